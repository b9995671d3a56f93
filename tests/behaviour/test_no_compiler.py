"""Where there is no C++ compiler, or a broken one: auto goes on without, and the rest says so."""

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import flashddpm as fd
from flashddpm.execution import compiled_network
from flashddpm.execution.cpu_noise import CompiledNoise
from flashddpm.kernels import reference

SEEDS = [1, 2]
LINES = 12
"""Of stderr, at most, of a command: what the sampler says, a bar, torch's notes and the error."""

FAKE = """#!/bin/sh
# Answers as g++ does, but has no cc1plus: whatever is to be compiled fails.
for word in "$@"; do
    case "$word" in
        -E) exec g++ "$@" ;;
        --version) echo "g++ (GCC) 12.2.0"; exit 0 ;;
    esac
done
echo "g++: fatal error: cannot execute 'cc1plus': execvp: No such file or directory" >&2
echo "compilation terminated." >&2
exit 1
"""

SCENES = """
import contextlib, json, logging, os, sys
import torch
import flashddpm as fd
from flashddpm.cli import main as cli
from flashddpm.execution import compile_choice

folder, *compilers = sys.argv[1:]
torch.set_num_threads(1)
logging.getLogger("flashddpm").setLevel(logging.INFO)
compile_choice.repays = lambda flops: (True, "")
compile_choice.CompileChoice._flops = 1
fd.UNet.body = lambda self, x_t, projected: x_t / 2 + projected.sum()  # is traced at once
small = {
    "sample_size": 2, "in_channels": 1, "out_channels": 1, "block_out_channels": (2,),
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1, "norm_num_groups": 1, "attention_head_dim": 2,
}

class Kept(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

@contextlib.contextmanager
def stderr_into(path):
    kept = os.dup(2)
    with open(path, "w") as file:
        os.dup2(file.fileno(), 2)
        yield
        sys.stderr.flush()
        os.dup2(kept, 2)

def make(compile):
    unet = fd.UNet(fd.UNetConfig(**small))
    return fd.Sampler(
        unet, fd.NoiseSchedule.create("linear", 10), shape=(1, 2, 2), device="cpu", compile=compile
    )

def ddpm(sampler):
    return sampler.sample([1, 2], solver="ddpm", num_steps=2)

def command(*words):
    sys.argv[1:] = words
    with stderr_into(f"{folder}/stderr"):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    with open(f"{folder}/stderr") as file:
        return code, file.read()

def tell(number):
    told = {}
    auto = make("auto")
    drawn, again = ddpm(auto), ddpm(auto)
    want = ddpm(auto.replace(compile=False))
    told["bits"] = torch.equal(drawn, want) and torch.equal(again, want)
    told["warnings"] = list(warnings)
    try:
        ddpm(make(True))
    except fd.CompilationError as error:
        told["raised"] = str(error)
    images = ("--num-images", "2", "--num-steps", "2", "--out", f"{folder}/x.png")
    unet = (f"{folder}/model", "--device", "cpu")
    told["sample"] = command("sample", *unet, *images, "--compile", "on")
    told["warm"] = command("warm", *unet, "--batch-size", "2")
    with open(f"{folder}/{number}.json", "w") as file:
        json.dump(told, file)

logging.getLogger("flashddpm").addHandler(Kept(logging.WARNING))
warnings = []
make(False).save_pretrained(f"{folder}/model")
tell(0)  # with what CXX says
for number, compiler in enumerate(compilers[1:], 1):
    if os.fork():
        os.wait()
        continue
    # A child need not import the compiler again, which takes seconds.
    torch._dynamo.reset()
    torch._inductor.config.cpp.cxx = (None, compiler)
    warnings.clear()
    tell(number)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was seen with each compiler: all in one process, which takes seconds to begin."""
    folder = tmp_path_factory.mktemp("compilers")
    fake = folder / "g++"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    compilers = {"missing": "/nonexistent", "failing": "/bin/false", "headless": str(fake)}
    environment = {
        **os.environ,
        "CXX": compilers["missing"],
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "home"),
    }
    run = subprocess.run(
        [sys.executable, "-P", "-c", SCENES, str(folder), *compilers.values()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    files = [folder / f"{i}.json" for i in range(len(compilers))]
    return dict(zip(compilers, (json.loads(file.read_text()) for file in files), strict=True))


@pytest.mark.parametrize("compiler", ["missing", "failing", "headless"])
@pytest.mark.slow
class TestEveryCompiler:
    def test_auto_goes_on_with_one_warning(self, compiler, told):
        assert told[compiler]["bits"]
        (warning,) = told[compiler]["warnings"]
        assert warning.startswith("goes on without compiling: could not compile (")

    def test_asked_for_it_raises_one_line(self, compiler, told):
        message = told[compiler]["raised"]
        assert message.startswith("could not compile (") and "\n" not in message
        assert "C++ compiler (g++)? compile=False does without" in message
        if compiler == "headless":
            assert "cannot execute 'cc1plus'" in message

    @pytest.mark.parametrize("command", ["sample", "warm"])
    def test_commands_end_with_one_line(self, compiler, command, told):
        code, stderr = told[compiler][command]
        assert code == 2
        assert "Traceback" not in stderr and len(stderr.splitlines()) <= LINES, stderr
        (line,) = [line for line in stderr.splitlines() if " error: could not" in line]
        assert line.startswith("flashddpm: error: could not compile (")
        assert stderr.splitlines()[-1] == line


class Broken:
    """What ``torch.compile`` returns where it does not work: it fails at calls, not before."""

    def __init__(self, network: Any, **options: Any) -> None:
        self.network, self.good = network, Broken.good

    good = 0
    """How many calls succeed first."""

    def __call__(self, *given: Any) -> Any:
        from torch._inductor.exc import CppCompileError

        if self.good:
            self.good -= 1
            return self.network(*given)
        raise CppCompileError(["g++", "x.cpp"], "x.cpp:1: error: no\nx.cpp:2: note: line")


@pytest.fixture
def broken(monkeypatch, caplog):
    """A compiler that fails, and that auto would choose; and what is logged."""
    choice = "flashddpm.execution.compile_choice"
    monkeypatch.setattr(f"{choice}.repays", lambda flops: (True, "by decree"))
    monkeypatch.setattr(f"{choice}.CompileChoice._flops", 1)
    monkeypatch.setattr(compiled_network.torch, "compile", Broken)
    monkeypatch.setattr(Broken, "good", 0)
    caplog.set_level(logging.WARNING, "flashddpm")
    return caplog


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


SAID = "goes on without compiling: could not compile (CppCompileError: x.cpp:1: error: no); is "


class TestAuto:
    @pytest.fixture
    def auto(self, tiny_sampler, broken):
        return tiny_sampler(compile="auto")

    @pytest.fixture
    def plain(self, tiny_sampler):
        return tiny_sampler(compile=False)

    def check_goes_on(self, auto: fd.Sampler, plain: fd.Sampler, caplog) -> None:
        (warning,) = warned(caplog)
        assert warning.startswith(SAID)
        want = plain.sample(SEEDS, 1, solver="ddpm", num_steps=3)
        assert torch.equal(auto.sample(SEEDS, 1, solver="ddpm", num_steps=3), want)
        assert len(warned(caplog)) == 1 and not auto.executor.choice.compiles(10**9, 2)

    def test_sample(self, auto, plain, broken):
        want = plain.sample(SEEDS, 1, solver="ddpm", num_steps=3)
        assert torch.equal(auto.sample(SEEDS, 1, solver="ddpm", num_steps=3), want)
        self.check_goes_on(auto, plain, broken)

    def test_trajectory(self, auto, plain, broken):
        want = plain.trajectory(SEEDS, num_steps=3).run()
        assert torch.equal(auto.trajectory(SEEDS, num_steps=3).run(), want)
        self.check_goes_on(auto, plain, broken)

    def test_predict(self, auto, plain, broken):
        x, t = auto.initial_noise(SEEDS), torch.tensor([1, 2])
        want = plain.predict(x, t, t)
        assert torch.equal(auto.predict(x, t, t, evaluations=100), want)
        self.check_goes_on(auto, plain, broken)

    def test_engine(self, auto, plain, broken):
        requests = [fd.Request(seed=seed, label=1, num_steps=3) for seed in SEEDS]
        with fd.Engine(auto, 2, buckets=[2], threaded=False) as engine:
            futures = [engine.submit(request) for request in requests]
        images = torch.stack([future.result().image for future in futures])
        assert torch.equal(images, plain.sample(SEEDS, 1, num_steps=3))
        self.check_goes_on(auto, plain, broken)

    def test_warmed_engine(self, auto, plain, broken):
        with fd.Engine(auto, 2, threaded=False) as engine:
            engine.warm()
            future = engine.submit(fd.Request(seed=1, num_steps=3))
        assert future.result().image.isfinite().all()
        self.check_goes_on(auto, plain, broken)

    def test_exact_never_goes_on_without(self, auto, broken):
        for good in (0, 1, 2):  # calls before it fails
            sampler = auto.replace()
            Broken.good = good
            with pytest.raises(fd.CompilationError, match="could not compile"):
                sampler.sample(SEEDS, num_steps=3, batch_size=2, exact=True)
        Broken.good = 0
        with fd.Engine(auto, 2, exact=True, threaded=False) as engine:
            future = engine.submit(fd.Request(seed=1, num_steps=3))
            engine.drain()
        assert isinstance(future.exception().__cause__, fd.CompilationError)


class TestAskedFor:
    def test_everything_raises(self, tiny_sampler, broken):
        sampler = tiny_sampler(compile=True)
        x, t = sampler.initial_noise(SEEDS), torch.tensor([1, 2])
        for call in (
            lambda: sampler.sample(SEEDS, num_steps=3),
            lambda: sampler.sample(SEEDS, num_steps=3, exact=True, batch_size=2),
            lambda: sampler.trajectory(SEEDS, num_steps=3).run(),
            lambda: sampler.predict(x, t, t),
        ):
            for _ in range(2):  # it is not given up
                with pytest.raises(fd.CompilationError, match=r"x.cpp:1: error: no\); is") as it:
                    call()
                assert "note: line" in str(it.value.__cause__)
        with fd.Engine(sampler, 2, threaded=False) as engine:
            with pytest.raises(fd.CompilationError):
                engine.warm()
            future = engine.submit(fd.Request(seed=1, num_steps=3))
        assert isinstance(future.exception(), fd.RequestFailed)
        assert isinstance(future.exception().__cause__, fd.CompilationError)
        assert not any("goes on" in line for line in warned(broken))

    def test_a_network_of_ones_own_raises_its_own_errors(self, tiny_sampler, monkeypatch):
        def compiled(network: Any, **options: Any) -> Any:
            def call(*given: Any) -> Any:
                raise ZeroDivisionError("of the network")

            return call

        monkeypatch.setattr(compiled_network.torch, "compile", compiled)
        with pytest.raises(ZeroDivisionError, match="of the network"):
            tiny_sampler(compile=True).sample(SEEDS, num_steps=3)


def test_noise_falls_back_to_the_same_bits(broken):
    draw, seeds, keys = CompiledNoise(), torch.tensor([1, 2**40]), torch.tensor([5, 9])
    for _ in range(2):
        assert torch.equal(
            draw(seeds, keys, (1, 3, 5), 1), reference.philox(seeds, keys, (1, 3, 5), 1)
        )
    (warning,) = warned(broken)
    assert warning.startswith("noise is drawn without compiling: could not compile (")


def test_only_the_compiled_is_missing(tiny_sampler, broken):
    """Where the network's code lies in a cache, the noise goes on by itself."""
    sampler = tiny_sampler(compile=True)
    Broken.good = 100
    _ = sampler.executor.choice.compiled.network
    Broken.good = 0
    want = tiny_sampler(compile=False).sample(SEEDS, solver="ddpm", num_steps=3)
    assert torch.equal(sampler.sample(SEEDS, solver="ddpm", num_steps=3), want)
    assert sampler.executor.choice.compiles(0, 2) and len(warned(broken)) == 1

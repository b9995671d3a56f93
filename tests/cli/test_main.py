"""The command line as a user meets it: exit codes, one-line errors, the files that it writes."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import flashddpm as fd
from flashddpm.cli import main as cli


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashddpm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return call


def test_sample_writes_a_labelled_grid_and_one_closing_line(run, tmp_path):
    picture = tmp_path / "grid.png"
    code, out, err = run("sample", "--num-images", 3, "--num-steps", 2, "--out", picture)
    assert code == 0
    assert out.count("\n") == 1
    assert out.startswith("3 images, 2 steps, ") and out.rstrip().endswith(f"-> {picture}")
    assert "images/s" in out and "fused" in out
    assert "2/2" in err  # the progress bar
    assert Image.open(picture).width == 2 + 10 * 58  # ten classes in a row


def test_sample_is_what_python_gives(run, tmp_path):
    run("sample", "--seeds", "5,-1", "--labels", "Bag,3", "--guidance", 2, "--solver", "ddpm",
        "--num-steps", 3, "--out", tmp_path / "folder")  # fmt: skip
    sampler = fd.Sampler.from_pretrained(fd.bundled())
    x = fd.to_uint8(sampler.sample([5, -1], [8, 3], 2.0, "ddpm", 3))
    for seed, image in zip((5, -1), x, strict=True):
        written = np.asarray(Image.open(tmp_path / "folder" / f"{seed}.png"))
        assert np.abs(written.astype(int) - image[0].numpy().astype(int)).max() <= 1


def test_sample_passes_threshold_and_rescale(run, tmp_path):
    run("sample", "--seeds", "5", "--labels", "3", "--guidance", 6, "--num-steps", 3,
        "--threshold", 0.9, "--clip", 2, "--guidance-rescale", 0.7, "--out", tmp_path)  # fmt: skip
    sampler = fd.Sampler.from_pretrained(fd.bundled())
    options = {"threshold": 0.9, "clip": 2.0, "guidance_rescale": 0.7}
    written = np.asarray(Image.open(tmp_path / "5.png")).astype(int)
    default = {"solver": "dpmpp_2m_sde", "spacing": "linspace"}
    asked, plain = (
        fd.to_uint8(sampler.sample([5], 3, 6.0, num_steps=3, **default, **more))[0, 0].int()
        for more in (options, {})
    )
    assert np.abs(written - asked.numpy()).max() <= 1
    assert np.abs(written - plain.numpy()).max() > 10


def test_respacing_is_openais(run, tmp_path):
    gif = tmp_path / "t.gif"
    code, out, err = run("sample", "--seeds", "5", "--labels", 3, "--respacing", "ddim5",
                         "--trajectory", gif, "--out", tmp_path / "a.png")  # fmt: skip
    assert code == 0 and out.startswith("1 images, 5 steps, ") and "5/5" in err
    assert Image.open(gif).n_frames == 5
    code, _, err = run("sample", "--respacing", "ddim", "--out", tmp_path / "b.png")
    assert code == 2 and "timestep_respacing='ddim'" in err


def test_trajectory_is_an_animation(run, tmp_path):
    gif = tmp_path / "t.gif"
    code, _, _ = run("sample", "--num-images", 2, "--num-steps", 4, "--trajectory", gif,
                     "--out", tmp_path / "a.png")  # fmt: skip
    assert code == 0
    assert Image.open(gif).n_frames == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solver", "foo"), "solver='foo': must be one of ddpm, ddim, dpmpp_2m"),
        (("--spacing", "x"), "spacing='x': must be one of leading, linspace, trailing"),
        (("--dtype", "int8"), "dtype='int8': must be one of float32, bfloat16, float16"),
        (("--device", "tpu"), "device='tpu': must be auto, cpu, cuda or cuda:N"),
        (("--num-steps", "0"), "num_steps=0: must be in 1..1000"),
        (("--num-steps", "1001"), "num_steps=1001: must be in 1..1000"),
        (("--num-images", "0"), "num_images=0: must be at least 1"),
        (("--num-images", "-3"), "num_images=-3: must be at least 1"),
        (("--seeds", "1.5"), "seeds='1.5': must be integers and ranges"),
        (("--seeds", "18446744073709551616"), "seeds: 18446744073709551616 is not in"),
        (("--seeds", "5:5"), "must name at least one seed"),
        (("--seeds", "1,2", "--num-images", "3"), "2 seeds for num_images=3"),
        (("--labels", "10"), "labels=10: must be in 0..9"),
        (("--labels", "-1"), "labels=-1: must be in 0..9"),
        (("--labels", "hat"), "labels: 'hat' must be a number or one of T-shirt"),
        (("--labels", "1,2", "--num-images", "3"), "2 labels for 3 seeds"),
        (("--labels=--5",), "labels: '--5' must be a number or one of T-shirt"),
        (("--seeds", "0:99999999999"), "must be at most 1000000 at a time"),
        (("--seeds", "7,7", "--out", "folder"), "some stand twice"),
        (("--guidance", "nan"), "guidance=nan: must be a finite number"),
        (("--labels", "none", "--guidance", "2"), "guidance=2.0: must be 1 where no labels"),
        (("--backend", "q"), "backend='q': must be one of auto, reference, fused"),
        (("--compile", "q"), "compile='q': must be one of auto, on, off"),
        (("--threshold", "0.9"), "threshold=0.9: needs clip"),
        (("--threshold", "2", "--clip", "2"), "threshold=2.0: must be a finite number in [0, 1]"),
        (("--guidance-rescale", "2"), "guidance_rescale=2.0: must be a finite number in [0, 1]"),
        (("--out", "x.foo"), "must be one of .png"),
        (("--trajectory", "x.png"), "must be one of .gif"),
        (("nowhere",), "nowhere: no such folder"),
        (("--num-images", "two"), "Invalid value for '--num-images'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("sample", *arguments)
    assert code == 2
    assert out == ""
    assert any(message in line for line in err.splitlines())
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_cuda_where_there_is_none(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = run("sample", "--device", "cuda")
    assert code == 2 and "device='cuda': no CUDA device is available; use cpu or auto" in err


def test_ctrl_c_in_sampling_ends_cleanly(run, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashddpm.execution.step.update", interrupt)
    code, _, err = run("sample", "--num-images", 1, "--num-steps", 2, "--out", tmp_path / "a.png")
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "a.png").exists()


def test_info_says_what_auto_chooses_and_why(run):
    code, out, _ = run("info")
    assert code == 0
    for part in ("flashddpm 0.1.0", "torch", "device auto:", "backend auto:", "compile auto:", "("):
        assert part in out


@pytest.fixture
def compile_kernels(forked):
    """Run ``flashddpm kernels`` in a process that may compile: (exit code, stdout, stderr)."""

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def call(*arguments, prepare="pass") -> tuple[int, str, str]:
        code = f"from flashddpm.cli import main as cli; {prepare}; cli.main()"
        command = [*forked, "-c", code, "kernels", *arguments]
        end = subprocess.run(command, env=environment, capture_output=True, text=True)
        return end.returncode, end.stdout, end.stderr

    return call


ONE = ("--kernel", "advance", "--arch", "90")


def test_kernels_prints_a_scorecard(compile_kernels):
    code, out, err = compile_kernels("--kernel", "philox,advance", "--arch", "100,90")
    assert code == 0 and err == ""
    assert "Compiled for sm_90 sm_100" in out and "every gate passes" in out
    assert "Picoseconds an element" in out and "Bytes an element" in out
    assert "add_noise" not in out
    code, out, _ = compile_kernels(*ONE, "--verbose")
    assert code == 0 and "advance fp32 sm_90" in out and "opcodes: " in out
    code, out, _ = compile_kernels(*ONE, "--json")
    assert code == 0
    (entry,) = json.loads(out)["kernels"]
    assert (entry["kernel"], entry["arch"], entry["stack"]) == ("advance", 90, 0)


def test_kernels_exits_with_1_where_a_gate_fails(compile_kernels):
    planted = (
        "from flashddpm.kernels.checks import budgets, compiled; "
        "planted = budgets.Budget(1, 0, 99.0, 'planted'); "
        "compiled.KERNELS['advance'].budgets[4] = planted; "
    )
    code, out, _ = compile_kernels(*ONE, prepare=planted + "budgets.pinned = lambda: True")
    assert code == 1 and "FAIL advance fp32 sm_90: " in out and "1 fault\n" in out
    code, out, _ = compile_kernels(*ONE, prepare=planted + "budgets.pinned = lambda: False")
    assert code == 0 and "registers, 1 budgeted (planted)" in out and "not gated" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", ""), "arch='': must be one of 80, 90, 100"),
        (("--kernel", ""), "kernel='': must be one of philox"),
        (("--arch", "70"), "arch='70': must be one of 80, 90, 100"),
        (("--arch", "sm_90"), "arch='sm_90': must be one of 80, 90, 100"),
        (("--kernel", "advance,foo"), "kernel='foo': must be one of philox, add_noise"),
    ],
)
def test_kernels_refuses_bad_input(run, arguments, message):
    code, out, err = run("kernels", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_kernels_refuses_the_interpreter(run):
    from flashddpm.kernels.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("the interpreter is off")
    code, out, err = run("kernels", *ONE)
    assert (code, out) == (2, "") and "TRITON_INTERPRET=1: the interpreter compiles nothing" in err


def test_kernels_needs_triton(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashddpm.kernels.checks.compiled", None)
    code, _, err = run("kernels", *ONE)
    assert code == 2 and "Triton is needed" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "x"), "batch_size='x': must be integers"),
        (("--batch-size", "4,0"), "batch_size=0: must be at least 1"),
        (("--device", "tpu"), "device='tpu'"),
        (("nowhere",), "nowhere"),
    ],
)
def test_warm_refuses_bad_input(run, options, message):
    code, out, err = run("warm", *options)
    assert code == 2 and message in err and not out


def test_evaluate_takes_all_metrics_by_default():
    """The command does not import them, so that ``--help`` is quick."""
    from flashddpm.cli.evaluate import evaluate
    from flashddpm.evaluation.job import METRICS

    assert inspect.signature(evaluate).parameters["metrics"].default.split(",") == list(METRICS)

"""Training in two processes: the losses of one, and one line for all when something is wrong."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from flashddpm.data import load_npz
from flashddpm.distributed import World
from flashddpm.training import resume
from flashddpm.training.progress import read_metrics
from flashddpm.training.trainer import Trainer

TOLERANCE = 1e-5
"""Of the loss, relative, over 10 steps in float32: sums over a batch are made in another order."""

COMMAND = os.path.join(os.path.dirname(sys.executable), "flashddpm")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


@pytest.fixture
def data(training, tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (32, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(32) % 3)
    return tmp_path / "data.npz"


SCENES = """
import dataclasses, logging, pathlib, sys
import torch
from flashddpm.data import load_npz
from flashddpm.errors import DivergedError
from flashddpm.distributed import World
from flashddpm.training.config import TrainConfig
from flashddpm.training.trainer import Trainer
root, config = sys.argv[1:]
logging.basicConfig()
config, data, world = TrainConfig(**eval(config)), load_npz(root + "/data.npz"), \
    World.from_environment()
def trainer(name, **changes):
    changed = dataclasses.replace(config, **changes)
    return Trainer(changed, data, f"{root}/{name}", "cpu", world=world)
with world.joined("cpu"):
    torch.set_num_threads(1)
    trainer("two").run(progress=False, log_every=1)
    trainer("parts", accumulate=2).run(progress=False, log_every=1)
    rest = trainer("resumed")
    rest.resume()
    rest.run(progress=False, log_every=1)
    bad = trainer("bad")
    loss = bad.stepper.loss
    bad.stepper.loss = lambda inputs: loss(inputs) + (
        float("inf") if world.rank == 1 and bad.step == 2 else 0
    )
    try:
        bad.run(progress=False)
    except DivergedError as error:
        pathlib.Path(root, f"diverged-{world.rank}").write_text(str(error.step))
"""


def losses(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


def test_two_processes_have_the_losses_of_one(forked, training, data, tmp_path):
    config = dataclasses.replace(
        training.TINY, steps=10, batch_size=8, timestep_sampling="low_discrepancy",
        horizontal_flip=True,
    )  # fmt: skip
    images = load_npz(data)
    one = Trainer(config, images, tmp_path / "one", "cpu")
    training.run(one, log_every=1)
    half = dataclasses.replace(config, steps=5)
    training.run(Trainer(half, images, tmp_path / "resumed", "cpu"), log_every=1)
    script = tmp_path / "scenes.py"
    script.write_text(SCENES)
    end = subprocess.run(
        [*forked, *TORCHRUN, *forked, script, tmp_path, repr(config.to_dict())],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert end.returncode == 0, end.stderr
    want = losses(tmp_path / "one")
    for name in ("two", "parts", "resumed"):
        assert len(losses(tmp_path / name)) == 10
        assert losses(tmp_path / name) == pytest.approx(want, rel=TOLERANCE)
        # Only the first process writes: every step has one line.
        assert (tmp_path / name / "metrics.jsonl").read_bytes().count(b"\n") == 10
        state = resume.read_newest(tmp_path / name)
        assert state.step == 10 and state.machine["processes"] == 2
        for key, value in one.state().tensors.items():
            if key.startswith(("model.", "ema-")):
                torch.testing.assert_close(state.tensors[key], value, rtol=1e-3, atol=1e-5)
    assert end.stderr.count("processes=1 there, 2 now") == 2  # each process says so
    # In a file each: what two processes print in the same moment mixes.
    diverged = {path.name: path.read_text() for path in tmp_path.glob("diverged-*")}
    assert diverged == {"diverged-0": "3", "diverged-1": "3"}
    assert not resume.states(tmp_path / "bad")
    alone = Trainer(config, images, tmp_path / "two", "cpu")
    alone.resume()
    assert alone.step == 10


def options(data, out, *more) -> list[str]:
    flags = ("--batch-size", 4, "--block-out-channels", "8,8", "--norm-num-groups", 4,
             "--attention-head-dim", 8, "--device", "cpu")  # fmt: skip
    return list(map(str, ("train", data, "--out", out, *flags, *more)))


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_sigterm_ends_both_processes_with_a_state(data, tmp_path):
    out = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-P", *TORCHRUN, COMMAND,
         *options(data, out, "--steps", 10**6, "--save-every", 2)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers = []
    try:
        end = time.monotonic() + 150
        while not resume.states(out):
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        workers = children(run.pid)
        assert len(workers) == 2
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=100)
    finally:
        for pid in [*workers, run.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    state = resume.read_newest(out)
    assert err.count(f"SIGTERM: stopped after step {state.step} of 1000000, saved") == 1
    assert "flashddpm: error" not in err and "gloo" not in err
    assert state.machine["processes"] == 2


FAILING = """
import os, sys
from flashddpm.cli import main as cli
from flashddpm.data import ImageData
from flashddpm.errors import DataError
fetch, calls = ImageData.fetch, []
def failing(self, index):
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) > 7:
        raise DataError("a.png: is broken")
    return fetch(self, index)
ImageData.fetch = failing
cli.main()
"""


def test_an_error_in_one_process_ends_both_with_one_line(forked, data, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    end = subprocess.run(
        [*forked, *TORCHRUN, *forked, script, *options(data, tmp_path / "run", "--steps", 100)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert end.returncode == 1
    assert re.findall("flashddpm: error: .*", end.stderr) == ["flashddpm: error: a.png: is broken"]
    assert "RuntimeError" not in end.stderr
    assert resume.read_newest(tmp_path / "run").step == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", 5), "batch_size=5: must be a multiple of 2 processes times accumulate=1"),
        (("--loss", "l2"), "loss='l2': must be one of mse, l1, huber"),
    ],
)
def test_bad_input_is_refused_once_and_before_work(forked, data, tmp_path, flags, message):
    end = subprocess.run(
        [*forked, *TORCHRUN, *forked, COMMAND,
         *options(data, tmp_path / "run", "--steps", 9, *flags)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert end.returncode == 1 and not (tmp_path / "run").exists()
    assert re.findall("flashddpm: error: .*", end.stderr) == [f"flashddpm: error: {message}"]


def test_a_batch_that_processes_cannot_share_is_refused(training, tmp_path):
    for changes, size in (({"batch_size": 5}, 2), ({"batch_size": 6, "accumulate": 2}, 2)):
        config = dataclasses.replace(training.TINY, **changes)
        with pytest.raises(ValueError, match="^batch_size=.*: must be a multiple of 2 processes"):
            Trainer(config, training.LABELLED, tmp_path, "cpu", world=World(1, size, 1, size))
    assert not list(tmp_path.iterdir())

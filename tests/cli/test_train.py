"""``flashddpm train`` as a user meets it: its flags, its settings' file, and how it stops."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from flashddpm.cli import main as cli
from flashddpm.training import resume
from flashddpm.training.config import TrainConfig
from flashddpm.training.trainer import Trainer

COMMAND = os.path.join(os.path.dirname(sys.executable), "flashddpm")
TRAIN = (
    "--batch-size", 4, "--block-out-channels", "8,8", "--norm-num-groups", 4,
    "--attention-head-dim", 8, "--ema-half-lives", "3,20", "--device", "cpu",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("os.fsync", lambda number: None)  # a slow disk is not what is tested

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashddpm", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def idx_folder(tmp_path):
    """A folder of 64 images of 8x8, with labels, gzipped."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8), np.uint8)
    header = b"\x00\x00\x08\x03" + np.array(images.shape, ">u4").tobytes()
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + images.tobytes())
    labels = rng.integers(0, 3, 64, np.uint8)
    labels[0] = 2
    with gzip.open(folder / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\x00\x00\x08\x01" + np.array([64], ">u4").tobytes() + labels.tobytes())
    return folder


def stored(out) -> dict:
    return json.loads((out / TrainConfig.FILE).read_text())


def newest(out) -> resume.State:
    return resume.read_newest(out)


def assert_equal_bits(a, b) -> None:
    one, two = newest(a), newest(b)
    assert one.step == two.step and one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(value, two.tensors[key]) for key, value in one.tensors.items())


# Flags


def test_every_setting_is_a_flag_with_its_help():
    command = typer.main.get_command(cli.app).commands["train"]
    flags = {param.name: param for param in command.params}
    for field in dataclasses.fields(TrainConfig):
        flag = flags[field.name]
        if field.name == "data":
            assert flag.param_type_name == "argument"
            continue
        assert flag.opts == [f"--{field.name.replace('_', '-')}"] and flag.default is None
        assert flag.help.startswith(field.metadata["help"])
        if field.default is not dataclasses.MISSING:
            value = field.default
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert flag.help.endswith(f"[default: {shown}]"), field.name
    others = {"out", "data", "config", "device", "compile", "resume", "allow", "help"}
    assert set(flags) - {field.name for field in dataclasses.fields(TrainConfig)} <= others


def test_every_flag_reaches_the_settings(run, idx_folder, tmp_path):
    out = tmp_path / "run"
    values = {
        "steps": 1, "batch_size": 6, "accumulate": 2, "seed": 5, "learning_rate": 0.25,
        "lr_schedule": "cosine", "warmup_steps": 3, "grad_clip": 0.5, "ema_half_lives": (7, 2),
        "label_dropout": 0.25, "horizontal_flip": True, "precision": "bfloat16",
        "prediction_type": "sample", "variance_type": "learned_range", "loss": "huber",
        "huber_delta": 0.5, "loss_weighting": "min_snr", "min_snr_gamma": 3.0,
        "timestep_sampling": "low_discrepancy", "beta_schedule": "sigmoid",
        "num_train_timesteps": 50, "block_out_channels": (4, 8), "layers_per_block": 2,
        "attention_head_dim": 4, "norm_num_groups": 2, "checkpoint_activations": True,
        "save_every": 9, "keep": 4, "sample_every": 1,
    }  # fmt: skip
    flags: list = []
    for name, value in values.items():
        flags.append(f"--{name.replace('_', '-')}")
        if value is not True:
            flags.append(",".join(map(str, value)) if isinstance(value, tuple) else value)
    code, text, err = run(idx_folder, "--out", out, "--device", "cpu", *flags)
    assert code == 0, err
    assert text == f"1 steps of 6 images, cpu -> {out}\n"
    rest = {"data": str(idx_folder), "init": "", "p2_gamma": 1.0}
    assert TrainConfig.from_dict(stored(out)) == TrainConfig(**values, **rest)
    assert {*values, *rest} == {field.name for field in dataclasses.fields(TrainConfig)}
    assert Image.open(out / "samples" / "000001.png").width > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 2, "--p2-gamma", 2), "p2_gamma=2.0: is of loss_weighting='p2' only"),
        (("--steps", 2, "--loss", "l2"), "loss='l2': must be one of mse, l1, huber"),
        (("--steps", 2, "--block-out-channels", "8,x"), "block_out_channels='8,x': must be integ"),
        (("--steps", 2, "--ema-half-lives", ""), "ema_half_lives='': must be integers"),
        (("--steps", 2, "--compile", "yes"), "compile='yes': must be one of auto, on, off"),
        (("--steps", 2, "--device", "tpu"), "device='tpu': must be auto, cpu, cuda or cuda:N"),
        (("--steps", 2, "--allow", "seed"), "allow='seed': is of --resume only"),
        (("--steps", 2, "--resume"), "train_config.json: is missing"),
        (("--steps", 2, "--resume", "--config", "x"), "config='x': must not be given with resume"),
        (("--steps", 2, "--config", "nowhere.json"), "nowhere.json: is missing"),
        (("--steps", "two"), "Invalid value for '--steps'"),
        ((), "steps: is missing"),
        (("--steps", 2, "--block-out-channels", "8,8,8,8,8"), "must be multiples of 16"),
        (("--steps", 2, "--init", "nowhere", "--block-out-channels", "32,64,96",
          "--norm-num-groups", 8, "--attention-head-dim", 32), "nowhere: no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    run, idx_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(idx_folder, "--out", "run", *TRAIN, *options)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_run_without_data_is_refused(run, tmp_path):
    code, _, err = run("--out", tmp_path / "run", "--steps", 2, *TRAIN)
    assert code == 2 and "data: must be given, as an argument or in the config" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"steps": 2, "ema_decay": 0.9}', "ema_decay=0.9: is no setting of a run"),
        ('{"steps": "2"}', "steps='2': must be an integer"),
        ('{"steps": 2, "learning_rate": NaN}', "must be finite"),
        ('{"seed": 2}', "steps: is missing"),
    ],
)
def test_a_config_that_is_none_is_named(run, idx_folder, tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    code, _, err = run(idx_folder, "--config", file, "--out", tmp_path / "run", *TRAIN)
    assert code == 2 and f"error: {file}: " in err and message in err


# Going on, and again


def test_resume_takes_the_runs_settings(run, idx_folder, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = ("--loss", "huber", "--huber-delta", 0.5, "--seed", 9, *TRAIN)
    code, text, _ = run(idx_folder, "--out", out, "--steps", 2, *options)
    assert code == 0 and "2 steps of 4 images" in text
    code, _, err = run(idx_folder, "--out", out, "--steps", 4, *options)
    assert code == 2 and "holds a run already; give --resume" in err
    code, text, _ = run("--out", out, "--resume", "--steps", 4, "--device", "cpu")
    assert code == 0 and "4 steps" in text
    assert stored(out)["huber_delta"] == 0.5 and stored(out)["steps"] == 4
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    assert run(idx_folder, "--out", whole, "--steps", 4, *options)[0] == 0
    assert_equal_bits(out, whole)
    again = tmp_path / "again"
    config = whole / TrainConfig.FILE
    assert run("--config", config, "--out", again, "--device", "cpu")[0] == 0
    assert_equal_bits(again, whole)
    assert stored(again) == stored(whole)
    changed = tmp_path / "changed"
    assert run("--config", config, "--out", changed, "--seed", 1, "--device", "cpu")[0] == 0
    assert stored(changed) == stored(whole) | {"seed": 1}


def test_a_changed_setting_must_be_allowed(run, idx_folder, tmp_path):
    out = tmp_path / "run"
    assert run(idx_folder, "--out", out, "--steps", 1, *TRAIN)[0] == 0
    more = ("--out", out, "--resume", "--steps", 2, "--device", "cpu")
    changes = ("--learning-rate", 0.125, "--seed", 4)
    code, _, err = run(*more, *changes)
    assert code == 2 and "learning_rate=0.125 (the run has 0.0005)" in err
    assert "seed=4 (the run has 0)" in err and newest(out).step == 1
    code, _, err = run(*more, *changes, "--allow", "seed,lr")
    assert code == 2 and "allow='lr': must be one of steps, data, init" in err
    assert run(*more, *changes, "--allow", "seed")[0] == 2
    assert run(*more, *changes, "--allow", "seed,learning_rate")[0] == 0
    assert stored(out)["seed"] == 4 and newest(out).step == 2
    # The run is now one of these settings, and other data must be allowed too.
    other = tmp_path / "other.npz"
    images = np.zeros((5, 8, 8), np.uint8)
    np.savez(other, images=images, labels=np.array([0, 1, 2, 0, 1]))
    more = (other, "--out", out, "--resume", "--steps", 3, "--device", "cpu")
    code, _, err = run(*more)
    assert code == 2 and "(the run has others, by their content)" in err
    assert run(*more, "--allow", "data")[0] == 0 and stored(out)["data"] == str(other)


@pytest.fixture
def sample(tmp_path, monkeypatch, capfd):
    """Run ``flashddpm sample`` in this process: (exit code, both streams)."""

    def call(model, *arguments) -> tuple[int, str]:
        line = ("flashddpm", "sample", model, *arguments, "--out", tmp_path / "s.png")
        monkeypatch.setattr(sys, "argv", [*map(str, line), "--num-steps", "2"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), "".join(capfd.readouterr())

    return call


def test_train_and_sample(run, sample, idx_folder, tmp_path):
    out = tmp_path / "run"
    assert run(idx_folder, "--out", out, "--steps", 1, *TRAIN)[0] == 0
    code, text = sample(out, "--num-images", 2, "--guidance", 2)
    assert code == 0 and "2 images" in text
    assert sample(out / "ema-20", "--labels", "2")[0] == 0
    code, text = sample(out, "--labels", "3")
    assert code == 2 and "labels=3: must be in 0..2" in text


def test_a_null_class_that_was_not_trained_is_not_offered(run, sample, idx_folder, tmp_path):
    out = tmp_path / "run"
    run(idx_folder, "--out", out, "--steps", 1, "--label-dropout", 0, *TRAIN)
    assert json.loads((out / "flashddpm.json").read_text())["null_label"] is None
    for options in (("--guidance", 2), ("--labels", "none")):
        code, text = sample(out, *options)
        assert code == 2 and "null class" in text


def test_broken_data_is_named_before_training_starts(run, idx_folder, tmp_path):
    file = idx_folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    code, _, err = run(idx_folder, "--out", tmp_path / "run", "--steps", 2, *TRAIN)
    assert code == 2 and str(file) in err and not (tmp_path / "run").exists()
    code, _, err = run(tmp_path / "none", "--out", tmp_path / "run", "--steps", 2, *TRAIN)
    assert code == 2 and "no such file or folder" in err


# Stopping


def test_ctrl_c_in_training_saves(run, idx_folder, tmp_path, monkeypatch):
    real = Trainer.train_step

    def interrupted(self, batch):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    out = tmp_path / "run"
    code, _, err = run(idx_folder, "--out", out, "--steps", 5, *TRAIN)
    assert code == 130 and "interrupted at step 2, saved; go on with --resume" in err
    monkeypatch.setattr(Trainer, "train_step", real)
    code, text, _ = run("--out", out, "--steps", 3, "--resume", "--device", "cpu")
    assert code == 0 and "3 steps" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_state(forked, idx_folder, tmp_path, number, code):
    out = tmp_path / "run"
    options = (idx_folder, "--out", out, "--steps", 10**6, "--save-every", 2, *TRAIN)
    with subprocess.Popen(
        [*forked, COMMAND, "train", *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        end = time.monotonic() + 100
        while not resume.states(out):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=100)
    assert process.returncode == code and "Traceback" not in err
    assert f"{number.name}: stopped after step {newest(out).step} of 1000000, saved" in err
    assert newest(out).step >= 2


def test_a_full_disk_is_one_line(run, idx_folder, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write_atomic", full)
    code, _, err = run(idx_folder, "--out", tmp_path / "run", "--steps", 1, *TRAIN)
    assert code == 2 and "Traceback" not in err
    assert "step 1 could not be saved (No space left on device); what was saved before" in err


def test_a_run_that_diverges_says_what_to_try(run, idx_folder, tmp_path):
    out = tmp_path / "run"
    options = ("--steps", 9, "--learning-rate", 1e30, "--warmup-steps", 0, "--grad-clip", 0, *TRAIN)
    code, _, err = run(idx_folder, "--out", out, *options)
    assert code == 2 and "training diverged" in err and "a lower learning_rate" in err
    assert not resume.states(out)

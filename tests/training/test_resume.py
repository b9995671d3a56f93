"""Going on: exactly where a run stopped, whatever stopped it, or not at all."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import strategies as st

from flashddpm.checkpoints.model_folder import WEIGHTS
from flashddpm.data import ImageData
from flashddpm.errors import CheckpointError
from flashddpm.training import resume
from flashddpm.training.config import MAY_CHANGE, NETWORK, ONLY_WITH, TrainConfig
from flashddpm.training.progress import read_metrics


def state_files(out: Path) -> list[int]:
    return [int(path.stem) for path in resume.states(out)]


def copied(whole, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "out"))


# Equal bits


@hypothesis.given(
    a=st.integers(1, 5), b=st.integers(1, 5), labels=st.booleans(),
    changes=st.fixed_dictionaries(
        {
            "precision": st.sampled_from(["float32", "bfloat16"]),
            "accumulate": st.sampled_from([1, 2]),
            "timestep_sampling": st.sampled_from(["uniform", "low_discrepancy"]),
            "variance_type": st.sampled_from(["fixed_small", "learned_range"]),
            "horizontal_flip": st.booleans(),
            "save_every": st.integers(1, 3),
        }
    ),
)  # fmt: skip
@hypothesis.settings(
    max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_plus_b_steps_are_a_then_b(tmp_path_factory, training, a, b, labels, changes):
    data = training.LABELLED if labels else training.PLAIN
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    whole = training.run(training.trainer(one, data, steps=a + b, **changes))
    training.run(training.trainer(two, data, steps=a, **changes))
    rest = training.resumed(two, data, steps=a + b, **changes)
    assert rest.step == a
    training.assert_same(training.run(rest), training.state(whole))
    left, right = training.files(one), training.files(two)
    for name in (f"unet/{WEIGHTS}", f"ema-20/unet/{WEIGHTS}", TrainConfig.FILE):
        assert left[name] == right[name], name
    tensors = [resume.read_newest(out).tensors for out in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())


def test_a_cosine_is_gone_on_with(tmp_path, training):
    changes = {"lr_schedule": "cosine", "save_every": 4}
    whole = training.run(training.trainer(tmp_path, **changes))
    newest = resume.states(tmp_path)[0]
    newest.unlink()
    rest = training.resumed(tmp_path, **changes)
    assert rest.step == 4
    training.assert_same(training.run(rest), training.state(whole))


def test_a_state_before_the_first_step(tmp_path, training, whole):
    training.trainer(tmp_path).save()
    fresh = training.resumed(tmp_path)
    assert fresh.step == 0
    training.assert_same(training.run(fresh), whole[1])


def test_a_finished_run_has_nothing_to_do(tmp_path, training, whole):
    out = copied(whole, tmp_path)
    training.assert_same(training.run(training.resumed(out)), whole[1])
    assert training.run(training.resumed(out, steps=2)).step == 6
    training.assert_same(training.resumed(out), whole[1])


# Stopped at any moment

KILLED = """
import os, pathlib, random, signal, sys, time
import torch
import flashddpm.training.trainer
from flashddpm.data import load_npz
from flashddpm.training.config import TrainConfig
from flashddpm.training.resume import states
out, data, config = sys.argv[1:]
torch.set_num_threads(1)
flashddpm.training.trainer.plot_loss = lambda out: None
config, data = TrainConfig(**eval(config)), load_npz(data)
pause = random.Random(0)
for _ in range(6):
    ready, begun = os.pipe()
    child = os.fork()
    if not child:
        trainer = flashddpm.training.trainer.Trainer(config, data, out, "cpu")
        if states(trainer.out):
            trainer.resume()
        print(trainer.step, flush=True)
        os.write(begun, b"!")
        trainer.run(progress=False, log_every=1)
    os.close(begun)
    assert os.read(ready, 1)
    while not os.path.exists(out + "/states") or not states(pathlib.Path(out)):
        time.sleep(0.01)
    time.sleep(pause.uniform(0, 1.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kills_at_random_moments(forked, tmp_path, training):
    """A run that saves after every step, killed six times, goes on as one that never was."""
    images, labels = training.LABELLED.images.numpy(), training.LABELLED.labels.numpy()
    np.savez(tmp_path / "data.npz", images=images[:, 0], labels=labels)
    config = dataclasses.replace(training.TINY, steps=10**6, save_every=1).to_dict()
    out = tmp_path / "run"
    command = [*forked, "-c", KILLED, out, tmp_path / "data.npz", repr(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    starts = [int(line) for line in done.stdout.split()]
    assert len(starts) == 6 and starts == sorted(starts)
    reached = training.resumed(out).step
    assert reached >= starts[-1] and reached > 0
    rest = training.run(training.resumed(out, steps=reached + 2))
    whole = training.trainer(tmp_path / "whole")
    for _ in range(reached + 2):
        whole.train_step()
    training.assert_same(rest, training.state(whole))
    assert not list((out / resume.FOLDER).glob(".*"))
    assert state_files(out) == [reached + 2, reached]
    assert read_metrics(out)[-1]["step"] == reached + 2


@pytest.mark.parametrize("place", [resume.FOLDER, "unet"])
def test_a_full_disk_costs_no_state(tmp_path, training, monkeypatch, place):
    fsync = os.fsync

    def full(number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.parent.name == place:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    whole = training.run(training.trainer(tmp_path / "a"))
    run = training.run(training.trainer(tmp_path / "b", steps=3, save_every=1))
    before = training.files(tmp_path / "b" / resume.FOLDER)
    monkeypatch.setattr(os, "fsync", full)
    run = training.resumed(tmp_path / "b")
    message = "step 6 could not be saved .No space left on device.; what was saved before is kept"
    with pytest.raises(OSError, match=message) as raised:
        training.run(run)
    assert raised.value.errno == errno.ENOSPC
    assert training.files(tmp_path / "b" / resume.FOLDER) == before
    assert not list((tmp_path / "b").rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", fsync)
    rest = training.resumed(tmp_path / "b")
    assert rest.step == 3
    training.assert_same(training.run(rest), training.state(whole))


def test_a_torn_state_falls_back_to_the_one_before(tmp_path, training, whole, caplog):
    training.run(training.trainer(tmp_path, save_every=2, keep=3))
    paths = resume.states(tmp_path)
    assert state_files(tmp_path) == [6, 4, 2]
    for broken in (b"", b"\xff" * 100, paths[0].read_bytes()[:-1]):
        paths[0].write_bytes(broken)
        caplog.clear()
        rest = training.resumed(tmp_path)
        assert rest.step == 4
        assert f"{paths[0]}: cannot be read" in caplog.text and "going on" in caplog.text
    training.assert_same(training.run(rest), whole[1])
    assert training.resumed(tmp_path).step == 6
    for path in paths:
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"^{paths[0]}: cannot be read"):
        training.resumed(tmp_path)


def test_the_newest_are_kept_and_litter_is_not(tmp_path, training):
    training.run(training.trainer(tmp_path, save_every=1, keep=3))
    assert state_files(tmp_path) == [6, 5, 4]
    litter = tmp_path / resume.FOLDER / ".000000007.safetensors.1.tmp"
    litter.write_bytes(b"half")
    assert training.resumed(tmp_path, keep=1).step == 6
    training.run(training.resumed(tmp_path, steps=7, keep=1))
    assert state_files(tmp_path) == [7] and not litter.exists()


def test_a_run_from_elsewhere_says_that_bits_may_differ(tmp_path, training, whole, caplog):
    out = copied(whole, tmp_path)
    training.resumed(out)
    assert "bits may differ" not in caplog.text
    path = resume.states(out)[0]
    state = resume.read(path)
    here = dict(state.machine)
    assert here["threads"] == 1 and here["processes"] == 1 and here["device"] == "cpu"
    assert here["torch"] == torch.__version__ and not here["compiled"]
    assert here["instructions"] == torch.backends.cpu.get_cpu_capability()
    for name, there in (
        ("threads", 7), ("instructions", "AVX9"), ("processes", 2), ("torch", "1.0"),
        ("device", "cuda"), ("compiled", True), ("card", "H100"),
    ):  # fmt: skip
        resume.write(out, dataclasses.replace(state, machine={**here, name: there}), 1)
        caplog.clear()
        training.assert_same(training.resumed(out), whole[1])
        assert caplog.text.count("bits may differ") == 1
        assert f"{name}={there!r} there, {here.get(name)!r} now" in caplog.text


# What a run may not go on from


def test_an_empty_folder_is_refused(tmp_path, training):
    for out in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"^{out / resume.FOLDER}: is missing"):
            training.resumed(out)


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (False, {}),
        (True, {"block_out_channels": (8, 24)}),
        (True, {"layers_per_block": 2}),
        (True, {"variance_type": "learned"}),
        (True, {"ema_half_lives": (3, 21)}),
        (3, {}),
    ],
)
def test_another_network_is_refused(training, whole, labels, changes):
    """By its settings and data, and where these are allowed, by its shapes."""
    data = training.LABELLED if labels else training.PLAIN
    data = ImageData(data.images, data.labels, 3) if labels == 3 else data
    run = training.trainer(whole[0], data, **changes)
    before = training.state(run)
    with pytest.raises(ValueError, match=f"^{next(iter(changes), 'data')}="):
        run.resume()
    message = f"^{whole[0] / resume.FOLDER}: is of another network: "
    with pytest.raises(CheckpointError, match=message):
        run.resume(["data", *changes])
    found = training.state(run)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_other_settings_are_all_listed_and_refused(training, whole):
    changes = {"learning_rate": 1e-3, "prediction_type": "v_prediction", "attention_head_dim": 4}
    run = training.trainer(whole[0], **changes, steps=9, save_every=2, sample_every=1, keep=5)
    run.state()  # makes the moments
    before = training.state(run)
    with pytest.raises(ValueError) as raised:
        run.resume()
    assert not isinstance(raised.value, CheckpointError)
    message = str(raised.value)
    assert "learning_rate=0.001 (the run has 0.005)" in message
    assert "prediction_type='v_prediction' (the run has 'epsilon')" in message
    assert "attention_head_dim=4 (the run has 8)" in message
    assert message.count("the run has") == 3
    with pytest.raises(ValueError, match="^prediction_type='v_prediction' .the run has 'epsilon'"):
        run.resume(["learning_rate", "attention_head_dim"])
    training.assert_same(run, before)
    run.resume([*changes])
    assert run.step == 6 and run.config.learning_rate == 1e-3


def test_names_that_are_no_settings_are_not_allowed(training, whole):
    for name in ("lr", "threads", ""):
        with pytest.raises(ValueError, match=f"^allow={name!r}: must be one of steps, data"):
            training.resumed(whole[0], allow=["seed", name])


def test_other_data_are_known_by_their_content(training, whole):
    same = ImageData(training.LABELLED.images.clone(), training.LABELLED.labels.clone(), 2)
    assert training.resumed(whole[0], same, data="elsewhere").step == 6
    other = ImageData(255 - training.LABELLED.images, training.LABELLED.labels, 2)
    with pytest.raises(ValueError, match="^data='here' .the run has others, by their content.: "):
        training.resumed(whole[0], other, data="here")
    assert training.resumed(whole[0], other, allow=["data"]).step == 6


def test_every_other_setting_is_compared(training, whole):
    assert training.resumed(whole[0], **dict.fromkeys(MAY_CHANGE[2:5], 1)).step == 6
    free = {"steps": 9, "data": "x", "checkpoint_activations": True}
    assert training.resumed(whole[0], **free).step == 6
    assert {*MAY_CHANGE} == {"save_every", "keep", "sample_every", *free}
    other = {
        "lr_schedule": "cosine",
        "precision": "bfloat16",
        "prediction_type": "sample",
        "variance_type": "fixed_large",
        "loss": "l1",
        "loss_weighting": "truncated_snr",
        "timestep_sampling": "low_discrepancy",
        "beta_schedule": "sigmoid",
        "block_out_channels": (8, 24),
        "ema_half_lives": (20, 3),
        "horizontal_flip": True,
        "label_dropout": 0.5,
        "norm_num_groups": 2,
    }
    for field in dataclasses.fields(TrainConfig):
        name = field.name
        if name in (*MAY_CHANGE, *ONLY_WITH, "init"):
            continue
        value = other[name] if name in other else getattr(training.TINY, name) * 2
        with pytest.raises(ValueError, match=f"^{name}="):
            training.resumed(whole[0], **{name: value})
        if name not in (*NETWORK, "ema_half_lives"):
            assert training.resumed(whole[0], allow=[name], **{name: value}).step == 6


def test_the_steps_of_a_cosine_are_compared(tmp_path, training):
    cosine = {"lr_schedule": "cosine"}
    training.run(training.trainer(tmp_path, steps=2, **cosine))
    with pytest.raises(ValueError, match="^steps=4 .the run has 2.: a resumed run may change data"):
        training.resumed(tmp_path, steps=4, **cosine)
    assert training.resumed(tmp_path, steps=4, allow=["steps"], **cosine).step == 2


@pytest.mark.parametrize(
    ("name", "value", "owner"),
    [
        ("huber_delta", 0.5, {"loss": "huber"}),
        ("min_snr_gamma", 3.0, {"loss_weighting": "min_snr"}),
        ("p2_gamma", 0.5, {"loss_weighting": "p2"}),
    ],
)
def test_settings_of_a_loss_are_compared_too(tmp_path, training, name, value, owner):
    training.trainer(tmp_path, **owner).save()
    assert training.resumed(tmp_path, **owner).step == 0
    with pytest.raises(ValueError, match=f"^{name}={value} \\(the run has"):
        training.resumed(tmp_path, **owner, **{name: value})


def test_a_state_of_another_version_has_other_settings(tmp_path, training, whole):
    """What it does not name was at its default: that goes on, and nothing else does."""
    state = resume.read_newest(whole[0])
    config = dict(state.config)
    for name in ("loss", "huber_delta", "loss_weighting", "min_snr_gamma", "p2_gamma"):
        del config[name]
    resume.write(tmp_path, dataclasses.replace(state, config=config), 1)
    training.assert_same(training.resumed(tmp_path), whole[1])
    for name, value, default in (("loss", "l1", "mse"), ("loss_weighting", "p2", "constant")):
        with pytest.raises(ValueError, match=f"^{name}='{value}' .the run has '{default}'"):
            training.resumed(tmp_path, **{name: value})
    newer = dataclasses.replace(state, config={**state.config, "optimizer": "lion"})
    resume.write(tmp_path, newer, 1)
    with pytest.raises(ValueError, match="^optimizer=None .the run has 'lion'.: "):
        training.resumed(tmp_path)


GOOD = {"step": "6", "config": "{}", "data": "sha256:0", "machine": "{}"}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        *({k: v for k, v in GOOD.items() if k != name} for name in GOOD),
        *({**GOOD, "step": value} for value in ("six", "-1", "6.0")),
        *({**GOOD, name: value} for name in ("config", "machine") for value in ("{", "3", "[1]")),
    ],
)
def test_broken_metadata_are_refused(tmp_path, training, whole, metadata):
    path = tmp_path / resume.FOLDER / "000000006.safetensors"
    path.parent.mkdir()
    tensors = resume.read_newest(whole[0]).tensors
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=f"^{path}: its metadata"):
        training.resumed(tmp_path)


def test_the_state_keeps_its_format(training, whole):
    path = whole[0] / resume.FOLDER / "000000006.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata().keys() == GOOD.keys()
        assert file.metadata()["step"] == "6"
        assert file.metadata()["data"] == training.LABELLED.fingerprint()
        keys = set(file.keys())
    names = {key.split(".", 1)[1] for key in keys}
    kinds = ("model", "ema-3", "ema-20", "exp_avg", "exp_avg_sq")
    assert keys == {f"{kind}.{name}" for kind in kinds for name in names}
    assert {"conv_in.weight", "class_embedding.weight"} < names
    assert "mid_block.attentions.0.to_qkv.weight" in names
    stored = json.loads((whole[0] / TrainConfig.FILE).read_text())
    assert stored == training.TINY.to_dict()

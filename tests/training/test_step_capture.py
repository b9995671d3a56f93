"""The training step as a CUDA graph: on a card that only pretends to be one, and on a real one."""

import pytest
import torch

from flashddpm.training import step as train_step
from flashddpm.training.step import WARM_UPS
from flashddpm.training.trainer import Trainer


class Captured:
    """What `CapturedSteps` is to a step: made, it runs nothing; called, it repeats the launches.

    Launches know addresses and no Python, so what the host has to say must lie in memory.
    """

    made: list["Captured"] = []

    def __init__(self, step, count, pool, stream):
        assert count == 1
        self.step, self.replays = step, 0
        self.made.append(self)

    def __call__(self):
        self.replays += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flashddpm.training.config.TrainConfig.learning_rate_at", None)
            patch.setattr("flashddpm.training.ema.Ema.set_rates", None)
            return self.step()


@pytest.fixture
def capturing(tmp_path, training, monkeypatch):
    """A function that makes a trainer whose steps are "captured"."""
    monkeypatch.setattr(train_step, "CapturedSteps", Captured)
    monkeypatch.setattr(Captured, "made", [])
    for name in ("synchronize", "empty_cache", "Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(train_step.TrainStep, "_aside", train_step.TrainStep._step)

    def make(**changes) -> Trainer:
        run = training.trainer(tmp_path / "captured", **changes)
        run.stepper._capture = True
        run.stepper.optimizer.param_groups[0]["capturable"] = True
        return run

    return make


def test_captured_steps_are_the_steps(tmp_path, training, capturing):
    changes = {"lr_schedule": "cosine", "warmup_steps": 3, "accumulate": 2}
    plain, captured = training.trainer(tmp_path, **changes), capturing(**changes)
    (group,) = captured.stepper.optimizer.param_groups
    place = group["lr"].data_ptr()
    for step in range(6):
        want = plain.train_step()
        loss = captured.train_step()
        assert torch.equal(loss, want)
        training.assert_same(captured, training.state(plain))
        assert len(Captured.made) == (step >= WARM_UPS)  # warm-ups are steps too
        assert group["lr"].data_ptr() == place
    assert Captured.made[0].replays == 6 - WARM_UPS
    assert captured.stepper.whole


def test_a_batch_is_copied_to_where_the_graph_reads_it(capturing):
    run = capturing()
    places: dict[str, int] = {}
    for step in range(6):
        batch = run.batch(step)
        run.stepper(batch, step)
        if step < WARM_UPS:
            assert run.stepper._buffers is None
            continue
        inside, given = run.stepper._buffers._asdict(), batch._asdict()
        assert inside.keys() == given.keys() == {"x0", "t", "seeds", "keys", "labels"}
        if step > WARM_UPS:
            assert {name: v.data_ptr() for name, v in inside.items()} == places
            assert all(torch.equal(value, given[name]) for name, value in inside.items())
            assert all(value is not given[name] for name, value in inside.items())
        places = {name: v.data_ptr() for name, v in inside.items()}
    assert len(Captured.made) == 1


def test_another_shape_is_captured_anew(tmp_path, training, capturing):
    plain, run = training.trainer(tmp_path), capturing()
    for step in range(8):
        batch = run.batch(step)
        if step == 6:
            batch = batch.map(lambda value: value[:2])
        assert torch.equal(run.stepper(batch, step), plain.stepper(batch, step))
    training.assert_same(run, training.state(plain) | {"step": torch.tensor(0)})
    assert len(Captured.made) == 3


def test_a_captured_run_resumes_in_place(tmp_path, training, capturing, whole):
    """A graph knows addresses: weights, averages and moments must stay where they are."""
    run = capturing()
    for _ in range(5):
        run.train_step()
    state = run.state()
    places = {key: value.data_ptr() for key, value in run.stepper.tensors().items()}
    run.train_step()
    run.load(state)
    assert {key: value.data_ptr() for key, value in run.stepper.tensors().items()} == places
    run.train_step()
    training.assert_same(run, whole[1])
    assert len(Captured.made) == 1


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    tmp_path, training, capturing, monkeypatch, caplog
):
    plain, run = training.trainer(tmp_path), capturing()

    def refuse(step, *_):
        run.stepper.whole = False  # it fails in the midst
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train_step, "CapturedSteps", refuse)
    for _ in range(6):
        assert torch.equal(run.train_step(), plain.train_step())
    training.assert_same(run, training.state(plain))
    assert caplog.text.count("not captured") == 1 and "no room" in caplog.text
    assert run.stepper.whole


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"variance_type": "learned_range"}])
def test_captured_on_a_card(tmp_path, training, changes):
    """Captured and compiled, and one by one: the same losses to 1e-4; neither ever waits."""
    runs = []
    for compile in (True, False):
        config = training.trainer(tmp_path, steps=20, **changes).config
        runs.append(Trainer(config, training.LABELLED, tmp_path, "cuda", compile=compile))
    runs[1].stepper._capture = False
    for step in range(10):
        found = []
        for run in runs:
            with run._loader(step, ahead=0) as loader:
                batch = loader.next()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step > WARM_UPS else "default")
            try:
                found.append(run.train_step(batch))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-4)
    assert runs[0].stepper._graph is not None and runs[1].stepper._graph is None
    state = runs[0].state()
    want = float(runs[0].train_step())
    runs[0].load(state)
    assert float(runs[0].train_step()) == want
    fresh = Trainer(runs[0].config, training.LABELLED, tmp_path, "cuda", compile=False)
    fresh.load(state)
    assert float(fresh.train_step()) == pytest.approx(want, rel=1e-4)
    for run in (runs[0], fresh):
        steps = [run.stepper.optimizer.state[p]["step"] for p in run.stepper.params.values()]
        assert all(step.is_cuda and float(step) == 11 for step in steps)

"""A request takes the options of ``Sampler.sample``, and a bad one is refused at once."""

import inspect

import pytest

import flashddpm as fd
from flashddpm.diffusion.plan_options import PlanOptions


def test_request_has_every_option_of_sample(sampler):
    sample = inspect.signature(sampler.sample).parameters
    request = inspect.signature(fd.Request).parameters
    of_many = {
        *("seeds", "labels", "batch_size", "bucket", "exact", "progress", "on_step", "options"),
        *("initial_noise", "step_noise"),
    }
    single = {"seed", "label", "index", "deadline"}
    assert set(request) - single == {*sample, *PlanOptions.__annotations__} - of_many
    for name, parameter in request.items():
        if name not in ("seed", "index"):
            default = sample[name].default if name in sample else None
            assert parameter.default == default


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seed": 1.5}, "1.5"),
        ({"seed": 2**64}, str(2**64)),
        ({"seed": [1, 2]}, "must be one integer"),
        ({"label": 3}, "labels=3"),
        ({"label": "1"}, "labels"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": 2.0, "label": None}, "guidance=2.0"),
        ({"solver": "heun"}, "solver='heun'"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 51}, "num_steps=51"),
        ({"eta": True}, "eta=True"),
        ({"eta": [1]}, "eta"),
        ({"spacing": "odd"}, "spacing='odd'"),
        ({"deadline": -1}, "deadline=-1"),
        ({"deadline": "soon"}, "deadline='soon'"),
    ],
)
def test_bad_requests_are_refused_before_they_are_queued(start, bad, message, ask):
    engine = start()
    engine.submit(ask(eta=1.0))  # a plan that equals one with eta=True is cached
    with pytest.raises(ValueError, match=message):
        engine.submit(fd.Request(**{"seed": 0, "label": 1, "num_steps": 3} | bad))
    assert engine.metrics()["submitted"] == 1
    engine.drain()

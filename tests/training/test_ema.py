"""Moving averages of several half-lives: the recursion, and that they are nobody else's memory."""

import math

import pytest
import torch

from flashddpm.training.ema import Ema


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=random))
        for name, shape in shapes.items()
    }


def test_averages_follow_their_recursion():
    """Also where the half-life is short enough to be above the start's (1 + s) / (10 + s)."""
    half_lives = (1, 3, 200)
    parameters = weights()
    ema = Ema(parameters, half_lives)
    expected = {h: {n: p.detach().double() for n, p in parameters.items()} for h in half_lives}
    for step in (0, 1, 2, 3, 50, 10**6):
        for value, new in zip(parameters.values(), weights(step + 1).values(), strict=True):
            value.data.copy_(new)
        ema.set_rates(step)
        ema.update()
        for h in half_lives:
            d = min(0.5 ** (1 / h), (1 + step) / (10 + step))
            for name, p in parameters.items():
                expected[h][name] = d * expected[h][name] + (1 - d) * p.detach().double()
                found = ema.weights[h][name]
                assert found.dtype is torch.float32 and not found.requires_grad
                torch.testing.assert_close(found.double(), expected[h][name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ema.weights[1]["a"], ema.weights[3]["a"])


def test_half_is_left_after_a_half_life():
    parameters = weights()
    ema = Ema(parameters, (16,))
    before = ema.weights[16]["a"].clone()
    for p in parameters.values():
        p.data.zero_()
    for step in range(10**6, 10**6 + 16):
        ema.set_rates(step)
        ema.update()
    torch.testing.assert_close(ema.weights[16]["a"], before / 2, rtol=1e-5, atol=1e-7)


def test_averages_are_copies():
    parameters = weights()
    ema = Ema(parameters, (5, 7))
    parameters["a"].data.fill_(9)
    assert not (ema.weights[5]["a"] == 9).any()
    ema.weights[5]["a"].fill_(3)
    assert not (ema.weights[7]["a"] == 3).any()
    assert (parameters["a"] == 9).all()


def test_an_update_reads_the_rate_where_it_lies():
    """A captured update is launched again with the memory that it was captured with."""
    parameters = weights()
    ema = Ema(parameters, (5,))
    places = [v.data_ptr() for v in ema.weights[5].values()]
    rates = ema._rates[5]
    ema.set_rates(3)
    ema.update()
    assert ema._rates[5] is rates and rates.device == parameters["a"].device
    assert [v.data_ptr() for v in ema.weights[5].values()] == places


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_was_not_finite_shows_ever_after(bad):
    parameters = weights()
    ema = Ema(parameters, (5, 7))
    assert ema.are_finite()
    good = parameters["b"].data.clone()
    parameters["b"].data[2] = bad
    for step in range(3):
        ema.set_rates(step)
        ema.update()
        assert not ema.are_finite()
        parameters["b"].data.copy_(good)

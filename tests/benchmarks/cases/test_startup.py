"""Start-up times and the price of exact: what is run, and when it is refused."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import flashddpm as fd
from flashddpm.benchmarks.cases import loops, startup
from flashddpm.benchmarks.measure import harness


def test_the_first_image_is_timed_twice_with_one_cache(monkeypatch):
    seconds, runs = iter([9.0, 4.0, 3.0, 2.0]), []

    def run(*line, cache):
        folder = Path(cache)
        runs.append((line[-1], cache, len(list(folder.iterdir()))))
        (folder / str(len(runs))).touch()
        return next(seconds), 0.0

    monkeypatch.setattr(startup, "_run", run)
    compiled, uncompiled = startup.first_image("cpu")
    assert (compiled.case, uncompiled.case) == ("first-image-compiled", "first-image-uncompiled")
    assert compiled.values == {"cold_seconds": 9, "warm_seconds": 4}
    assert uncompiled.values == {"cold_seconds": 3, "warm_seconds": 2}
    assert [(how, found) for how, _, found in runs] == [
        ("compiled", 0), ("compiled", 1), ("uncompiled", 0), ("uncompiled", 1)
    ]  # fmt: skip
    caches = [cache for _, cache, _ in runs]
    assert caches[0] == caches[1] != caches[2] == caches[3]
    assert not any(Path(cache).exists() for cache in caches)


def test_the_first_image_can_be_drawn(forked, tmp_path):
    """Uncompiled, for real; what the other command says is seen by a stand-in."""
    line = (*forked, "-c", startup.FIRST_IMAGE + "assert image.shape == (1, 1, 28, 28)")
    seconds, _ = startup._run(*line, "cpu", "uncompiled", cache=str(tmp_path))
    assert seconds > 0


@pytest.mark.parametrize(("how", "compile"), [("compiled", True), ("uncompiled", False)])
def test_it_compiles_or_not(monkeypatch, tmp_path, how, compile):
    asked = []

    class Sampler:
        def sample(self, *arguments, num_steps):
            asked.append(num_steps)
            return torch.zeros(1)

    def from_pretrained(folder, device, compile):
        asked.append((folder, device, compile))
        return Sampler()

    monkeypatch.setattr(fd.Sampler, "from_pretrained", from_pretrained)
    monkeypatch.setattr(sys, "argv", ["-c", "cpu", how])
    script = tmp_path / "first_image.py"
    script.write_text(startup.FIRST_IMAGE)
    runpy.run_path(str(script))
    assert asked == [(fd.bundled(), "cpu", compile), 2]


class Exact:
    """A sampler whose images are their seeds; off by ``alone`` where one is wanted exact."""

    def __init__(self, alone=0.0, refuse=False):
        self.alone, self.refuse, self.calls = alone, refuse, []

    def sample(self, seeds, labels, solver, num_steps, batch_size, exact=False):
        if exact and self.refuse:
            raise ValueError("exact=True: on this machine not")
        self.calls.append((len(seeds), exact, batch_size))
        wrong = self.alone if exact and len(seeds) == 1 else 0.0
        return torch.tensor([float(seed) for seed in seeds]) + wrong


def price(monkeypatch, sampler):
    monkeypatch.setattr(fd.Sampler, "from_pretrained", lambda *a, **k: sampler)
    return list(loops.price_of_exact("cpu"))


def test_the_price_of_exact(monkeypatch):
    sampler = Exact()
    results = price(monkeypatch, sampler)
    assert [result.case for result in results] == ["exact-1-of-16", "exact-16-of-16"]
    assert all(result.values["ratio"] > 0 for result in results)
    assert {call[:2] for call in sampler.calls} == {(1, True), (1, False), (16, True), (16, False)}
    assert {call[2] for call in sampler.calls} == {16}


def test_ratios_are_of_exact_over_the_other(monkeypatch):
    def compare(ours, peer, rounds):
        assert not ours.keywords.get("exact") and peer.keywords["exact"]
        assert ours.args == peer.args
        return harness.Comparison(1, 3, 3, 3, 3, 0, rounds)

    monkeypatch.setattr(loops, "compare", compare)
    assert [result.values["ratio"] for result in price(monkeypatch, Exact())] == [3, 3]


def test_inexact_bits_are_not_timed(monkeypatch):
    with pytest.raises(AssertionError, match="one image has other bits"):
        price(monkeypatch, Exact(alone=1e-6))


def test_where_exact_is_refused_the_result_says_so(monkeypatch):
    (result,) = price(monkeypatch, Exact(refuse=True))
    assert result.line() == "exact: exact=True: on this machine not"

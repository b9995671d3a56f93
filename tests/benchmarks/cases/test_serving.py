"""Serving: arrivals, the policies, what is measured of them, and the refusal to time others."""

import math
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import flashddpm as fd
from flashddpm.benchmarks.cases import serving, suites
from flashddpm.benchmarks.measure import harness, runs
from flashddpm.benchmarks.peers.serving_policies import Batches, InFlight

SHAPE = (1, 3, 5)
TINY = serving.ServingSetting(max_batch=4, requests=16, loads=(0.5, 2.0), repeats=2, rounds=1)


def arithmetic(x_t, t, labels):
    return x_t * (0.25 + labels * 0.02 + t * 0.001).reshape(-1, 1, 1, 1)


def make_sampler(network=arithmetic):
    conditioning = fd.Conditioning(serving.CLASSES, serving.CLASSES)
    schedule = fd.NoiseSchedule.create("linear", 50)
    return fd.Sampler(
        network, schedule, shape=SHAPE, device="cpu", call=network, conditioning=conditioning
    )


@pytest.fixture
def sampler():
    return make_sampler()


@pytest.fixture
def engine(sampler):
    with fd.Engine(sampler, TINY.max_batch) as engine:
        yield engine


@pytest.fixture
def case(sampler, engine):
    return serving.ServingMix(sampler, engine, serving.MIXES["mixed"], TINY)


def alone(request):
    """What a request asks for, drawn by itself."""
    return make_sampler().sample(
        [request.seed], request.label, request.guidance, request.solver, request.num_steps
    )[0]


def ask(seed, num_steps=3):
    return fd.Request(seed=seed, label=seed % 10, num_steps=num_steps)


def test_arrivals_are_a_poisson_process():
    due = serving.arrivals(rate=8.0, count=4000, seed=5)
    gaps = np.diff(due, prepend=0)
    assert due.shape == (4000,) and (gaps > 0).all()
    assert abs(gaps.mean() * 8 - 1) < 4 / math.sqrt(4000)  # standard deviation equals the mean
    assert scipy.stats.kstest(gaps, "expon", (0, 1 / 8)).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(4000)
    assert np.array_equal(due, serving.arrivals(8.0, 4000, 5))
    assert not np.array_equal(due, serving.arrivals(8.0, 4000, 6))


def test_requests_are_of_each_kind_equally_often_in_random_order():
    kinds = serving.MIXES["mixed"]
    requests = serving.make_requests(kinds, 40, 1)
    found = [(r.solver, r.num_steps, r.guidance) for r in requests]
    assert [found.count(kind) for kind in kinds] == [10] * 4
    assert [r.seed for r in requests] == list(range(40))
    assert [r.label for r in requests] == [i % 10 for i in range(40)]
    assert found != [kinds[i % 4] for i in range(40)]


@pytest.mark.parametrize("name", ["in-flight", "one-at-a-time", "static"])
@pytest.mark.parametrize("count", [16, 11])
def test_every_policy_answers_every_request_once_with_its_image(case, name, count):
    requests = serving.make_requests(serving.MIXES["mixed"], count, 3)
    policy, answers = case.policies[name](), []
    futures = []
    for request in requests:
        futures.append(policy.submit(request))
        futures[-1].add_done_callback(answers.append)
    policy.close()
    for request, future in zip(requests, futures, strict=True):
        result = future.result(timeout=60)
        assert result.request is request
        torch.testing.assert_close(result.image, alone(request), rtol=1e-5, atol=1e-5)
        assert 0 <= result.timings.queued and 0 < result.timings.running
    if name != "in-flight":  # there a waiter may wake just before the callbacks
        assert len(answers) == count and set(answers) == set(futures)


def test_a_static_batch_waits_until_it_is_full_and_is_flushed_at_close(sampler, monkeypatch):
    calls, draw = [], sampler.sample

    def sample(seeds, labels, guidance, solver, num_steps, batch_size):
        calls.append((list(seeds), num_steps, batch_size))
        return draw(seeds, labels, guidance, solver, num_steps, batch_size=batch_size)

    monkeypatch.setattr(sampler, "sample", sample)
    policy = Batches(sampler, 3)
    first = [policy.submit(ask(i)) for i in range(2)]
    other = [policy.submit(ask(10 + i, num_steps=4)) for i in range(3)]
    for future in other:
        future.result(timeout=60)
    # The queue is in order: the thread has seen the first two, and waits.
    assert calls == [([10, 11, 12], 4, 3)] and not any(future.done() for future in first)
    first.append(policy.submit(ask(2)))
    first[-1].result(timeout=60)
    assert all(future.done() for future in first) and calls[1:] == [([0, 1, 2], 3, 3)]
    late = policy.submit(ask(7))
    policy.close()
    assert late.done() and calls[2:] == [([7, 7, 7], 3, 3)]
    torch.testing.assert_close(late.result().image, alone(ask(7)), rtol=1e-5, atol=1e-5)


def test_one_at_a_time_draws_alone_and_in_order(sampler, monkeypatch):
    calls, draw = [], sampler.sample

    def sample(seeds, *rest, **options):
        calls.append(list(seeds))
        return draw(seeds, *rest, **options)

    monkeypatch.setattr(sampler, "sample", sample)
    policy = Batches(sampler, 1)
    futures = [policy.submit(ask(i)) for i in (4, 2, 9)]
    policy.close()
    assert calls == [[4], [2], [9]] and all(future.done() for future in futures)


def test_what_fails_fails_its_batch_alone(sampler):
    policy = Batches(sampler, 2)
    bad = [policy.submit(fd.Request(seed=i, label=99, num_steps=3)) for i in range(2)]
    good = [policy.submit(ask(i)) for i in range(2)]
    policy.close()
    for future in bad:
        with pytest.raises(ValueError, match="99"):
            future.result()
    assert all(future.result().image.shape == SHAPE for future in good)


def test_unlabelled_requests_get_the_null_class(sampler):
    policy = Batches(sampler, 1)
    future = policy.submit(fd.Request(seed=3, num_steps=3))
    policy.close()
    torch.testing.assert_close(future.result().image, sampler.sample([3], num_steps=3)[0])


class Clock:
    """Time that passes when somebody sleeps or works."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


def test_latency_counts_from_when_a_request_was_due(monkeypatch):
    """Each takes 2 s and holds up the next: waiting to be submitted is waiting too."""
    clock, closed = Clock(), []
    monkeypatch.setattr(serving, "time", clock)

    def submit(request):
        clock.now += 2
        future = Future()
        future.set_result(fd.Result(torch.full(SHAPE, float(request.seed)), request, None))
        return future

    policy = SimpleNamespace(submit=submit, close=lambda: closed.append(True))
    served = serving.serve(policy, [ask(i) for i in range(4)], np.array([1.0, 2.0, 3.0, 20.0]))
    assert served.latencies.tolist() == pytest.approx([2, 3, 4, 2])
    assert served.seconds == pytest.approx(21)  # from 1 to 22
    assert served.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and closed == [True]


def test_late_callbacks_are_waited_for():
    """A future wakes those who wait for its result before it calls back."""

    class Slow(Future):
        def set_result(self, result):
            with self._condition:
                self._result, self._state = result, "FINISHED"
                self._condition.notify_all()
            threading.Timer(0.05, self._invoke_callbacks).start()

    def submit(request):
        future = Slow()
        threading.Timer(
            0.01, future.set_result, [fd.Result(torch.zeros(SHAPE), request, None)]
        ).start()
        return future

    policy = SimpleNamespace(submit=submit, close=lambda: None)
    served = serving.serve(policy, [ask(0), ask(1)], np.zeros(2))
    assert (served.latencies >= 0.05).all()


def test_percentiles_and_throughput_of_known_numbers():
    served = serving.Served(np.arange(101.0)[::-1], 50.5, torch.zeros(1))
    assert served.figures == {"throughput_per_second": 2, "p50_seconds": 50, "p99_seconds": 99}


def test_summaries_of_known_numbers():
    runs = [{"a": float(a), "b": 2.0} for a in (5, 1, 4, 2, 3)]
    assert serving.summary(runs) == {
        "a": 3, "a_low": 2, "a_high": 4, "b": 2, "b_low": 2, "b_high": 2
    }  # fmt: skip


def test_shares_are_of_static_on_the_same_arrivals():
    ours = [{"p50_seconds": 1.0, "occupancy": 0.5}, {"p50_seconds": 9.0, "occupancy": 0.5}]
    theirs = [{"p50_seconds": 4.0}, {"p50_seconds": 12.0}]
    shares = serving.shares({"in-flight": ours, "static": theirs, "one-at-a-time": []})
    assert shares == {
        "p50_seconds_of_static": 0.5,
        "p50_seconds_of_static_low": 0.375,
        "p50_seconds_of_static_high": 0.625,
    }


def test_occupancy_is_the_mean_share_of_slots_in_a_step(sampler):
    engine = fd.Engine(sampler, 4, threaded=False)
    engine.submit(ask(0, num_steps=7))
    engine.drain()  # steps before the run do not count
    policy = InFlight(engine)
    policy.submit(ask(1, num_steps=6))
    policy.submit(ask(2, num_steps=3))
    policy.close()
    assert policy.occupancy(9) == 9 / (6 * 4)
    assert policy.occupancy(9) == pytest.approx((3 * 2 / 4 + 3 * 1 / 4) / 6)


def test_policies_see_the_same_arrivals_and_take_turns(case, monkeypatch):
    seen, serve = [], serving.serve

    def spy(policy, requests, due):
        kinds = [(r.seed, r.solver, r.num_steps, r.guidance) for r in requests]
        seen.append((type(policy).__name__, getattr(policy, "size", None), kinds, due.tolist()))
        return serve(policy, requests, due)

    monkeypatch.setattr(serving, "serve", spy)
    runs = case.under_load(rate=500.0)
    assert [len(each) for each in runs.values()] == [2, 2, 2]
    order = [("InFlight", None), ("Batches", 1), ("Batches", 4)]
    assert [call[:2] for call in seen] == order + order[::-1]
    for repeat in (seen[:3], seen[3:]):
        assert all(call[2:] == repeat[0][2:] for call in repeat)
    assert seen[0][2] != seen[3][2] and seen[0][3] != seen[3][3]
    assert np.allclose(seen[0][3], serving.arrivals(500.0, 16, 0))


def test_capacity_is_of_full_static_batches_over_all_kinds(case, monkeypatch):
    """Four images in 1, 2, 4 and 9 s, each the median of three: 16 images in 16 s."""
    seconds, sizes = iter([1, 1, 7, 2, 0, 2, 4, 4, 4, 9, 9, 30]), []

    def serve(policy, requests, due):
        policy.close()
        sizes.append((policy.size, len(requests), len({r.solver for r in requests})))
        return SimpleNamespace(seconds=float(next(seconds)))

    monkeypatch.setattr(serving, "serve", serve)
    assert case.capacity() == 1.0
    assert sizes == [(4, 4, 1)] * 12


def test_other_images_are_not_timed(case):
    case.check()
    other = make_sampler(lambda x, t, labels: 1.01 * arithmetic(x, t, labels))
    case.policies["static"] = lambda: Batches(other, TINY.max_batch)
    with pytest.raises(AssertionError, match="static: differs from one at a time"):
        case.check()
    nothing = make_sampler(lambda x, t, labels: torch.nan * x)
    case.policies["static"] = lambda: Batches(nothing, TINY.max_batch)
    with pytest.raises(fd.NonFiniteError):
        case.check()


def test_the_engine_is_warm_before_anything_is_drawn(sampler, monkeypatch):
    did, serve = [], serving.serve
    monkeypatch.setattr(fd.Sampler, "from_pretrained", lambda *a, **k: sampler)
    monkeypatch.setattr(fd.Engine, "warm", lambda self: did.append("warm"))

    def spy(*arguments):
        did.append("serve")
        return serve(*arguments)

    monkeypatch.setattr(serving, "serve", spy)
    setting = serving.ServingSetting(max_batch=2, requests=8, loads=(), repeats=1, rounds=1)
    for result in serving.under_load("cpu", setting=setting):
        assert result.case.endswith("all-at-once") and len(did) > 2
        assert did == ["warm"] + ["serve"] * (len(did) - 1)
        did.clear()


def test_the_suite_reports_each_policy_mix_and_load(sampler, monkeypatch):
    asked = []

    def from_pretrained(folder, device, dtype, compile):
        asked.append((folder, device, dtype, compile))
        return sampler

    monkeypatch.setattr(fd.Sampler, "from_pretrained", from_pretrained)
    monkeypatch.setattr(serving, "ON_CPU", TINY)
    results = list(suites.chosen("cpu", "serving", eager=True)[0].measure("cpu"))
    assert asked == [(fd.bundled(), "cpu", "float32", False)]
    cases = [result.case for result in results]
    expected = []
    for mix in ("eager-uniform", "eager-mixed"):
        for load in ("0.5", "2"):
            stem = f"serving-{mix}-{load}"
            expected += [f"{stem}-{name}" for name in ("in-flight", "one-at-a-time", "static")]
            expected.append(stem)
        expected.append(f"serving-{mix}-all-at-once")
    assert cases == expected
    by_case = {result.case: result.values for result in results}
    flight = by_case["serving-eager-mixed-2-in-flight"]
    assert flight["load"] == 2 and 0 < flight["occupancy"] <= 1
    assert flight["p99_seconds"] >= flight["p50_seconds"] > 0
    half = by_case["serving-eager-mixed-0.5-static"]
    assert 4 * half["offered_per_second"] == pytest.approx(flight["offered_per_second"])
    assert by_case["serving-eager-uniform-2"]["p50_seconds_of_static"] > 0
    assert by_case["serving-eager-uniform-all-at-once"]["pairs"] == 2
    assert all(result.line() for result in results)


def test_all_at_once_is_a_ratio_of_throughput(case, monkeypatch):
    """In flight twice as fast is a ratio of 2."""
    monkeypatch.setattr(serving.ServingMix, "capacity", lambda self: 1.0)
    monkeypatch.setattr(serving.ServingMix, "under_load", lambda self, rate: {})
    monkeypatch.setattr(serving, "shares", lambda runs: {})
    ran = []

    def run(self, name, rate, repeat):
        ran.append((name, rate))
        return {"throughput_per_second": {"in-flight": 8.0, "static": 4.0}[name]}

    monkeypatch.setattr(serving.ServingMix, "run", run)
    last = list(serving.results(case, "mixed"))[-1]
    assert (last.values["ratio"], last.values["ours_seconds"]) == (2, 16 / 8)
    assert set(ran) == {("in-flight", None), ("static", None)}


def test_a_run_at_no_rate_has_all_requests_at_once(case, monkeypatch):
    seen = []

    def serve(policy, requests, due):
        seen.append((len(requests), due.tolist()))
        return serving.Served(np.ones(2), 1.0, torch.zeros(1))

    monkeypatch.setattr(serving, "serve", serve)
    case.run("one-at-a-time", None, 0)
    assert seen == [(16, [0.0] * 16)]


def test_the_settings_let_static_batches_fill():
    for setting in (serving.ON_CPU, serving.ON_CUDA):
        for kinds in serving.MIXES.values():
            assert setting.requests % (setting.max_batch * len(kinds)) == 0


def test_results_can_be_written(tmp_path, case):
    values = serving.summary([case.run("in-flight", 100.0, 0)])
    runs.BenchmarkRun({}, [harness.Measurement("serving", "", "", values)]).write(
        tmp_path / "r.json"
    )
    assert "occupancy_low" in (tmp_path / "r.json").read_text()

"""What was recorded of a run is what happened, and the pictures are drawn of it."""

import itertools
import json

import numpy as np
import pytest
import typer
from PIL import Image

import flashddpm as fd
from flashddpm.benchmarks.cases import serving
from flashddpm.benchmarks.reports import serving_plot
from flashddpm.benchmarks.reports.serving_record import Bar, record

SLOTS = 3


@pytest.fixture
def engine():
    def network(x_t, t, labels):
        return x_t * (0.25 + labels * 0.02).reshape(-1, 1, 1, 1)

    sampler = fd.Sampler(
        network,
        fd.NoiseSchedule.create("linear", 50),
        shape=(1, 3, 5),
        device="cpu",
        call=network,
        conditioning=fd.Conditioning(10, 10),
    )
    return fd.Engine(sampler, SLOTS, threaded=False)


def watch(engine):
    """Return a list that fills with who is in which slot in each step."""
    seen, batch = [], engine._loop.batch
    step = batch.step

    def watched():
        running = sorted(batch.images.items(), key=lambda one: one[1])
        seen.append([(slot, image.request) for image, slot in running])
        return step()

    batch.step = watched
    return seen


def test_bars_are_what_happened(engine):
    requests = serving.make_requests(serving.MIXES["mixed"], 12, 0)
    requests[3:3] = [fd.Request(seed=99, label=1, num_steps=2)]  # two turns: hardly seen
    due = np.sort(np.random.default_rng(0).uniform(0, 0.05, len(requests)))
    seen = watch(engine)
    bars = record(engine, requests, due)
    turns = [list(turn) for _, turn in itertools.groupby(bars, lambda bar: bar.start)]
    assert [[(b.slot, requests[b.image]) for b in turn] for turn in turns] == seen
    for image, request in enumerate(requests):
        mine = [bar for bar in bars if bar.image == image]
        assert [bar.step for bar in mine] == list(range(request.num_steps))
        assert len({bar.slot for bar in mine}) == 1 and mine[0].start >= due[image]
        what = (request.solver, request.num_steps, request.guidance)
        assert {(bar.solver, bar.num_steps, bar.guidance) for bar in mine} == {what}
    for slot in range(SLOTS):
        mine = [bar for bar in bars if bar.slot == slot]
        assert mine, "every slot was used"
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine)), "bars overlap"
    assert all(bar.start < bar.end for bar in bars)


def test_requests_of_one_step_are_refused_before_any_is_submitted(engine):
    requests = [fd.Request(seed=i, label=0, num_steps=2 - i) for i in range(2)]
    with pytest.raises(ValueError, match="num_steps=1: must be at least 2"):
        record(engine, requests, np.zeros(2))
    assert engine.metrics()["submitted"] == 0


def test_a_failed_request_raises(engine):
    engine._loop.batch.step = lambda: 1 / 0
    with pytest.raises(fd.RequestFailed):
        record(engine, [fd.Request(seed=0, label=0, num_steps=2)], np.zeros(1))


IMAGES = ((0, "ddim", 1.0), (1, "ddpm", 2.0), (0, "dpmpp_2m", 1.0))
BARS = [
    Bar(slot, i, solver, 2, guidance, step, i + 0.5 * step, i + 0.5 * step + 0.5)
    for i, (slot, solver, guidance) in enumerate(IMAGES)
    for step in range(2)
]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def colour(solver, step):
    return np.round(255 * np.array(serving_plot.shade(solver, step, 2)[:3]))


def count(path, wanted):
    return (abs(pixels(path) - wanted).max(1) <= 2).sum()


def test_slots_are_drawn(tmp_path):
    path = tmp_path / "slots.png"
    serving_plot.save(serving_plot.draw_slots(BARS, np.array([0.0, 0.9, 1.1]), 2), path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 600 and image.height > 250
    for solver in ("ddim", "ddpm", "dpmpp_2m"):
        for step in range(2):
            assert count(path, colour(solver, step)) > 3000, (solver, step)
    serving_plot.save(serving_plot.draw_slots(BARS[:2], np.zeros(1), 2), path)
    assert count(path, colour("ddim", 0)) > 3000 and count(path, colour("ddpm", 0)) == 0


def test_shades_darken():
    for solver in serving_plot.COLOURS:
        shades = [sum(serving_plot.shade(solver, step, 5)[:3]) for step in range(5)]
        assert shades == sorted(shades, reverse=True) and len(set(shades)) == 5


def test_every_solver_of_the_mixes_has_a_colour():
    for kinds in serving.MIXES.values():
        assert {kind[0] for kind in kinds} <= set(serving_plot.COLOURS)


def results(*mixes):
    cases = []
    for mix in mixes:
        for load in (0.7, 0.3):  # in no order
            for name, latency in (("in-flight", 0.1), ("static", 0.5), ("one-at-a-time", 0.3)):
                run = {
                    "throughput_per_second": 10 * load,
                    "p50_seconds": latency,
                    "p99_seconds": 3 * latency,
                }
                values = {"load": load, "offered_per_second": 11 * load}
                values |= serving.summary([run])
                cases.append({"case": f"serving-{mix}-{load}-{name}", "values": values})
            cases.append({"case": f"serving-{mix}-{load}", "values": {"p50_of_static": 0.2}})
        cases.append({"case": f"serving-{mix}-all-at-once", "values": {"ratio": 1.0}})
    return {"results": [{"case": "ddim-50-batch-1", "values": {}}, *cases]}


def test_curves_are_by_policy_in_the_order_of_loads():
    content = results("uniform", "eager-uniform")
    for result in content["results"]:
        if "eager" in result["case"] and "p50_seconds" in result["values"]:
            result["values"]["p50_seconds"] = 7.0
    found = serving_plot.curves(content, "uniform")
    assert set(found) == {"in-flight", "static", "one-at-a-time"}
    assert [v["load"] for v in found["static"]] == [0.3, 0.7]
    assert [v["p50_seconds"] for v in found["static"]] == [0.5, 0.5]
    assert serving_plot.curves(content, "eager-uniform")["static"][0]["p50_seconds"] == 7.0
    assert serving_plot.curves(content, "mixed") == {}


def test_results_are_drawn(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    serving_plot.save(serving_plot.draw_results(results("uniform")), one)
    serving_plot.save(serving_plot.draw_results(results("uniform", "mixed")), two)
    heights = []
    for path in (one, two):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 800
            heights.append(image.height)
        for line in serving_plot.LINES.values():
            wanted = [int(line[i : i + 2], 16) for i in (1, 3, 5)]
            assert count(path, wanted) > 100
    assert heights[1] > 1.5 * heights[0]


def test_nothing_is_drawn_beyond_an_axis():
    content = results("uniform", "mixed")
    for result in content["results"]:
        if "mixed" in result["case"]:
            result["values"] = {key: 5 * value for key, value in result["values"].items()}
    for axes in serving_plot.draw_results(content).axes:
        low, high = axes.get_ylim()
        y = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        assert low <= y.min() and y.max() <= high


def test_results_without_serving_are_refused():
    with pytest.raises(ValueError, match="no case of serving"):
        serving_plot.draw_results(results("eager-mixed"))
    assert len(serving_plot.draw_results(results("eager-mixed"), eager=True).axes) == len(
        serving_plot.PANELS
    )


def test_the_command_draws_both(tmp_path, monkeypatch, engine):
    source, out, slots = (tmp_path / name for name in ("r.json", "r.png", "s.png"))
    source.write_text(json.dumps(results("mixed")))
    monkeypatch.setattr(serving_plot.Sampler, "from_pretrained", lambda *a, **k: engine.sampler)
    monkeypatch.setattr(serving_plot, "IMAGES", 8)
    serving_plot.main(source, out, slots=slots)
    assert out.stat().st_size > 1000 and slots.stat().st_size > 1000
    for few in ((source, None, slots), (None, None, None)):
        with pytest.raises(typer.BadParameter):
            serving_plot.main(*few)


def test_a_panel_has_the_lines_it_is_given():
    axes = serving_plot.Figure().subplots()
    lines = serving_plot.curves(results("mixed"), "mixed")
    serving_plot._panel(axes, lines, "throughput_per_second", False)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert set(drawn) == {"offered", "in flight", "full static batches", "one at a time"}
    assert drawn["in flight"] == [[0.3, 3.0], [0.7, 7.0]]
    assert np.allclose(drawn["offered"], [[0.3, 3.3], [0.7, 7.7]])

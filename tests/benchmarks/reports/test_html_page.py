"""Results as tables, pages and pictures."""

import base64
import html.parser
import io

import pytest
from matplotlib.figure import Figure
from PIL import Image

from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runs import BenchmarkRun, Failure
from flashddpm.benchmarks.reports import html_page, plots, table

WHERE = {
    "gpu": {"name": "a card"}, "cpu": "a CPU", "capability": "AVX2", "threads": 1,
    "python": "3", "versions": {"torch": "1"}, "commit": "c",
}  # fmt: skip


def ratio(case, value, spread=0.01):
    values = {"ours_seconds": 0.5, "peer_seconds": 0.5 * value, "ratio": value, "spread": spread}
    return Measurement(
        case, "p", "n", values | {"ratio_low": value - 0.1, "ratio_high": value + 0.1}
    )


def step(batch, ms=2.0, loop=0.5, flop=0.25, byte=0.125):
    values = {
        "ms_a_step": ms, "loop_ms": loop, "of_flop_floor": flop, "of_byte_floor": byte,
        "gflop": 1.0, "mbytes": 10.0, "tflop_a_second_peak": 2.0, "gbyte_a_second_peak": 100.0,
    }  # fmt: skip
    return Measurement(f"step-m-float32-batch-{batch}", "nothing", "n", values)


RUN = BenchmarkRun(
    WHERE,
    [
        *(ratio(f"m-ddim-batch-{b}-best", 1 + 1 / b) for b in (1, 16)),
        ratio("m-ddpm-batch-1-best", 1.0),
        *(ratio(f"graph-m-batch-{b}", r) for b, r in ((1, 1.5), (4, 1.2), (16, 1.005), (64, 1.0))),
        *(step(b) for b in (1, 16)),
        Measurement("philox-1x3x32x32-float32", "", "n", {"us": 2.0, "of_bound": 0.5}),
        Measurement("a<b", "nothing", "note & more", {"seconds": 1.0}),
    ],
    [Failure("bad", "they differ")],
    ["late"],
)


def test_lines_are_by_case_and_peer_in_the_order_of_batches():
    run = BenchmarkRun(
        {}, [ratio("m-batch-16-best", 2), ratio("m-batch-2-best", 3), ratio("m-batch-2", 4)]
    )
    lines = plots.lines_of(run, plots.SPEED_UP, "ratio")
    assert {name: [(b, v["ratio"]) for b, v in points] for name, points in lines.items()} == {
        "m-best": [(2, 3), (16, 2)], "m": [(2, 4)]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "end"),
    [((1.5, 1.2, 1.0), 3), ((1.5, 1.0, 1.2), None), ((1.0, 0.9, 0.9), 1), ((2, 2, 2), None)],
)
def test_the_graph_stops_paying_where_all_that_follows_is_noise(ratios, end):
    points = [(i, {"ratio": r, "spread": 0.02}) for i, r in enumerate(ratios, 1)]
    assert plots.crossover(points) == end


def test_the_parts_of_a_step_add_up():
    assert plots.shares(step(1).values) == {
        "floor": 0.25, "network above its floor": 0.5, "loop": 0.25
    }  # fmt: skip
    crowded = plots.shares(step(1, ms=1.0, loop=0.5, flop=0.9).values)
    assert sum(crowded.values()) == 1 and min(crowded.values()) >= 0


@pytest.mark.parametrize("draw", [plots.speed_up, plots.roofline, plots.split])
def test_pictures_have_a_mark_for_each_case(draw):
    figure = draw(RUN)
    assert isinstance(figure, Figure)
    marks = sum(len(axes.lines) + len(axes.patches) for axes in figure.axes)
    assert marks >= {"speed_up": 6, "roofline": 4, "split": 6}[draw.__name__]
    figure.savefig(io.BytesIO(), format="png")


def test_the_crossover_is_marked():
    axes = plots.speed_up(RUN).axes[0]
    assert [text.get_text() for text in axes.texts] == ["the graph stops paying"]
    assert axes.texts[0].xy == (16, 1)


def test_kernels_and_steps_have_a_panel_each():
    assert [axes.get_title() for axes in plots.roofline(RUN).axes] == ["whole steps", "kernels"]
    kernels = BenchmarkRun({}, [r for r in RUN.results if "of_bound" in r.values])
    assert [axes.get_title() for axes in plots.roofline(kernels).axes] == ["kernels"]


def test_nothing_to_draw_is_no_picture():
    assert [draw(BenchmarkRun({})) for draw in plots.PLOTS.values()] == [None] * 4


class Page(html.parser.HTMLParser):
    """What a page has: links to elsewhere, pictures, and tags that are open."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        assert not {"href", "srcset"} & dict(attrs).keys() and tag != "script"
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file():
    text = html_page.page([RUN, RUN])
    page = Page(text)
    assert page.open == [] and len(page.sources) == 2 * 3
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert "a&lt;b" in text and "a<b" not in text and "note &amp; more" in text
    assert "they differ" in text and "Left out: late." in text


def test_a_page_is_filled_from_the_files_that_it_names(tmp_path):
    RUN.write(tmp_path / "r" / "a.json")
    page = tmp_path / "page.md"
    head, tail = "before\n<!-- results: r/a.json -->\n", "<!-- end of results -->\nafter\n"
    page.write_text(f"{head}an old table\n{tail}")
    text = table.filled(page)
    assert text == f"{head}\n{table.table(RUN)}\n\n{tail}"
    page.write_text(text)
    assert table.filled(page) == text
    page.write_text("no place\n")
    assert table.filled(page) == "no place\n"


def test_figures_stand_with_their_quartiles():
    values = {"load": 0.7, "p50_seconds": 1.0, "p50_seconds_low": 0.5, "p50_seconds_high": 2.0}
    run = BenchmarkRun(WHERE, [Measurement("a", "nothing", "", values | {"low": 3.0})])
    assert "| a | load 0.7, p50 seconds 1 (0.5 to 2), low 3 | | | |" in table.table(run)

"""An evaluation as text, page and JSON: what stands there, escaped, whole, and in one file."""

import base64
import html.parser
import io
import json
import os

import pytest
import torch
from PIL import Image

from flashddpm.evaluation import pictures, report
from flashddpm.io import html_pages

BOUND = {
    "timesteps": [0, 5, 12], "terms": [1.0, 0.25, 0.125], "terms_stderr": [0.1, 0.01, 0.2],
    "x0_mse": [0.1, 0.2, 0.4], "eps_mse": [1.0, 0.5, 0.1], "prior": 1e-4, "prior_stderr": 1e-5,
    "decoder": 1.0, "decoder_stderr": 0.1, "total": 3.75, "total_stderr": 0.125, "images": 16,
    "labels": "none",
}  # fmt: skip
RESULT = {
    "model": {"folder": "a<b", "fingerprint": "sha256:m", "num_train_timesteps": 1000},
    "data": {"path": "train", "images": 60000},
    "reference": {"path": "test", "images": 10000, "held_out": True},
    "samples": {
        "count": 1000, "seeds": "0:1000", "labels": "in turn", "guidance": 1.5, "solver": "ddim",
        "num_steps": 50,
    },
    "features": {"name": "x&y.pt", "fingerprint": "sha256:f"},
    "environment": {"versions": {"torch": "2"}},
    "bound": BOUND,
    "frechet": {"distance": 8.9584, "training": {"distance": 1.58993}},
    "kernel": {"mean": 0.5, "deviation": 0.0625, "training": {"mean": 1e-3, "deviation": 2e-3}},
    "prc": {"precision": 0.75, "recall": 0.5, "training": {"precision": 0.875, "recall": 1.0}},
    "recognised": {
        "overall": 0.878, "by_class": [0.87, None], "real_overall": 0.9174,
        "real_by_class": [0.877, 0.984], "class_names": ["<coat>", "boot"],
    },
    "neighbours": {
        "median": 27.371, "smallest": 17.5, "duplicates": [{"seed": 3, "training_image": 9}],
        "real": {"median": 31.234, "smallest": 14.5},
    },
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a page holds: tags that must be closed in order, images, table cells and links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.cells, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.cells.append([])
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)


def test_the_summary_has_each_number_beside_that_of_real_images():
    assert report.summary(RESULT) == [
        ("", "model", "real images"),
        ("bits a dimension, at most", "3.7500 +- 0.1250", ""),
        ("Frechet distance", "8.958", "1.590"),
        ("kernel distance", "0.5 +- 0.062", "0.001 +- 0.002"),
        ("precision", "75.0%", "87.5%"),
        ("recall", "50.0%", "100.0%"),
        ("recognised as asked", "87.8%", "91.7%"),
        ("nearest training image, median", "27.37", "31.23"),
        ("nearest training image, smallest", "17.50", "14.50"),
        ("copies of a training image", "1", ""),
    ]


def test_what_was_not_measured_has_no_row():
    for name in ("bound", "frechet", "kernel", "prc", "recognised", "neighbours"):
        left = {key: value for key, value in RESULT.items() if key != name}
        assert len(report.summary(left)) < len(report.summary(RESULT))
        assert report.text(left) and report.page(left, {})
    alone = {**RESULT, "frechet": {"distance": 1.0, "training": None}}
    assert ("Frechet distance", "1.000", "") in report.summary(alone)


def test_the_text_says_of_what_the_numbers_are():
    text = report.text(RESULT)
    assert (
        "1,000 samples, seeds 0:1000, labels in turn, guidance 1.5, ddim, 50 steps; 10,000 real "
        "images\n"
    ) in text
    assert "features: x&y.pt\n" in text
    assert "bound: of 16 real images, labels none, no guidance, at 3 of 1,000 timesteps" in text
    assert f"{'Frechet distance':32}  {'8.958':>16}  {'1.590':>14}\n" in text  # in columns
    trained = {**RESULT, "reference": {**RESULT["reference"], "held_out": False}}
    assert report.text(trained).count("no others were given") == 2


def test_the_page_is_whole_and_needs_no_other_file():
    shown = {
        "samples": pictures.samples(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [0, 1, 1], None),
        "terms": pictures.terms(BOUND),
        "errors": pictures.errors(BOUND),
    }
    page = Page(report.page(RESULT, shown))
    assert not page.open and not page.links
    assert [image["alt"] for image in page.images] == [report.CAPTIONS[name] for name in shown]
    for image, png in zip(page.images, shown.values(), strict=True):
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert content == png and Image.open(io.BytesIO(content)).format == "PNG"
    assert ["<coat>", "87.0%", "87.7%"] in page.cells and ["boot", "98.4%"] in page.cells
    assert ["L_1 to L_(T-1)", "2.749900"] in page.cells
    assert ["in all", "3.750000", "0.125000"] in page.cells
    words = "".join(page.words)
    assert "a<b" in words and "sha256:m" in words and "x&y.pt" in words


def test_write_puts_json_beside_the_page(tmp_path):
    out = tmp_path / "new" / "page.html"
    assert report.write(out, RESULT, {}) == tmp_path / "new" / "page.json"
    assert json.loads((tmp_path / "new" / "page.json").read_text()) == {"format": 1, **RESULT}
    assert out.read_text() == report.page(RESULT, {})
    assert len(list(out.parent.iterdir())) == 2


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    report.write(out, RESULT, {})
    old = out.read_bytes()

    real = os.replace

    def full(source, target):
        if str(target).endswith(".html"):
            raise OSError("disk is full")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        report.write(out, {**RESULT, "features": {"name": "other"}}, {})
    assert out.read_bytes() == old and len(list(tmp_path.iterdir())) == 2


def test_samples_stand_in_a_column_a_class():
    images = torch.zeros(7, 3, 8, 8, dtype=torch.uint8)
    width = 3 * (16 + 2) + 2
    shown = pictures.samples(images, [0, 1, 2, 0, 1, 2, 0], ["a", "b", "c"])
    assert Image.open(io.BytesIO(shown)).width == width
    assert Image.open(io.BytesIO(pictures.samples(images, None, None))).width == width  # 3 by 3
    many = pictures.samples(images[:1].repeat(200, 1, 1, 1), None, None)
    assert Image.open(io.BytesIO(many)).height == 10 * 18 + 2  # the first hundred


def test_pictures_of_a_bound_follow_its_numbers(monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "png_of", lambda figure: figures.append(figure) or b"")
    pictures.terms(BOUND)
    pictures.errors(BOUND)
    terms, errors = (figure.axes[0] for figure in figures)
    assert [axes.get_yscale() for axes in (terms, errors)] == ["log", "log"]
    step, decoder, prior = terms.get_lines()
    assert step.get_xydata().tolist() == [[5, 0.25], [12, 0.125]]
    assert decoder.get_xydata().tolist() == [[0, 1.0]]
    assert prior.get_label() == "prior's, L_T = 0.0001"
    band = terms.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.125 + 0.2)
    assert [line.get_xydata()[:, 1].tolist() for line in errors.get_lines()] == [
        BOUND["x0_mse"], BOUND["eps_mse"]
    ]  # fmt: skip


def test_a_table_escapes_its_cells():
    text = html_pages.table([("a", "b"), ("<1>", "&")])
    assert text == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>&lt;1&gt;</td><td>&amp;</td></tr></table>"
    )
    assert "<title>a &lt; b</title>" in html_pages.page("a < b", "")

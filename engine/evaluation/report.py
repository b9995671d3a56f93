"""The report of an evaluation: a short table of text, JSON, and an HTML page that stands alone.

``result`` is always the first dictionary, that of numbers, that ``evaluate`` returns.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashddpm.io import html_pages
from flashddpm.io.files import write_atomic, write_json

TITLE = "flashddpm: how good the model is"
FORMAT = 1

CAPTIONS = {
    "samples": "Samples, with the classes asked for",
    "terms": "Terms of the bound over t, with their standard error",
    "errors": "Mean squared error of the network's x0 and eps over t",
    "neighbours": "The samples nearest to a training image, each with its nearest training images",
}

Rows = list[tuple[str, str, str]]


def summary(result: Mapping[str, Any]) -> Rows:
    """Return the rows of the summary: tuples of (measure, of the model, of real images), all text.

    The first row is the head; a value that was not measured is "". "Of real images" is what the
    measure gives for real images in the place of samples.

    Args:
        result: the numbers of an evaluation: the first dictionary that ``evaluate`` returns.
    """
    rows: Rows = [("", "model", "real images")]
    if "bound" in result:
        bound = result["bound"]
        value = f"{bound['total']:.4f} +- {bound['total_stderr']:.4f}"
        rows.append(("bits a dimension, at most", value, ""))
    if "frechet" in result:
        rows.append(_row("Frechet distance", result["frechet"], "{distance:.3f}"))
    if "kernel" in result:
        rows.append(_row("kernel distance", result["kernel"], "{mean:.4g} +- {deviation:.2g}"))
    if "prc" in result:
        rows.append(_row("precision", result["prc"], "{precision:.1%}"))
        rows.append(_row("recall", result["prc"], "{recall:.1%}"))
    if "recognised" in result:
        found = result["recognised"]
        rows.append(("recognised as asked", _share(found["overall"]), _share(_real(found))))
    if "neighbours" in result:
        found = result["neighbours"]
        rows.append(_row("nearest training image, median", found, "{median:.2f}", "real"))
        rows.append(_row("nearest training image, smallest", found, "{smallest:.2f}", "real"))
        rows.append(("copies of a training image", str(len(found["duplicates"])), ""))
    return rows


def _row(
    name: str, found: Mapping[str, Any], form: str, beside: str = "training"
) -> tuple[str, str, str]:
    """Return the row of a measure: of the model and, where it was measured, of real images."""
    other = found[beside]
    return name, form.format(**found), "" if other is None else form.format(**other)


def _real(found: Mapping[str, Any]) -> float | None:
    return found.get("real_overall")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def text(result: Mapping[str, Any]) -> str:
    """Return the summary as a table in plain text, followed by lines that say what was measured.

    Args:
        result: the numbers of an evaluation: the first dictionary that ``evaluate`` returns.
    """
    rows = summary(result)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_notes(result)])


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Return lines of text that say which samples, features and images the numbers are from."""
    reference = result["reference"]
    held_out = "" if reference["held_out"] else " (no others were given: those of training)"
    lines = []
    if "samples" in result:
        s = result["samples"]
        lines.append(
            f"{s['count']:,} samples, seeds {s['seeds']}, labels {s['labels']}, guidance "
            f"{s['guidance']:g}, {s['solver']}, {s['num_steps']} steps; {reference['images']:,} "
            f"real images{held_out}"
        )
    if "features" in result:
        lines.append(f"features: {result['features']['name']}")
    if "bound" in result:
        b = result["bound"]
        lines.append(
            f"bound: of {b['images']:,} real images{held_out}, labels {b['labels']}, no guidance, "
            f"at {len(b['timesteps']):,} of {result['model']['num_train_timesteps']:,} timesteps"
        )
    return lines


def page(result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the report as one HTML page that needs no other file.

    Args:
        result: the numbers of an evaluation: the first dictionary that ``evaluate`` returns.
        pictures: PNG bytes by name: "samples", "terms", "errors" and "neighbours"; any may be
            missing, and others are left out.
    """
    parts = [html_pages.table(summary(result))]
    parts += [f"<p>{html.escape(line)}</p>" for line in _notes(result)]
    parts.append(
        "<p>Real images: as many training images, of the samples' classes, beside the same "
        "reference, what a perfect model would be given; of recognised, the reference itself, and "
        "of the nearest training image, reference images, whose distances are root mean squared, "
        "in levels of 0 to 255.</p>"
    )
    for name, caption in CAPTIONS.items():
        if name in pictures:
            image = html_pages.picture(pictures[name], caption)
            parts.append(f"<h2>{html.escape(caption)}</h2>{image}")
    if "recognised" in result:
        parts.append("<h2>Recognised as asked, by class</h2>" + _classes(result["recognised"]))
    if "bound" in result:
        parts.append("<h2>The bound, bits a dimension</h2>" + _bound(result["bound"]))
    facts = {key: result[key] for key in FACTS if key in result}
    parts.append(f"<h2>Of what</h2><pre>{html.escape(json.dumps(facts, indent=2))}</pre>")
    return html_pages.page(TITLE, "\n".join(parts))


FACTS = ("model", "samples", "data", "reference", "features", "environment")


def _classes(found: Mapping[str, Any]) -> str:
    real = found.get("real_by_class") or [None] * len(found["by_class"])
    rows = [
        (name, _share(ours), _share(theirs))
        for name, ours, theirs in zip(found["class_names"], found["by_class"], real, strict=True)
    ]
    return html_pages.table([("class", "samples", "real images"), *rows])


def _bound(bound: Mapping[str, Any]) -> str:
    rows = [("part", "bits a dimension", "standard error")]
    middle = bound["total"] - bound["prior"] - bound["decoder"]
    rows.append(("prior, L_T", f"{bound['prior']:.6f}", f"{bound['prior_stderr']:.6f}"))
    rows.append(("L_1 to L_(T-1)", f"{middle:.6f}", ""))
    rows.append(("decoder, L_0", f"{bound['decoder']:.6f}", f"{bound['decoder_stderr']:.6f}"))
    rows.append(("in all", f"{bound['total']:.6f}", f"{bound['total_stderr']:.6f}"))
    return html_pages.table(rows)


def write(out: Path, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Path:
    """Write the HTML page, and the numbers beside it as .json; return the path of the latter.

    Args:
        out: the path of the page to write, such as report.html; its suffix, which is not checked,
            is replaced by .json for the numbers. Its folder is made if it is missing.
        result: the numbers of an evaluation: the first dictionary that ``evaluate`` returns.
        pictures: PNG bytes by name: "samples", "terms", "errors" and "neighbours"; any may be
            missing, and others are left out.

    Raises:
        OSError: if a file cannot be written.
    """
    numbers = out.with_suffix(".json")
    write_json(numbers, {"format": FORMAT, **result})
    write_atomic(out, page(result, pictures).encode())
    return numbers

"""Pictures of an evaluation: samples, the bound's terms and the errors over t. All return PNGs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashddpm.data import to_float
from flashddpm.io.html_pages import png_of
from flashddpm.io.images import make_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

DPI = 110
SHOWN = 100
MAX_COLUMNS = 16


def samples(images: Tensor, labels: Sequence[int] | None, names: Sequence[str] | None) -> bytes:
    """Return the first samples, with the classes that were asked for.

    Args:
        images: uint8 [N, 1 or 3, H, W].
        labels: one an image, or None.
        names: of the classes, by number; None for the numbers.
    """
    few = images[:SHOWN]
    captions = None
    if labels is not None:
        captions = [names[label] if names else str(label) for label in labels[: len(few)]]
    classes = 0 if labels is None else max(labels) + 1
    columns = classes if 1 < classes <= MAX_COLUMNS else None
    return of_image(make_grid(to_float(few), columns, captions))


def of_image(image: Image) -> bytes:
    """Return a picture of PIL as a PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def terms(bound: Mapping[str, Any]) -> bytes:
    """Draw the bound's terms over t, with their standard error; ``bound`` is `Bound.to_dict`'s."""
    figure, axes = _axes()
    t, values, error = (bound[key][1:] for key in ("timesteps", "terms", "terms_stderr"))
    axes.plot(t, values, ".-", markersize=4, color="#1b6ca8", label="a step's, by t")
    low, high = ([v + sign * e for v, e in zip(values, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(t, low, high, alpha=0.3, color="#1b6ca8")
    decoder, prior = (f"{bound[key]:.3g}" for key in ("decoder", "prior"))
    axes.plot(0, bound["decoder"], "D", color="#d1495b", label=f"decoder's, L_0 = {decoder}")
    axes.plot([], [], " ", label=f"prior's, L_T = {prior}")  # often far below the others
    axes.set(yscale="log", xlabel="t", ylabel="bits a dimension")
    axes.legend(frameon=False)
    return png_of(figure)


def errors(bound: Mapping[str, Any]) -> bytes:
    """Draw the mean squared errors of x0 and eps over t; ``bound`` is `Bound.to_dict`'s."""
    figure, axes = _axes()
    for key, name, colour in (("x0_mse", "x0", "#1b6ca8"), ("eps_mse", "eps", "#d1495b")):
        axes.plot(bound["timesteps"], bound[key], ".-", markersize=4, color=colour, label=name)
    axes.set(yscale="log", xlabel="t", ylabel="mean squared error")
    axes.legend(frameon=False)
    return png_of(figure)


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=DPI, layout="constrained")
    return figure, figure.subplots()

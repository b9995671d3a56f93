"""Pictures of an evaluation as PNG bytes: samples, the bound's terms, and errors over t."""

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
    """Draw a grid of the first 100 samples, with their classes as captions; return the PNG's bytes.

    Args:
        images: uint8 [N, C, H, W] with 1 to 4 channels, N at least 1.
        labels: the class label of each image, N ints; None for no captions.
        names: the name of each class, by number; None to show the numbers.

    Raises:
        ValueError: if there is no image, if images have not 1 to 4 channels, or if there are fewer
            labels than images shown.
    """
    few = images[:SHOWN]
    captions = None
    if labels is not None:
        captions = [names[label] if names else str(label) for label in labels[: len(few)]]
    classes = 0 if labels is None else max(labels) + 1
    columns = classes if 1 < classes <= MAX_COLUMNS else None
    return of_image(make_grid(to_float(few), columns, captions))


def of_image(image: Image) -> bytes:
    """Return a PIL image as the bytes of a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def terms(bound: Mapping[str, Any]) -> bytes:
    """Plot the bound's terms over timesteps, with standard errors; return the PNG's bytes.

    Args:
        bound: the dictionary that `Bound.to_dict` returns, of which "timesteps", "terms",
            "terms_stderr", "decoder" and "prior" are read. No standard error may be None, as it is
            for one image.

    Raises:
        KeyError: if one of them is missing.
    """
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
    """Plot the squared errors of predicted x_0 and eps over timesteps; return the PNG's bytes.

    Args:
        bound: the dictionary that `Bound.to_dict` returns, of which "timesteps", "x0_mse" and
            "eps_mse" are read.

    Raises:
        KeyError: if one of them is missing.
    """
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

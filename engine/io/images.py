"""Pictures: samples to 8 bits, labelled grids, and animations of a trajectory."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.host import isolated
from flashddpm.io.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNELS = (1, 2, 3, 4)
"""Those of a picture: grey (L), grey and alpha (LA), RGB, or RGBA."""
MARGIN = 2
FONT_SIZE = 12


@isolated(grad=False)
def to_uint8(x: Tensor) -> Tensor:
    """Return round(clamp(x / 2 + 0.5, 0, 1) 255), as diffusers does, uint8 of the same shape."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@isolated(grad=False)
def to_pil(x: Tensor) -> list[Image]:
    """Return one picture for each image of [B, 1..4, H, W] in [-1, 1], as diffusers does.

    Returns:
        Of mode L, LA, RGB or RGBA, by the number of channels.

    Raises:
        ValueError: another number of channels.
    """
    from PIL import Image

    if x.ndim != 4 or x.shape[1] not in CHANNELS:
        raise ValueError(f"x of shape {tuple(x.shape)}: must be [B, 1..4, H, W]")
    array = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in array]


@isolated(grad=False)
def make_grid(
    x: Tensor, columns: int | None = None, captions: Sequence[str] | None = None, zoom: int = 2
) -> Image:
    """Return the images of [B, 1..4, H, W] in a grid, row by row.

    The grid is RGB and white; where an image has alpha, the white shows through.

    Args:
        x: in [-1, 1].
        columns: by default as many as make the grid about square.
        captions: a line of text under each image.
        zoom: side of the square that a pixel becomes.

    Raises:
        ValueError: no image, a wrong shape, or another number of captions than of images.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = to_pil(x)
    if not pictures:
        raise ValueError("x: holds no image; must hold at least one")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"captions: {len(captions)} for {len(pictures)} images")
    if columns is None:
        columns = math.ceil(math.sqrt(len(pictures)))
    arguments.integer("columns", columns, 1)
    arguments.integer("zoom", zoom, 1)
    rows = -(-len(pictures) // columns)
    w, h = pictures[0].width * zoom, pictures[0].height * zoom
    text = FONT_SIZE + 2 if captions is not None else 0
    cell_w, cell_h = w + MARGIN, h + text + MARGIN
    grid = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)
    for i, picture in enumerate(pictures):
        left = MARGIN + i % columns * cell_w
        top = MARGIN + i // columns * cell_h
        tile = picture.resize((w, h), Image.Resampling.NEAREST)
        alpha = tile.getchannel("A") if "A" in tile.mode else None
        grid.paste(tile.convert("RGB"), (left, top + text), alpha)
        if captions is not None:
            caption = captions[i]
            while caption and draw.textlength(caption, font) > w:
                caption = caption[:-1]
            draw.text((left, top), caption, "black", font)
    return grid


@isolated(grad=False)
def save_grid(
    x: Tensor,
    path: str | PathLike[str],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    zoom: int = 2,
) -> None:
    """Write the images as one picture; arguments as for ``make_grid``.

    Raises:
        ValueError: as for ``make_grid``, or a suffix that names no picture format.
    """
    grid = make_grid(x, columns, captions, zoom)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


@isolated(grad=False)
def save_folder(x: Tensor, folder: str | PathLike[str], seeds: Sequence[int]) -> int:
    """Write each image as FOLDER/SEED.png, whole or not at all; a file that is there stays.

    Returns:
        How many were written.

    Raises:
        ValueError: a seed stands twice, or another number of seeds than of images.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError("seeds: some stand twice, and a folder has one file a seed")
    if len(seeds) != len(x):
        raise ValueError(f"seeds: {len(seeds)} for {len(x)} images")
    written = 0
    for picture, seed in zip(to_pil(x), seeds, strict=True):
        path = Path(folder) / f"{seed}.png"
        if not path.exists():
            content = io.BytesIO()
            picture.save(content, "PNG")
            write_atomic(path, content.getvalue())
            written += 1
    return written


def save_gif(frames: Sequence[Image], path: str | PathLike[str], milliseconds: int = 80) -> None:
    """Write frames as an animation that rests on its last one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    times = [milliseconds] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)

"""Images: samples as 8-bit tensors, PIL images, captioned grids, folders of PNGs and animations."""

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
"""The numbers of channels of a picture: grey (L), grey and alpha (LA), RGB, or RGBA."""
MARGIN = 2
FONT_SIZE = 12


@isolated(grad=False)
def to_uint8(x: Tensor) -> Tensor:
    """Return images as 8-bit numbers, round(255 clamp(x / 2 + 0.5, 0, 1)), as in diffusers.

    Args:
        x: floating-point, of any shape; -1 becomes 0 and 1 becomes 255, also what lies beyond.

    Returns:
        uint8, of the same shape and on the same device.
    """
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@isolated(grad=False)
def to_pil(x: Tensor) -> list[Image]:
    """Return a batch of images as a list of PIL images, with diffusers' rounding to 8 bits.

    Args:
        x: floating-point [B, C, H, W] on any device, C in 1..4; -1 is black (0) and 1 is white
            (255), and what lies beyond is clamped.

    Returns:
        B images of W x H pixels and 8 bits a channel, of mode L, LA, RGB or RGBA for C = 1, 2, 3,
        4; an empty list for B = 0.

    Raises:
        ValueError: if x is not of four dimensions, or has another number of channels.
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
    """Return a batch of images as one PIL image: a grid, filled row by row from the top left.

    The grid is RGB and white; where an image has alpha, the white shows through. There is a margin
    of 2 pixels around every image.

    Args:
        x: floating-point [B, C, H, W], B at least 1, C in 1..4, in [-1, 1]; what lies beyond is
            clamped.
        columns: the number of columns; None for the square root of B, rounded up.
        captions: B lines of text, each drawn above its image and cut to its width; None for none.
        zoom: the side, in pixels, of the square that a pixel becomes.

    Raises:
        ValueError: if x holds no image or is of a wrong shape, if there are not as many captions as
            images, or if columns or zoom is no integer of at least 1.
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
    """Write a batch of images as one picture file, the grid of `make_grid`.

    Args:
        x: floating-point [B, C, H, W], B at least 1, C in 1..4, in [-1, 1]; what lies beyond is
            clamped.
        path: the file, whose suffix names the picture format; its folder is made if it is missing.
        columns: the number of columns; None for the square root of B, rounded up.
        captions: B lines of text, each drawn above its image and cut to its width; None for none.
        zoom: the side, in pixels, of the square that a pixel becomes.

    Raises:
        ValueError: if x holds no image or is of a wrong shape, if there are not as many captions as
            images, if columns or zoom is no integer of at least 1, or if the suffix names no
            picture format.
        OSError: if the file cannot be written.
    """
    grid = make_grid(x, columns, captions, zoom)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


@isolated(grad=False)
def save_folder(x: Tensor, folder: str | PathLike[str], seeds: Sequence[int]) -> int:
    """Write each image of a batch as FOLDER/SEED.png, atomically; a file that exists is kept.

    Args:
        x: floating-point [B, C, H, W], C in 1..4, in [-1, 1]; what lies beyond is clamped.
        folder: the folder, which is made if it is missing.
        seeds: the seeds of the B images, all different.

    Returns:
        The number of files written.

    Raises:
        ValueError: if a seed occurs twice, if there are not as many seeds as images, or if x is of
            a wrong shape.
        OSError: if a file cannot be written.
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
    """Write frames as an animation that repeats for ever and rests 1.5 seconds on its last frame.

    Args:
        frames: PIL images, at least one, all of one size.
        path: the file, whose suffix names the format, as .gif; its folder is made if it is missing.
        milliseconds: how long each frame but the last is shown; not checked here.

    Raises:
        IndexError: if there is no frame.
        ValueError: if the suffix names no picture format.
        OSError: if the file cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    times = [milliseconds] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)

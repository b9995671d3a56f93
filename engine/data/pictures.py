"""One picture file: opened with care, inspected, hashed and decoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
"""The only formats that Pillow may try: some of its other readers start programs."""
MODES = {"L": 1, "RGB": 3}
"""The number of channels of each Pillow mode that can be trained on."""


@dataclass(frozen=True)
class Found:
    """The result of looking at one file: its picture's mode and size, or an error.

    Attributes:
        mode: Pillow's name of the pixel format, such as "L" or "RGB"; "" if there is an error.
        height, width: the size in pixels; 0 if there is an error.
        sha256: the SHA-256 of the file's bytes, 32 bytes; b"" if it was not hashed.
        error: why the file cannot be read, as one line of text; "" if it can.
    """

    mode: str = ""
    height: int = 0
    width: int = 0
    sha256: bytes = b""
    error: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), ints in pixels; C is 0 if the mode is not one that can be trained on."""
        return MODES.get(self.mode, 0), self.height, self.width


def open_picture(path: Path) -> Image:
    """Open a picture file with Pillow without decoding it; the caller closes the picture.

    Args:
        path: a PNG, JPEG, BMP or WebP file, by its content.

    Raises:
        ValueError: if the file is missing or no plain file, is an animation, or has more pixels
            than Pillow's MAX_IMAGE_PIXELS.
        Exception: whatever Pillow raises for a broken file.
    """
    from PIL import Image

    if not path.is_file():  # to open a pipe may never end
        raise ValueError("is no plain file" if path.exists() else "is missing")
    picture = Image.open(path, formats=FORMATS)
    limit, wrong = Image.MAX_IMAGE_PIXELS, ""
    if limit is not None and picture.width * picture.height > limit:  # Pillow merely warns
        wrong = f"is {picture.height}x{picture.width}; must have at most {limit} pixels"
    elif getattr(picture, "is_animated", False):
        wrong = "is an animation; must be one picture"
    if wrong:
        picture.close()
        raise ValueError(wrong)
    return picture


def look(
    path: Path, shape: tuple[int, int, int] | None, hashed: bool = False
) -> tuple[Found, np.ndarray | None]:
    """Read a picture file's mode and size, and decode it if it has the wanted shape.

    A picture of another shape is not decoded, however large it is. No error of the file is raised:
    it is in ``Found.error``.

    Args:
        path: the file.
        shape: (C, H, W) of the pictures to decode, in pixels; None to decode none.
        hashed: whether a file of the wanted shape is hashed too, into ``Found.sha256``.

    Returns:
        What was found, and the pixels, uint8 [C, H, W], or None if they were not decoded: for
        another shape, a mode other than L and RGB, or an error.
    """
    try:
        with open_picture(path) as picture:
            found = Found(picture.mode, picture.height, picture.width)
            if found.mode not in MODES or found.shape != shape:
                return found, None
            pixels = np.asarray(picture)
        if hashed:
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").digest()
            found = Found(found.mode, found.height, found.width, sha256)
    except Exception as error:  # what Pillow raises on a broken file has no end
        return Found(error=" ".join(str(error).split()) or type(error).__name__), None
    return found, pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

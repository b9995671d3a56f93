"""One file with a picture: opened with care, looked at, hashed and decoded."""

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
"""The only ones that Pillow may try: some of its other readers start programs."""
MODES = {"L": 1, "RGB": 3}
"""Channels of the modes that can be trained on."""


@dataclass(frozen=True)
class Found:
    """What a look at a file gave: Pillow's mode, the size, a hash of the bytes, or an error."""

    mode: str = ""
    height: int = 0
    width: int = 0
    sha256: bytes = b""
    error: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W); 0 channels if the mode is none to train on."""
        return MODES.get(self.mode, 0), self.height, self.width


def open_picture(path: Path) -> Image:
    """Open a picture without decoding it.

    Raises:
        Exception: whatever Pillow has to say of a broken file.
        ValueError: no plain file, an animation, or more pixels than Pillow holds to be safe.
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
    """Look at a file, and decode it to uint8 [C, H, W] if that is its shape.

    Nothing of another shape is decoded, however large it is.

    Args:
        path: of the file.
        shape: the wanted shape; None only looks.
        hashed: whether a file of the wanted shape is hashed too.
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

"""manifest.json: what the images of a folder are, so that a run can go on in it or refuse.

    {"format": 1, "complete": true,
     "settings": {"model": "sha256:...", "solver": "ddim", "num_steps": 50, ...},
     "run": {"torch": "2.14.1", "batch_size": 64, "world_size": 2, ...},
     "images": {"7.png": {"seed": 7, "label": 3, "rank": 0}, ...}}

``settings`` are what an image depends on besides its seed and label: a later run in the folder must
have the same. ``run`` describes the latest run that drew something; only the last bits of images
depend on it. The file is written before the first image and again after the last, so that no image
is ever without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashddpm.io.files import write_atomic

log = logging.getLogger("flashddpm")

NAME = "manifest.json"
FORMAT = 1
FREE = ("world_size",)
"""The keys of ``run`` on which no bit of an image depends."""

Manifest = dict[str, Any]


def read(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, a dictionary of what its images are.

    Args:
        folder: the folder of images.

    Returns:
        A dictionary of "format" (1), "complete" (a bool), and "settings", "run" and "images"
        (dictionaries, which `merge` describes); None if the folder or its manifest does not exist.

    Raises:
        ValueError: if the file is not JSON, or no manifest of this format.
        OSError: if the file exists and cannot be read.
    """
    path = folder / NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    parts = [value.get(key) for key in ("settings", "run", "images")] if _is_ours(value) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path}: is no manifest of images in format {FORMAT}")
    if not all(isinstance(image, dict) for image in parts[-1].values()):
        raise ValueError(f"{path}: images: must be objects of seed, label and rank")
    return value


def _is_ours(value: Any) -> bool:
    return isinstance(value, dict) and value.get("format") == FORMAT


def merge(
    folder: Path,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    images: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    """Return the folder's manifest with images added that are yet to be drawn; nothing is written.

    Args:
        folder: the folder of images, which may not exist yet.
        settings: what images depend on besides seed and label, by name, such as the hash of the
            model, solver and num_steps: values that JSON can hold.
        run: facts of this run by name, such as the version of torch and the batch size: values that
            JSON can hold. Another value than the folder's is logged, not refused.
        images: for each file's name a dictionary of "seed", "label" (an int or None) and "rank",
            the number of the process that draws it.

    Returns:
        A dictionary of "format", "complete" (False), "settings", "run" and "images" (the folder's
        and the new ones); the folder's own, unchanged, if the file of every image exists.

    Raises:
        ValueError: if the folder has images of other settings, an image of the same name with
            another seed or label, or a file of such a name that is not in its manifest; or if its
            manifest is broken or of another format.
    """
    where = f"out={str(folder)!r}"
    old = read(folder)
    known = {} if old is None else old["images"]
    if old is not None:
        changes = _changes(old["settings"], settings)
        if changes:
            raise ValueError(f"{where}: holds images of other settings: {changes}")
    missing = [name for name, image in images.items() if _is_missing(folder, name, image, known)]
    if old is not None and not missing:
        return old
    if old is not None:
        of_bits = [{k: v for k, v in r.items() if k not in FREE} for r in (old["run"], run)]
        changes = _changes(*of_bits)
        if changes:
            log.info("the last bits may differ from those of the images in %s: %s", folder, changes)
    return {
        "format": FORMAT,
        "complete": False,
        "settings": dict(settings),
        "run": dict(run),
        "images": {**known, **{name: dict(images[name]) for name in missing}},
    }


def _is_missing(
    folder: Path, name: str, image: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Return whether an image is yet to be drawn.

    Raises:
        ValueError: if the manifest has it with another seed or label, or its file is not in it.
    """
    where = f"out={str(folder)!r}"
    there = (folder / name).exists()
    if there and name not in known:
        raise ValueError(f"{where}: holds {name} already, which no {NAME} names")
    if name in known:
        mine = {key: image[key] for key in ("seed", "label")}
        changes = _changes({key: known[name].get(key) for key in mine}, mine)
        if changes:
            raise ValueError(f"{where}: {name} is of another {changes}")
    return not there


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return, as text, the keys whose values differ."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}={old.get(key)!r} there, {new.get(key)!r} now" for key in keys)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into its folder, atomically; a file that has the same text is not touched.

    "complete" becomes true if the file of every image exists.

    Args:
        folder: the folder of images; it is made if it is missing.
        manifest: a dictionary of "format", "complete", "settings", "run" and "images", as `merge`
            returns it; it is not changed.

    Raises:
        OSError: if the file cannot be written.
    """
    complete = all((folder / name).exists() for name in manifest["images"])
    head = json.dumps({**manifest, "complete": complete, "images": None}, indent=2)
    lines = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(image)}" for name, image in manifest["images"].items()
    )
    text = head.removesuffix("null\n}") + "{\n" + lines + "\n  }\n}\n"
    path = folder / NAME
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text.encode())


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed run left in a folder; no other run may be using it.

    Args:
        folder: the folder of images; nothing happens if it does not exist.

    Raises:
        OSError: if a file cannot be removed.
    """
    for pattern in (".*.png.*.tmp", f".{NAME}.*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)

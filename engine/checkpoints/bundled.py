"""`bundled`: the folders of the trained models that come with the package."""

from __future__ import annotations

from pathlib import Path

from flashddpm import arguments

MODELS = Path(__file__).parents[1] / "models"


def bundled(name: str = "fashion-mnist") -> Path:
    """Return the path of the folder of a model that comes with the package.

    Args:
        name: the name of the model, such as "fashion-mnist".

    Raises:
        ValueError: if there is no such model; the text lists those that there are.
    """
    names = sorted(index.parent.name for index in MODELS.glob("*/model_index.json"))
    return MODELS / arguments.one_of("name", name, names)

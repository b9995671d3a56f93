"""docs/math.md names tests and code; every name must be there."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")


def test_every_test_named_exists():
    file, named = None, []
    for match in re.finditer(r"`(tests/[\w/]+\.py)?::(\w+)`", TEXT):
        file = match[1] or file
        named.append((file, match[2]))
    assert len(named) > 25
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def test_every_equation_has_a_row():
    for i in range(1, 11):
        assert f"| S{i} |" in TEXT


def test_the_model_card_quotes_the_measured_quality():
    folder = ROOT / "engine" / "models" / "fashion-mnist"
    card = (folder / "README.md").read_text(encoding="utf-8")
    measured = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    for key in ("recognised", "classifier_accuracy"):
        assert f"| {measured[key]:.1%}" in card
    for key in ("frechet_distance", "frechet_distance_of_training_images"):
        assert f"| {measured[key]:.2f}" in card
    for name in ("recognised_by_class", "classifier_accuracy_by_class"):
        assert " | ".join(f"{share:.0%}" for share in measured[name]) in card

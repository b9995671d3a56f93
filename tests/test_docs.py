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
    measured = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    recognised, frechet, prc = (measured[key] for key in ("recognised", "frechet", "prc"))
    rows = [
        (f"{recognised['overall']:.1%}", f"{recognised['real_overall']:.1%} (10,000 test images)"),
        (f"{frechet['distance']:.2f}", f"{frechet['training']['distance']:.2f} (1,000 training"),
        (f"{prc['precision']:.1%}", f"{prc['training']['precision']:.1%} (1,000 training"),
        (f"{prc['recall']:.1%}", f"{prc['training']['recall']:.1%} (1,000 training"),
        [f"{of['median']:.1f}" for of in (measured["neighbours"], measured["neighbours"]["real"])],
        [f"{share:.0%}" for share in recognised["by_class"]],
        [f"{share:.0%}" for share in recognised["real_by_class"]],
    ]
    for cells in rows:
        assert f"| {' | '.join(cells)}" in card
    bound = measured["bound"]
    assert f"| {bound['total']:.3f} ± {bound['total_stderr']:.3f} |" in card
    assert f"{bound['images']} test\nimages at {len(bound['timesteps'])} of" in card

"""docs/math.md names tests and code; every name must be there."""

import ast
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

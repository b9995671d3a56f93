"""docs/math.md names tests and code; every name must be there."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import flashddpm as fd

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("docs/examples/*.py")]
)
PUBLIC = {"kernels", "testing", "data", "evaluation"}
"""Modules that README and docs import from, besides the top."""
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


def test_every_name_of_code_exists():
    """Of a public class, of the kernels, or of the one module with that name."""
    rows = [line.split("|")[3] for line in TEXT.splitlines() if re.match(r"\| S\d+ \|", line)]
    names = re.findall(r"`([\w.]+)`", " ".join(rows))
    assert len(names) > 15
    for name in names:
        *path, last = name.split(".")
        home = getattr(fd, path[0], None)
        if home is None:
            (file,) = (ROOT / "engine").rglob("/".join(path) + ".py")
            module = ".".join(file.relative_to(ROOT / "engine").with_suffix("").parts)
            home = importlib.import_module(f"flashddpm.{module}")
        else:
            for part in path[1:]:
                home = getattr(home, part)
        assert hasattr(home, last), name


def imports(path: Path):
    """Yield (module, name) of every import from flashddpm in a page's Python or a program."""
    text = path.read_text(encoding="utf-8")
    blocks = [text] if path.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.S)
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashddpm"):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("flashddpm")]
            yield from ((name, "") for name in names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_import_public_names_only(path):
    for module, name in imports(path):
        if module == "flashddpm":
            assert name in {"", *fd.__all__, *PUBLIC}
        else:
            assert module.split(".")[1] in PUBLIC


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

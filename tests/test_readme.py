"""The README's Python runs, block after block in one namespace, as a reader would type it."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 10
    namespace: dict = {}
    shapes = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
        shapes.append(tuple(namespace["x"].shape))
    assert shapes[:4] == [(20, 1, 28, 28), (3, 1, 28, 28), (3, 1, 28, 28), (3, 1, 28, 28)]
    assert shapes[4] == (4, 3, 16, 16) and namespace["image"].shape == (1, 28, 28)
    assert namespace["y"].shape == (2, 1, 28, 28) and namespace["trajectory"].position == 3
    assert (tmp_path / "garments.png").exists()
    assert shapes[5] == (4, 3, 16, 16) and (tmp_path / "other" / "model_index.json").exists()
    assert [picture.size for picture in namespace["pictures"]] == [(16, 16)] * 4
    assert namespace["z"].shape == namespace["x_T"].shape == (2, 1, 28, 28)
    assert namespace["network"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["docs/math.md", "docs/parity.md", "CONTRIBUTING.md", "LICENSE", "docs/samples.png"]
)
def test_what_the_readme_links_to_is_there(name):
    assert (README.parent / name).is_file()


def test_the_table_is_that_of_the_committed_results():
    from flashddpm.benchmarks.measure.runs import BenchmarkRun
    from flashddpm.benchmarks.reports.table import filled, table

    pages = [README, *sorted((README.parent / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert filled(page) == text, "python -m flashddpm.benchmarks.reports.table writes it again"
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for results in (README.parent / "benchmarks" / "results").glob("*.json"):
        if results.name == "solver-study.json":  # tests/benchmarks/test_solver_study has it
            continue
        assert table(BenchmarkRun.read(results)) in text, f"{results.name} is in no page"

"""Whether two versions of flashddpm do the same on the CPU, bit for bit.

    python tests/same_bits BEFORE [AFTER]

BEFORE and AFTER are revisions of this repository, AFTER by default HEAD. Each is laid out as an
installed package and put to work.py, in processes of their own; AFTER also goes on from what BEFORE
left half done. Prints a table, and exits with 1 if a tensor or text differs, is missing on either
side, or is not there at all, or a section fails. It takes some minutes a side; about half of that
with --leave-out compiled,scorecard,processes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).resolve().parent
FOLDERS = {"engine": ".", "kernels": "kernels", "benchmarks": "benchmarks"}
"""Where the repository's folders lie in the package."""
PRIVATE = ("PYTHON", "TORCH", "TRITON", "OMP_", "MKL_", "FLASHDDPM")
"""How variables begin that the work does not inherit."""

Found = dict[str, Tensor | str]


def git(*words: str) -> bytes:
    """Return what git says of this repository."""
    line = ["git", "-C", str(HERE), *words]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout


def lay_out(revision: str, site: Path) -> None:
    """Write a revision as the package ``flashddpm`` in a folder."""
    root = git("rev-parse", "--show-toplevel").decode().strip()
    archive = git("-C", root, "archive", "--format=tar", revision, *FOLDERS)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(site / "checkout", filter="data")
    for folder, place in FOLDERS.items():
        shutil.copytree(site / "checkout" / folder, site / "flashddpm" / place, dirs_exist_ok=True)
    shutil.rmtree(site / "checkout")


def put_to_work(side: Path, earlier: Path, left_out: str, interpret: bool) -> int:
    """Run work.py in a fresh process, on one thread and without a GPU; return its exit code."""
    site, out, folder = side / "site", side / "out", side / f"work-{interpret:d}"
    folder.mkdir()
    out.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(PRIVATE)}
    variables = {
        "PYTHONPATH": os.pathsep.join([str(site), str(HERE)]),
        "PYTHONSAFEPATH": "1",
        "XDG_CACHE_HOME": str(side / "cache"),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": f"{interpret:d}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    line = [sys.executable, *map(str, (HERE / "work.py", site, out, earlier)), left_out]
    with open(side / "failures", "ab") as failures, open(side / "log", "ab") as log:
        given = {"cwd": folder, "env": {**kept, **variables}, "stdout": failures, "stderr": log}
        return subprocess.run(line, **given).returncode


def read(path: Path) -> Found:
    """Return the tensors and texts of a section, nothing of one that is missing."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | (file.metadata() or {})


def difference(before: Tensor | str | None, after: Tensor | str | None) -> str:
    """Return how two values differ, in words; an empty text where they are the same bits."""
    if before is None or after is None:
        return f"missing {'before' if before is None else 'after'}"
    if isinstance(before, str) or isinstance(after, str):
        if before == after:
            return ""
        lines = zip(str(before).splitlines(), str(after).splitlines(), strict=False)
        first = next(((a, b) for a, b in lines if a != b), ("one", "longer than the other"))
        at = len(os.path.commonprefix(first))
        start = max(at - 30, 0)
        return " -> ".join(repr(line[start : at + 50]) for line in first)
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} {[*before.shape]} -> {after.dtype} {[*after.shape]}"
    one, two = (x.contiguous().view(-1).view(torch.uint8) for x in (before, after))
    if torch.equal(one, two):
        return ""
    apart = (one != two).view(before.numel(), -1).any(1).sum()
    most = (before.double() - after.double()).abs().max()
    return f"{apart} of {before.numel()} numbers, by up to {most:.3g}"


def compare(before: Path, after: Path) -> bool:
    """Print a line a section, and whether they are the same; return whether all are."""
    found = {path.stem for out in (before, after) for path in out.glob("*.safetensors")}
    same = bool(found)
    print(f"{'section':14}{'tensors':>8}{'texts':>7}  outcome")
    for section in sorted(found):
        a, b = (read(out / f"{section}.safetensors") for out in (before, after))
        names = {**a, **b}
        unlike = {name: said for name in names if (said := difference(a.get(name), b.get(name)))}
        texts = sum(isinstance(value, str) for value in names.values())
        outcome = "same" if names else "EMPTY"
        if unlike:
            name, said = next(iter(unlike.items()))
            outcome = f"{len(unlike)} DIFFER, the first: {name}: {said}"
        print(f"{section:14}{len(names) - texts:8}{texts:7}  {outcome}", flush=True)
        same &= outcome == "same"
    return same


def main() -> int:
    """Run both sides and compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a revision")
    parser.add_argument("after", help="another", nargs="?", default="HEAD")
    parser.add_argument("--leave-out", help="sections, comma-separated", default="")
    asked = parser.parse_args()
    commits = [
        git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
        for revision in (asked.before, asked.after)
    ]
    with tempfile.TemporaryDirectory() as folder:
        sides, well = [Path(folder).resolve() / name for name in ("before", "after")], True
        begun = sides[0] / "work-0" / "begun"
        for side, commit in zip(sides, commits, strict=True):
            lay_out(commit, side / "site")
            start = time.perf_counter()
            codes = [put_to_work(side, begun, asked.leave_out, i) for i in (False, True)]
            seconds = time.perf_counter() - start
            print(f"{side.name}: {commit[:12]}, {seconds:.0f} s, exit codes {codes}", flush=True)
            if any(codes):
                well = False
                said = ((side / name).read_text(errors="replace") for name in ("failures", "log"))
                print(next((text for text in said if text), "")[-5000:])
        well &= compare(*(side / "out" for side in sides))
    left_out = f", {asked.leave_out} left out" if asked.leave_out else ""
    print(f"{'the same, bit for bit' if well else 'NOT THE SAME'}{left_out}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

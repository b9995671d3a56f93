"""Write what this version of flashddpm writes, small, for later versions to go on from.

    python tests/earlier/make.py tests/earlier/VERSION-COMMIT

The new folder holds what `begin` of tests/same_bits/halfway.py leaves, a file of benchmark results,
and, in expected.safetensors, what followed here from each of CONTINUED: tensors, and texts as the
file's metadata. States and loss curves of continued runs are left out: the weights tell.
"""

from __future__ import annotations

import contextlib
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PATH = Path(__file__).parents[1] / "same_bits" / "halfway.py"
HALFWAY = runpy.run_path(str(PATH), run_name="halfway")
LEFT_OUT = ("run run/states", "run run/loss.png", "evaluation report/report.html")


def main(folder: Path) -> None:
    """Fill a folder that does not exist yet."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        HALFWAY["begin"]()
        Path("report/report.html").unlink()
        bench = ("bench", "--cases", "noise", "--device", "cpu", "--out", "benchmark.json")
        HALFWAY["command"](*bench)
    tensors, texts = {}, {}
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        with contextlib.chdir(copy):
            for part in HALFWAY["CONTINUED"]:
                for name, value in part():
                    kept = tensors if isinstance(value, Tensor) else texts
                    kept[f"{part.__name__} {name}"] = value
    for kept in (tensors, texts):
        for name in [name for name in kept if name.startswith(LEFT_OUT)]:
            del kept[name]
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors", texts
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

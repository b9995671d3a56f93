"""``python -m flashddpm.benchmarks.table RESULTS.json``: results as the README's Markdown table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(content: dict[str, Any]) -> str:
    """Return the table of one file of results, headed by the machine that they are from."""
    where = content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    card = f"{where['gpu']['name']}, " if where["gpu"] else ""
    lines = [
        f"{card}{where['cpu']} ({where['capability']}), {where['threads']} threads, "
        f"Python {where['python']}, {versions}, commit {where['commit']}.",
        "",
        "| case | ours | peer | times as fast (quartiles) | A/A spread |",
        "|---|---|---|---|---|",
    ]
    for result in content["results"]:
        v = result["values"]
        if "ratio" in v:
            lines.append(
                f"| {result['case']} | {_time(v['ours_seconds'])} | {result['peer']}: "
                f"{_time(v['peer_seconds'])} | {v['ratio']:.2f} "
                f"({v['ratio_low']:.2f} to {v['ratio_high']:.2f}) | {v['spread']:.2f} |"
            )
        else:
            figures = ", ".join(f"{k.replace('_', ' ')} {x:.3g}" for k, x in v.items())
            lines.append(f"| {result['case']} | {figures} | | | |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

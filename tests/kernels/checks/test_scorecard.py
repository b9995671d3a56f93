"""The scorecard (kernels/checks/scorecard.py): every kernel compiled, counted, held to its budget.

One child process, without the interpreter, compiles everything: ``flashddpm kernels --json``.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from flashddpm.kernels.checks import budgets, compiled, counting, plain, report, sass
from flashddpm.kernels.checks.scorecard import Entry, Scorecard

pytestmark = pytest.mark.timeout(900)

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
CASES = [
    f"{kernel.name} {dtype} sm_{arch}"
    for kernel in compiled.KERNELS.values()
    for dtype in kernel.dtypes
    for arch in compiled.ARCHITECTURES
]


@pytest.fixture(scope="module")
def written() -> dict:
    """What the command writes."""
    command = [sys.executable, "-P", "-m", "flashddpm", "kernels", "--json"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode in (0, 1) and run.stdout, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def card(written) -> Scorecard:
    entries = []
    for entry in written["kernels"]:
        widths = {k: {int(w): n for w, n in v.items()} for k, v in entry["accesses"].items()}
        entries.append(Entry(**entry | {"accesses": widths}))
    return Scorecard(entries, written["bytes_per_element"], gated=True)


@pytest.fixture
def entries(card) -> dict[str, Entry]:
    return {entry.name: entry for entry in card.entries}


@pytest.mark.parametrize("case", CASES)
def test_gates_and_budget(entries, case):
    """Exact operations, 64-bit offsets, 16-byte accesses, no spills; within the budget."""
    entry = entries[case]
    assert entry.faults == [] and entry.unknown == []
    assert entry.over == [] or not budgets.pinned()
    if compiled.KERNELS[entry.kernel].exact:
        assert set(entry.rounding) <= {"rn"}


def test_nothing_fails(written, entries):
    assert set(entries) == set(CASES)
    assert written["faults"] == []
    assert written["over_budget"] == [] or not budgets.pinned()


@pytest.mark.parametrize("case", counting.CASES)
def test_bytes_counted_are_those_of_the_formula(written, case):
    for counts in written["bytes_per_element"][case].values():
        assert counts["counted"] == counts["formula"] > 0


@pytest.mark.parametrize(
    ("case", "images", "state"),
    [
        ("add_noise", 2, 0),
        ("diffusion_loss", 1, 0),
        ("diffusion_loss v", 2, 0),
        ("diffusion_loss backward", 2, 0),
        ("diffusion_loss v backward", 3, 0),
        ("denoise_step", 2, 8),
        ("denoise_step guided", 4, 8),
        ("denoise_step multistep", 2, 16),
        ("denoise_step given", 2, 12),
        ("denoise_step learned", 3, 8),
        ("hybrid_loss", 2, 0),
        ("hybrid_loss backward", 4, 0),
    ],
)
def test_bytes_an_element(written, case, images, state):
    """Images of the dtype and bytes of float32 state for each element."""
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        assert written["bytes_per_element"][case][dtype]["counted"] == images * size + state


def test_what_bounds_the_kernels(card):
    """The update by memory; noise and loss in 16 bits by Philox, at most 72 instructions."""
    bounds = {(bound.kernel, bound.dtype): bound for bound in card.bounds}
    for dtype in compiled.DTYPES:
        assert bounds["denoise_step", dtype].by == "memory"
    for entry in card.entries:
        if entry.kernel.startswith(("add_noise", "diffusion_loss")) and entry.dtype != "fp32":
            assert entry.instructions <= 72
    for kernel in ("add_noise", "diffusion_loss", "diffusion_loss_backward"):
        assert bounds[kernel, "bf16"].by == "issue"
    found = bounds["denoise_step", "bf16"].times
    assert found["memory"] == pytest.approx(4.0)  # 12 bytes at 3 TB/s
    step = next(e for e in card.entries if e.name == "denoise_step bf16 sm_90")
    assert found["issue"] == pytest.approx(step.instructions / 128 / 132 / 1.755e9 * 1e12)
    assert found["integer"] == pytest.approx(step.pipes["integer"] / 64 / 132 / 1.755e9 * 1e12)


@pytest.mark.skipif(not budgets.pinned(), reason="the page quotes the pinned version of Triton")
def test_the_page_quotes_the_scorecard(card):
    """docs/kernels.md holds the bounds and the bytes as the command prints them."""
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")
    for section in (report.bounds(card), report.bytes_moved(card)):
        assert "\n".join(section) in page


def test_pipes_add_up(card):
    for entry in card.entries:
        if entry.instructions is not None:
            assert sum(entry.pipes.values()) == pytest.approx(entry.instructions)
    loops = {entry.kernel for entry in card.entries if entry.instructions is None}
    assert loops == {"loss_mean", "sample_stats", "sample_stats_learned"}


def changed(card: Scorecard, index: int, **values) -> Scorecard:
    entries = list(card.entries)
    entries[index] = dataclasses.replace(entries[index], **values)
    return dataclasses.replace(card, entries=entries)


def test_a_fault_fails_and_is_printed(card):
    before = len(card.faults)
    broken = changed(card, 0, faults=["9 x lg2.approx.f32"])
    assert len(broken.faults) == before + 1
    assert "FAIL philox fp32 sm_80: 9 x lg2.approx.f32" in report.text(broken)


def test_an_exceeded_budget_fails_for_the_pinned_version_only(card):
    over = ["99 registers, 46 budgeted (noise)"]
    broken = changed(card, 0, over=over)
    assert any("99 registers" in fault for fault in broken.faults)
    other = dataclasses.replace(broken, gated=False)
    assert not any("99 registers" in fault for fault in other.faults)
    assert any("99 registers" in fault for fault in other.excess)
    assert "reported, not gated" in report.text(other) and "99 registers" in report.text(other)


def test_miscounted_bytes_fail(card):
    moved = json.loads(json.dumps(card.bytes))
    moved["add_noise"]["bf16"]["counted"] = 6.0
    broken = dataclasses.replace(card, bytes=moved)
    assert "add_noise bf16: 6 bytes an element counted, 4 by the formula" in broken.faults


def test_an_update_that_is_not_memory_bound_fails(card):
    (index,) = [i for i, e in enumerate(card.entries) if e.name == "denoise_step fp32 sm_90"]
    slow = changed(card, index, clocks=card.entries[index].clocks | {"issue": 1000.0})
    assert "denoise_step fp32: bound by issue, must be by memory" in slow.faults


def test_an_unknown_opcode_is_listed(card):
    text = report.text(changed(card, 0, unknown=["FROB"], pipes={"unknown": 1.0}))
    assert "FROB (philox fp32 sm_80)" in text


@pytest.mark.parametrize("verbose", [False, True])
def test_the_report_is_readable(card, verbose):
    text = report.text(card, verbose)
    assert max(map(len, text.splitlines())) <= 120
    for kernel in compiled.KERNELS:
        assert kernel in text
    assert ("accesses: " in text) == verbose


BUDGET = budgets.Budget(32, 64, 10.0, "why", width=4)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((32, 64, 10.0, 4), None),
        ((32, 64, None, None), None),
        ((33, 64, 10.0, 4), "33 registers, 32 budgeted (why)"),
        ((32, 65, 10.0, 4), "65 bytes of shared memory, 64 budgeted (why)"),
        ((32, 64, 10.5, 4), "10.5 instructions an element, 10 budgeted (why)"),
        ((32, 64, 10.0, 2), "accesses of 2 bytes, 4 budgeted (why)"),
    ],
)
def test_budget(found, expected):
    assert budgets.exceeded(BUDGET, *found) == ([expected] if expected else [])
    assert "no budget" in budgets.exceeded(None, *found)[0]


def test_every_kernel_has_a_budget_with_a_reason():
    for kernel in compiled.KERNELS.values():
        assert kernel.budgets.keys() == {4 if dtype == "fp32" else 2 for dtype in kernel.dtypes}
        for budget in kernel.budgets.values():
            assert len(budget.reason) > 10


SASS = """
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P2 IMAD.WIDE.U32 R8, R0, 0x400, RZ ;
        /*0020*/                   FADD.FTZ R8, R25, R8 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   MOV R6, 0x1850 ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sqrt_slowpath) ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0070*/                   FROB.X2 R1, R2 ;
.L_x_2:
        /*0080*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0090*/                   NOP ;
        /*00a0*/                   EXIT ;
$__internal_0_$__cuda_sqrt_slowpath:
        /*00b0*/              @!P2 BRA `(.L_x_3) ;
        /*00c0*/                   MUFU.RSQ R27, R24 ;
.L_x_3:
        /*00d0*/                   RET.REL.NODEC R28 `(k) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
        /*00f0*/                   NOP;
"""


def test_machine_code_is_read():
    """Slow paths and padding apart; an opcode that nobody knows is counted and named."""
    code = sass.read(SASS)
    known = ("LDC", "IMAD", "FADD", "BRA", "UIADD3", "EXIT")
    assert code.opcodes == Counter({**dict.fromkeys(known, 1), "FROB": 1})
    assert (code.instructions, code.slow, code.loops) == (7, 6, False)
    assert code.unknown == ["FROB"]
    assert code.pipes == {"uniform": 2, "multiply": 1, "float": 1, "control": 2, "unknown": 1}
    assert code.clocks() == {"issue": 7 / 128, "multiply": 1 / 64, "float": 1 / 128}


@pytest.mark.parametrize("back", ["BRA `(.L_x_0) ;", "BRA.U UP0, `(.L_x_0) ;"])
def test_a_loop_is_seen(back):
    """In a block that calls a slow path too."""
    assert sass.read(SASS.replace("FROB.X2 R1, R2 ;", back)).loops
    assert sass.read(SASS.replace("BRA `(.L_x_2) ;", back)).loops


def test_a_line_that_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="not understood"):
        sass.read(SASS.replace("FROB.X2", "???"))


def chain(case: str):
    return counting.CASES[case][1].plain


def test_a_case_without_plain_pytorch_has_no_such_bytes(written):
    assert chain("denoise_step given") is None
    for counts in written["bytes_per_element"]["denoise_step given"].values():
        assert counts["plain"] is None


def test_plain_pytorch_is_counted():
    """Known by hand: noise is one write, a product a read and a write, a sum two reads and one."""
    x0 = torch.ones(2, 3, 4, 5)
    args = {"x0": x0, "t": torch.zeros(2, dtype=torch.int64), "rows": torch.ones(1, 2)}
    n = x0.numel()
    assert plain.bytes_moved(chain("add_noise"), args, 60) == (1 + 2 + 2 + 3) * 4 * n
    assert plain.bytes_moved(chain("add_noise"), args | {"x0": x0.bfloat16()}, 60) == 8 * 2 * n
    args = {"seeds": args["t"], "shape": (3, 4, 5)}
    assert plain.bytes_moved(chain("philox"), args, 60) == 4 * n


def test_plain_gradients_are_counted():
    """The mean's gradient is written for each element; the error's reads three, writes one."""
    x0, out = torch.ones(2, 2, 3, 4, 5).unbind()
    args = {"x0": x0, "out": out.clone().requires_grad_(), "t": torch.zeros(2, dtype=torch.int64)}
    args["rows"] = torch.ones(1, 3)
    n = x0.numel()
    assert plain.bytes_moved(chain("diffusion_loss"), args, 60) == (3 + 1) * 4 * n
    gradient = plain.bytes_moved(chain("diffusion_loss backward"), args, 60, backward=True)
    assert gradient == (1 + 4) * 4 * n


@pytest.mark.skipif(not compiled.INTERPRETED, reason="the interpreter counts")
def test_bytes_are_counted_by_their_masks():
    module = importlib.import_module("flashddpm.kernels.philox")
    seeds = torch.zeros(2, dtype=torch.int64)
    with counting.counted() as moved:
        module.philox(seeds, seeds, (1, 5, 7))
    assert moved == {"loaded": 0, "stored": 2 * 35 * 4}
    module.philox(seeds, seeds, (1, 5, 7))
    assert moved["stored"] == 280  # not after the block


def test_counting_needs_the_interpreter():
    command = [sys.executable, "-P", "-m", "flashddpm.kernels.checks.counting"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode and "TRITON_INTERPRET" in run.stderr
    with pytest.raises(RuntimeError, match="counting bytes failed: oh"):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.exit('oh')"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        counting.result(child)

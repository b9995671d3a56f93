"""What each kernel may use, and why: gated for one version of Triton, reported for others.

Another compiler gives other numbers for the same kernel, so a change of version must not look like
a change of ours. A budget is what the pinned version gives, the worst of the architectures,
instructions rounded up to a half: one that is exceeded says that the kernel became worse, and one
that is raised needs a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

PINNED = "3.8"
"""Of Triton: the major and minor version that the budgets were taken from."""


@dataclass(frozen=True)
class Budget:
    """The most that a kernel may use on any architecture, for images of one size of element.

    Attributes:
        registers: of a thread; a multiprocessor has 65,536 for at most 2048 threads, so that 64
            let half of them stay resident, 96 a third.
        shared: bytes of a program.
        instructions: an element, slow paths apart; None where a loop makes them no total.
        reason: what it is spent on.
        width: bytes of the narrowest access of an image, foreign ones included.
        memory_bound: whether moving its bytes must take longest on the reference card.
    """

    registers: int
    shared: int
    instructions: float | None
    reason: str
    width: int = 16
    memory_bound: bool = False


_DRAW = "a Philox call and two Box-Muller transforms for 4 elements, 4 calls a thread side by side"
_NOISING = f"{_DRAW}; two products, a sum from -0, conversions: below the 72 that noise may cost"
_SUMMED = f"{_DRAW}; the error and its penalty, summed over the program by shuffles: below 72"
_GRADIENT = f"{_DRAW}; the error and its slope, scaled: below 72"
_HYBRID = (
    "noise, and the bound of a learned variance: exponentials and a logarithm by polynomials, the "
    "decoder's bins with four divisions; 2C channels of 3 are read one by one"
)
_BOUND = (
    "noise, and a term of the bound: an exponential, or the decoder's bin with five, a logarithm "
    "and four divisions; three sums; 2C channels of 3 are read one by one"
)
_STEP = f"{_DRAW}; every term of the formula, a branch each; the most live values of all kernels"
_GIVEN = "every term of the formula, a branch each; the noise is read"
_LEARNED = f"{_DRAW}; every term and an exponential; 2C channels of 3 are read one by one"
_STATS = "loops over a whole sample; a histogram of 256 counts in shared memory"
_INDEX = "an index or two for a thread: two loads and a store"
BUDGETS: dict[tuple[str, int], Budget] = {
    ("philox", 4): Budget(46, 0, 51.0, _DRAW),
    ("add_noise", 4): Budget(64, 0, 58.0, _NOISING),
    ("add_noise", 2): Budget(60, 0, 60.5, _NOISING),
    ("diffusion_loss", 4): Budget(71, 8, 65.5, _SUMMED),
    ("diffusion_loss", 2): Budget(56, 8, 67.5, _SUMMED),
    ("diffusion_loss_backward", 4): Budget(71, 0, 64.0, _GRADIENT),
    ("diffusion_loss_backward", 2): Budget(56, 0, 67.0, _GRADIENT),
    ("diffusion_loss_l1", 4): Budget(71, 8, 64.5, _SUMMED),
    ("diffusion_loss_l1", 2): Budget(56, 8, 66.5, _SUMMED),
    ("diffusion_loss_backward_l1", 4): Budget(72, 0, 67.0, _GRADIENT),
    ("diffusion_loss_backward_l1", 2): Budget(58, 0, 70.0, _GRADIENT),
    ("diffusion_loss_huber", 4): Budget(71, 8, 70.0, _SUMMED),
    ("diffusion_loss_huber", 2): Budget(56, 8, 71.5, _SUMMED),
    ("diffusion_loss_backward_huber", 4): Budget(71, 0, 64.5, _GRADIENT),
    ("diffusion_loss_backward_huber", 2): Budget(56, 0, 68.0, _GRADIENT),
    ("loss_mean", 4): Budget(60, 8, None, "a loop over partial sums"),
    ("hybrid_loss", 4): Budget(58, 16, 303.0, _HYBRID, width=4),
    ("hybrid_loss", 2): Budget(72, 16, 308.0, _HYBRID, width=2),
    ("hybrid_loss_backward", 4): Budget(84, 2048, 323.5, _HYBRID, width=4),
    ("hybrid_loss_backward", 2): Budget(84, 2048, 336.5, _HYBRID, width=2),
    ("denoise_step", 4): Budget(78, 8, 101.5, _STEP, memory_bound=True),
    ("denoise_step", 2): Budget(96, 2048, 106.5, _STEP, memory_bound=True),
    ("denoise_step_given", 4): Budget(76, 8, 53.5, _GIVEN, memory_bound=True),
    ("denoise_step_given", 2): Budget(80, 2048, 59.5, _GIVEN, memory_bound=True),
    ("denoise_step_learned", 4): Budget(71, 16, 176.5, _LEARNED, width=4),
    ("denoise_step_learned", 2): Budget(76, 4096, 186.0, _LEARNED, width=2),
    ("sample_stats", 4): Budget(64, 1024, None, _STATS),
    ("sample_stats", 2): Budget(58, 1024, None, _STATS),
    ("sample_stats_learned", 4): Budget(72, 1024, None, _STATS, width=4),
    ("sample_stats_learned", 2): Budget(74, 1024, None, _STATS, width=2),
    ("vlb_terms", 4): Budget(104, 16, 381.0, _BOUND),
    ("vlb_terms", 2): Budget(104, 16, 381.0, _BOUND),
    ("vlb_terms_learned", 4): Budget(119, 16, 473.0, _BOUND, width=4),
    ("vlb_terms_learned", 2): Budget(122, 16, 475.0, _BOUND, width=2),
    ("advance", 4): Budget(14, 0, 17.5, _INDEX),
}
"""By name in ``compiled.KERNELS`` and bytes an element of the images."""


def pinned() -> bool:
    """Whether the installed Triton is the version that the budgets are for."""
    return triton.__version__.split(".")[:2] == PINNED.split(".")


def exceeded(
    budget: Budget | None,
    registers: int,
    shared: int,
    instructions: float | None,
    width: int | None,
) -> list[str]:
    """Return what exceeds the budget, nothing if all is well; a missing budget is a fault.

    Args:
        budget: of the kernel, None if it has none.
        registers, shared, instructions, width: as in ``Budget``, what was found.
    """
    if budget is None:
        return ["no budget: give it one in budgets.py, with its reason"]
    found = []
    for name, value, most in (
        ("registers", registers, budget.registers),
        ("bytes of shared memory", shared, budget.shared),
        ("instructions an element", instructions, budget.instructions),
    ):
        if value is not None and most is not None and value > most:
            found.append(f"{value:.4g} {name}, {most:.4g} budgeted ({budget.reason})")
    if width is not None and width < budget.width:
        found.append(f"accesses of {width} bytes, {budget.width} budgeted ({budget.reason})")
    return found

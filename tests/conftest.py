"""What every test gets: uninitialised memory that shows, and GPU tests skipped where none is."""

import functools
import os

import hypothesis
import pytest
import torch
from torch.utils import _device

# Without a GPU the kernels run in Triton's interpreter; Triton looks when flashddpm imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on both sides of a comparison

from flashddpm.testing import zones  # noqa: E402

CI = bool(os.environ.get("CI"))
hypothesis.settings.register_profile("default", deadline=None, derandomize=CI)
# On a GPU shapes are larger, and it is the results on the CPU that take the time.
hypothesis.settings.register_profile("gpu", deadline=None, derandomize=CI, max_examples=25)
hypothesis.settings.load_profile("gpu" if torch.cuda.is_available() else "default")


def fill_uninitialised_memory() -> None:
    """Make torch.empty and its kin return NaN (the largest integer), so that reading it shows.

    Patched for the whole run, and not by torch.use_deterministic_algorithms, which fills too but
    also replaces the algorithms that users run, on a GPU the very ones whose repeatability is
    tested. Compiled code is traced without the fill.
    """
    # Tables that are made on first use and hold the functions by identity: make them now.
    _device._device_constructors()
    torch.overrides.get_ignored_functions()

    def filling(empty):
        @functools.wraps(empty)
        def filled(*args, **kwargs):
            x = empty(*args, **kwargs)
            if not zones.fillable(x):
                return x
            with torch.no_grad():
                return x.fill_(zones.fit(torch.nan, x.dtype))

        return filled

    for owner, name in zones.ALLOCATORS:
        setattr(owner, name, filling(getattr(owner, name)))
    assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(3).isnan().all()


fill_uninitialised_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no NVIDIA GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

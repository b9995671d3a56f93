import dataclasses

import pytest
import torch

from flashddpm.benchmarks import operations
from flashddpm.kernels import OPS


@pytest.mark.parametrize("name", OPS)
def test_only_equal_operations_are_timed(name):
    op = OPS[name]
    arguments = op.example("cpu", torch.float32, (3, 4, 4), 3, 0)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    operations.check(op, arguments)
    for key, value in before.items():
        torch.testing.assert_close(arguments[key], value, rtol=0, atol=0, equal_nan=True)

    def off(**kwargs):
        result = op.fast(**kwargs)
        for value in [result, *(kwargs[name] for name in op.mutates)]:
            if value is not None:
                value += 1
        return result

    with pytest.raises(AssertionError):
        operations.check(dataclasses.replace(op, fast=off), arguments)

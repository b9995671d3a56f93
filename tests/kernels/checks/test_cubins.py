"""Cubins that cannot be joined; what joined ones disassemble to: test_compiled.py."""

import pytest

from flashddpm.kernels.checks import cubins


@pytest.mark.parametrize("flags", [(), (0x0550, 0x0D5A)])
def test_cubins_of_one_architecture_are_needed(flags):
    files = [bytes(0x30) + flag.to_bytes(2, "little") + bytes(14) for flag in flags]
    with pytest.raises(ValueError, match=f"^{len(files)} cubins: must be one or more, of one arch"):
        cubins.join(files)

"""Devices, copies and steps; the rules and red zones are those of flashddpm.testing."""

import pytest
import torch

from flashddpm import kernels
from flashddpm.kernels import Column, reference
from flashddpm.kernels.checks import counting
from flashddpm.kernels.step_arguments import by_tensor
from flashddpm.testing import Guarded, rules


@pytest.fixture(scope="session", name="rules")
def _rules():
    return rules


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def copy_of():
    """(arguments, device) -> a copy of them there, tensors with the same strides."""

    def copied(args: dict, device: str = "cpu") -> dict:
        result = {}
        for name, value in args.items():
            if isinstance(value, torch.Tensor):
                place = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
                value = place.copy_(value.detach()).requires_grad_(value.requires_grad)
            result[name] = value
        return result

    return copied


@pytest.fixture(scope="session", name="Guarded")
def _guarded():
    return Guarded


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Module of an operation -> list that collects red zones around each output it allocates."""

    def guard(module) -> list[Guarded]:
        made = []

        def empty_channels_last(like: torch.Tensor) -> torch.Tensor:
            B, C, H, W = like.shape
            n = C * H * W
            stride = (n, 1, W * C, C)
            made.append(Guarded(like.shape, stride, like.dtype, like.device, B * n))
            return made[-1].view

        monkeypatch.setattr(module, "empty_channels_last", empty_channels_last)
        return made

    return guard


IN_PLACE = ("x", "hist", "net_in", "nonfinite")


# name: (columns of the row, 0 where nothing is said; the row that follows)
STEPS = {
    "idle": ({}, 0),
    "ancestral": (dict(x0_xt=1.3, x0_out=-0.8, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2), 2),
    "second order": (dict(x0_xt=1.3, x0_out=-0.8, c_x0=0.55, c_xt=0.6, c_hist=-0.15), 3),
    "stochastic": (dict(x0_out=1.0, c_x0=0.5, c_xt=0.4, c_hist=-0.1, sigma=0.3), 4),
    "clipped": (dict(x0_xt=0.8, x0_out=-0.6, clip=0.7, c_x0=0.9, c_out=0.4), 5),
    "last": (dict(x0_xt=1.1, x0_out=-0.5, c_x0=1.0), 6),
    "finished": (dict(x0_xt=1.0, x0_out=1.0, c_x0=1.0, c_xt=1.0, sigma=1.0), 6),
    "all": (
        dict(x0_xt=1.2, x0_out=-0.9, c_x0=0.4, c_xt=0.5, c_out=0.1, c_hist=-0.2, sigma=0.3),
        3,
    ),
    "thresholded": (
        dict(x0_xt=1.3, x0_out=-0.8, clip=2.0, threshold=0.9, c_x0=0.5, c_xt=0.4, sigma=0.2),
        3,
    ),
    "rescaled": (dict(x0_xt=1.2, x0_out=-0.9, rescale=0.7, c_x0=0.4, c_xt=0.5, c_out=0.1), 3),
    "unguided": (dict(x0_xt=1.2, x0_out=-0.9, rescale=0.7, c_x0=0.4, c_xt=0.5, unguided=1.0), 0),
    "learned": (dict(x0_xt=1.3, x0_out=-0.8, c_x0=0.3, c_xt=0.6, sigma=0.2, log_sigma=0.6), 3),
}


class State:
    """Arguments of a step on a device, with red zones around what is changed in place.

    A table begins with the idle row; its other rows are given by name, each with the columns that
    are not 0 and the number of the row that follows. Lanes are given by slot. With ``variance``,
    the network has 2C channels.
    """

    STEPS = STEPS

    def __init__(
        self,
        device,
        shape=(3, 5, 7),
        names=("ancestral", "second order", "clipped", "all"),
        uncond=(-1, 5, -1, 4),
        cond=(2, 0, 3, 1),
        dtypes=(torch.float32, torch.float32),
        table=STEPS,
        noise=False,
        variance=False,
        seed=0,
        change=None,
    ):
        draws = torch.Generator().manual_seed(seed)
        slots, lanes = len(names), max(*cond, *uncond) + 2  # the last lane is nobody's
        table = {"idle": ({}, 0)} | table
        self.names = list(table)
        columns = [column.name.lower() for column in Column]
        rows = [[row.get(name, 0.0) for name in columns] for row, _ in table.values()]

        def images(count, dtype=torch.float32):
            return torch.randn((count, *shape), generator=draws).to(dtype)

        n = images(1).numel()
        self.zones = {
            "x": Guarded.around(images(slots), -(-n // 16) * 16 + 16, device),
            "hist": Guarded.around(images(slots), -(-n // 16) * 16 + 32, device),
            "net_in": Guarded.around(images(lanes, dtypes[1]), n, device),
        }
        self.args = {name: zone.view for name, zone in self.zones.items()} | {
            "nonfinite": torch.zeros(slots, dtype=torch.int32),
            "out": images(lanes, dtypes[0]).contiguous(memory_format=torch.channels_last),
            "idx": torch.tensor([self.names.index(name) for name in names]),
            "seeds": torch.randint(-(2**63), 2**63 - 1, (slots,), generator=draws),
            "guidance": torch.rand(slots, generator=draws) * 4,
            "lane_cond": torch.tensor(cond[:slots], dtype=torch.int32),
            "lane_uncond": torch.tensor(uncond[:slots], dtype=torch.int32),
            "dynamic_threshold": 1 + torch.rand(slots, generator=draws),
            "rescale_factor": torch.rand(slots, generator=draws),
            "rows": torch.tensor(rows),
            "keys": torch.randint(0, 2**40, (len(rows),), generator=draws),
            "next": torch.tensor([follow for _, follow in table.values()]),
        }
        if variance:
            both = torch.cat([self.args["out"], images(lanes, dtypes[0])], 1)
            self.args["out"] = both.contiguous(memory_format=torch.channels_last)
        if noise:
            self.args["noise"] = images(slots).contiguous(memory_format=torch.channels_last)
        if change:
            change(self.args)
        for name, value in self.args.items():
            if name not in self.zones:
                self.args[name] = value.to(device)
        self.before = {name: self.args[name].clone() for name in IN_PLACE}

    def step(self, step=kernels.denoise_step):
        """Apply the step; return its results on the CPU."""
        assert by_tensor(step)(**self.args) is None
        for zone in self.zones.values():
            zone.check()
        return {name: self.args[name].cpu() for name in IN_PLACE}


@pytest.fixture(scope="session", name="State")
def _state():
    return State


@pytest.fixture(scope="session")
def fast_step(device):
    """What State takes -> the results of the kernel."""
    return lambda **spec: State(device, **spec).step()


@pytest.fixture(scope="session")
def compared_step(device):
    """What State takes -> the results of the kernel, once they equal the reference's."""

    def compare(**spec):
        results = State(device, **spec).step()
        expected = State("cpu", **spec).step(reference.denoise_step)
        for name in IN_PLACE:
            rules.same(results[name], expected[name], truncates=True)
        return results

    return compare


@pytest.fixture
def counted():
    """Bytes of images that the interpreter loads and stores: every block, no single numbers."""
    with counting.counted() as moved:
        yield moved

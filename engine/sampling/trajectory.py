"""A batch of images on their way: step by step, out to a file and back.

All that a trajectory is, is its state (x_t and the previous x_0) and what each image was asked for:
its noise is a pure function of seed and row. So it can stop, move and go on. On the same hardware,
versions and number of lanes it ends in the same bits; elsewhere state and noise are still exact,
and the images agree to the network's rounding.
"""

from __future__ import annotations

import json
import logging
import weakref
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flashddpm import arguments, host
from flashddpm.diffusion.plan import Plan
from flashddpm.errors import CheckpointError, NonFiniteError
from flashddpm.execution.slot_table import Batch, Occupant
from flashddpm.host import isolated
from flashddpm.io.files import read_tensors, write_atomic

if TYPE_CHECKING:
    from flashddpm.sampling.sampler import Sampler

log = logging.getLogger("flashddpm")

FORMAT = "1"


class Trajectory:
    """Images that are drawn step by step; made by `Sampler.trajectory`.

    Args:
        sampler: whose network and device.
        plan: what every image follows.
        x: float32 [B, C, H, W], what they begin at.
        seeds, labels, guidance: of each image; labels None without classes.
        position: how many steps are done already.

    Attributes:
        position: how many steps are done.
    """

    def __init__(
        self,
        sampler: Sampler,
        plan: Plan,
        x: Tensor,
        seeds: list[int],
        labels: list[int] | None,
        guidance: list[float],
        position: int = 0,
    ) -> None:
        self.sampler, self.plan = sampler, plan
        self.seeds, self.labels, self.guidance = seeds, labels, guidance
        self.position = position
        self._execution = execution = sampler.execution
        execution.check_plan(plan)
        lanes = len(seeds) + sum(w != 1 for w in guidance)
        L = execution.bucket(lanes, 1 << (lanes - 1).bit_length(), compiled=True)
        self._compiled = execution.compiles(len(plan) * lanes, L)
        if not (self._compiled or execution.capture):
            L = lanes
        with sampler._exclusive():
            self._version = execution.renew()
            self._slots = execution.service_slots(len(seeds), L, len(plan) + 1)
            self._slots.load_plan(plan)
            self._slots.x.copy_(x)
            self._batch = Batch(self._slots)
            self._enter(x)
        # Only noted, for this may be while something is captured; nobody waits for it at exit.
        weakref.finalize(self, execution.graphs.forget, self._slots.token).atexit = False

    def _enter(self, x: Tensor) -> None:
        """Put every image into its slot, at the row where it is."""
        if self.done:
            return
        null, row = self.sampler.conditioning.null_label, self.position + 1
        for i, seed in enumerate(self.seeds):
            label = None if self.labels is None else self.labels[i]
            occupant = Occupant(seed, label, null, self.guidance[i], row, len(self), i)
            self._batch.admit(occupant, x[i])
        self._batch.upload()

    def __len__(self) -> int:
        """Return how many steps there are in all."""
        return len(self.plan)

    @property
    def done(self) -> bool:
        """Whether the last step is taken."""
        return self.position == len(self)

    @property
    @isolated(grad=False)
    def x(self) -> Tensor:
        """A copy of x_t, float32 [B, C, H, W]; the images, once it is done."""
        with self.sampler._exclusive():
            return self._slots.x.clone(memory_format=torch.contiguous_format)

    @isolated(grad=False)
    def step(self, count: int = 1) -> None:
        """Take so many steps, or as many as are left, by the network as it is now.

        Raises:
            ValueError: count is not an integer of at least 1.
            NonFiniteError: the network's output turned NaN or infinite.
            RuntimeError: the network's weights were changed meanwhile, by another thread.
        """
        count = min(arguments.integer("count", count, 1), len(self) - self.position)
        plan = self.plan
        fractional = self._execution.tells_floats(plan)
        with self.sampler._exclusive():
            unchanged = self._execution.follower.unchanged()
            version = self._execution.renew()
            if version != self._version:
                self._slots.load_plan(plan)
                self._version = version
            for _ in range(count):
                self._execution.take_step(self._slots, self._compiled, plan.needs_stats, fractional)
                self._batch.advance()
                self.position += 1
            unchanged()
        for seed, row in zip(self.seeds, self._slots.nonfinite.tolist(), strict=True):
            if row:
                raise NonFiniteError(seed, row - 1, len(self))

    @isolated(grad=False)
    def run(self) -> Tensor:
        """Take every step that is left; return the images, float32 [B, C, H, W]."""
        if not self.done:
            self.step(len(self) - self.position)
        return self.x

    def __reduce__(self) -> Any:
        raise TypeError("a Trajectory: must not be pickled; save() it, and resume() it elsewhere")

    @isolated(grad=False)
    def save(self, path: str | PathLike[str]) -> None:
        """Write the state as a safetensors file, atomically."""
        tensors = {
            "x": self.x,
            "hist": self._slots.hist.clone(memory_format=torch.contiguous_format),
            "seeds": host.ints(self.seeds),
            "guidance": torch.tensor(self.guidance, dtype=torch.float64, device="cpu"),
            "rows": torch.tensor(self.plan.rows, dtype=torch.float64, device="cpu"),
            "noise_keys": host.ints(self.plan.noise_keys),
        }
        if self.labels is not None:
            tensors["labels"] = host.ints(self.labels)
        metadata = {
            "format": FORMAT,
            "position": str(self.position),
            "bits": json.dumps(bits_depend_on(self.sampler), sort_keys=True),
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(Path(path), safetensors.torch.save(tensors, metadata))


def bits_depend_on(sampler: Sampler) -> dict[str, Any]:
    """Return what the network's bits depend on besides its weights and the batch."""
    device = sampler.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "capability": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(sampler.dtype),
        "backend": sampler.backend,
    }


def load_trajectory(sampler: Sampler, path: str | PathLike[str]) -> Trajectory:
    """Return the trajectory of a file that `Trajectory.save` wrote, to go on from.

    Raises:
        CheckpointError: no such file, or not one that save wrote for images of this shape.
    """
    tensors = read_tensors(Path(path))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r} is not {FORMAT}")
        plan = Plan(tensors["rows"].numpy(), tensors["noise_keys"].numpy().astype(np.int64))
        position = arguments.integer("position", int(metadata["position"]), 0, len(plan))
        seeds = arguments.seed_list(tensors["seeds"])
        for name in ("x", "hist"):
            if tensors[name].shape != (len(seeds), *sampler.shape):
                raise ValueError(f"{name} of shape {tuple(tensors[name].shape)}")
            if tensors[name].dtype is not torch.float32:
                raise ValueError(f"{name} of {tensors[name].dtype}")
        labels = tensors["labels"].tolist() if "labels" in tensors else None
        guidance = [arguments.number("guidance", w) for w in tensors["guidance"].tolist()]
        if len(guidance) != len(seeds) or (labels is not None and len(labels) != len(seeds)):
            raise ValueError("labels or guidance are not as many as seeds")
        if (labels is None) != (sampler.conditioning.num_classes is None):
            raise ValueError("labels do not fit the network")
        stored = dict(json.loads(metadata["bits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a trajectory of this network: {error}") from error
    here = bits_depend_on(sampler)
    differ = [
        f"{key} {stored.get(key)} -> {value}"
        for key, value in here.items()
        if stored.get(key) != value
    ]
    if differ:
        log.info("goes on elsewhere, images agree to rounding only: %s", ", ".join(differ))
    x = tensors["x"].to(sampler.device)
    trajectory = Trajectory(sampler, plan, x, seeds, labels, guidance, position)
    with sampler._exclusive():
        trajectory._slots.hist.copy_(tensors["hist"])
    return trajectory

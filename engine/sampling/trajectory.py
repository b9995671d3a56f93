"""`Trajectory`: a batch of images that is drawn step by step, and can be saved and resumed.

It consists of its state, x_t and the previous x_0, and of what each image was asked for, since the
noise is a pure function of seed and step. On the same hardware and versions, with the same number
of lanes (network evaluations a step), a resumed trajectory ends in the same bits; elsewhere state
and noise are still exact, and images agree to the network's rounding.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flashddpm import arguments, host
from flashddpm.diffusion.plan import Plan
from flashddpm.errors import CheckpointError
from flashddpm.execution.checks import check_variance
from flashddpm.execution.executor import Executor
from flashddpm.execution.slot_table import Occupant, SlotTable
from flashddpm.host import isolated
from flashddpm.io.files import read_tensors, write_atomic
from flashddpm.sampling.chunks import check_finite
from flashddpm.sampling.inputs import Images

log = logging.getLogger("flashddpm")

FORMAT = "1"


class Trajectory:
    """A batch of B images that is drawn step by step; made by `Sampler.trajectory`.

    ``len`` of it is the number of steps in all. It cannot be pickled: use `save`.

    Args:
        executor: the executor that runs the network.
        plan: the plan (the steps, a row of coefficients each) that every image follows.
        images: the seed, label and guidance of each image.
        position: the number of steps that are already taken, in 0..len(plan); not checked.

    Attributes:
        plan, images: as above.
        position: the number of steps that are taken, in 0..len.

    Raises:
        ValueError: if the plan learns its variance and the U-Net does not predict it.
        RuntimeError: if a callback of the sampler makes it, or the network was changed in a way
            that cannot be followed, such as a move to another device.
    """

    def __init__(self, executor: Executor, plan: Plan, images: Images, position: int = 0) -> None:
        self.plan, self.images, self.position = plan, images, position
        self._executor = executor
        executor.check_plan(plan)
        lanes = sum(images.lanes)
        L = executor.bucket(lanes, 1 << (lanes - 1).bit_length(), compiled=True)
        self._compiled = executor.choice.compiles(len(plan) * lanes, L)
        if not (self._compiled or executor.capture):
            L = lanes
        with executor.exclusive():
            self._version = executor.renew()
            self._slots = executor.service_slots(len(images), L, len(plan) + 1)
            self._slots.load_plan(plan)
            self._table = SlotTable(self._slots)
        # Only noted, for this may be while something is captured; nobody waits for it at exit.
        weakref.finalize(self, executor.graphs.forget, self._slots.token).atexit = False

    @classmethod
    def begin(
        cls, executor: Executor, plan: Plan, images: Images, image: Tensor | None
    ) -> Trajectory:
        """Return a new trajectory at x_T: noise of the seeds, or images with such noise added.

        Args:
            executor: the executor that runs the network.
            plan: the plan (the steps, a row of coefficients each) that every image follows.
            images: the seed, label and guidance of each of the B images.
            image: float32 [B, C, H, W] in [-1, 1] on the device, the images to begin at; None where
                the plan begins at noise.

        Raises:
            ValueError: if the plan learns its variance and the U-Net does not predict it.
            RuntimeError: if a callback of the sampler calls it, or the network was changed in a way
                that cannot be followed, such as a move to another device.
        """
        new = cls(executor, plan, images)
        with executor.exclusive():
            executor.enter(new._table, new._occupants(), plan, image)
        return new

    def put(self, x: Tensor, hist: Tensor) -> None:
        """Set the state of all images of a trajectory just made, which took ``position`` steps.

        Args:
            x: float32 [B, C, H, W], the states x_t.
            hist: float32 [B, C, H, W], the previous x_0, which multistep solvers read.

        Raises:
            RuntimeError: if a shape is wrong (one that broadcasts is not refused), or a callback of
                the sampler calls it.
            ValueError: if the images are in their slots already, as they are after `begin`.
        """
        with self._executor.exclusive():
            self._slots.state.x.copy_(x)
            self._slots.state.hist.copy_(hist)
            if self.done:
                return
            for occupant in self._occupants():
                self._table.admit(occupant)
            self._table.upload()
            self._table.fill_lanes()

    def _occupants(self) -> Iterator[Occupant]:
        """Yield every image as the occupant of a slot, at the row where it is."""
        null = self._executor.conditioning.null_label
        return self.images.occupants(slice(None), null, len(self), self.position + 1)

    def __len__(self) -> int:
        """Return the number of steps in all, those that are taken included."""
        return len(self.plan)

    @property
    def done(self) -> bool:
        """Whether the last step is taken, a bool."""
        return self.position == len(self)

    @property
    @isolated(grad=False)
    def x(self) -> Tensor:
        """A copy of x_t, float32 [B, C, H, W] on the device; the images themselves once `done`.

        Raises:
            RuntimeError: if a callback (such as on_step) of a call of the sampler reads it.
        """
        with self._executor.exclusive():
            return self._slots.state.x.clone(memory_format=torch.contiguous_format)

    @isolated(grad=False)
    def step(self, count: int = 1) -> None:
        """Take some steps of every image, with the network's weights as they are now.

        Args:
            count: the number of steps, at least 1; no more are taken than are left.

        Raises:
            ValueError: if count is no integer of at least 1, the network's output is of a wrong
                shape, or the plan learns its variance and the network predicts none.
            NonFiniteError: if the network's output turned NaN or infinite; the steps are taken all
                the same.
            RuntimeError: if the network was changed during the call, by another thread, or before
                it in a way that cannot be followed; or if a callback of the sampler calls it.
            CompilationError: if the compiler fails where compile=True.
        """
        count = min(arguments.integer("count", count, 1), len(self) - self.position)
        plan, stats = self.plan, self.plan.needs_stats
        fractional = self._executor.tells_floats(plan)
        with self._executor.following() as version:
            if version != self._version:
                self._slots.load_plan(plan)
                self._version = version
            for _ in range(count):
                out = self._executor.take_step(self._slots, self._compiled, stats, fractional)
                check_variance(plan, out.shape[1], self._executor.shape[0])
                self._table.advance()
                self.position += 1
        check_finite(self._slots, self.images.seeds, len(self))

    @isolated(grad=False)
    def run(self) -> Tensor:
        """Take all steps that are left, and return the images.

        Returns:
            float32 [B, C, H, W] in about [-1, 1], a copy on the device.

        Raises:
            ValueError, NonFiniteError, RuntimeError, CompilationError: as `step` says: a wrong
                output, one that is not finite, a changed network or a call by a callback, or a
                compiler that fails.
        """
        if not self.done:
            self.step(len(self) - self.position)
        return self.x

    def __reduce__(self) -> Any:
        raise TypeError("a Trajectory: must not be pickled; save() it, and resume() it elsewhere")

    @isolated(grad=False)
    def save(self, path: str | PathLike[str]) -> None:
        """Write the trajectory as a safetensors file that `Sampler.resume` reads, atomically.

        The file has the state, seeds, labels, guidance, plan and position, but no weights.

        Args:
            path: the file; its folder is made if it is missing.

        Raises:
            OSError: if the file cannot be written.
            RuntimeError: if a callback of the sampler calls it.
        """
        tensors = {
            "x": self.x,
            "hist": self._slots.state.hist.clone(memory_format=torch.contiguous_format),
            "seeds": host.ints(self.images.seeds),
            "guidance": torch.tensor(self.images.guidance, dtype=torch.float64, device="cpu"),
            "rows": torch.tensor(self.plan.rows, dtype=torch.float64, device="cpu"),
            "noise_keys": host.ints(self.plan.noise_keys),
        }
        if self.images.labels is not None:
            tensors["labels"] = host.ints(self.images.labels)
        metadata = {
            "format": FORMAT,
            "position": str(self.position),
            "bits": json.dumps(bits_depend_on(self._executor), sort_keys=True),
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(Path(path), safetensors.torch.save(tensors, metadata))


def bits_depend_on(executor: Executor) -> dict[str, Any]:
    """Return what decides the bits of the network's output, besides its weights and the batch.

    Args:
        executor: the executor that runs the network.

    Returns:
        A dict of device (the GPU's name, or "cpu"), capability (a string such as "AVX2" on the CPU,
        else None), threads (torch's number of them on the CPU, an int, else None), and the strings
        torch (its version), dtype (such as "torch.float32") and backend ("reference" or "fused").
    """
    device = executor.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "capability": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(executor.dtype),
        "backend": executor.backend,
    }


def load_trajectory(executor: Executor, path: str | PathLike[str]) -> Trajectory:
    """Return the trajectory that `Trajectory.save` wrote to a file, ready for its next step.

    Args:
        executor: the executor that runs the network, for images of the same shape.
        path: the safetensors file.

    Raises:
        CheckpointError: if the file is missing or broken, is no trajectory, or is one of images of
            another shape, or with labels or guidance that the network does not take.
        ValueError: if the plan learns its variance and the U-Net does not predict it.
        RuntimeError: if it is called within another call of the executor, by a function (such as
            on_step) that the user gave it, or if the network was changed in a way that cannot be
            followed, such as a move to another device.
    """
    tensors = read_tensors(Path(path))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r} is not {FORMAT}")
        if tensors["noise_keys"].dtype is not torch.int64:
            raise ValueError(f"noise_keys of {tensors['noise_keys'].dtype}")
        plan = Plan(tensors["rows"].numpy(), tensors["noise_keys"].numpy())
        position = arguments.integer("position", int(metadata["position"]), 0, len(plan))
        images = _images(executor, tensors)
        stored = dict(json.loads(metadata["bits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a trajectory of this network: {error}") from error
    here = bits_depend_on(executor)
    differ = [
        f"{key} {stored.get(key)} -> {value}"
        for key, value in here.items()
        if stored.get(key) != value
    ]
    if differ:
        log.info("goes on elsewhere, images agree to rounding only: %s", ", ".join(differ))
    trajectory = Trajectory(executor, plan, images, position)
    trajectory.put(tensors["x"].to(executor.device), tensors["hist"])
    return trajectory


def _images(executor: Executor, tensors: dict[str, Tensor]) -> Images:
    """Return the seeds, labels and guidance of a file's images, which the network can draw.

    Raises:
        KeyError: if a tensor is missing.
        ValueError: if one is of another shape or dtype, or not what the network takes.
    """
    seeds = arguments.seed_list(tensors["seeds"])
    for name in ("x", "hist"):
        if tensors[name].shape != (len(seeds), *executor.shape):
            raise ValueError(f"{name} of shape {tuple(tensors[name].shape)}")
        if tensors[name].dtype is not torch.float32:
            raise ValueError(f"{name} of {tensors[name].dtype}")
    labels = tensors["labels"].tolist() if "labels" in tensors else None
    guidance = [arguments.number("guidance", w) for w in tensors["guidance"].tolist()]
    if len(guidance) != len(seeds) or (labels is not None and len(labels) != len(seeds)):
        raise ValueError("labels or guidance are not as many as seeds")
    classes, null = executor.conditioning.num_classes, executor.conditioning.null_label
    if (labels is None) != (classes is None):
        raise ValueError("labels do not fit the network")
    if labels is not None and not {*labels} <= {*range(classes or 0), null}:
        raise ValueError(f"labels {labels} are not all labels of the network")
    if null is None and any(w != 1 for w in guidance):
        raise ValueError(f"guidance {guidance}: the network has no null class")
    return Images(seeds, labels, guidance)

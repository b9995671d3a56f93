"""`Executor`: runs a network on batches of slots (images), plainly, compiled or as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashddpm import arguments, host
from flashddpm.diffusion.plan import Plan
from flashddpm.errors import CompilationError
from flashddpm.execution import cpu_noise
from flashddpm.execution.backends import choose_backend
from flashddpm.execution.checks import check_network, check_state, check_variance
from flashddpm.execution.compile_choice import CompileChoice
from flashddpm.execution.cpu_noise import CompiledNoise
from flashddpm.execution.cuda_graphs import CaptureDevice, CapturedSteps, Graphs, Idling, Key, Step
from flashddpm.execution.follower import Follower
from flashddpm.execution.modes import evaluating
from flashddpm.execution.prepared_network import prepare
from flashddpm.execution.slot_table import Occupant, SlotTable
from flashddpm.execution.slots import Slots
from flashddpm.execution.step import (
    Call,
    check_output,
    predicted_x0,
    step,
)
from flashddpm.execution.turns import Turns
from flashddpm.execution.upload import send
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose
from flashddpm.networks import registry
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.customized import hanging

log = logging.getLogger("flashddpm")


class Executor:
    """A network on a device, and the ways to run it; arguments and errors are those of `Sampler`.

    Attributes:
        backend, capture: "reference" or "fused"; a bool, whether steps are run as CUDA graphs.
        ops, graphs: the module of a step's operations, flashddpm.kernels or its ``reference``; the
            captured steps.
        choice, follower: the network, compiled or not; what sees changes of it, and follows them.
        network, device, dtype: the network as it runs, its torch.device and its input's dtype.
        shape, num_timesteps, conditioning: (C, H, W); T of the schedule; the labels that it takes.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        call: Call | None,
        *,
        shape: tuple[int, int, int],
        num_timesteps: int,
        conditioning: Conditioning,
        device: torch.device,
        dtype: str | torch.dtype | None,
        backend: str,
        compile: bool | str,
        capture: bool | str,
        tune: bool = False,
        graph_memory: int | None = None,
    ) -> None:
        own = network if isinstance(network, registry.Network) and call is None else None
        # What hangs on a network may be any code: it runs as a network of the user's own does.
        plain = own is not None and not hanging(own) and type(own) in registry.CLASSES
        chosen = choose_backend(backend, compile, capture, device, plain)
        if own is not None:
            check_network(own, shape, conditioning)
        self.backend, self.capture, self.ops = chosen.name, chosen.capture, chosen.ops
        if graph_memory is not None:
            arguments.integer("graph_memory", graph_memory, 0)
        self.device, self.shape = device, shape
        self.num_timesteps = num_timesteps
        self.conditioning = conditioning
        ready = prepare(network, call, shape, device, dtype, chosen.name == "fused")
        self.network, self.dtype, self._hoisted = ready.network, ready.dtype, ready.hoisted
        self.follower = Follower(self.network, ready.modules, self._hoisted)
        log.info("runs on %s in %s, %s backend", device, self.dtype, self.backend)
        tune = arguments.boolean("tune", tune)
        self.choice = CompileChoice(chosen.compile, ready.predict, tune, device, ready.flops)
        self._compiled_noise = CompiledNoise()
        self.graphs = Graphs(CaptureDevice(device), graph_memory)
        self._slots: Slots | None = None
        self._turns = Turns(device)

    @property
    def _labelled(self) -> bool:
        return self.conditioning.num_classes is not None

    def enter(
        self,
        table: SlotTable,
        occupants: Iterable[Occupant],
        plan: Plan,
        image: Tensor | None = None,
        z: Tensor | None = None,
    ) -> None:
        """Put images into the first slots of an empty table, at the x_T that `start` sets.

        The plan, image and z are those of `start`. Raises ValueError if there is no slot, or there
        are no lanes (network evaluations), for one of them.
        """
        count = len([table.admit(occupant) for occupant in occupants])
        table.upload()
        self.start(table.slots, slice(count), plan, image, z)
        table.fill_lanes()

    def start(
        self,
        slots: Slots,
        which: slice | Tensor,
        plan: Plan,
        image: Tensor | None = None,
        z: Tensor | None = None,
    ) -> None:
        """Set x_T of n slots to initial[0] image + initial[1] z, by the seeds that were uploaded.

        Args:
            slots: the buffers.
            which: the slots: a slice, or their numbers, int64 [n] on the device.
            plan: the plan (a row of coefficients a step) whose ``initial`` it is.
            image: float32 [n, C, H, W] on the device; None, where the plan needs none, is 0.
            z: float32 [n, C, H, W] on the device, normal noise; None for that of the seeds.
        """
        a, b = plan.initial
        seeds = slots.per_slot.seeds[which]
        zero = torch.zeros_like(seeds)
        if z is not None:
            x = b * z if image is None else a * image + b * z
        elif plan.initial == (0.0, 1.0):
            x = self.ops.philox(seeds, zero, self.shape, Purpose.INITIAL)
        else:
            x0 = slots.state.x.new_zeros((len(seeds), *self.shape)) if image is None else image
            rows = send(host.floats([plan.initial]), self.device)
            x = self.ops.add_noise(x0, zero, seeds, zero, rows, Purpose.INITIAL)
        slots.state.x[which] = x
        slots.state.nonfinite[which] = 0

    def draw(self, seeds: Sequence[int], key: int, purpose: Purpose) -> Tensor:
        """Return the noise of B seeds at a key (64 bits of its counter), float32 [B, C, H, W]."""
        seed = send(host.ints(seeds), self.device)
        return self.ops.philox(seed, torch.full_like(seed, key), self.shape, purpose)

    def on_device(self) -> AbstractContextManager[Any]:
        """Return a context in which the device, if a CUDA one, is the current one."""
        return self._turns.on_device()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the buffers to oneself, the network in evaluation mode; other threads wait.

        Raises RuntimeError if a callback calls it within such a context of the same thread.
        """
        with self._turns.exclusive(), evaluating(self.follower.modules):
            yield

    @contextmanager
    def following(self) -> Iterator[int]:
        """Have the buffers to oneself, and follow the network, which must not change within.

        Yields the version of what was derived from its weights, an int. Raises RuntimeError if this
        thread is in such a context, if the network was changed in a way that cannot be followed
        (`renew`), or if, at the end of the block, its weights are not those of the start.
        """
        with self.exclusive():
            unchanged = self.follower.unchanged()
            yield self.renew()
            unchanged()

    def check_not_within(self) -> None:
        """Raise RuntimeError if this thread has the buffers, as a callback does."""
        self._turns.check_not_within()

    def service_slots(self, S: int, L: int, R: int) -> Slots:
        """Return new buffers for S slots, L lanes and R rows of plans, the idle row included."""
        embed = self._hoisted.embed if self._hoisted else None
        return Slots(
            S,
            L,
            self.shape,
            R,
            self.dtype,
            self.device,
            self._labelled,
            embed,
        )

    def slots(self, S: int, L: int, most: tuple[int, int]) -> Slots:
        """Return buffers for S slots and L lanes (evaluations), the same ones while they fit.

        Under capture, as graphs hold their addresses, they are made for ``most`` (slots, lanes),
        all that may be asked for, and larger ones fit too.
        """
        kept = self._slots
        had = (0, 0) if kept is None else (len(kept.per_slot.idx), len(kept.lane_slot))
        if self.capture:
            S, L = max(S, most[0], had[0]), max(L, most[1], had[1])
        if kept is not None:
            if had == (S, L):
                return kept
            self.forget(kept)
        self._slots = self.service_slots(S, L, self.num_timesteps + 1)
        return self._slots

    def buckets(self, most: int) -> list[int]:
        """Return the buckets (lanes for which it may be compiled): powers of 2 below most, most."""
        return [*(1 << i for i in range((most - 1).bit_length())), most]

    def bucket(self, lanes: int, most: int, compiled: bool) -> int:
        """Return how many lanes run for ``lanes`` in use: compiled or captured, the next bucket."""
        if not (compiled or self.capture):
            return lanes
        return next(bucket for bucket in self.buckets(most) if bucket >= lanes)

    def warm(self, prefixes: Sequence[Slots], compiled: bool) -> None:
        """Compile prefixes of buffers if ``compiled``, then capture, largest first, slots idle.

        Raises CompilationError if compile=True fails, ValueError for an output of a wrong shape.
        """
        prefixes = sorted(prefixes, key=lambda slots: -len(slots.lane_slot))
        for slots in prefixes:
            compiled = compiled and self.choice.prepared(slots, fractional=False)
            if self.capture:
                self.graphs.warm(*self._step(slots, compiled, False))
        for slots in prefixes:
            self._graph(slots, compiled, False)

    def take_step(
        self, slots: Slots, compiled: bool, stats: bool, fractional: bool = False
    ) -> Tensor:
        """Take one step of every slot; return the network's output for its L lanes (evaluations).

        It is [L, C or 2C, H, W] in the network's dtype; the next step overwrites it. Raises
        ValueError for an output of a wrong shape, CompilationError if compile=True fails.

        Args:
            slots: the buffers; all their lanes are run.
            compiled: whether the compiled network runs.
            stats: whether some row has a threshold or rescales guidance (``sample_stats``).
            fractional: whether the network is told timesteps as float32.
        """
        compiled = compiled and self.choice.prepared(slots, fractional)
        graph = self._graph(slots, compiled, fractional)
        if graph is not None:
            return graph()
        noise = partial(cpu_noise.of_rows, slots) if self._draws_ahead else None
        return step(slots, self.choice.network(compiled), self.ops, fractional, noise, stats)

    def run(
        self,
        slots: Slots,
        plan: Plan,
        compiled: bool,
        previews: bool,
        given: Iterator[Tensor | None] | None = None,
    ) -> Iterator[Tensor | None]:
        """Take every step of a plan; yield after each its x0, float32 [S, C, H, W], or None.

        All slots follow the plan together. ValueError if the network's output is of a wrong shape.

        Args:
            slots, plan: the buffers, of S slots; the plan, which is in their rows from 1 on.
            compiled, previews: whether the compiled network runs; whether x0 are yielded.
            given: yields each step's noise, float32 [S, C, H, W]; nothing is captured then.
        """
        self.check_plan(plan)
        fractional = self.tells_floats(plan)
        compiled = compiled and self.choice.prepared(slots, fractional)
        graph = None if given else self._graph(slots, compiled, fractional)
        if graph is not None and not previews:
            yield from self._replay(slots, plan, compiled, graph)
            return
        network, stats = self.choice.network(compiled), plan.needs_stats
        drawn = given or self._noise(slots, plan, compiled)
        rows = plan.rows.astype(np.float32).tolist() if previews else []
        for i in range(len(plan)):
            x_t = slots.state.x.clone() if previews else None
            if graph is not None:
                out = graph()
            else:
                out = step(slots, network, self.ops, fractional, drawn.__next__, stats)
            if i == 0:
                check_variance(plan, out.shape[1], self.shape[0])
            yield None if x_t is None else predicted_x0(slots, out, x_t, rows[i])

    def _replay(
        self, slots: Slots, plan: Plan, compiled: bool, one: CapturedSteps
    ) -> Iterator[None]:
        """Take every step of the plan, by graphs of as many steps as are fastest."""
        many = self.graphs.best(*self._step(slots, compiled, self.tells_floats(plan))) or one
        left = len(plan)
        while left:
            graph = many if left >= many.count else one
            out = graph()
            if left == len(plan):
                check_variance(plan, out.shape[1], self.shape[0])
            left -= graph.count
            yield from [None] * graph.count

    def tells_floats(self, plan: Plan) -> bool:
        """Return whether the network is told fractional timesteps, and so is given float32."""
        return plan.fractional and self._hoisted is None

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError if our U-Net lacks the plan's variance; others are checked when run."""
        if isinstance(self.network, registry.Network):
            check_variance(plan, self.network.config.out_channels, self.shape[0])

    def check_exact(self, plan: Plan) -> None:
        """Raise ValueError where exact cannot be promised, CompilationError if compiling failed."""
        if self.choice.why_not is not None:
            raise CompilationError(self.choice.why_not)
        if self.choice.compile is False:
            raise ValueError(
                f"exact=True: needs a compiled network; this sampler, with backend="
                f"{self.backend!r} and compile=False, has none"
            )
        if self.tells_floats(plan):
            raise ValueError(
                "exact=True: the plan has timesteps between the integers, for which the network "
                "is compiled apart; must be integers"
            )

    def prove_exact(self, L: int) -> None:
        """Raise ValueError if the compiled network's bits depend on the lane (of L), tried once."""
        if L not in self.choice.compiled.exact:
            image = self.draw([0], 0, Purpose.INITIAL).to(self.dtype)
            t = torch.zeros(1, dtype=torch.int64, device=self.device)
            told = self._hoisted.embed(t) if self._hoisted else t
            self.choice.compiled.prove_exact(image, told, L, self._labelled)

    def predict(self, x_t: Tensor, t: Tensor, labels: Tensor | None, evaluations: int) -> Tensor:
        """Return the output, [B, C or 2C, H, W], for x_t [B, C, H, W], int64 t and labels [B].

        ``evaluations`` is how many of one image are to come, by which compile="auto" decides on the
        CPU. Raises ValueError for an output of another shape.
        """
        x_t, told = x_t.to(self.dtype), self._hoisted.embed(t) if self._hoisted else t
        index = torch.arange(len(x_t), dtype=torch.int64, device=x_t.device)
        out = self.choice.predict(evaluations, x_t, told, labels, index)
        check_output(out, x_t.shape)
        return out

    def _step(self, slots: Slots, compiled: bool, fractional: bool) -> tuple[Key, Idling]:
        """Return the key of these buffers' step among the graphs, and the step with slots idle."""
        key = (slots.token, len(slots.per_slot.idx), len(slots.lane_slot), compiled, fractional)
        take = partial(step, slots, self.choice.network(compiled), self.ops, fractional)
        return key, partial(_idle, slots, take)

    def _graph(self, slots: Slots, compiled: bool, fractional: bool) -> CapturedSteps | None:
        """Return the captured step of these buffers; None where steps run one by one."""
        return self.graphs.get(*self._step(slots, compiled, fractional)) if self.capture else None

    def renew(self) -> int:
        """Follow the network's changes; return the version, an int, or raise (`Follower.renew`)."""
        return self.follower.renew(self.capture)

    def forget(self, slots: Slots) -> None:
        """Destroy the captured graphs of these buffers."""
        self.graphs.forget(slots.token)
        self.graphs.sweep()

    @property
    def _draws_ahead(self) -> bool:
        """Whether noise is drawn before the step: on the CPU's fast path."""
        return self.ops is reference and self.backend != "reference"

    def _noise(self, slots: Slots, plan: Plan, compiled: bool) -> Iterator[Tensor | None]:
        """Yield each step's noise; None where the step draws its own, or none."""
        if self._draws_ahead:
            draw = self._compiled_noise if compiled else reference.philox
            return cpu_noise.ahead(slots, plan, draw)
        return repeat(None)

    def update_weights(self, state: dict[str, Tensor]) -> None:
        """Copy weights by diffusers' keys into our network; ValueError if they do not fit."""
        check_state(self.network, state).load_state_dict(state)


@contextmanager
def _idle(slots: Slots, take: Step) -> Iterator[Step]:
    """Make every slot idle, so that ``take`` leaves all state as it is."""
    idx = slots.per_slot.idx.clone()
    slots.per_slot.idx.zero_()
    try:
        yield take
    finally:
        slots.per_slot.idx.copy_(idx)

"""How a batch of slots runs: plainly, with noise drawn ahead, compiled, or as a captured graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flashddpm import arguments, kernels
from flashddpm.caches import keep_compiled_code
from flashddpm.checkpoint import Conditioning, mismatches
from flashddpm.graph import CapturedStep
from flashddpm.kernels import reference
from flashddpm.kernels.contract import Column, Purpose
from flashddpm.network import HoistedUNet, flops_per_image
from flashddpm.noise import CompiledNoise
from flashddpm.slots import Network, Slots, evaluate, measure, step, update
from flashddpm.solvers import Plan
from flashddpm.unet import UNet

log = logging.getLogger("flashddpm")

BACKENDS = ("auto", "reference", "fused")
MAX_COMPILED_SHAPES = 128
NOISE_BYTES = 16 << 20
"""Most memory that noise drawn ahead may hold, on the CPU, unless one step needs more."""

# compile="auto" on the CPU: compiling takes about a minute and saves about a quarter of the time
# of eager convolutions, which run at some 20 GFLOP/s a core. Rough figures; only the order counts.
COMPILE_SECONDS, SAVED, FLOPS_PER_CORE = 60.0, 0.25, 20e9


class Execution:
    """A network on a device, and the ways to run it. Arguments are those of ``Sampler``.

    Attributes:
        backend: "reference" or "fused".
        compile: True, False or "auto".
        capture: whether the step becomes a CUDA graph.
        tune: whether compiling tries many kernels for each operation, for minutes.
        ops: the module whose operations a step calls.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        call: Network | None,
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
    ) -> None:
        arguments.one_of("backend", backend, BACKENDS)
        self.backend = "fused" if backend == "auto" else backend
        for name, flag in (("compile", compile), ("capture", capture)):
            if flag not in (True, False, "auto"):
                raise ValueError(f"{name}={flag!r}: must be True, False or 'auto'")
        fused, cuda = self.backend == "fused", device.type == "cuda"
        if not fused and True in (compile, capture):
            raise ValueError("backend='reference': is never compiled or captured")
        if capture is True and not cuda:
            raise ValueError(f"capture=True: needs a CUDA device, not {device}")

        if fused and cuda and not kernels.HAS_TRITON:
            if backend == "fused" or True in (compile, capture):
                raise ValueError(f"backend={backend!r}: on {device} it needs Triton, not installed")
            log.info("Triton is not installed: reference backend on %s", device)
            self.backend, fused = "reference", False

        own = network if isinstance(network, UNet) and call is None else None
        if own is not None:
            _check_unet(own, shape, conditioning)
            own.eval()
        self.compile = compile if fused and (own or compile is True) else False
        self.capture = fused and cuda and (bool(own) if capture == "auto" else bool(capture))
        self.ops = kernels if fused and cuda else reference
        self.tune = arguments.boolean("tune", tune)
        self.device, self.shape = device, shape
        self.num_timesteps = num_timesteps
        self.labelled = conditioning.num_classes is not None
        self.network = network.to(device) if isinstance(network, nn.Module) else network
        stored = _dtype_of(network)
        self.dtype = arguments.resolve_dtype(dtype, stored)
        if own and self.dtype is not stored:
            raise ValueError(f"dtype={self.dtype}: the network's is {stored}; convert it first")
        self._hoisted: HoistedUNet | None = None
        if fused and own is not None:
            own.to(memory_format=torch.channels_last)
            with torch.inference_mode(False), torch.no_grad():
                self._hoisted = HoistedUNet(own, num_timesteps)
        self._predict: Network = self._hoisted or call or _positional(network)
        log.info("runs on %s in %s, %s backend", device, self.dtype, self.backend)
        self._compiled: Network | None = None
        self._compiled_lanes: set[tuple[int, bool]] = set()  # and whether timesteps are floats
        self._exact_lanes: set[int] = set()
        self._compiled_noise = CompiledNoise()
        self._slots: dict[tuple[int, int], Slots] = {}
        self._captured: dict[tuple[int, int, bool], CapturedStep] = {}

    def start(self, seeds: Sequence[int], plan: Plan, image: Tensor | None = None) -> Tensor:
        """Return what trajectories begin at, float32 [B, C, H, W]: initial[0] image + initial[1] z.

        Args:
            seeds: of z, one an image.
            plan: whose ``initial`` it is.
            image: float32 [B, C, H, W] on the device, None where the plan needs none.
        """
        z = self.draw(seeds, 0, Purpose.INITIAL)
        if plan.initial == (0.0, 1.0):
            return z
        x0 = torch.zeros_like(z) if image is None else image
        t = torch.zeros(len(seeds), dtype=torch.int64, device=self.device)
        rows = torch.tensor([plan.initial], dtype=torch.float32, device=self.device)
        seed = torch.tensor(seeds, device=self.device)
        return self.ops.add_noise(x0, t, seed, t, rows, Purpose.INITIAL)

    def draw(self, seeds: Sequence[int], key: int, purpose: Purpose) -> Tensor:
        """Return the noise of these seeds under one key, float32 [B, C, H, W]."""
        seed = torch.tensor(seeds, device=self.device)
        return self.ops.philox(seed, torch.full_like(seed, key), self.shape, purpose)

    def compiles(self, evaluations: int, lanes: int) -> bool:
        """Return whether to compile for this many evaluations of one image, ``lanes`` at a time."""
        if self.compile != "auto":
            return bool(self.compile)
        return (lanes, False) in self._compiled_lanes or self.auto_compile(evaluations)[0]

    def auto_compile(self, evaluations: int) -> tuple[bool, str]:
        """Return what compile="auto" chooses for so many evaluations of one image, and why."""
        if not isinstance(self.network, UNet):
            return False, "a foreign network is compiled only when asked"
        if self.device.type == "cuda":
            return True, "our U-Net on CUDA is always compiled"
        flops = evaluations * self._flops
        seconds = flops / (FLOPS_PER_CORE * torch.get_num_threads())
        chosen = seconds * SAVED > COMPILE_SECONDS
        verb = "repays" if chosen else "does not repay"
        return chosen, (
            f"about {seconds:.0f} s of work {verb} about {COMPILE_SECONDS:.0f} s of compiling"
        )

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @cached_property
    def _flops(self) -> int:
        assert isinstance(self.network, UNet)
        return flops_per_image(self.network, self.shape)

    def service_slots(self, S: int, L: int, R: int) -> Slots:
        """Return new buffers for S slots, L lanes and R rows of plans, the rest row included."""
        return Slots(S, L, self.shape, R, self.dtype, self.device, self.labelled)

    def bucket(self, lanes: int, most: int, compiled: bool) -> int:
        """Return how many lanes the network runs for so many in use, of ``most`` at most.

        A compiled or captured network has one shape for each power of two; otherwise as many as
        are in use.
        """
        if not (compiled or self.capture):
            return lanes
        return min(1 << (lanes - 1).bit_length(), most)

    def take_step(self, slots: Slots, L: int, compiled: bool, stats: bool) -> Tensor | None:
        """Take one step of every slot, whatever its row, the network on the first L lanes.

        Args:
            slots: the buffers.
            L: lanes of the bucket.
            compiled: whether the compiled network runs.
            stats: whether some row asks for ``sample_stats``.

        Returns:
            The network's output, or None where the step was a captured graph.
        """
        network = self._network(compiled)
        if compiled:
            self._warm(slots, network, L)
        if self.capture:
            self._capture(slots, network, L)()
            return None
        out = evaluate(slots, network, L)
        if stats:
            measure(slots, out, self.ops)
        update(slots, out, self.ops, self._step_noise(slots))
        return out

    def _step_noise(self, slots: Slots) -> Tensor | None:
        """Return the noise of all slots, each by its own row, in one call on the fused CPU path."""
        if self.ops is not reference or self.backend == "reference":
            return None
        drawing = (slots.rows[slots.idx, Column.SIGMA] != 0).nonzero().flatten()
        if not len(drawing):
            return None
        keys = slots.keys[slots.idx[drawing]]
        noise = torch.empty_like(slots.x)
        z = reference.philox(slots.seeds[drawing], keys, self.shape, Purpose.REVERSE_STEP)
        noise[drawing] = z
        return noise

    def slots(self, S: int, L: int) -> Slots:
        """Return buffers for S slots and L lanes; the same ones each time while they are kept."""
        if (S, L) not in self._slots:
            if not self.capture:  # nothing holds the addresses of the last ones
                self._slots.clear()
            self._slots[S, L] = Slots(
                S, L, self.shape, self.num_timesteps + 1, self.dtype, self.device, self.labelled
            )
        return self._slots[S, L]

    def run(
        self, slots: Slots, plan: Plan, compiled: bool, previews: bool
    ) -> Iterator[Tensor | None]:
        """Take every step of the plan; yield after each, with its x0 if previews are wanted."""
        network = self._network(compiled)
        self.check_plan(plan)
        slots.fractional = plan.fractional
        if compiled:
            self._warm(slots, network, len(slots.lane_slot))
        if self.capture and not previews:
            replay = self._capture(slots, network, len(slots.lane_slot))
            for _ in range(len(plan)):
                replay()
                yield None
            return
        noise, stats = self._noise(slots, plan, compiled), plan.needs_stats
        for i in range(len(plan)):
            out = evaluate(slots, network)
            if i == 0:
                self.check_variance(plan, out.shape[1])
            if stats:
                measure(slots, out, self.ops)
            x0 = _preview(slots, out, i + 1) if previews else None
            update(slots, out, self.ops, next(noise))
            yield x0

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that our U-Net has not the channels for; others show when they are run."""
        if isinstance(self.network, UNet):
            self.check_variance(plan, self.network.config.out_channels)

    def check_exact(self, plan: Plan) -> None:
        """Refuse what has no bits to promise: a network that is not compiled, or compiled twice."""
        if self.compile is False:
            raise ValueError(
                f"exact=True: needs a compiled network; this sampler, with backend="
                f"{self.backend!r} and compile=False, has none"
            )
        if plan.fractional:
            raise ValueError(
                "exact=True: the plan has timesteps between the integers, for which the network "
                "is compiled apart; must be integers"
            )

    def prove_exact(self, L: int) -> None:
        """Refuse exact mode where the compiled network's bits depend on the lane: try, once.

        They do on the CPU for some odd sizes, where loops over the whole batch end in tails that
        round differently.
        """
        if L in self._exact_lanes:
            return
        image = self.draw([0], 0, Purpose.INITIAL).to(self.dtype).expand(L, *self.shape)
        t = torch.zeros(L, dtype=torch.int64, device=self.device)
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
            x = image.contiguous(memory_format=torch.channels_last)
            out = self._network(True)(x, t, torch.zeros_like(t) if self.labelled else None)
        if not torch.equal(out, out[:1].expand_as(out)):
            raise ValueError(
                f"exact=True: on this machine the compiled network gives other bits in other lanes "
                f"of {L}, for images of {self.shape}; must be False"
            )
        self._exact_lanes.add(L)

    def check_variance(self, plan: Plan, channels: int) -> None:
        """Refuse a plan that learns its variance for a network without channels for it."""
        if plan.learns_variance and channels != 2 * self.shape[0]:
            raise ValueError(
                f"variance_type: must be fixed_small or fixed_large for a network that returns "
                f"{channels} channels; a learned variance takes {2 * self.shape[0]}"
            )

    def _network(self, compiled: bool) -> Network:
        if not compiled:
            return self._predict
        if self._compiled is None:
            keep_compiled_code()
            mode = "max-autotune-no-cudagraphs" if self.tune else None
            log.info("compiling the network (%s)", mode or "default")
            self._compiled = torch.compile(self._predict, fullgraph=True, dynamic=False, mode=mode)
        return self._compiled

    def _warm(self, slots: Slots, network: Network, L: int) -> None:
        """Compile for this number of lanes, if it is new: Dynamo by itself stops at 8."""
        if (L, slots.fractional) not in self._compiled_lanes:
            with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
                evaluate(slots, network, L)
            self._compiled_lanes.add((L, slots.fractional))

    def _capture(self, slots: Slots, network: Network, L: int) -> CapturedStep:
        """Return the captured step of these buffers; captured with every slot at rest.

        A captured step holds on to its buffers, so theirs is no other's identity while it lives.
        """
        key = (id(slots), L, slots.fractional)
        if key not in self._captured:
            idx = slots.idx.clone()
            slots.idx.zero_()
            self._captured[key] = CapturedStep(
                lambda: step(slots, network, self.ops, L), self.device, self._pool
            )
            slots.idx.copy_(idx)
        return self._captured[key]

    def forget(self, slots: Slots) -> None:
        """Let go of the graphs of these buffers."""
        for key in [key for key in self._captured if key[0] == id(slots)]:
            del self._captured[key]

    def _noise(self, slots: Slots, plan: Plan, compiled: bool) -> Iterator[Tensor | None]:
        """Yield each step's noise, drawn for many steps in one call on the fused CPU path.

        None where the step draws its own, or none.
        """
        S, n = len(slots.idx), len(plan)
        if self.ops is not reference or self.backend == "reference":
            yield from [None] * n
            return
        draw = self._compiled_noise if compiled else reference.philox
        many = max(1, NOISE_BYTES // (4 * slots.x.numel()))
        for start in range(0, n, many):
            keys = torch.tensor(plan.noise_keys[start : start + many])
            if not plan.rows[start : start + many, Column.SIGMA].any():
                yield from [None] * len(keys)
                continue
            z = draw(
                slots.seeds.repeat(len(keys)),
                keys.repeat_interleave(S),
                self.shape,
                Purpose.REVERSE_STEP,
            )
            yield from z.unflatten(0, (len(keys), S))

    def update_weights(self, state: dict[str, Tensor]) -> None:
        """Copy weights into our U-Net and derive again what depends on them, all in place."""
        if not isinstance(self.network, UNet):
            raise ValueError("update_weights: the network is not a flashddpm UNet")
        wrong = mismatches(self.network, state)
        if wrong:
            raise ValueError("state: does not match the network: " + "; ".join(wrong))
        self.network.load_state_dict(state)
        if self._hoisted is not None:
            self._hoisted.refresh()


def _preview(slots: Slots, out: Tensor, row: int) -> Tensor:
    """Return the x0 that the slots, all on one row, predict from their output."""
    numbers = slots.rows[row].tolist()
    out = out[:, : slots.x.shape[1]]
    cond = out[slots.lane_cond.long()].float()
    o = reference.combine(cond, out[slots.lane_uncond.clamp(min=0).long()], slots.guidance)
    if numbers[Column.RESCALE]:
        o *= slots.factors.reshape(-1, 1, 1, 1)
    guided = ((slots.lane_uncond >= 0) & (numbers[Column.UNGUIDED] == 0)).reshape(-1, 1, 1, 1)
    return reference.predict_x0(slots.x, torch.where(guided, o, cond), numbers, slots.bounds)


def _check_unet(unet: UNet, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
    """Refuse a U-Net that does not take these images or labels."""
    config, (C, H, W) = unet.config, shape
    multiple = 2 ** (len(config.block_out_channels) - 1)
    channels = config.in_channels == C and config.out_channels in (C, 2 * C)
    if not channels or H % multiple or W % multiple:
        raise ValueError(
            f"shape={shape}: must have {config.in_channels} channels, as many as come out "
            f"({config.out_channels}) or half, and sides that are multiples of {multiple}"
        )
    embeds, classes = config.num_class_embeds, conditioning.num_classes
    needed = 0 if classes is None else max(classes, (conditioning.null_label or 0) + 1)
    if (embeds is None) != (classes is None) or needed > (embeds or 0):
        raise ValueError(f"conditioning={conditioning}: the network has {embeds} class embeddings")


def _dtype_of(network: Any) -> torch.dtype:
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def _positional(network: Callable[..., Tensor]) -> Network:
    def call(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return network(x_t, t) if labels is None else network(x_t, t, labels)

    return call

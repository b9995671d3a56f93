"""The job of ``flashddpm sample``: its options, checked, with the model loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoints.bundled import bundled
from flashddpm.checkpoints.hub import locate
from flashddpm.cli.parsing import parse_labels, parse_seeds
from flashddpm.diffusion.plan_options import with_defaults
from flashddpm.distributed import World
from flashddpm.io import images
from flashddpm.sampling.sampler import Sampler

log = logging.getLogger("flashddpm")

MAX_FRAMES = 60
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class SampleOptions:
    """The options of ``flashddpm sample``, as they were given.

    Attributes:
        model_dir: the model's folder, or OWNER/NAME on the Hugging Face Hub; None for the model
            that comes with the package.
        out: the picture to write (with a suffix such as .png), or a folder (without).
        num_images: the number of images; None for 64, or as many as seeds are listed.
        seeds: the seeds as text, such as "7" (the first), "1,2,5" or "0:64"; None for those from 0.
        labels: the class labels as text, numbers or names, such as "3" (of all images) or
            "0,Boot,2", or "none"; None for the classes in turn.
        device: "cpu", "cuda", "cuda:N", or "auto" for the GPU where there is one, else the CPU.
        dtype: the dtype of the network: "float32", "bfloat16" or "float16"; None for bfloat16 on
            CUDA and float32 on the CPU.
        backend: "fused", "reference" (plain PyTorch), or "auto", which is "fused", but "reference"
            on CUDA without Triton.
        compile: whether the network is compiled: "on", "off", or "auto", which with backend "fused"
            is "on" on CUDA, and on the CPU where it repays its cost, and else "off".
        batch_size: the number of images drawn at a time, at least 1.
        trajectory: the animation (.gif) of the predicted x0 to write besides; None for none.
        plan: guidance, and options of `Sampler.plan`, by name; None is the same as left out.
        allow_pickle: whether .bin weights (pickles) may be read where there are no safetensors.
    """

    model_dir: Path | None
    out: Path
    num_images: int | None
    seeds: str | None
    labels: str | None
    device: str
    dtype: str | None
    backend: str
    compile: str
    batch_size: int
    trajectory: Path | None
    plan: dict[str, Any]
    allow_pickle: bool = False


@dataclass(frozen=True)
class SampleJob:
    """A run of ``flashddpm sample`` that is ready: its options, checked, and its model, loaded.

    Attributes:
        options: the options; solver and num_steps of their plan are filled in.
        sampler: the sampler of the model.
        folder: the model's folder.
        seeds: the seed of each of the N images.
        labels: the class label of each image; None for an unconditional model, or for no labels.
        layout: how a grid is drawn, a dict of "columns", an int or None for about as many as rows,
            and "captions", a list of N strings or None.
        parts: the batches, as slices of 0..N-1, of which each is drawn by one process.
    """

    options: SampleOptions
    sampler: Sampler
    folder: Path
    seeds: list[int]
    labels: list[int] | None
    layout: dict[str, Any]
    parts: Sequence[slice]

    @property
    def num_steps(self) -> int:
        """The number of steps of the plan, an int, which a respacing may determine."""
        options = {k: v for k, v in self.options.plan.items() if k != "guidance"}
        return len(self.sampler.plan(**options))

    def draw(
        self, part: slice, progress: bool, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Draw the images of a batch.

        Args:
            part: the batch, a slice of 0..N-1 with b images.
            progress: whether a progress bar is shown.
            on_step: called after each step with its number, from 0, and the predicted x0, float32
                [b, C, H, W], of the batch; None for no call.

        Returns:
            float32 [b, C, H, W] in about [-1, 1], on the sampler's device.

        Raises:
            ValueError: if an option is not allowed.
            NonFiniteError: if the network's output turns NaN or infinite.
        """
        return self.sampler.sample(
            self.seeds[part],
            None if self.labels is None else self.labels[part],
            **self.options.plan,
            batch_size=self.options.batch_size if on_step is None else len(self.seeds),
            progress=progress,
            on_step=on_step,
        )

    def frames(self, frames: list[Any]) -> Callable[[int, Tensor], None] | None:
        """Return a callback for ``draw`` that collects the animation's frames; None without one.

        Args:
            frames: the list that the callback appends PIL images to: one grid of the predicted x0
                for each of at most 60 evenly spaced steps, and for the last.
        """
        if self.options.trajectory is None:
            return None
        last = self.num_steps - 1

        def keep(i: int, x0: Tensor) -> None:
            if i % -(-(last + 1) // MAX_FRAMES) == 0 or i == last:
                frames.append(images.make_grid(x0, **self.layout))

        return keep


def prepare(options: SampleOptions, world: World) -> SampleJob:
    """Check the options of ``flashddpm sample`` and load the model that they name.

    Args:
        options: the options, as they were given.
        world: the processes of the run, and which of them this one is.

    Raises:
        ValueError: if an option is not allowed, or the model draws images of more than 4 channels.
        CheckpointError: if there is no such model, or it is broken.
    """
    seeds = _check(options, world)
    pickle, model = options.allow_pickle, options.model_dir
    folder = bundled() if model is None else locate(str(model), pickle)
    sampler = Sampler.from_pretrained(
        folder,
        world.device(options.device),
        options.dtype,
        allow_pickle=pickle,
        backend=options.backend,
        compile=options.compile if options.compile == "auto" else options.compile == "on",
    )
    plan = with_defaults(options.plan, sampler.defaults.solver, len(sampler.schedule))
    options = replace(options, plan=plan)
    labels = parse_labels(options.labels, sampler.conditioning, len(seeds))
    if sampler.shape[0] not in images.CHANNELS:
        raise ValueError(f"model_dir: draws {sampler.shape[0]} channels; pictures have 1 to 4")
    # One process hands a picture's images, which it keeps anyway, to the sampler all at once.
    whole = options.trajectory is not None or (bool(options.out.suffix) and world.size == 1)
    step = len(seeds) if whole else options.batch_size
    parts = [slice(i, i + step) for i in range(0, len(seeds), step)]
    if len(parts) < world.size and not world.rank:
        log.info(
            "%d of %d processes have nothing to draw: %d images are %d of batch_size=%d",
            *(world.size - len(parts), world.size, len(seeds), len(parts), options.batch_size),
        )
    layout = _layout(sampler, labels, options.labels is None)
    return SampleJob(options, sampler, folder, seeds, labels, layout, parts)


def _check(options: SampleOptions, world: World) -> list[int]:
    """Check the options that can be checked without the model; return the seeds."""
    out, trajectory = options.out, options.trajectory
    if out.suffix:
        arguments.one_of("suffix of out", out.suffix.lower(), PICTURES)
    elif out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file; must be a folder, or end in .png")
    if trajectory is not None:
        arguments.one_of("suffix of trajectory", trajectory.suffix.lower(), (".gif",))
        if world.size > 1:
            raise ValueError(f"trajectory={str(trajectory)!r}: is drawn by one process only")
    arguments.one_of("compile", options.compile, ("auto", "on", "off"))
    arguments.integer("batch_size", options.batch_size, 1)
    seeds = parse_seeds(options.seeds, options.num_images)
    if not out.suffix and len(set(seeds)) != len(seeds):
        raise ValueError(
            f"seeds={options.seeds!r}: some stand twice, and a folder has one file a seed"
        )
    return seeds


def _layout(sampler: Sampler, labels: list[int] | None, in_turn: bool) -> dict[str, Any]:
    """Return columns and captions of a grid; with 16 classes or less in turn, each has a column."""
    classes, names = sampler.conditioning.num_classes, sampler.conditioning.class_names
    captions = None
    if labels is not None:
        captions = [names[i] if names and 0 <= i < len(names) else str(i) for i in labels]
    columns = classes if in_turn and classes and classes <= 16 else None
    return {"columns": columns, "captions": captions}

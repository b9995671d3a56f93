"""What ``flashddpm sample`` does: read its options, draw, and write a picture or a folder.

Under torchrun every process draws its share of the batches (``sharding``). A folder is written
batch by batch, with a manifest, so that the same command goes on where a killed one ended.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashddpm.cli.options import with_defaults

if TYPE_CHECKING:
    from torch import Tensor

    from flashddpm.distributed import World
    from flashddpm.sampling.sampler import Sampler

log = logging.getLogger("flashddpm")

MAX_FRAMES = 60
MAX_SEEDS = 1_000_000
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def parse_seeds(seeds: str | None, num_images: int | None) -> list[int]:
    """Return the seeds that the options name: "7", "1,2,5", "0:64", or one and a count.

    Raises:
        ValueError: not of that form, or another number of seeds than of images.
    """
    from flashddpm import arguments

    if num_images is not None:
        arguments.integer("num_images", num_images, 1)
    if seeds is None:
        return list(range(64 if num_images is None else num_images))
    result: list[int] = []
    try:
        for part in seeds.split(","):
            low, colon, high = part.partition(":")
            stop = int(high) if colon else int(low) + 1
            if stop - int(low) > MAX_SEEDS:
                raise OverflowError
            result += range(int(low), stop)
    except OverflowError:
        raise ValueError(f"seeds={seeds!r}: must be at most {MAX_SEEDS} at a time") from None
    except ValueError:
        raise ValueError(
            f"seeds={seeds!r}: must be integers and ranges, such as 7 or 1,2,5 or 0:64"
        ) from None
    if len(result) == 1 and num_images is not None:
        result = list(range(result[0], result[0] + num_images))
    if num_images is not None and len(result) != num_images:
        raise ValueError(f"seeds={seeds!r}: {len(result)} seeds for num_images={num_images}")
    return arguments.seed_list(result)


def parse_labels(labels: str | None, sampler: Sampler, count: int) -> list[int] | None:
    """Return a label for each image; without the option, the classes in turn.

    Raises:
        ValueError: no number or class name, or another number of labels than 1 or ``count``.
    """
    classes, names = sampler.conditioning.num_classes, sampler.conditioning.class_names or ()
    if labels is None:
        return None if classes is None else [i % classes for i in range(count)]
    if labels == "none":
        return None
    lower = [name.lower() for name in names]
    result = []
    for part in (part.strip() for part in labels.split(",")):
        if part.lower() in lower:
            result.append(lower.index(part.lower()))
            continue
        try:
            result.append(int(part))
        except ValueError:
            known = f" or one of {', '.join(names)}" if names else ""
            raise ValueError(f"labels: {part!r} must be a number{known}") from None
    return result * count if len(result) == 1 else result


@dataclass(frozen=True)
class Request:
    """The options of the command; ``options`` are those of ``Sampler.sample`` by name.

    None among these is "not given" (`with_defaults`).
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
    options: dict[str, Any]
    allow_pickle: bool = False


@dataclass(frozen=True)
class Job:
    """A request that was read and found possible.

    Attributes:
        seeds, labels: one an image.
        layout: arguments of ``images.make_grid``.
        parts: the batches that are drawn one at a time, by whichever process.
    """

    request: Request
    sampler: Sampler
    folder: Path
    seeds: list[int]
    labels: list[int] | None
    layout: dict[str, Any]
    parts: Sequence[slice]

    @property
    def num_steps(self) -> int:
        """Steps of the plan, which a respacing may set."""
        options = {k: v for k, v in self.request.options.items() if k != "guidance"}
        return len(self.sampler.plan(**options))

    def draw(
        self, part: slice, progress: bool, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Return the images of a part, on the sampler's device."""
        return self.sampler.sample(
            self.seeds[part],
            None if self.labels is None else self.labels[part],
            **self.request.options,
            batch_size=self.request.batch_size if on_step is None else len(self.seeds),
            progress=progress,
            on_step=on_step,
        )


def run(request: Request) -> str:
    """Draw and write what was asked for; return the closing line, empty but in process 0."""
    from flashddpm.distributed import World

    world = World.from_environment()
    if world.rank:
        log.setLevel(logging.WARNING)
    with world.joined(request.device):
        with world.together():
            job = _prepare(request, world)
        start = time.perf_counter()
        try:
            drawn = (_picture if request.out.suffix else _folder)(job, world)
        except Exception:
            if world.size > 1:  # another process's bar may hold the line
                print(file=sys.stderr)
            raise
        total = sum(world.gather(drawn))
        seconds = time.perf_counter() - start
    if world.rank:
        return ""
    kept = len(job.seeds) - total
    return (
        f"{total} images, {job.num_steps} steps, {seconds:.1f} s, "
        f"{total / seconds:.1f} images/s, {job.sampler.device}, {job.sampler.backend}"
        + (f", {world.size} processes" if world.size > 1 else "")
        + (f", {kept} were there" if kept else "")
        + f" -> {request.out}"
    )


def _prepare(request: Request, world: World) -> Job:
    """Check the request and load its model.

    Raises:
        ValueError: an option that is not allowed.
    """
    import flashddpm as fd
    from flashddpm import arguments
    from flashddpm.checkpoints.hub import locate
    from flashddpm.io.images import CHANNELS

    out, trajectory = request.out, request.trajectory
    if out.suffix:
        arguments.one_of("suffix of out", out.suffix.lower(), PICTURES)
    elif out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file; must be a folder, or end in .png")
    if trajectory is not None:
        arguments.one_of("suffix of trajectory", trajectory.suffix.lower(), (".gif",))
        if world.size > 1:
            raise ValueError(f"trajectory={str(trajectory)!r}: is drawn by one process only")
    arguments.one_of("compile", request.compile, ("auto", "on", "off"))
    batch = arguments.integer("batch_size", request.batch_size, 1)
    seeds = parse_seeds(request.seeds, request.num_images)
    if not out.suffix and len(set(seeds)) != len(seeds):
        raise ValueError(
            f"seeds={request.seeds!r}: some stand twice, and a folder has one file a seed"
        )
    pickle = request.allow_pickle
    model = request.model_dir
    folder = fd.bundled() if model is None else locate(str(model), pickle)
    sampler = fd.Sampler.from_pretrained(
        folder,
        world.device(request.device),
        request.dtype,
        allow_pickle=pickle,
        backend=request.backend,
        compile=request.compile if request.compile == "auto" else request.compile == "on",
    )
    request = replace(request, options=with_defaults(request.options, sampler))
    labels = parse_labels(request.labels, sampler, len(seeds))
    if sampler.shape[0] not in CHANNELS:
        raise ValueError(f"model_dir: draws {sampler.shape[0]} channels; pictures have 1 to 4")
    # One process hands a picture's images, which it keeps anyway, to the sampler all at once.
    whole = trajectory is not None or (bool(out.suffix) and world.size == 1)
    step = len(seeds) if whole else batch
    parts = [slice(i, i + step) for i in range(0, len(seeds), step)]
    if len(parts) < world.size and not world.rank:
        log.info(
            "%d of %d processes have nothing to draw: %d images are %d of batch_size=%d",
            *(world.size - len(parts), world.size, len(seeds), len(parts), batch),
        )
    layout = _layout(sampler, labels, request.labels is None)
    return Job(request, sampler, folder, seeds, labels, layout, parts)


def _layout(sampler: Sampler, labels: list[int] | None, in_turn: bool) -> dict[str, Any]:
    """Return columns and captions of a grid: a column a class where there are few."""
    classes, names = sampler.conditioning.num_classes, sampler.conditioning.class_names
    captions = None
    if labels is not None:
        captions = [names[i] if names and 0 <= i < len(names) else str(i) for i in labels]
    columns = classes if in_turn and classes and classes <= 16 else None
    return {"columns": columns, "captions": captions}


def _frames(job: Job, frames: list[Any]) -> Callable[[int, Tensor], None] | None:
    """Return what keeps the previews of the steps that an animation shows, if one is wanted."""
    from flashddpm.io import images

    if job.request.trajectory is None:
        return None
    last = job.num_steps - 1

    def keep(i: int, x0: Tensor) -> None:
        if i % -(-(last + 1) // MAX_FRAMES) == 0 or i == last:
            frames.append(images.make_grid(x0, **job.layout))

    return keep


def _picture(job: Job, world: World) -> int:
    """Write one picture of all images; return how many of them this process drew."""
    import torch

    from flashddpm.io import images

    shape = (len(job.seeds), *job.sampler.shape)
    frames: list[Any] = []
    mine = world.mine(job.parts)
    with world.together():
        x = torch.zeros(shape, device=job.sampler.device)
        for part in mine:
            x[part] = job.draw(part, not world.rank, _frames(job, frames))
    x = world.add_up(x)
    with world.together():
        if not world.rank:
            images.save_grid(x.cpu(), job.request.out, **job.layout)
            if job.request.trajectory is not None:
                images.save_gif(frames, job.request.trajectory)
    return sum(len(job.seeds[part]) for part in mine)


def _folder(job: Job, world: World) -> int:
    """Write one file an image and the manifest; return how many files this process wrote."""
    from flashddpm.cli import manifest
    from flashddpm.io import images

    frames: list[Any] = []
    out = job.request.out
    with world.together():
        model = manifest.fingerprint(job.folder)
    models = world.gather(model)
    with world.together():
        if len(set(models)) > 1:
            raise ValueError(f"model_dir={str(job.folder)!r}: was changed while it was read")
        if not world.rank:
            final = manifest.merge(out, *_facts(job, world, model))
    # A bad option shows in the first batch, and then nothing is written by any process.
    drawn = _missing(job, world, frames)
    with world.together():
        first = next(drawn, None)
    with world.together():
        if not world.rank:
            manifest.sweep(out)
            manifest.write(out, final)
    written = 0
    for part, x in chain([] if first is None else [first], drawn):
        written += images.save_folder(x, out, job.seeds[part])
    world.gather(None)
    if not world.rank:
        manifest.write(out, final)
        if job.request.trajectory is not None:
            images.save_gif(frames, job.request.trajectory)
    return written


def _missing(job: Job, world: World, frames: list[Any]) -> Iterator[tuple[slice, Tensor]]:
    """Yield this process's batches with an image that is not in the folder, and their images.

    Such a batch is drawn whole, for its images to have the bits that they have in a first run.
    """
    from tqdm import tqdm

    keep = _frames(job, frames)
    todo = [
        part
        for part in world.mine(job.parts)
        if keep or any(not (job.request.out / f"{s}.png").exists() for s in job.seeds[part])
    ]
    alone = len(todo) == 1  # then the bar shows steps
    count = sum(len(job.seeds[part]) for part in todo)
    with tqdm(total=count, unit="image", disable=bool(world.rank) or len(todo) < 2) as bar:
        for part in todo:
            yield part, job.draw(part, alone and not world.rank, keep)
            bar.update(len(job.seeds[part]))


def _facts(job: Job, world: World, model: str) -> tuple[dict[str, Any], ...]:
    """Return settings, run and images as the manifest has them."""
    import torch

    import flashddpm as fd

    sampler, request = job.sampler, job.request
    dtype = str(sampler.dtype).removeprefix("torch.")
    settings = {"model": model, "dtype": dtype, **request.options}
    kind = sampler.device.type
    run = {
        "flashddpm": fd.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(sampler.device) if kind == "cuda" else kind,
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "backend": sampler.backend,
        "compile": request.compile,
        "batch_size": request.batch_size,
        "world_size": world.size,
    }
    labels: Sequence[int | None] = job.labels or [None] * len(job.seeds)
    images = {}
    for number, part in enumerate(job.parts):
        for seed, label in zip(job.seeds[part], labels[part], strict=True):
            name, rank = f"{seed}.png", number % world.size
            images[name] = {"seed": seed, "label": label, "rank": rank}
    return settings, run, images

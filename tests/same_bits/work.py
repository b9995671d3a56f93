"""What flashddpm does on the CPU, for __main__.py to compare: of its public names and commands.

    python work.py SITE OUT EARLIER LEFT_OUT

runs with the package that lies in SITE, in an empty folder, and writes what each section yields,
tensors and texts, to OUT/SECTION.safetensors. The last section goes on from what a version, this
one or another, left in EARLIER. With TRITON_INTERPRET=1 it is the kernels alone. LEFT_OUT are names
of sections that are not run, comma-separated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import calls, compiled, engine, images, options, pipelines, sampling, schedules
from halfway import (
    CONTINUED,
    SAMPLE,
    TRAIN,
    Values,
    begin,
    command,
    files,
    normal,
    sampler,
    stored,
    write_images,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import flashddpm as fd
import flashddpm.testing

TESTS = Path(__file__).resolve().parents[1]
FINGERPRINT = re.compile("sha256:[0-9a-f]+")


def training() -> Values:
    """Yield the files of runs of several losses, resumed too, on images in several forms."""
    write_images()
    for i, image in enumerate(np.load("data.npz")["images"][:12]):
        path = Path(f"pictures/{'ab'[i % 2]}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    runs: dict[str, tuple[Any, ...]] = {
        "plain": ("data.npz", "--ema-half-lives", "3,20", "--sample-every", 3, "--save-every", 2),
        "learned": (
            "data.npz", "--variance-type", "learned_range", "--accumulate", 2, "--loss", "huber",
            "--huber-delta", 0.5, "--lr-schedule", "cosine", "--horizontal-flip",
            "--timestep-sampling", "low_discrepancy", "--beta-schedule", "squaredcos_cap_v2",
        ),
        "weighted": (
            "pictures", "--prediction-type", "v_prediction", "--loss-weighting", "min_snr",
            "--precision", "bfloat16", "--checkpoint-activations", "--label-dropout", 0,
        ),
    }  # fmt: skip
    for name, flags in runs.items():
        command("train", "--out", name, *TRAIN, "--steps", 5, *flags)
        yield from files(name)
    command("train", "--out", "plain", "--resume", "--steps", 8, "--device", "cpu")
    yield from ((f"resumed {name}", value) for name, value in files("plain"))
    flags = ("--init", "plain", "--batch-size", 4, "--num-train-timesteps", 50, "--device", "cpu")
    command("train", "data.npz", "--out", "from plain", "--steps", 2, *flags)
    yield from files("from plain")


def processes() -> Values:
    """Yield the files of a run and of a folder of samples, each by two processes."""
    write_images()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for words in (
        ("train", "data.npz", "--out", "two", *TRAIN, "--steps", 3),
        ("sample", "two", "--out", "shared", *SAMPLE),
    ):
        line = [*launch, "-m", "flashddpm", *map(str, words)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    yield from files("two")
    yield from files("shared")


def evaluation() -> Values:
    """Yield the reports of every metric, by a classifier that is trained, and the features kept."""
    sampler("epsilon").save_pretrained("model")
    write_images()
    few = ("--num-images", 72, "--num-steps", 3, "--bound-images", 6, "--bound-timesteps", 5)
    every = ("--metrics", "bound", "--bound-images", 4, "--bound-timesteps", "all")
    for out, flags in (("few", (*few, "--guidance", 2, "--batch-size", 16)), ("every", every)):
        line = ("model", "data.npz", "--out", f"{out}.html", "--device", "cpu", *flags)
        yield out, command("evaluate", *line)
    # A classifier's fingerprint covers its source, docstrings too; features are kept by it.
    for name, value in files("."):
        yield name, FINGERPRINT.sub("sha256:", value) if name.startswith("few.") else value
    kept = Path(os.environ["XDG_CACHE_HOME"], "flashddpm", "features").rglob("*.safetensors")
    found = [safe_open(path, "pt").get_tensor("features") for path in kept]
    yield "features are kept", str(len(found))
    for i, features in enumerate(sorted(found, key=lambda x: (x.shape, x.flatten().tolist()))):
        yield f"features {i}", features


def data() -> Values:
    """Yield images as each form of data has them."""
    write_images()
    Path("idx").mkdir()
    Path("flat").mkdir()
    arrays = np.load("data.npz")
    for name, key in (("images-idx3", "images"), ("labels-idx1", "labels")):
        array = arrays[key].astype(np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        Path(f"idx/train-{name}-ubyte").write_bytes(header + array.tobytes())
    for i, image in enumerate(arrays["images"][:5]):
        Image.fromarray(image).convert("RGB").save(f"flat/{i}.png")
    for path in ("data.npz", "idx", "flat"):
        source = fd.data.load_data(path, 2)
        yield f"{path} is", f"{source.fingerprint()} {source.num_classes} {source.shape}"
        pixels, labels = source.fetch(torch.tensor([3, 0, 4]))
        yield f"{path} images", fd.data.to_float(pixels)
        yield f"{path} labels", str(labels)


def convert() -> Values:
    """Yield the files of other projects' checkpoints, converted, and images of them."""
    fixtures = next(TESTS.rglob("make_openai.py"))
    made = runpy.run_path(str(fixtures))
    case = made["CASES"]["improved_scale_shift"]
    ddpt = {"image_size": 16, "timesteps": 200, "beta_schedule": "sigmoid", "objective": "pred_v"}
    for project, file, key, prefix, flags in (
        ("improved", "openai_improved_scale_shift", "shapes", "", case),
        ("ddpt", "ddpt", "default", "model.", ddpt),
    ):
        with safe_open(fixtures.with_name(f"{file}.safetensors"), "pt") as stored_shapes:
            state = made["weights"](json.loads(stored_shapes.metadata()[key]))
        save_file({prefix + name: value for name, value in state.items()}, "theirs.safetensors")
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        yield project, command("convert", "theirs.safetensors", project, "--from", project, *words)
        yield from files(project)
        yield f"{project} images", stored(project).sample([0], num_steps=2)


def benchmarks() -> Values:
    """Yield what is said of files of results."""
    values = {"ours_seconds": 1.0, "peer_seconds": 2.0, "ratio": 2.0, "ratio_low": 1.9}
    values |= {"ratio_high": 2.1, "spread": 0.01, "pairs": 5.0}
    where = {"gpu": None, "cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}, "python": "3"}
    for case in ("a", "b"):
        result = {"case": case, "peer": "peer", "note": "a note", "values": values}
        run = {"schema": 2, "environment": {**where, "commit": "c", "capability": "AVX2"}}
        Path(f"{case}.json").write_text(json.dumps({**run, "results": [result]}))
    yield "merge", command("bench", "--merge", "a.json", "b.json", "--out", "both.json")
    yield "compare", command("bench", "--compare", "a.json", "both.json")
    yield "report", command("bench", "--report", "both.json", "--html", "both.html")
    yield from files(".")


def testing() -> Values:
    """Yield what the battery says of a right function and of a wrong one."""

    def right(x):
        return 2 * x

    def wrong(x):
        return 2 * x if x.numel() < 9 else 2 * x.roll(1)

    def arguments(device, dtype, shape, batch, seed):
        draws = torch.Generator().manual_seed(seed)
        return {"x": torch.randn((batch, *shape), generator=draws).to(device, dtype)}

    yield "checks", str(fd.testing.CHECKS)
    yield "right", str(fd.testing.check_op(right, right, arguments, examples=3))
    try:
        fd.testing.check_op(wrong, right, arguments, examples=3)
    except fd.testing.CheckFailed as error:
        yield "wrong", str(error)


RENAMED = {"bounds": "dynamic_threshold", "factors": "rescale_factor"}
"""Arguments of kernels by their names in 0.1.0, and their names now."""


def scorecard() -> Values:
    """Yield the scorecard of the kernels, compiled for an H100: it takes a minute."""
    card = json.loads(command("kernels", "--arch", 90, "--json"))
    for entry in card.pop("kernels"):
        text = json.dumps(entry)
        for before, now in RENAMED.items():
            text = text.replace(f'"{before}"', f'"{now}"')
        yield f"{entry['kernel']} {entry['dtype']}", text
    for name, value in card.items():  # lists in the order of the operations, which may change
        ordered = sorted(value, key=json.dumps) if isinstance(value, list) else value
        yield name, json.dumps(ordered, sort_keys=True)


def operations() -> Values:
    """Yield results and gradients of every kernel but the step's, which is the samplers' to run."""
    ops, shape, t = fd.kernels, (3, 5, 7), torch.tensor([0, 2, 1])
    noise = {"seeds": torch.tensor([5, -9, 2**62 + 1]), "keys": torch.tensor([0, 7, 2**40])}
    losses = normal("loss rows", 3, len(ops.LossColumn)).abs()
    bounds = normal("bound rows", 3, len(ops.VlbColumn)).abs()
    steps = normal("step rows", 3, len(ops.Column))
    losses[:2, ops.LossColumn.HALF_BIN] = bounds[:2, ops.VlbColumn.HALF_BIN] = 0
    for name, value in (("CLIP", 2), ("THRESHOLD", 0.9), ("RESCALE", 0.7), ("UNGUIDED", 0)):
        steps[:, ops.Column[name]] = value
    yield from (
        (f"philox {p.name}", ops.philox(**noise, shape=shape, purpose=p)) for p in ops.Purpose
    )
    for dtype in (torch.float32, torch.bfloat16):
        x0 = normal("x0", 3, *shape).clamp(-1, 1).to(dtype).requires_grad_()
        out = normal("out", 3, 6, 5, 7).to(dtype).requires_grad_()
        given = {"x0": x0.detach(), "t": t, **noise}
        x_t = ops.add_noise(x0, t, **noise, rows=losses[:, :2].contiguous())
        results = {"add_noise": (x_t, x0)}
        for loss in ops.LOSSES:
            kind = {"loss": loss, "delta": 0.5}
            plain = ops.diffusion_loss(out[:, :3], **given, rows=losses[:, :3].contiguous(), **kind)
            hybrid = ops.hybrid_loss(out, **given, rows=losses, **kind)
            results[f"diffusion_loss {loss}"] = plain, out
            results[f"hybrid_loss {loss}"] = hybrid, out
        for name, (result, leaf) in results.items():
            yield f"{name} {dtype}", result
            yield f"{name} {dtype} gradient", torch.autograd.grad(result.sum(), leaf)[0]
        yield f"vlb_terms {dtype}", ops.vlb_terms(out.detach(), **given, rows=bounds)
        found, factors, x = torch.ones(3), torch.ones(3), normal("x", 3, *shape)
        x = x.contiguous(memory_format=torch.channels_last)
        lanes, guidance = normal("lanes", 5, *shape).to(dtype), torch.tensor([2.0, 1.0, 0.5])
        cond, uncond = torch.tensor([0, 1, 2]).int(), torch.tensor([-1, 3, 4]).int()
        if hasattr(ops, "StepState"):  # in groups, of which it reads what it took one by one before
            ops.sample_stats(
                ops.StepState(x, x, lanes, t.int()),
                lanes,
                ops.StepSlots(t + 0, noise["seeds"], guidance, cond, uncond),
                ops.StepStatistics(found, factors),
                ops.StepTable(steps, noise["keys"], t * 0),
            )
        else:
            ops.sample_stats(found, factors, x, lanes, t + 0, guidance, cond, uncond, steps, t * 0)
        yield f"sample_stats {dtype}", torch.stack([found, factors])
    following = torch.tensor([0, 2, 0])
    if hasattr(ops, "StepState"):
        slots = ops.StepSlots(t, *[None] * 4)
        ops.advance(slots, ops.StepTable(None, None, following))
    else:
        ops.advance(t, following)
    yield "advance", t


def begun() -> Values:
    """Yield the files of what is left half done."""
    begin()
    yield from files(".")


def across(earlier: Path) -> Values:
    """Yield what follows from what was left half done in a folder, which stays as it is."""
    shutil.copytree(earlier, ".", dirs_exist_ok=True)
    for part in CONTINUED:
        yield from ((f"{part.__name__} {name}", value) for name, value in part())


# The battery is last: hypothesis watches the garbage collection of this process from then on, and
# in CPython 3.11 that disturbs the threads in which the scorecard has sources parsed.
SECTIONS: tuple[Callable[[], Values], ...] = (
    schedules, images, options, calls, engine, pipelines, sampling, training, processes,
    evaluation, data, convert, benchmarks, operations, begun, compiled, scorecard, testing,
)  # fmt: skip


def write(path: Path, values: Values) -> None:
    """Write what a section yields: tensors, and texts as the file's metadata."""
    tensors, texts = {}, {}
    for name, value in values:
        assert name not in tensors | texts, f"{name}: twice"
        if isinstance(value, str):
            texts[name] = value
        else:
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    save_file(tensors, path, texts)


def check_place(site: str) -> None:
    """Refuse modules of another package of this name, such as one that is installed."""
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "flashddpm":
            place = module.__file__ or next(iter(module.__path__))
            assert Path(place).is_relative_to(site), f"{name}: {place} is not in {site}"


def main(site: str, out: str, earlier: str, left_out: str) -> int:
    """Write every section; return how many failed, and say how on standard output."""
    check_place(site)
    sections: dict[str, Callable[[], Values]] = {part.__name__: part for part in SECTIONS}
    sections["across"] = partial(across, Path(earlier))
    if os.environ.get("TRITON_INTERPRET") == "1":
        sections = {"interpreted": operations}
    for name in left_out.split(","):
        sections.pop(name, None)
    failed = 0
    for name, section in sections.items():
        Path(name).mkdir()
        try:
            with contextlib.chdir(name):
                write(Path(out) / f"{name}.safetensors", section())
        except Exception:
            failed += 1
            print(f"section {name}:\n{traceback.format_exc()}")
    check_place(site)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

r"""The solver study: Frechet distance against number of steps, for every solver and spacing.

    python -P -m flashddpm.benchmarks.studies.solver_study MODEL DATA \
        --out-json benchmarks/results/solver-study.json --out-png docs/solver-study.png \
        --page docs/evaluation.md

N images (seeds 0..N-1, labels in turn, guidance 1) are drawn for each solver, spacing and number of
steps. Their Frechet distance is measured to the real images that ``flashddpm evaluate`` would
compare with, in the same features. Spacings of sigma lie between the ends of linspace spacing, that
is, of the whole schedule.

Each result is written as it comes. The same command goes on after a stop: the results in the file
stay if model, images, features, settings and device are the same. The table is put into the page
where it says ``<!-- solver study: FILE.json -->``, a path relative to the page.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashddpm import arguments
from flashddpm.benchmarks.studies.solver_plot import (
    FORMAT,
    GRIDS,
    filled,
    find_places,
    key_of,
    plot,
    read_study,
)
from flashddpm.checkpoints.hub import locate
from flashddpm.checkpoints.model_folder import fingerprint
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.evaluation import distances
from flashddpm.evaluation.classifier import FEATURES
from flashddpm.evaluation.evaluate import counterpart, draw, environment
from flashddpm.evaluation.features import Features, cached_features, features_of
from flashddpm.evaluation.job import (
    AUTO,
    check_out,
    classes_in_turn,
    features_for,
    load_images,
    require_matplotlib,
)
from flashddpm.io.files import write_atomic, write_json
from flashddpm.sampling.sampler import Sampler

STEPS = (5, 10, 20, 50, 100)
NUM_IMAGES = 1000


@dataclass(frozen=True)
class StudyPoint:
    """One point of the study: a solver, a spacing and a number of steps, which give one distance.

    Attributes:
        solver: the solver's name, a key of ``solvers.SOLVERS``.
        grid: the name of the spacing of the steps, a key of ``solver_plot.GRIDS``: "leading",
            "linspace" or "trailing" (of timesteps), "karras", "exponential" or "beta" (of sigma).
        steps: the number of steps, at least 1.
    """

    solver: str
    grid: str
    steps: int

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `Sampler.plan`, a dictionary.

        The keys are solver, num_steps and spacing, and sigmas for a spacing of sigma.
        """
        return {"solver": self.solver, "num_steps": self.steps, **GRIDS[self.grid]}


def cases(solvers: Sequence[str], grids: Sequence[str], steps: Sequence[int]) -> list[StudyPoint]:
    """Return all combinations of solver, spacing and number of steps, the fewest steps first.

    So a study that is stopped has whole columns of its table.

    Args:
        solvers: names of solvers, keys of ``solvers.SOLVERS``.
        grids: names of spacings, keys of ``solver_plot.GRIDS``.
        steps: numbers of steps, in any order.
    """
    return [
        StudyPoint(solver, grid, n) for n in sorted(steps) for solver in solvers for grid in grids
    ]


def begin(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study that a file holds, to go on with it; or a new one if there is no file.

    Args:
        path: the JSON file of the study.
        settings: what the results depend on: from names to values that JSON can hold.

    Returns:
        The study, a dictionary as `solver_plot` describes it; a new one has no results.

    Raises:
        ValueError: if the file is no study, or its settings differ from these.
    """
    if not path.exists():
        return {"format": FORMAT, "settings": dict(settings), "results": [], "left_out": []}
    study = read_study(path)
    there = study["settings"]
    unlike = [
        f"{name}: {there.get(name)!r} there, {settings.get(name)!r} now"
        for name in {**there, **settings}
        if there.get(name) != settings.get(name)
    ]
    if unlike:
        raise ValueError(
            f"out_json={str(path)!r}: holds a study of other settings: {'; '.join(unlike)}"
        )
    return study


def measure(
    sampler: Sampler,
    wanted: Sequence[StudyPoint],
    study: dict[str, Any],
    extractor: Features,
    real: Tensor,
    batch_size: int = 64,
    end: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Measure the cases that a study has no result of, add each result to it, and yield it.

    A case for which the model has no plan (table of steps), such as a spacing of sigma for a
    schedule that ends in pure noise, is added to study["left_out"] with the reason.

    Args:
        sampler: the sampler of the model.
        wanted: the cases, in the order in which they are measured.
        study: the study, as `begin` returns it; changed in place. As many images are drawn for each
            case as study["settings"]["images"] says.
        extractor: the extractor of features, which takes uint8 images [B, C, H, W].
        real: the features of the real images, floating [N, D] with N > D.
        batch_size: the number of images drawn at a time.
        end: the reading of time.monotonic, in seconds, from which on no case is begun.

    Yields:
        The result of each case, a dictionary: "solver", "grid", "steps", "frechet" (the distance to
        the real images, at least 0) and "seconds_to_draw".

    Raises:
        ValueError: if there are no more images than features D, or torch-fidelity is missing.
        NonFiniteError: if the network's output turned NaN or infinite.
    """
    count = study["settings"]["images"]
    labels = classes_in_turn(sampler, count)
    keys = {key_of(vars(case)) for case in wanted}
    study["left_out"] = [case for case in study["left_out"] if key_of(case) not in keys]
    done = {key_of(result) for result in study["results"]}
    for case in wanted:
        if key_of(vars(case)) in done:
            continue
        try:
            sampler.plan(**case.options)
        except ValueError as error:
            study["left_out"].append({**vars(case), "reason": str(error)})
            continue
        start = time.monotonic()
        if start >= end:
            continue
        drawn = draw(sampler, range(count), labels, batch_size, False, **case.options)
        seconds = time.monotonic() - start
        value = distances.frechet(features_of(drawn, extractor), real)
        result = {**vars(case), "frechet": value, "seconds_to_draw": seconds}
        study["results"].append(result)
        yield result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of the study.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Returns:
        A namespace: model, a string; data, out_json, out_png, page and reference, paths, of which
        the last three may be None; features, feature_input, device, dtype (or None), strings;
        num_images and batch_size, ints; steps, solvers and grids, lists of strings, unchecked;
        budget, seconds or None.

    Raises:
        SystemExit: if an argument is missing, unknown or no number, or help is asked for.
    """
    parser = argparse.ArgumentParser(
        prog="flashddpm.benchmarks.studies.solver_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",")]

    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out-json", type=Path, required=True, help="the results")
    parser.add_argument("--out-png", type=Path, help="the picture")
    parser.add_argument("--page", type=Path, help="the page that holds the table")
    parser.add_argument("--reference", type=Path, help="as for flashddpm evaluate")
    parser.add_argument("--features", default=AUTO, help="as for flashddpm evaluate")
    parser.add_argument("--feature-input", default="uint8", help="as for flashddpm evaluate")
    parser.add_argument("--num-images", type=int, default=NUM_IMAGES, help="a point")
    parser.add_argument("--steps", type=names, default=[str(n) for n in STEPS])
    parser.add_argument("--solvers", type=names, default=list(SOLVERS))
    parser.add_argument("--grids", type=names, default=list(GRIDS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--budget", type=float, help="seconds after which nothing more is begun")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run the study: measure what is missing, write each result, and update plot and page.

    Args:
        args: the arguments, as `parse` returns them.

    Raises:
        ValueError: if an argument is not allowed, a package is missing, there are too few images,
            the file holds another study, or the model or the images cannot be read.
        OSError: if a file cannot be written.
    """
    wanted = _check(args)
    folder = locate(args.model)
    sampler = Sampler.from_pretrained(folder, args.device, args.dtype)
    data, reference, held_out = load_images(args.data, args.reference, sampler.shape)
    arguments.integer("num_images", args.num_images, 2, len(data) if held_out else None)
    counts = {"num_images": args.num_images, "reference": len(reference)}
    if args.features == AUTO:  # known before a classifier is trained
        _check_counts(counts, FEATURES)
    extractor, _ = features_for(args.features, args.feature_input, data, str(sampler.device))
    where = environment(sampler)
    settings = {
        "device": where["device"],
        "model": fingerprint(folder),
        "data": data.fingerprint(),
        "reference": reference.fingerprint(),
        "features": extractor.fingerprint,
        "features_name": extractor.name,
        "images": args.num_images,
        "dtype": str(sampler.dtype).removeprefix("torch."),
    }
    study = begin(args.out_json, settings)
    key = reference.fingerprint()
    real = cached_features(reference, extractor, fingerprint=key, progress=True)
    _check_counts(counts, real.shape[1])
    study |= {"environment": where, "training": None}
    if held_out:
        same = sampler.conditioning.num_classes == data.num_classes
        labels = classes_in_turn(sampler, args.num_images) if same else None
        known = counterpart(data, args.num_images, labels)
        if known is not None:
            study["training"] = distances.frechet(features_of(known, extractor), real)
    end = math.inf if args.budget is None else time.monotonic() + args.budget
    for result in measure(sampler, wanted, study, extractor, real, args.batch_size, end):
        write_json(args.out_json, study)
        print("{solver:16} {grid:12} {steps:4} steps  {frechet:9.3f}".format(**result), flush=True)
    write_json(args.out_json, study)
    if args.out_png is not None and study["results"]:
        write_atomic(args.out_png, plot(study))
    if args.page is not None and study["results"]:
        write_atomic(args.page, filled(args.page).encode())


def _check_counts(counts: Mapping[str, int], dimension: int) -> None:
    for name, count in counts.items():
        distances.check_frechet(name, count, dimension)


def _check(args: argparse.Namespace) -> list[StudyPoint]:
    """Check all arguments that can be checked without the model, and return the cases."""
    require_matplotlib()
    distances.require_fidelity()
    check_out("out_json", args.out_json, ".json")
    if args.out_png is not None:
        check_out("out_png", args.out_png, ".png")
    if args.page is not None:
        find_places(args.page)
    arguments.integer("batch_size", args.batch_size, 1)
    for name in args.solvers:
        arguments.one_of("solvers", name, SOLVERS)
    for name in args.grids:
        arguments.one_of("grids", name, GRIDS)
    try:
        steps = [int(part) for part in args.steps]
    except ValueError:
        raise ValueError(f"steps={','.join(args.steps)!r}: must be integers") from None
    for n in steps:
        arguments.integer("steps", n, 1)
    return cases(args.solvers, args.grids, steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of the study.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Raises:
        SystemExit: with one line of text, and exit status 1, if `run` raises ValueError; with
            status 2 if the arguments cannot be parsed.
    """
    args = parse(argv)
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

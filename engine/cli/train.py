"""The command ``flashddpm train``, whose flags are the fields of `TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from flashddpm import arguments
from flashddpm.cli import exits
from flashddpm.distributed import World
from flashddpm.errors import CheckpointError
from flashddpm.io.files import read_json
from flashddpm.training.config import TrainConfig

Option = typer.Option


def train(
    out: Annotated[Path, Option(help="The run's folder, itself a model folder.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A folder of images, with or without a folder a class, an .npz, or IDX files.  "
            "[default: the config's]"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        Option(help="A run's train_config.json to take settings from; flags go before it."),
    ] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    compile: Annotated[str, Option(help="auto (on CUDA), on or off.")] = "auto",
    resume: Annotated[bool, Option("--resume", help="Go on from OUT, with its settings.")] = False,
    allow: Annotated[
        str, Option(help="Settings that a resumed run may change, comma-separated.")
    ] = "",
    **flags: Any,
) -> None:
    """Train a model; OUT always holds the latest averaged weights in diffusers' layout.

    Under torchrun every process takes its part of each batch. Ctrl-C and SIGTERM save the run, then
    end it.
    """
    world = World.from_environment()
    device = world.device(device)
    with world.joined(device):
        with world.together():
            given = {n: _parsed(n, value) for n, value in flags.items() if value is not None}
            if data is not None:
                given["data"] = str(data)
            if resume and config is not None:
                raise ValueError(
                    f"config={str(config)!r}: must not be given with resume: OUT has its own"
                )
            if allow and not resume:
                raise ValueError(f"allow={allow!r}: is of --resume only")
            source = out / TrainConfig.FILE if resume else config
            settings = TrainConfig.from_dict({**_stored(source), **given})
        done = _run(settings, out, device, compile, resume, allow, world)
    if world.rank == 0:
        print(done)


def _stored(path: Path | None) -> dict[str, Any]:
    """Return the settings in a file, checked; an empty dictionary for None.

    Raises:
        CheckpointError: if the file cannot be read, or holds no settings.
    """
    if path is None:
        return {}
    try:
        return TrainConfig.from_dict(read_json(path)).to_dict()
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _run(
    settings: TrainConfig,
    out: Path,
    device: str,
    compile: str,
    resume: bool,
    allow: str,
    world: World,
) -> str:
    from flashddpm.data import load_data
    from flashddpm.training.resume import states
    from flashddpm.training.trainer import Trainer

    with world.together():
        arguments.one_of("compile", compile, ("auto", "on", "off"))
        wanted: bool | str = compile if compile == "auto" else compile == "on"
        if not settings.data:
            raise ValueError("data: must be given, as an argument or in the config")
        if not resume and states(out):
            raise ValueError(
                f"out={str(out)!r}: holds a run already; give --resume or another folder"
            )
        settings.part_of(world.size)
        multiple = 1 if settings.init else 2 ** (len(settings.block_out_channels) - 1)
        trainer = Trainer(settings, load_data(settings.data, multiple), out, device, wanted, world)
        if resume:
            trainer.resume([name for name in allow.split(",") if name])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # raised when the run has been saved
    try:
        trainer.run()
    except KeyboardInterrupt:
        if world.rank == 0:
            print(
                f"flashddpm: error: interrupted at step {trainer.step}, saved; go on with --resume",
                file=sys.stderr,
            )
        raise SystemExit(exits.INTERRUPTED) from None
    except RuntimeError as error:
        if not _is_of_another_process(error):
            raise
        raise SystemExit(exits.USAGE) from None  # it, or torchrun, says why
    return f"{trainer.step} steps of {settings.batch_size} images, {trainer.device} -> {out}"


def _is_of_another_process(error: RuntimeError) -> bool:
    """Return whether the error came about because another process of torchrun has ended."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)


def _parsed(name: str, value: Any) -> Any:
    """Return the value of a flag; where the setting is a tuple, of the integers between commas."""
    if not isinstance(getattr(TrainConfig, name, None), tuple):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"{name}={value!r}: must be integers, such as 32,64,96") from None


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command of ``**flags`` the settings' flags, in place, and return it.

    Each field of `TrainConfig` but ``data`` becomes a keyword-only option of typer, whose default
    is None for "not given". Settings that are tuples become text, with integers between commas.

    Args:
        command: the function of the command, which takes the settings as ``**flags``; its own
            parameters before these stay.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name == "data":
            continue
        default = field.default
        required = default is dataclasses.MISSING
        several = isinstance(default, tuple)
        shown = ",".join(map(str, default)) if several else default  # type: ignore[arg-type]
        help = field.metadata["help"] + ("" if required else f"  [default: {shown}]")
        kind = str if several else kinds[field.name]
        annotation: Any = Annotated[kind | None, Option(help=help)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(field.name, keyword, default=None, annotation=annotation)
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


train = with_flags(train)

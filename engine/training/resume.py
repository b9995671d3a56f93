"""The states that a run can be resumed from: OUT/states/STEP.safetensors, the newest few of them.

A state holds weights, averages and the optimizer's moments. Its metadata hold the step, the
settings, the fingerprint of the data, and the machine, on which the last bits of a step depend.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.errors import CheckpointError
from flashddpm.io.files import read_tensors, write_atomic
from flashddpm.training.config import TrainConfig

log = logging.getLogger("flashddpm")

FOLDER = "states"


@dataclass(frozen=True)
class State:
    """Everything that the rest of a run depends on.

    Attributes:
        step: number of steps that the run has taken.
        tensors: float32 tensors; the name of each is "model.", "ema-H.", "exp_avg." or
            "exp_avg_sq.", then the parameter's name.
        config: settings that the run had, as `TrainConfig.to_dict` returns them.
        data: fingerprint of the data.
        machine: what else the last bits of a step depend on, as `machine` returns it.
    """

    step: int
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    data: str
    machine: Mapping[str, Any]


def machine(device: torch.device, compiled: bool, processes: int) -> dict[str, Any]:
    """Return what the last bits of a step depend on besides settings and data."""
    where: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        where["card"] = torch.cuda.get_device_name(device)
    else:
        where |= {
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    return {**where, "compiled": compiled, "processes": processes}


def states(out: Path) -> list[Path]:
    """Return the files of a run's states, the newest first."""
    return sorted((out / FOLDER).glob("[0-9]*.safetensors"), reverse=True)


def write(out: Path, state: State, keep: int) -> None:
    """Write a state, then remove all but the newest ``keep``; a kill at any moment loses none.

    Raises:
        OSError: the state could not be written; those before it are kept.
    """
    metadata = {
        "step": str(state.step),
        "config": json.dumps(state.config),
        "data": state.data,
        "machine": json.dumps(state.machine),
    }
    content = safetensors.torch.save(dict(state.tensors), metadata)
    path = out / FOLDER / f"{state.step:09}.safetensors"
    write_atomic(path, content)
    for old in states(out)[keep:]:
        if old != path:
            old.unlink(missing_ok=True)
    for torn in path.parent.glob(".*.tmp"):  # of runs that were killed while they wrote
        torn.unlink(missing_ok=True)


def read_newest(out: Path) -> State:
    """Return the newest state that can be read; the log names those that cannot.

    Raises:
        CheckpointError: there is no state, or none that can be read.
    """
    found = states(out)
    if not found:
        raise CheckpointError(f"{out / FOLDER}: is missing or empty: there is nothing to resume")
    broken: CheckpointError | None = None
    for path in found:
        try:
            return read(path)
        except CheckpointError as error:
            log.warning("%s; going on from the state before it, if there is one", error)
            broken = broken or error
    assert broken is not None
    raise broken


def read(path: Path) -> State:
    """Return the state in a file.

    Raises:
        CheckpointError: the file is missing or broken, or holds no state of a run.
    """
    tensors = read_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        step = arguments.integer("step", int(metadata["step"]), 0)
        config, where = (dict(json.loads(metadata[key])) for key in ("config", "machine"))
        return State(step, tensors, config, metadata["data"], where)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata are no run's: {error!r}") from error


def check_settings(state: State, config: TrainConfig, data: str, allow: Sequence[str] = ()) -> None:
    """Refuse to resume with other settings or data than those that the run was started with.

    Args:
        state: state to resume from. A setting that it does not name, as the version that wrote it
            did not have it, was at its default.
        config: settings to resume with.
        data: fingerprint of the data to resume with.
        allow: names of settings that may differ, besides MAY_CHANGE; "data" for the data.

    Raises:
        ValueError: something else differs; the message lists all of it.
    """
    given = config.to_dict()
    for name in allow:
        arguments.one_of("allow", name, tuple(given))
    had = {**TrainConfig(config.steps).to_dict(), **state.config}
    free = (*config.may_change, *allow)
    changed = [
        f"{name}={given.get(name)!r} (the run has {value!r})"
        for name, value in had.items()
        if name not in free and (name not in given or given[name] != value)
    ]
    if state.data != data and "data" not in allow:
        changed.append(f"data={config.data!r} (the run has others, by their content)")
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: a resumed run may change {', '.join(config.may_change)}, and "
            "what is allowed by name"
        )


def check_tensors(out: Path, state: State, expected: Mapping[str, Tensor]) -> None:
    """Refuse a state whose tensors have other names or shapes than those of the run in ``out``.

    Raises:
        CheckpointError: they have; the message names some.
    """
    found = {name: tensor.shape for name, tensor in state.tensors.items()}
    names = {*found, *expected}
    wrong = sorted(n for n in names if n not in expected or found.get(n) != expected[n].shape)
    if wrong:
        differ = ", ".join(wrong[:5])
        raise CheckpointError(f"{out / FOLDER}: is of another network: {differ} differ")


def report_machine(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn in the log where this machine differs from the one that wrote a state."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        changes = ", ".join(f"{n}={there.get(n)!r} there, {here.get(n)!r} now" for n in names)
        log.warning("bits may differ from those of an uninterrupted run: %s", changes)

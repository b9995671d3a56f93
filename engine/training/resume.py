"""The states of a run, to go on from: OUT/states/STEP.safetensors, the newest few of them.

A state holds weights, averages and the optimizer's moments; its metadata the step, the settings,
the fingerprint of the data, and the machine, on which the last bits of what follows depend.
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
    """A moment of a run.

    Attributes:
        step: the steps taken.
        tensors: by name; "model.", "ema-H.", "exp_avg." or "exp_avg_sq." and a parameter's.
        config: the settings that the run had, `TrainConfig.to_dict`.
        data: the fingerprint of its data.
        machine: what its last bits depend on besides.
    """

    step: int
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    data: str
    machine: Mapping[str, Any]


def machine(device: torch.device, compiled: bool, processes: int) -> dict[str, Any]:
    """Return what the bits of a step depend on besides the settings."""
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
    """Return a run's states, the newest first."""
    return sorted((out / FOLDER).glob("[0-9]*.safetensors"), reverse=True)


def write(out: Path, state: State, keep: int) -> None:
    """Write a state, then remove all but the newest ``keep``; a kill at any moment costs none."""
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
    """Return the newest state that can be read; one that cannot is named in the log.

    Raises:
        CheckpointError: there is none.
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
    """Return a state.

    Raises:
        CheckpointError: the file is missing, broken or no run's.
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
    """Refuse to go on with other settings or data than those that the run was started with.

    Args:
        state: what to go on from. A setting that is younger than the run was at its default then.
        config, data: of now.
        allow: settings that may differ, besides MAY_CHANGE; "data" for the data.

    Raises:
        ValueError: something else differs; all of it is listed.
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


def report_machine(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Say in the log where this machine differs from the one that a state is from."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        changes = ", ".join(f"{n}={there.get(n)!r} there, {here.get(n)!r} now" for n in names)
        log.warning("bits may differ from those of an uninterrupted run: %s", changes)

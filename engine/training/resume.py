"""The states from which a training run is resumed: OUT/states/STEP.safetensors, the newest few.

A state holds weights, averages and the optimizer's moments. Its metadata hold the step, the
settings, the fingerprint of the data (a hash that identifies them), and the machine, on which the
last bits of a step depend.
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
    """The state of a training run after a step: everything that its further steps depend on.

    Attributes:
        step: the number of steps that the run has taken.
        tensors: float32 tensors of the parameters' shapes, by name: "model.", "ema-H." (H being a
            half-life in steps), "exp_avg." or "exp_avg_sq." (AdamW's moments), then the parameter's
            name.
        config: the settings that the run had, as `TrainConfig.to_dict` returns them.
        data: the fingerprint of the data, "sha256:..." (`ImageSource.fingerprint`).
        machine: what else the last bits of a step depend on, by name, such as "device", "torch"
            and "processes" (the function `machine` returns it).
    """

    step: int
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    data: str
    machine: Mapping[str, Any]


def machine(device: torch.device, compiled: bool, processes: int) -> dict[str, Any]:
    """Return a dictionary of what the last bits of a step depend on besides settings and data.

    Args:
        device: the device of the run.
        compiled: whether the network is compiled.
        processes: the number of processes that train.

    Returns:
        By key: "device" ("cpu" or "cuda"), "torch" (its version), on CUDA "card" (the GPU's name),
        on the CPU "threads" (the number of torch's threads) and "instructions" (the instruction
        set, such as "AVX2"), "compiled" (a bool) and "processes" (an int).
    """
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
    """Return the paths of a run's state files, the newest (of the highest step) first; [] for none.

    Args:
        out: the folder of the run.
    """
    return sorted((out / FOLDER).glob("[0-9]*.safetensors"), reverse=True)


def write(out: Path, state: State, keep: int) -> None:
    """Write a state to OUT/states/STEP.safetensors, then remove older states.

    The file is written whole or not at all, so a kill at any moment loses no state that was there.

    Args:
        out: the folder of the run, OUT; folders are made if they are missing.
        state: the state to write.
        keep: how many states, those of the highest steps, are left, at least 1; the new one always
            is.

    Raises:
        OSError: if the state could not be written; those before it are then kept.
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
    """Return the newest state of a run that can be read; the log names those that cannot.

    Args:
        out: the folder of the run.

    Raises:
        CheckpointError: if there is no state, or none that can be read.
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
    """Return the state in a file, its tensors on the CPU.

    Args:
        path: a safetensors file that `write` wrote.

    Raises:
        CheckpointError: if the file is missing or broken, or holds no state of a run.
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
        state: the state to resume from. A setting that it does not name, since the version that
            wrote it did not have it, counts as having been at its default.
        config: the settings to resume with.
        data: the fingerprint of the data to resume with.
        allow: names of settings that may differ, besides ``config.may_change``; "data" for other
            data.

    Raises:
        ValueError: if another setting or the data differ (the message lists all that do), or a name
            in ``allow`` is not a setting.
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
    """Refuse a state whose tensors have other names or shapes than those of the run.

    Args:
        out: the folder of the run, for the error's text.
        state: the state.
        expected: the run's own tensors by name, of which names and shapes are compared.

    Raises:
        CheckpointError: if a name or shape differs; the message has up to five such names.
    """
    found = {name: tensor.shape for name, tensor in state.tensors.items()}
    names = {*found, *expected}
    wrong = sorted(n for n in names if n not in expected or found.get(n) != expected[n].shape)
    if wrong:
        differ = ", ".join(wrong[:5])
        raise CheckpointError(f"{out / FOLDER}: is of another network: {differ} differ")


def report_machine(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Log a warning that names where this machine differs from the one that wrote a state.

    Args:
        there: facts of the machine that wrote the state by name, such as "device", "torch" and
            "processes", as `machine` returns them.
        here: those of this machine.
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        changes = ", ".join(f"{n}={there.get(n)!r} there, {here.get(n)!r} now" for n in names)
        log.warning("bits may differ from those of an uninterrupted run: %s", changes)

"""A run's checkpoint on the disk: `resume/` with `state.json` and safetensors files, replaced whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from faceprior.files import size_text
from faceprior.training.optimizer import flatten_optimizer

RESUME_FOLDER, STATE_FILE = "resume", "state.json"
# File of weights that not every run has -> the key of the state that says whether it has.
_OPTIONAL = {"average": "ema_decay", "best": "keeps_best"}


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    state: JSON values, among them `step` and, by optimizer, `optimizers`, the plain values of its state; weights: file
    -> name -> tensor; optimizers: by optimizer, the tensors of its state.
    """

    folder: Path
    state: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Tensor]]


def checkpoint_state(output: Path) -> dict[str, Any]:
    """Return state.json of the checkpoint in a run's folder; empty without one."""
    return next(filter(None, (read_json(output / f"{RESUME_FOLDER}{end}" / STATE_FILE) for end in ("", ".old"))), {})


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where there is none, or a damaged one, which the run itself will report."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ---- writing


def save_checkpoint(
    output: Path,
    state: dict[str, Any],
    weights: dict[str, dict[str, Tensor]],
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    """Write a checkpoint beside the old one, which is deleted once the new one is complete and on the disk.

    At any moment `resume/` is complete, or it is missing and `resume.old/` is. state, weights: as in `Checkpoint`.

    Raises OSError that says how much space it takes and how much there is.
    """
    folder = output / RESUME_FOLDER
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write(new, state, weights, optimizers)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)  # its space is needed for whatever is still written
        size = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
        size += sum(tensor.nbytes for o in optimizers.values() for tensor in flatten_optimizer(o)[0].values())
        raise OSError(
            f"the checkpoint of step {state['step']} in {output} could not be written ({' '.join(str(error).split())})"
            f": it takes {size_text(size)} beside the last one, and {size_text(shutil.disk_usage(output).free)} are "
            f"free. Free space on the disk; the same command resumes at step {checkpoint_state(output).get('step', 0)}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    folder: Path,
    state: dict[str, Any],
    weights: dict[str, dict[str, Tensor]],
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    # one file after the other: all tensors together need not fit beside the training
    for name, tensors in weights.items():
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, folder / f"{name}.safetensors")
    values = {}
    for name, optimizer in optimizers.items():
        tensors, values[name] = flatten_optimizer(optimizer)
        save_file(tensors, folder / f"{name}.optimizer.safetensors")
    (folder / STATE_FILE).write_text(json.dumps({**state, "optimizers": values}), encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


# ---- reading


def recover_checkpoint(output: Path) -> None:
    """Put the old checkpoint back in place if a run was killed between the two renames of `save_checkpoint`.

    What else a kill has left of checkpoints beside a complete one is deleted.
    """
    folder = output / RESUME_FOLDER
    old = folder.with_suffix(".old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    if folder.exists():
        for rest in (old, folder.with_suffix(".new")):
            shutil.rmtree(rest, ignore_errors=True)


def load_checkpoint(output: Path, optimizers: Iterable[str]) -> Checkpoint | None:
    """Read the checkpoint in a run's folder, with the states of these optimizers; None without one.

    Raises ValueError if it is damaged.
    """
    folder = output / RESUME_FOLDER
    if not folder.exists():
        return None
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        files = ["parameters", *(file for file, key in _OPTIONAL.items() if state.get(key))]
        weights = {file: load_file(folder / f"{file}.safetensors") for file in files}
        tensors = {name: load_file(folder / f"{name}.optimizer.safetensors") for name in optimizers}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder} is damaged ({error}): delete it to train from step 0") from error
    return Checkpoint(folder, state, weights, tensors)

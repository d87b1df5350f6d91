"""Optimizers by name, the learning rate over the steps, and an optimizer's state as tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def make_optimizer(
    parameters: Iterable,
    name: str = "adamw",
    learning_rate: float = 1e-5,
    weight_decay: float = 0.0,
    betas=(0.9, 0.999),
) -> torch.optim.Optimizer:
    """Return `adamw`, or bitsandbytes' `adamw8bit` or `paged_adamw8bit`, whose state takes a quarter of the memory."""
    parameters = list(parameters)
    options = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if name not in ("adamw8bit", "paged_adamw8bit"):
        raise ValueError(f"`optimizer` has to be adamw, adamw8bit or paged_adamw8bit but is {name!r}")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(parameters, **options)


def learning_rate_factor(step: int, steps: int, warmup_steps: int = 0, schedule: str = "constant") -> float:
    """Return the factor of the learning rate at `step` (0-based): linear warm-up, then `constant` or `cosine` to 0.

    The warm-up's factors are 1/(w+1), 2/(w+1), ..., w/(w+1); the cosine would reach 0 at the step after the last one.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"`schedule` has to be constant or cosine but is {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


# ---- its state, for checkpoints


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors for safetensors and plain values for JSON.

    The keys are paths, `parameter's index/name`, or longer where the state is nested, as bitsandbytes' is.
    """
    tensors, values = {}, {}

    def walk(state: dict, path: tuple[str, ...]) -> None:
        for name, value in state.items():
            if isinstance(value, dict):
                walk(value, (*path, str(name)))
            elif isinstance(value, Tensor):
                tensors["/".join((*path, name))] = value.detach().contiguous().cpu().clone()
            else:
                values["/".join((*path, name))] = value

    walk(optimizer.state_dict()["state"], ())
    return tensors, values


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Load what `flatten_optimizer` returned; the optimizer keeps its own learning rate and other settings."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        index, *folders, name = key.split("/")
        place = state.setdefault(int(index), {})
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

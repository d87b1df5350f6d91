"""accelerate's Accelerator as the settings of a run say: device, precision, accumulation, tracker."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from faceprior.models import resolve_device

# Ways of accelerate to train that split the parameters over the processes.
_SPLIT = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def make_accelerator(
    device: str = "auto",
    mixed_precision: str = "no",
    accumulation: int = 1,
    tracker: str | GeneralTracker = "none",
    output: str | Path | None = None,
) -> Accelerator:
    """Return accelerate's Accelerator for one device, or for the processes that `accelerate launch` started.

    mixed_precision: `no`, `fp16` or `bf16`, the dtype of the forward pass; accumulation: micro-batches in a step;
    tracker: `none`, `tensorboard`, `wandb`, or a tracker object of accelerate's; a `TrainingRun` logs every row of its
    `metrics.jsonl` to it, too; output: the run's folder, for the tracker's files.
    What `accelerate config` or the environment says of accumulation, mixed precision and compilation does not count: a
    run is what its settings say.

    Raises ValueError for a device that does not exist or that the environment overrides, for fp16 on a CPU, and where
    the parameters would be split over the processes; ImportError without the tracker's package.
    """
    if isinstance(tracker, str) and tracker not in {"none", *map(str, get_available_trackers())}:
        raise ImportError(f"`tracker` is {tracker}, which is not installed: `pip install {tracker}`")
    require_at_least(1, accumulation=accumulation)
    kind = resolve_device(device)
    if kind.type == "cpu" and mixed_precision == "fp16":
        raise ValueError("`mixed_precision` is fp16, which a CPU cannot train in: use bf16 or no")
    if kind.type == "cuda" and kind.index is not None:
        torch.cuda.set_device(kind)
    if not torch.distributed.is_initialized():
        # accelerate keeps one state per process and would refuse other settings for the second run in a notebook
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=kind.type == "cpu",
        mixed_precision=mixed_precision,
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS goes before a plain number, not before a plugin
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
        dynamo_backend="no",
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(logging_dir=None if output is None else str(Path(output, "tensorboard"))),
    )
    if accelerator.distributed_type in _SPLIT:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which splits the parameters over the "
            "processes: give `accelerate launch --multi_gpu`, and for less memory `--optimizer adamw8bit`"
        )
    if device != "auto" and accelerator.device.type != kind.type:
        raise ValueError(
            f"`device` is {device}, but accelerate's environment (ACCELERATE_USE_CPU, ACCELERATE_TORCH_DEVICE) says "
            f"{accelerator.device.type}: change one of them"
        )
    return accelerator


def require_at_least(least: int, **numbers: int) -> None:
    """Raise ValueError, which names it, unless each of `numbers` is a whole number of at least `least`."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < least:
            raise ValueError(f"`{name}` has to be a whole number of at least {least} but is {number}")

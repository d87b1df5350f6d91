"""The output folder of a training stage: opened for a new run, or to resume one whose settings go with it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from faceprior.config import CONFIG_FILE, DONE_FILE, is_complete, open_output, require_same_settings, saved_settings
from faceprior.files import hold_folder
from faceprior.training.checkpoint import RESUME_FOLDER, checkpoint_state, read_json
from faceprior.training.inputs import require_same_inputs

FORMER = "former."  # begin of the names under which a finished run's end lies until it is known that the run goes on


def open_run(config: Any, accelerator: Accelerator, inputs: dict[str, Any] | None = None) -> Path:
    """Open the output folder of a training stage by `open_output`, for a new run or to resume, and return it.

    Whatever does not change the steps already done may differ from the settings of the run that is resumed:

    - `batch_size` and `accumulation`, where their product with the number of processes stays the same;
    - `steps`, where no step done depends on it, as under the constant schedule: also to train a finished run further;
    - what is used after the training only, which the Config names in `AFTER_TRAINING`: a finished run whose checkpoint
      exists makes its samples again;
    - all of these before the first checkpoint.

    inputs: of the run's inputs those that are known by now (see `TrainingRun`), of a finished run, too.

    Raises FileExistsError, which names what differs.
    """
    output = Path(config.output)
    if not accelerator.is_main_process:
        return output
    stored = None if config.overwrite else saved_settings(config)
    if stored is None:
        return open_output(config)

    # ---- How far the run is
    finished = is_complete(output)
    if finished and stored["schedule"] != "constant":  # a kill while `TrainingRun.finish` deleted it leaves a part
        shutil.rmtree(output / RESUME_FOLDER, ignore_errors=True)
    checkpoint = checkpoint_state(output)
    progress = read_json(output / DONE_FILE) if finished else checkpoint
    step = stored["steps"] if finished else progress.get("step", 0)
    is_constant = config.schedule == stored["schedule"] == "constant"
    goes_on = config.steps > step and is_constant
    after = getattr(type(config), "AFTER_TRAINING", frozenset())
    samples_again = checkpoint and config.steps == step and any(stored.get(k) != getattr(config, k) for k in after)

    # ---- The samples of a step
    parts = config.batch_size, config.accumulation, accelerator.num_processes
    samples = progress.get("samples_per_step", stored["batch_size"] * stored["accumulation"] * parts[2])
    if step and math.prod(parts) != samples:
        raise FileExistsError(other_samples(output, samples, parts))
    free = {"batch_size", "accumulation"}

    # ---- The number of steps, and what follows them
    if not finished or goes_on or samples_again:
        free |= after
    if not step or goes_on or (not finished and config.schedule == "constant" and config.steps >= step):
        free.add("steps")
    if finished and goes_on and not checkpoint:
        raise FileExistsError(
            f"{output} was trained for {step} steps and its checkpoint {output / RESUME_FOLDER} does not exist, so it "
            "cannot be trained further: choose another `output`, or `--overwrite` to start over"
        )
    require_same_settings(config, free)
    require_same_inputs(output, progress.get("inputs", {}), inputs or {})
    if finished and (goes_on or samples_again):
        hold_folder(output, config)
        # before the new settings are saved, which nothing is made with yet
        shutil.copyfile(output / CONFIG_FILE, output / f"{FORMER}{CONFIG_FILE}")
        os.replace(output / DONE_FILE, output / f"{FORMER}{DONE_FILE}")
    return open_output(config, free)


def put_back(output: Path) -> None:
    """Make a finished run as it was before `open_run` opened it again: what it began with is something else now."""
    if (output / f"{FORMER}{DONE_FILE}").is_file():
        for name in (CONFIG_FILE, DONE_FILE):
            os.replace(output / f"{FORMER}{name}", output / name)


def keep_open(output: Path) -> None:
    """Forget that the run was finished: it goes on."""
    for name in (DONE_FILE, CONFIG_FILE):
        (output / f"{FORMER}{name}").unlink(missing_ok=True)


def other_samples(output: Path, samples: int, parts: tuple[int, int, int]) -> str:
    """Return the message for a run whose steps had another number of samples than `parts` multiply to."""
    batch_size, accumulation, processes = parts
    return (
        f"{output} holds a run with {samples} samples a step, but `batch_size` {batch_size} x `accumulation` "
        f"{accumulation} x {processes} process{'es' if processes > 1 else ''} is {math.prod(parts)}: give values "
        f"whose product is {samples} to resume it, or another `output`, or start over"
    )

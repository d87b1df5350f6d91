"""What every training stage needs around its loop: device, data order, optimizer, log, checkpoints, a graceful stop.

The loop itself is in the stage:

    run = TrainingRun(output, steps, accelerator, modules={"unet": unet}, optimizers={"unet": optimizer})
    for batch in run.batches(dataset, batch_size=4):
        with accelerator.accumulate(unet):
            loss = ...  # random numbers from run.generators(batch)
            run.check(loss, batch)  # ends the run at NaN, before the weights see it
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)

Samples come from an endless shuffled stream, and a sample's random numbers depend on the seed and on its position in
the stream only. So a run that was killed and resumed, or that is split over several processes, draws the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from faceprior.config import DONE_FILE, METRICS_FILE, finish, is_complete, open_output, saved_settings
from faceprior.jsonl import append_row, resume_rows, rewrite_rows
from faceprior.models import resolve_device, to_device

logger = logging.getLogger(__name__)
RESUME_FOLDER, STATE_FILE = "resume", "state.json"
MOST_NAMED = 8  # samples in the message of a loss that is not finite
TRACKER_PROJECT = "faceprior"


# ---------------------------------------------------------------------------------------------------------- accelerator


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


_SPLIT = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


# --------------------------------------------------------------------------------------------------------------- output


def open_run(config: Any, accelerator: Accelerator) -> Path:
    """Open the output folder of a training stage by `open_output`, for a new run or to resume, and return it.

    Whatever does not change the steps already done may differ from the settings of the run that is resumed:

    - `batch_size` and `accumulation`, where their product with the number of processes stays the same;
    - `steps`, where no step done depends on it, as under the constant schedule: also to train a finished run further;
    - what is used after the training only, which the Config names in `AFTER_TRAINING`: a finished run whose checkpoint
      exists makes its samples again;
    - all of these before the first checkpoint.

    Raises FileExistsError, which names what differs.
    """
    output = Path(config.output)
    if not accelerator.is_main_process:
        return output
    stored = None if config.overwrite else saved_settings(config)
    if stored is None:
        return open_output(config)

    # ---- How far the run is
    finished, checkpoint = is_complete(output), _checkpoint_state(output)
    progress = _read_json(output / DONE_FILE) if finished else checkpoint
    step = stored["steps"] if finished else progress.get("step", 0)
    is_constant = config.schedule == stored["schedule"] == "constant"
    goes_on = config.steps > step and is_constant
    after = getattr(type(config), "AFTER_TRAINING", frozenset())
    samples_again = checkpoint and config.steps == step and any(stored.get(k) != getattr(config, k) for k in after)

    # ---- The samples of a step
    parts = config.batch_size, config.accumulation, accelerator.num_processes
    samples = progress.get("samples_per_step", stored["batch_size"] * stored["accumulation"] * parts[2])
    if step and math.prod(parts) != samples:
        raise FileExistsError(_other_samples(output, samples, parts))
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
    open_output(config, free)
    if finished and (goes_on or samples_again):
        (output / DONE_FILE).unlink()
    return output


def _other_samples(output: Path, samples: int, parts: tuple[int, int, int]) -> str:
    batch_size, accumulation, processes = parts
    return (
        f"{output} holds a run with {samples} samples a step, but `batch_size` {batch_size} x `accumulation` "
        f"{accumulation} x {processes} process{'es' if processes > 1 else ''} is {math.prod(parts)}: give values "
        f"whose product is {samples} to resume it, or another `output`, or start over"
    )


def _checkpoint_state(output: Path) -> dict[str, Any]:
    """Return state.json of a run's checkpoint; empty without one."""
    return next(filter(None, (_read_json(output / f"{RESUME_FOLDER}{end}" / STATE_FILE) for end in ("", ".old"))), {})


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where there is none, or a damaged one, which the run itself will report."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ------------------------------------------------------------------------------------------------------------ optimizer


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


# ----------------------------------------------------------------------------------------------------------- randomness


def stable_seed(*parts: int | str) -> int:
    """Hash numbers and names to a 63-bit seed, the same on every machine and in every process."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's global generators from `parts`, and restore them at the end: for dropout and initial weights."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(stable_seed(*parts))
        yield


def sample_generators(seed: int, positions: Tensor | Iterable[int], purpose: str = "noise") -> list[torch.Generator]:
    """Return one CPU generator per sample, seeded by the run's seed, the sample's position and the purpose."""
    return [torch.Generator().manual_seed(stable_seed(seed, int(p), purpose)) for p in positions]


def sample_timesteps(generators: list[torch.Generator], low: int, high: int, device=None) -> Tensor:
    """Draw one timestep in [low, high) per generator -> (B,) int64."""
    drawn = [torch.randint(low, high, (1,), generator=g) for g in generators]
    return to_device(torch.cat(drawn), torch.device(device or "cpu"))


def drop_prompts(prompts: list[str], probability: float, generators: list[torch.Generator]) -> list[str | None]:
    """Replace each prompt by None with `probability`, as classifier-free guidance needs it."""
    drawn = [float(torch.rand((), generator=g)) for g in generators]
    return [None if u < probability else prompt for prompt, u in zip(prompts, drawn, strict=True)]


# ---------------------------------------------------------------------------------------------------- stream of samples


class SampleStream(Dataset):
    """An endless shuffled stream of `dataset`: position p -> the sample, with `position` added.

    Every epoch is a permutation of the dataset drawn from (seed, epoch), so that a run can resume at any position.
    `augment(sample, rng)` may change a sample; its numpy generator depends on (seed, position) only.
    """

    def __init__(self, dataset, seed: int, augment: Callable[[dict, np.random.Generator], dict] | None = None):
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        self.dataset, self.seed, self.augment = dataset, seed, augment
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    def __getstate__(self):
        return {"dataset": self.dataset, "seed": self.seed, "augment": self.augment}

    def __setstate__(self, state):
        self.__init__(**state)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, place = divmod(position, len(self.dataset))
        sample = dict(self.dataset[int(self._permutation(epoch)[place])])
        if self.augment is not None:
            sample = self.augment(sample, np.random.default_rng(stable_seed(self.seed, position, "augment")))
        return {**sample, "position": position}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors, turn positions into a tensor, and keep everything else as a list."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "position" else values
    return batch


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch to `device` (except positions, which only seed generators)."""
    return {k: to_device(v, device) if isinstance(v, Tensor) and k != "position" else v for k, v in batch.items()}


def _positions(start: int, steps: int, per_step: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """Return the stream positions of every micro-batch of this process, from optimizer step `start` to `steps`.

    One step takes the next per_step * num_processes positions of the stream, whatever the number of processes: two
    processes with batch 2 see what one sees with batch 4.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    micro = per_step // batch_size
    starts = [(number * world + rank) * batch_size for number in range(start * micro, steps * micro)]
    return [range(first, first + batch_size) for first in starts]


# ------------------------------------------------------------------------------------------------------------------ run


class TrainingRun:
    """The steps of one training run, with its progress bar, its log and its checkpoints.

    output: folder for `metrics.jsonl` and `resume/` (None: nothing is written); modules: the networks whose trainable
    parameters are saved; optimizers: theirs, by the same or other names; save_every: steps between checkpoints.

    ema_decay: decay of an average of the trained parameters, [0, 1), which `averaged` and `use_final_weights` put in
    their place; 0: none. It is updated after each step of the first optimizer (a step that the scaler of fp16 skips
    is none); at step n the decay is min(ema_decay, n / (n + 9)), 0 at the first. ema_device: where it lies: `auto`,
    the parameters' own device, or `cpu`, which takes no memory there but a copy after each step.

    keep_best: the weights of the best validation (see `validated`), on the CPU, are what `use_final_weights` takes;
    patience: validations in a row without a better score after which the run ends; 0: never. A run that ended so is
    trained further with a larger `patience`, or with more `steps`, which count the validations anew.

    Attributes: `step`, the optimizer steps done; `state`, JSON values of the caller, `best`, {step, score, since} of
    the best validation and how many have followed it. These, the average and the best weights are saved with every
    checkpoint.
    """

    def __init__(
        self,
        output: str | Path | None,
        steps: int,
        accelerator: Accelerator,
        modules: dict[str, torch.nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        save_every: int = 100,
        warmup_steps: int = 0,
        schedule: str = "constant",
        progress: bool = True,
        ema_decay: float = 0.0,
        ema_device: str = "auto",
        keep_best: bool = False,
        patience: int = 0,
    ):
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` has to be in [0, 1) but is {ema_decay}")
        self.output = Path(output) if output is not None else None
        self.steps, self.accelerator, self.save_every = steps, accelerator, save_every
        self.modules, self.optimizers = modules, optimizers
        self.warmup_steps, self.schedule, self.progress = warmup_steps, schedule, progress
        self.keep_best, self.patience = keep_best, patience
        self.step, self.seed, self.state = 0, 0, {}
        self.best: dict[str, Any] = {}
        self._best_weights: dict[str, Tensor] = {}
        self._ema = self._make_average(ema_decay, ema_device) if ema_decay else None
        self._samples_per_step: int | None = None
        self._base_rates = {n: [g["lr"] for g in o.param_groups] for n, o in optimizers.items()}
        self._logged = defaultdict(list)
        self._unchecked: list[tuple[Tensor, str]] = []
        if self.output is not None:
            self._resume()
            # a no-op without a tracker; wandb's files, too, go to the output folder
            options = {"wandb": {"dir": str(self.output), "name": self.output.name}}
            accelerator.init_trackers(TRACKER_PROJECT, init_kwargs=options)

    def batches(
        self, dataset, batch_size: int, seed: int = 0, augment: Callable | None = None, num_workers: int = 0
    ) -> Iterator[dict]:
        """Yield micro-batches from the present step to the last one; `accumulation` of them make a step.

        `batch_size` counts the samples of one micro-batch on one process. Raises ValueError if a step of the run that
        is resumed had another number of samples.
        """
        accumulation, self.seed = self.accelerator.gradient_accumulation_steps, seed
        parts = batch_size, accumulation, self.accelerator.num_processes
        if self.step and self._samples_per_step not in (None, math.prod(parts)):
            raise ValueError(_other_samples(self.output, self._samples_per_step, parts))
        self._samples_per_step = math.prod(parts)
        if self.stopped_early:
            return
        loader = DataLoader(
            SampleStream(dataset, seed, augment),
            batch_sampler=_positions(self.step, self.steps, batch_size * accumulation, batch_size, self.accelerator),
            num_workers=num_workers,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
        )
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc=self.output.name if self.output else "training",
            disable=not (self.progress and self.accelerator.is_main_process),
        )
        with GracefulStop() as stop, bar:
            for number, batch in enumerate(loader, 1):
                if number % accumulation == 1 % accumulation:
                    self._set_learning_rates()
                yield move(batch, self.accelerator.device)
                if number % accumulation == 0:
                    self._finish_step(bar, stop)
                if self.stopped_early:
                    break

    def every(self, steps: int) -> bool:
        """Tell whether the step in progress ends with this micro-batch and is the last or a multiple of `steps`.

        steps: 0 for never.
        """
        done = self.step + 1
        return steps > 0 and self.accelerator.sync_gradients and (done % steps == 0 or done == self.steps)

    def generators(self, batch: dict, purpose: str = "noise") -> list[torch.Generator]:
        """Return one generator per sample of the batch, for its noise, timestep and all else that is drawn."""
        return sample_generators(self.seed, batch["position"], purpose)

    def log(self, **values: float | Tensor) -> None:
        """Add numbers to the row of the present step; they are averaged over its micro-batches and processes."""
        for name, value in values.items():
            self._logged[name].append(
                value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            )

    def check(self, loss: Tensor, batch: dict) -> None:
        """Raise ValueError for a loss that is not finite, before its gradients reach the weights.

        To look at a loss is to wait for a GPU, so those of a step are looked at together, at its last micro-batch. The
        message names the step, the samples of the micro-batch (`id`, else their positions in the stream) and the last
        good checkpoint.
        """
        self._unchecked.append((loss.detach(), _names(batch)))
        if not self.accelerator.sync_gradients:
            return
        losses, names = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        for value, samples in zip(torch.stack(losses).tolist(), names, strict=True):
            if not math.isfinite(value):
                raise ValueError(self._not_finite(f"`loss` became {value} at step {self.step + 1}, in {samples}"))

    def validated(self, score: float) -> None:
        """Take the score of a validation of the step in progress, higher is better, for `keep_best` and `patience`."""
        if self.best and score <= self.best["score"]:
            self.best["since"] += 1
            return
        self.best = {"step": self.step + 1, "score": score, "since": 0}
        if self.keep_best:
            self._require_finite(self.step + 1)
            self._best_weights = {key: w.detach().to("cpu", copy=True) for key, w in self._validated_weights().items()}

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` ended the run before its last step."""
        return 0 < self.patience <= self.best.get("since", 0) and self.step < self.steps

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the modules, and the trained ones back; nothing without `ema_decay`."""
        if self._ema is None:
            yield
            return
        parameters = list(self._trainable().values())
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)

    @torch.no_grad()
    def use_final_weights(self) -> None:
        """Put the weights to save into the modules, after the last step: the best, else the averaged, else the last."""
        final = self._best_weights or self._validated_weights()
        for key, parameter in self._trainable().items():
            parameter.copy_(final[key])

    def describe(self) -> str:
        """Return how many steps were done and which weights the run ends with, in words."""
        steps = f"{self.step} of {self.steps} steps, ended early" if self.stopped_early else f"{self.step} steps"
        if self._best_weights:
            return f"{steps}, weights of step {self.best['step']}"
        return f"{steps}, averaged weights" if self._ema else steps

    def finish(self, **summary) -> None:
        """Mark the output as complete.

        The checkpoint is kept under the constant schedule, to train further with more `steps`; under another one it is
        of no more use and is deleted.
        """
        if self.output is None or not self.accelerator.is_main_process:
            return
        if self._best_weights:
            summary["best_step"] = self.best["step"]
        if self.stopped_early:
            summary["stopped_early"] = True
        finish(self.output, steps=self.step, samples_per_step=self._samples_per_step, **summary)
        folder = self.output / RESUME_FOLDER
        if self.schedule != "constant":
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            logger.info("%s (%s) is kept: more `steps` train further from it", folder, size_text(_size(folder)))

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.step, self.steps, self.warmup_steps, self.schedule)
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, self._base_rates[name], strict=True):
                group["lr"] = rate * factor

    def _finish_step(self, bar: tqdm, stop: GracefulStop) -> None:
        self.step += 1
        self._write_row(bar)
        bar.update()
        stopping = self._any_process(stop.signal is not None)
        if stopping or self.stopped_early or self.step % self.save_every == 0 or self.step == self.steps:
            self.save()
        if stopping and self.step < self.steps:
            where = f"stopped after step {self.step}"
            if self.accelerator.is_main_process:
                bar.write(f"{where}; the same command resumes" if self.output else where)
            if stop.signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))

    def _write_row(self, bar: tqdm) -> None:
        row: dict[str, Any] = {"step": self.step}
        if self._logged:
            logged = [torch.stack([v.to(self.accelerator.device) for v in values]) for values in self._logged.values()]
            means = self.accelerator.reduce(torch.stack([values.mean() for values in logged]), "mean")
            row |= dict(zip(self._logged, means.tolist(), strict=True))
        self._logged.clear()
        for name, value in row.items():
            if not math.isfinite(value):
                raise ValueError(self._not_finite(f"`{name}` became {value} at step {self.step}"))
        first = next(iter(self.optimizers.values()))
        row["learning_rate"] = first.param_groups[0]["lr"]
        bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k not in ("step", "learning_rate")})
        if self.output is not None and self.accelerator.is_main_process:
            append_row(self.output / METRICS_FILE, row)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=self.step)

    def _not_finite(self, what: str) -> str:
        step = 0 if self.output is None else _checkpoint_state(self.output).get("step", 0)
        kept = (
            f"the last good checkpoint is {self.output / RESUME_FOLDER}, of step {step}"
            if step
            else "no checkpoint yet"
        )
        return (
            f"{what}; {kept}. Start over with a lower `learning_rate` or more `warmup_steps`, or with "
            "`mixed_precision` bf16 or no if it is fp16; samples that are at fault have to be removed"
        )

    def _require_finite(self, step: int) -> None:
        """Raise ValueError if a trained parameter has a NaN or an infinity, which a checkpoint must not hold."""
        for key, parameter in self._trainable().items():
            if not parameter.isfinite().all():
                raise ValueError(self._not_finite(f"the parameter {key} is not finite after step {step}"))

    def _make_average(self, decay: float, device: str) -> EMAModel:
        average, parameters = EMAModel(self._trainable().values(), decay), list(self._trainable().values())
        if device != "auto":
            average.to(device)

        def update(*_) -> None:
            # EMAModel averages only what requires a gradient, and copies everything else
            pairs = zip(parameters, average.shadow_params, strict=True)
            average.step([parameter.detach().to(shadow.device).requires_grad_() for parameter, shadow in pairs])

        first = next(iter(self.optimizers.values()))
        getattr(first, "optimizer", first).register_step_post_hook(update)  # accelerate's has the real one inside
        return average

    def _validated_weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, or the trained ones where there is no average."""
        trained = self._trainable()
        return trained if self._ema is None else dict(zip(trained, self._ema.shadow_params, strict=True))

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(total > 0)

    def save(self) -> None:
        """Write the checkpoint beside the old one, which is deleted once the new one is complete and on the disk.

        At any moment `resume/` is complete, or it is missing and `resume.old/` is.
        """
        if self.output is None:
            return
        self._require_finite(self.step)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = self.output / RESUME_FOLDER
            new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            try:
                self._write_checkpoint(new)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(new, ignore_errors=True)  # its space is needed for whatever is still written
                raise OSError(self._not_saved(error)) from error
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _not_saved(self, error: Exception) -> str:
        last = _checkpoint_state(self.output).get("step", 0)
        copies = 1 + bool(self._best_weights) + (self._ema is not None)
        size = copies * sum(p.nbytes for p in self._trainable().values())
        size += sum(t.nbytes for o in self.optimizers.values() for t in flatten_optimizer(o)[0].values())
        return (
            f"the checkpoint of step {self.step} in {self.output} could not be written ({' '.join(str(error).split())})"
            f": it takes {size_text(size)} beside the last one, and {size_text(shutil.disk_usage(self.output).free)} "
            f"are free. Free space on the disk; the same command resumes at step {last}"
        )

    def _write_checkpoint(self, folder: Path) -> None:
        weights = {"parameters": self._trainable(), "best": self._best_weights}
        state: dict[str, Any] = {"step": self.step, "samples_per_step": self._samples_per_step}
        state |= {"state": self.state, "optimizers": {}}
        if self.best:
            state |= {"best": self.best, "keeps_best": self.keep_best, "steps": self.steps}
        if self._ema is not None:
            weights["average"] = self._validated_weights()
            state |= {"ema_decay": self._ema.decay, "ema_step": self._ema.optimization_step}
        for name, tensors in weights.items():
            if tensors:
                tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
                save_file(tensors, folder / f"{name}.safetensors")
        for name, optimizer in self.optimizers.items():
            tensors, state["optimizers"][name] = flatten_optimizer(optimizer)
            save_file(tensors, folder / f"{name}.optimizer.safetensors")
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, module in self.modules.items()
            for key, parameter in self.accelerator.unwrap_model(module).named_parameters()
            if parameter.requires_grad
        }

    def _resume(self) -> None:
        folder = self.output / RESUME_FOLDER
        old = folder.with_suffix(".old")
        if self.accelerator.is_main_process and not folder.exists() and old.exists():
            old.rename(folder)  # killed between the two renames of `save`
        self.accelerator.wait_for_everyone()
        if folder.exists():
            self._read_checkpoint(folder)
            logger.info("resuming %s at step %d", self.output, self.step)
        if self.accelerator.is_main_process:
            rows = [row for row in resume_rows(self.output / METRICS_FILE) if row["step"] <= self.step]
            rewrite_rows(self.output / METRICS_FILE, rows)
        self.accelerator.wait_for_everyone()

    def _read_checkpoint(self, folder: Path) -> None:
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            stored = load_file(folder / "parameters.safetensors")
            tensors = {name: load_file(folder / f"{name}.optimizer.safetensors") for name in self.optimizers}
            average = load_file(folder / "average.safetensors") if state.get("ema_decay") else {}
            best = load_file(folder / "best.safetensors") if state.get("keeps_best") else {}
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"the checkpoint {folder} is damaged ({error}): delete it to train from step 0") from error
        trainable = self._trainable()
        differing = [
            key
            for key in sorted(stored.keys() | trainable.keys())
            if key not in stored or key not in trainable or stored[key].shape != trainable[key].shape
        ]
        if differing:
            raise ValueError(
                f"the checkpoint {folder} was made by another model: {len(differing)} parameters differ in name or "
                f"shape, such as {', '.join(differing[:5])}. Give that model, or another `output`"
            )
        decay = 0.0 if self._ema is None else self._ema.decay
        if state.get("ema_decay", 0.0) != decay:
            raise ValueError(
                f"the checkpoint {folder} was made with `ema_decay` {state.get('ema_decay', 0.0)} but it is {decay}: "
                "give that, or another `output`"
            )
        with torch.no_grad():
            for key, parameter in trainable.items():
                parameter.copy_(stored[key])
            for key, shadow in self._validated_weights().items() if average else ():
                shadow.copy_(average[key])
        if average:
            self._ema.optimization_step = state["ema_step"]
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, tensors[name], state["optimizers"][name])
        if "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.state = state["step"], state["state"]
        self._samples_per_step = state.get("samples_per_step")
        if best or not self.keep_best:
            self.best, self._best_weights = state.get("best", {}), best if self.keep_best else {}
        if self.stopped_early and self.steps > state["steps"]:
            self.best["since"] = 0  # it had ended early and is to be trained further


class GracefulStop:
    """Turns the first SIGTERM or Ctrl-C into a request to stop after the step; a second one stops at once."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> GracefulStop:
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            # signals that the caller ignores (Ctrl-C under nohup, in a background job) stay ignored
            heard = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN]
            self._old = {s: signal.signal(s, self._request) for s in heard}
        return self

    def _request(self, number, frame):
        self.signal = number
        signal.signal(number, self._old[number])

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _names(batch: dict) -> str:
    """Return which samples a batch holds, as words."""
    what, names = ("samples", batch["id"]) if "id" in batch else ("positions", batch["position"].tolist())
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{what} {', '.join(map(str, names[:MOST_NAMED]))}{more}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def size_text(size: float) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# ----------------------------------------------------------------------------------------------------------- checkpoint


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

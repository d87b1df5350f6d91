"""A training run: its steps, learning rate, log, checks and checkpoints, and its graceful stop."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from faceprior.config import METRICS_FILE, finish
from faceprior.files import size_text
from faceprior.jsonl import append_row, resume_rows, rewrite_rows
from faceprior.training.accelerator import require_at_least
from faceprior.training.checkpoint import (
    RESUME_FOLDER,
    Checkpoint,
    checkpoint_state,
    load_checkpoint,
    recover_checkpoint,
    save_checkpoint,
)
from faceprior.training.inputs import require_same_inputs
from faceprior.training.optimizer import learning_rate_factor, restore_optimizer
from faceprior.training.output import keep_open, other_samples, put_back
from faceprior.training.samples import SampleStream, collate, move, positions, sample_generators
from faceprior.training.weights import TrainedWeights

logger = logging.getLogger(__name__)
TRACKER_PROJECT = "faceprior"
MOST_NAMED = 8  # samples in the message of a loss that is not finite


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

    inputs: what the steps depend on, by name: JSON values, such as `describe_samples` and `describe_weights` return.
    A run that began with others is not resumed: FileExistsError.

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
        inputs: dict[str, Any] | None = None,
    ):
        require_at_least(1, steps=steps, save_every=save_every)
        require_at_least(0, warmup_steps=warmup_steps, patience=patience)
        self.output = Path(output) if output is not None else None
        self.steps, self.accelerator, self.save_every = steps, accelerator, save_every
        self.optimizers = optimizers
        self.warmup_steps, self.schedule, self.progress = warmup_steps, schedule, progress
        self.keep_best, self.patience = keep_best, patience
        self.step, self.seed, self.state = 0, 0, {}
        self.inputs, self.best = inputs or {}, {}
        first = next(iter(optimizers.values()))
        first = getattr(first, "optimizer", first)  # accelerate's has the real one inside
        networks = {name: accelerator.unwrap_model(module) for name, module in modules.items()}
        self._weights = TrainedWeights(networks, first, ema_decay, ema_device)
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
        require_at_least(1, batch_size=batch_size)
        require_at_least(0, seed=seed)
        accumulation, self.seed = self.accelerator.gradient_accumulation_steps, seed
        parts = batch_size, accumulation, self.accelerator.num_processes
        if self.step and self._samples_per_step not in (None, math.prod(parts)):
            raise ValueError(other_samples(self.output, self._samples_per_step, parts))
        self._samples_per_step = math.prod(parts)
        if self.stopped_early:
            return
        loader = DataLoader(
            SampleStream(dataset, seed, augment),
            batch_sampler=positions(self.step, self.steps, batch_size * accumulation, batch_size, self.accelerator),
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
            self._weights.keep_best()

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` ended the run before its last step."""
        return 0 < self.patience <= self.best.get("since", 0) and self.step < self.steps

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights into the modules, and the trained ones back; nothing without `ema_decay`."""
        return self._weights.averaged()

    def use_final_weights(self) -> None:
        """Put the weights to save into the modules, after the last step: the best, else the averaged, else the last."""
        self._weights.use_final()

    def describe(self) -> str:
        """Return how many steps were done and which weights the run ends with, in words."""
        steps = f"{self.step} step{'s' if self.step != 1 else ''}"
        steps = f"{self.step} of {self.steps} steps, ended early" if self.stopped_early else steps
        if self._weights.best:
            return f"{steps}, weights of step {self.best['step']}"
        return f"{steps}, averaged weights" if self._weights.are_averaged else steps

    def finish(self, **summary) -> None:
        """Mark the output as complete.

        The checkpoint is kept under the constant schedule, to train further with more `steps`; under another one it is
        of no more use and is deleted.
        """
        if self.output is None or not self.accelerator.is_main_process:
            return
        if self._weights.best:
            summary["best_step"] = self.best["step"]
        if self.stopped_early:
            summary["stopped_early"] = True
        inputs = {"inputs": self.inputs} if self.inputs else {}
        summary = {"samples_per_step": self._samples_per_step, **inputs, **summary}
        finish(self.output, steps=self.step, **summary)
        folder = self.output / RESUME_FOLDER
        if self.schedule != "constant":
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            size = size_text(sum(path.stat().st_size for path in folder.iterdir()))
            logger.info("%s (%s) is kept: more `steps` train further from it", folder, size)

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
        step = 0 if self.output is None else checkpoint_state(self.output).get("step", 0)
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
        name = self._weights.not_finite()
        if name is not None:
            raise ValueError(self._not_finite(f"the parameter {name} is not finite after step {step}"))

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(total > 0)

    # ---- checkpoints

    def save(self) -> None:
        """Write the checkpoint, in place of the last one; see `save_checkpoint`."""
        self._require_finite(self.step)
        if self.output is None:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {"step": self.step, "samples_per_step": self._samples_per_step}
            state |= {"state": self.state, "inputs": self.inputs, **self._weights.state()}
            if self.best:
                state |= {"best": self.best, "keeps_best": self.keep_best, "steps": self.steps}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(self.output, state, self._weights.files(), self.optimizers)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            recover_checkpoint(self.output)
        self.accelerator.wait_for_everyone()
        checkpoint = load_checkpoint(self.output, self.optimizers)
        if checkpoint is not None:
            self._take(checkpoint)
            logger.info("resuming %s at step %d", self.output, self.step)
        if self.accelerator.is_main_process:
            rows = [row for row in resume_rows(self.output / METRICS_FILE) if row["step"] <= self.step]
            rewrite_rows(self.output / METRICS_FILE, rows)
        self.accelerator.wait_for_everyone()

    def _take(self, checkpoint: Checkpoint) -> None:
        try:
            require_same_inputs(self.output, checkpoint.state.get("inputs", {}), self.inputs)
        except FileExistsError:
            if self.accelerator.is_main_process:
                put_back(self.output)
            raise
        if self.accelerator.is_main_process:
            keep_open(self.output)
        self._weights.load(checkpoint)
        state, best = checkpoint.state, checkpoint.weights.get("best", {})
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, checkpoint.optimizers[name], state["optimizers"][name])
        if "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.state = state["step"], state["state"]
        self._samples_per_step = state.get("samples_per_step")
        if best or not self.keep_best:
            self.best, self._weights.best = state.get("best", {}), best if self.keep_best else {}
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

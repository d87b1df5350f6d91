"""The weights of a run: those that are trained, their moving average, and a copy of the best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from faceprior.models import differing_tensors
from faceprior.training.checkpoint import Checkpoint


class TrainedWeights:
    """The trained parameters of a run, and what may take their place at its end: their average, or the best ones.

    modules: the networks by name; what requires a gradient is trained, under the name NETWORK.PARAMETER. ema_decay,
    ema_device: of the average, see `TrainingRun`; optimizer: the average is updated after each of its steps.

    Attributes: `trained`, the parameters by name; `best`, on the CPU by the same names, empty until `keep_best`.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        ema_decay: float = 0.0,
        ema_device: str = "auto",
    ):
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` has to be in [0, 1) but is {ema_decay}")
        named = ((f"{name}.{key}", p) for name, module in modules.items() for key, p in module.named_parameters())
        self.trained: dict[str, nn.Parameter] = {name: p for name, p in named if p.requires_grad}
        self.best: dict[str, Tensor] = {}
        self._average = EMAModel(self.trained.values(), ema_decay) if ema_decay else None
        if self._average:
            if ema_device != "auto":
                self._average.to(ema_device)
            optimizer.register_step_post_hook(self._update)

    def _update(self, *_) -> None:
        # EMAModel averages only what requires a gradient, and copies everything else
        pairs = zip(self.trained.values(), self._average.shadow_params, strict=True)
        self._average.step([parameter.detach().to(shadow.device).requires_grad_() for parameter, shadow in pairs])

    @property
    def current(self) -> dict[str, Tensor]:
        """The averaged weights by name, or the trained ones where there is no average."""
        return dict(zip(self.trained, self._average.shadow_params, strict=True)) if self._average else self.trained

    @property
    def are_averaged(self) -> bool:
        return self._average is not None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the networks, and the trained ones back; nothing without an average."""
        if self._average is None:
            yield
            return
        parameters = list(self.trained.values())
        self._average.store(parameters)
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            self._average.restore(parameters)

    def keep_best(self) -> None:
        """Copy the present weights, averaged if they are, as the best."""
        self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.current.items()}

    @torch.no_grad()
    def use_final(self) -> None:
        """Put the weights to save into the networks: the best, else the averaged, else the last."""
        final = self.best or self.current
        for name, parameter in self.trained.items():
            parameter.copy_(final[name])

    def not_finite(self) -> str | None:
        """Return the name of a trained parameter with a NaN or an infinity, which a checkpoint must not hold."""
        return next((name for name, parameter in self.trained.items() if not parameter.isfinite().all()), None)

    # ---- checkpoints

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights that a checkpoint holds, by file."""
        files = {"parameters": self.trained, "average": self.current if self._average else {}, "best": self.best}
        return {file: tensors for file, tensors in files.items() if tensors}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's state says of the average; nothing without one."""
        if self._average is None:
            return {}
        return {"ema_decay": self._average.decay, "ema_step": self._average.optimization_step}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint, but for the best; ValueError if it is of another model or decay."""
        stored = checkpoint.weights["parameters"]
        differing = differing_tensors(stored, self.trained)
        if differing:
            raise ValueError(
                f"the checkpoint {checkpoint.folder} was made by another model: {len(differing)} parameters differ in "
                f"name or shape, such as {', '.join(differing[:5])}. Give that model, or another `output`"
            )
        decay, own = checkpoint.state.get("ema_decay", 0.0), self._average.decay if self._average else 0.0
        if decay != own:
            raise ValueError(
                f"the checkpoint {checkpoint.folder} was made with `ema_decay` {decay} but it is {own}: give that, or "
                "another `output`"
            )
        for name, parameter in self.trained.items():
            parameter.copy_(stored[name])
        if self._average:
            for name, shadow in self.current.items():
                shadow.copy_(checkpoint.weights["average"][name])
            self._average.optimization_step = checkpoint.state["ema_step"]

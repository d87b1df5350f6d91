"""`TunedPipeline`: a base, the part of its network that is trained, and the original weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from faceprior.bases import describe_base, load_pipeline, require_base, save_single_file
from faceprior.diffusion import denoiser_of, native_side, networks_of
from faceprior.lora import Lora, adapters_of, add_lora, extract_lora, require_no_lora, save_lora, trained_lora
from faceprior.models import device_of, placed, quantization_of, require_trainable
from faceprior.training import describe_weights, seeded

TRAIN = ("self_attention", "lora", "full")


class TunedPipeline:
    """A pipeline of which a part of the network is trained; images and files of it.

    pipeline: a Stable Diffusion 1, 2, 3, SDXL or FLUX.1 pipeline; train: the U-Net's `self_attention` layers (the
    paper's choice), a `lora`, or the `full` U-Net (the paper's ablation), of the transformers of Stable Diffusion 3 and
    FLUX.1 a `lora` only; rank, alpha (rank by default), lora_targets, lora_variant: of the LoRA (see `lora.add_lora`),
    ignored without one; seed: of the LoRA's first weights; original_device: where the original weights of what is
    trained lie, `auto`, the network's own device, or `cpu`, where `untuned` finds them, but not `original`.

    The original model is the same network with its LoRA off, or with its original weights in place of the trained ones.
    So a second U-Net takes the memory of the trained part only, and none with a LoRA.

    The trained weights are float32. With a base in half precision every call of the U-Net, also by the pipeline, runs
    under autocast and returns float32.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        train: Literal["self_attention", "lora", "full"] = "self_attention",
        rank: int = 16,
        alpha: int | None = None,
        lora_targets: str | Sequence[str] = "self_attention",
        lora_variant: Literal["plain", "rslora", "dora"] = "plain",
        seed: int = 0,
        original_device: Literal["auto", "cpu"] = "auto",
    ):
        if train not in TRAIN:
            raise ValueError(f"`train` has to be one of {', '.join(TRAIN)} but is {train!r}")
        require_base(pipeline, "tune", train=train)
        require_trainable(train, quantization_of(denoiser_of(pipeline)))
        require_no_lora(pipeline)
        self._pipeline, self.train, self.original_device = pipeline, train, original_device
        for network in networks_of(pipeline):
            network.requires_grad_(False).eval()  # built by hand it may train: T5 has dropout
        if self.denoiser.dtype != torch.float32:
            _run_under_autocast(self.denoiser, self.denoiser.dtype)
        self._original: dict[str, Tensor] = {}
        self._adapters: list = []  # found once: to search the network for them would take a tenth of a small step
        with seeded(seed, "lora"):
            self._select_trained(rank, rank if alpha is None else alpha, lora_targets, lora_variant)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        dtype: torch.dtype = torch.float32,
        vae: str | None = None,
        prediction_type: str = "auto",
        quantization: str = "none",
        weights: bool = True,
        **options,
    ):
        """Load `base` (diffusers folder, single `.safetensors` file or hub id); `options` are the constructor's.

        quantization: `none`, `8bit` or `nf4`: how the frozen network and text encoders are held (`models.quantize`);
        only a LoRA can be trained beside them. weights: False builds the networks from their configs alone, to plan
        with.
        """
        train = options.get("train", TRAIN[0])
        require_trainable(train, quantization)
        if weights:
            describe_base(base, vae, prediction_type).require("tune", train)
        return cls(load_pipeline(base, dtype, vae, prediction_type, quantization, weights), **options)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained: the pipeline's U-Net or transformer."""
        return denoiser_of(self._pipeline)

    @property
    def resolution(self) -> int | None:
        """The base's native image size in pixels; None if its U-Net's config does not say."""
        return native_side(self._pipeline)

    def to(self, device: torch.device | str, encoders: bool = True) -> TunedPipeline:
        """Move the networks; `encoders`: also the VAE and the text encoders, else to the CPU.

        Batches of `cached` need none of them. `pipeline`, and what decodes latents, bring back what they use.
        """
        for network in networks_of(self._pipeline):
            network.to(device if encoders or network is self.denoiser else "cpu")
        place = device if self.original_device == "auto" else self.original_device
        self._original = {name: tensor.to(place) for name, tensor in self._original.items()}
        return self

    # ---- the trained weights, and the original ones

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the float32 parameters that are trained; every other weight keeps the dtype it was loaded in."""
        return list(self._trained().values())

    def describe_base(self) -> str:
        """Return a short text on the original weights of all networks, the same whatever was trained since.

        See `describe_weights`.
        """
        trained, frozen = self._trained(), [n for n in networks_of(self._pipeline) if n is not self.denoiser]
        own = {name: p for name, p in self.denoiser.named_parameters() if name not in trained} | self._original
        return describe_weights([*own.values(), *(p for network in frozen for p in network.parameters())])

    @contextmanager
    def original(self) -> Iterator[Callable]:
        """Give the network with the original weights, to call without gradients."""
        if self.train == "lora":
            with self._adapters_off():
                yield self.denoiser
        else:
            yield lambda *a, **k: torch.func.functional_call(self.denoiser, self._original, a, k, tie_weights=False)

    def _select_trained(self, rank: int, alpha: int, lora_targets: str | Sequence[str], lora_variant: str) -> None:
        if self.train == "lora":
            add_lora(self._pipeline, rank, alpha, lora_targets, lora_variant)
            self._adapters = adapters_of(self.denoiser)
        else:
            self._original = {name: parameter.detach().clone() for name, parameter in self._trained().items()}
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)
        if not self.trainable_parameters():
            raise ValueError("the base's U-Net has no self-attention layers (attn1) to train")
        cast_training_params(self.denoiser, torch.float32)

    def _trained(self) -> dict[str, nn.Parameter]:
        # by name, not by requires_grad: peft turns the flag off while an adapter is disabled
        part = {"self_attention": ".attn1.", "lora": "lora_", "full": ""}[self.train]
        return {name: parameter for name, parameter in self.denoiser.named_parameters() if part in name}

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        for adapter in self._adapters:
            adapter.enable_adapters(False)
        try:
            yield
        finally:
            for adapter in self._adapters:
                adapter.enable_adapters(True)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained().items():
            parameter.copy_(tensors[name])

    # ---- images

    def pipeline(self) -> DiffusionPipeline:
        """Return the pipeline with the tuned weights, for sampling."""
        self.denoiser.eval()
        self.to(self.denoiser.device)
        return self._pipeline

    @contextmanager
    def sampling(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the tuned weights; its parts are afterwards as before: their devices, the mode."""
        training = self.denoiser.training
        with placed(networks_of(self._pipeline), self.denoiser.device):
            try:
                yield self.pipeline()
            finally:
                self.denoiser.train(training)

    @contextmanager
    def untuned(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the original weights, to sample images as before the tuning; else as `sampling`."""
        if self.train == "lora":
            with self._adapters_off(), self.sampling() as pipeline:
                yield pipeline
            return
        tuned = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trained().items()}
        try:
            self._copy(self._original)
            with self.sampling() as pipeline:
                yield pipeline
        finally:
            self._copy(tuned)

    # ---- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a LoRA file for `load_lora_weights` (see `save_lora`); else a whole pipeline folder."""
        if self.train == "lora":
            self.save_lora(folder)
        else:
            self._pipeline.save_pretrained(folder)

    def save_lora(
        self, folder: str | Path, lora_format: Literal["diffusers", "kohya"] = "diffusers", rank: int | None = None
    ) -> Lora:
        """Write a LoRA file, also of a tuner that trained the self-attention itself; return what was written.

        lora_format: see `lora.save_lora`. rank: of the LoRA that is extracted from trained self-attention, whose loss
        is in `.info` and in the file's metadata (see `lora.extract_lora`); a trained LoRA has its own.

        Raises ValueError for a full U-Net, and for what the format loses.
        """
        if self.train == "full":
            raise ValueError("`train` is full, and a LoRA of a whole U-Net would lose most of it: save the pipeline")
        if self.train == "lora" and rank is not None:
            raise ValueError("`rank` is of a LoRA that is extracted, and this one was trained: leave `rank` out")
        if self.train == "self_attention" and rank is None:
            raise ValueError("`train` is self_attention, of which a LoRA is extracted: give its `rank`")
        lora = trained_lora(self.denoiser) if rank is None else extract_lora(self._original, self._trained(), rank)
        save_lora(self._pipeline, lora, folder, lora_format)
        return lora

    def save_single_file(self, file: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a whole checkpoint for the web UIs (see `bases.save_single_file`); ValueError with a LoRA."""
        save_single_file(self._pipeline, file, dtype)


def _run_under_autocast(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Let a network of mixed dtypes run in `dtype` and return float32, as accelerate's `prepare` does."""
    forward = denoiser.forward

    def forward_under_autocast(*args, **kwargs):
        with torch.autocast(device_of(denoiser).type, dtype):
            return forward(*args, **kwargs)

    denoiser.forward = convert_outputs_to_fp32(forward_under_autocast)

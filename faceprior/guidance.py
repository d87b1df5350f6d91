"""`GuidanceTuner`: teach a Stable Diffusion checkpoint to draw better faces from (good, bad) pairs (Face Score, 5).

tuner = GuidanceTuner.from_pretrained("my_model.safetensors", train="lora")
tuner.fit("data/pairs", steps=500)
tuner.save_pretrained("checkpoints/guided")     # a LoRA that any diffusers pipeline loads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from faceprior.diffusion import (
    PromptEmbeddings,
    added_conditions,
    downsample_mask,
    encode_latents,
    encode_prompts,
    load_pipeline,
    make_noise_scheduler,
    noise_like,
    pred_original_sample,
)
from faceprior.losses import guidance_loss
from faceprior.pairs import PairDataset, read_pairs
from faceprior.training import TrainingRun, drop_prompts, make_accelerator, make_optimizer, sample_timesteps

TRAIN = ("self_attention", "lora", "full")
LORA_FILE = "pytorch_lora_weights.safetensors"
SELF_ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


class GuidanceTuner:
    """A base model, the part of its U-Net that is trained, and the guidance loss.

    pipeline: a Stable Diffusion or SDXL pipeline; train: the U-Net's `self_attention` layers (the paper's choice), a
    `lora` on the same layers, or the `full` U-Net (the paper's ablation); rank, alpha: of the LoRA (alpha: rank by
    default); t_end: timesteps are drawn from the first share t_end of the schedule, (0, 1], the paper's is 0.5;
    prompt_drop: share of the samples whose prompt is dropped, the paper's is 0.2; distance: between the masked
    predictions, l2 by default.

    The original model, which gives the targets, is the same network with its LoRA off, or with its original weights in
    the trained places: no second U-Net stands in memory.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        train: Literal["self_attention", "lora", "full"] = "self_attention",
        rank: int = 16,
        alpha: int | None = None,
        t_end: float = 0.5,
        prompt_drop: float = 0.2,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    ):
        if train not in TRAIN:
            raise ValueError(f"`train` has to be one of {', '.join(TRAIN)} but is {train!r}")
        if not 0 < t_end <= 1:
            raise ValueError(f"`t_end` has to be in (0, 1] but is {t_end}")
        self._pipeline, self.train = pipeline, train
        self.t_end, self.prompt_drop, self.distance = t_end, prompt_drop, distance
        self.noise_scheduler = make_noise_scheduler(pipeline)
        for part in (
            pipeline.vae,
            pipeline.unet,
            pipeline.text_encoder,
            getattr(pipeline, "text_encoder_2", None),
        ):
            if part is not None:
                part.requires_grad_(False)
        self._select_trained(rank, rank if alpha is None else alpha)
        self._original = {} if train == "lora" else {n: p.detach().clone() for n, p in self._trained()}

    @classmethod
    def from_pretrained(
        cls, base: str, dtype: torch.dtype = torch.float32, vae: str | None = None, **options
    ):
        """Load `base` (diffusers folder, single `.safetensors` file or hub id); `options` are the constructor's."""
        return cls(load_pipeline(base, dtype, vae), **options)

    @property
    def unet(self) -> nn.Module:
        return self._pipeline.unet

    @property
    def resolution(self) -> int:
        """The base's native picture size in pixels."""
        return self.unet.config.sample_size * self._pipeline.vae_scale_factor

    def to(self, device: torch.device | str) -> GuidanceTuner:
        self._pipeline.to(device)
        self._original = {name: tensor.to(device) for name, tensor in self._original.items()}
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the float32 parameters that are trained; every other weight keeps the dtype it was loaded in."""
        return [parameter for _, parameter in self._trained()]

    def loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        unet: nn.Module | None = None,
    ) -> Tensor:
        """Return the guidance loss of a batch (Face Score, Eqs. 6 and 7, Algorithm 1), with gradients.

        batch: good, bad (B, 3, H, W) in [-1, 1]; mask (B, 1, H, W) in {0, 1}; prompt, B texts. generator: draws
        timesteps, noise and dropped prompts; a list has one per sample. unet: the prepared network (DDP), by default
        the tuner's own. Good and bad share the timestep and the noise; Algorithm 1 draws from [0, 0.5 T), section 5
        writes [1, 0.5 T], which is the same for steps that are counted from 0.
        """
        device, size = self.unet.device, batch["good"].shape[-2:]
        generators = _per_sample(generator, len(batch["good"]))
        with torch.no_grad():
            latents = encode_latents(self._pipeline.vae, torch.cat([batch["good"], batch["bad"]]))
        steps = self.noise_scheduler.config.num_train_timesteps
        timesteps = sample_timesteps(generators, 0, max(1, int(self.t_end * steps)), device)
        noise = noise_like(latents[: len(timesteps)], generators)
        noisy_good, noisy_bad = self.noise_scheduler.add_noise(
            latents, noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
        ).chunk(2)
        embeddings = encode_prompts(
            self._pipeline, drop_prompts(batch["prompt"], self.prompt_drop, generators)
        )
        with torch.no_grad(), self._original_model() as original:
            target = self._denoise(original, noisy_good, timesteps, embeddings, size)
        prediction = self._denoise(unet or self.unet, noisy_bad, timesteps, embeddings, size)
        mask = downsample_mask(batch["mask"].to(device), tuple(latents.shape[-2:]))
        return guidance_loss(target, prediction, mask, self.distance)

    def fit(
        self,
        pairs,
        steps: int = 500,
        learning_rate: float = 1e-5,
        batch_size: int = 2,
        accumulation: int = 1,
        optimizer: str = "adamw",
        mixed_precision: str = "no",
        device: str = "auto",
        seed: int = 0,
        output: str | Path | None = None,
    ) -> GuidanceTuner:
        """Train on `pairs`: a folder that stage 01 made, or a dataset with the samples that `loss` takes.

        Stops and goes on like stage 04 when `output` names a folder for its log and checkpoints.
        """
        if isinstance(pairs, str | Path):
            pairs = PairDataset(pairs, read_pairs(pairs)[0], self.resolution)
        accelerator = make_accelerator(device, mixed_precision, accumulation)
        self.to(accelerator.device)
        adam = make_optimizer(self.trainable_parameters(), optimizer, learning_rate)
        unet, adam = accelerator.prepare(self.unet, adam)
        run = TrainingRun(output, steps, accelerator, {"unet": unet}, {"unet": adam})
        for batch in run.batches(pairs, batch_size, seed):
            with accelerator.accumulate(unet):
                loss = self.loss(batch, run.generators(batch), unet)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(self.trainable_parameters(), 1.0)
                adam.step()
                adam.zero_grad()
            run.log(loss=loss)
        return self

    def pipeline(self) -> DiffusionPipeline:
        """Return the pipeline with the tuned weights, for sampling."""
        self.unet.eval()
        return self._pipeline

    @contextmanager
    def untuned(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the original weights, to sample the picture before."""
        tuned = {name: parameter.detach().clone() for name, parameter in self._trained()}
        try:
            if self.train == "lora":
                self.unet.disable_adapters()
            self._copy(self._original)
            yield self.pipeline()
        finally:
            if self.train == "lora":
                self.unet.enable_adapters()
            self._copy(tuned)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the result: a LoRA file with its rank and alpha for `load_lora_weights`, else a whole pipeline folder."""
        if self.train != "lora":
            self._pipeline.save_pretrained(folder)
            return
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        self._pipeline.save_lora_weights(
            save_directory=folder,
            unet_lora_layers=layers,
            # without it a LoRA whose alpha differs from its rank loads at the wrong strength
            unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
        )

    def _select_trained(self, rank: int, alpha: int) -> None:
        if self.train == "lora":
            targets = [f"attn1.{layer}" for layer in SELF_ATTENTION_LAYERS]
            self.unet.add_adapter(LoraConfig(rank, targets, lora_alpha=alpha, init_lora_weights="gaussian"))
        else:
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_(self.train == "full" or ".attn1." in name)
        cast_training_params(self.unet, torch.float32)
        if not self.trainable_parameters():
            raise ValueError("the base's U-Net has no self-attention layers (attn1) to train")

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        # By name, not by requires_grad: peft turns the flag off while an adapter is disabled.
        if self.train == "lora":
            return [(n, p) for n, p in self.unet.named_parameters() if "lora_" in n]
        return [(n, p) for n, p in self.unet.named_parameters() if self.train == "full" or ".attn1." in n]

    @contextmanager
    def _original_model(self) -> Iterator[Callable]:
        if self.train == "lora":
            self.unet.disable_adapters()
            try:
                yield self.unet
            finally:
                self.unet.enable_adapters()
        else:
            yield lambda *a, **k: torch.func.functional_call(self.unet, self._original, a, k)

    def _denoise(
        self, unet: Callable, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, size: torch.Size
    ) -> Tensor:
        dtype = embeddings.prompt_embeds.dtype  # of the frozen modules
        with torch.autocast(noisy.device.type, dtype, enabled=dtype != torch.float32):
            model_pred = unet(
                noisy.to(dtype),
                timesteps,
                embeddings.prompt_embeds,
                added_cond_kwargs=added_conditions(embeddings, *size),
            ).sample
        return pred_original_sample(self.noise_scheduler, model_pred, timesteps, noisy)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            if name in tensors:
                parameter.copy_(tensors[name])


def load_tuned(
    folder: str | Path, base: str, dtype: torch.dtype = torch.float32, vae: str | None = None
) -> DiffusionPipeline:
    """Load what `save_pretrained` wrote: a pipeline folder, or `base` with the LoRA in `folder`."""
    folder = Path(folder)
    if (folder / LORA_FILE).is_file():
        pipeline = load_pipeline(base, dtype, vae)
        pipeline.load_lora_weights(folder)
        return pipeline
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no tuned model in {folder}: `python stages/04_guidance_tune.py` makes one")
    return load_pipeline(str(folder), dtype)


def _per_sample(generator, count: int) -> list[torch.Generator]:
    if isinstance(generator, list):
        return generator
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return [generator] * count

"""`GuidanceTuner`: teach a Stable Diffusion checkpoint to generate better faces from (good, bad) pairs (Face Score, 5).

tuner = GuidanceTuner.from_pretrained("my_model.safetensors", train="lora")
tuner.fit("data/pairs", steps=500)
tuner.save_pretrained("checkpoints/guided")     # a LoRA that any diffusers pipeline loads
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from faceprior.bases import load_pipeline, require_base
from faceprior.diffusion import (
    PromptEmbeddings,
    add_noise,
    decode_latents,
    denoiser_of,
    downsample_mask,
    encode_latents,
    encode_prompts,
    make_noise_scheduler,
    noise_like,
    pred_original_sample,
    predict,
    report_long_prompts,
    timesteps_below,
    training_target,
)
from faceprior.features import FeatureNetwork
from faceprior.lora import LORA_FILE, find_lora, load_lora, save_lora
from faceprior.losses import guidance_loss, noise_loss
from faceprior.pairs import PairDataset, gather_pairs
from faceprior.training import TrainingRun, drop_prompts, make_accelerator, make_optimizer, sample_timesteps, seeded

logger = logging.getLogger(__name__)
TRAIN = ("self_attention", "lora", "full")
OBJECTIVES = ("guidance", "denoising")
# Names of layers that a LoRA is put on, by the kind of network: self-attention, which is joint with the text's in a
# transformer (its image side).
LORA_TARGETS = {
    "unet": {"self_attention": "attn1"},
    "transformer": {"self_attention": "attn"},
}


class GuidanceTuner:
    """A base model, the part of its U-Net that is trained, and the guidance loss.

    pipeline: a Stable Diffusion or SDXL pipeline; train: the U-Net's `self_attention` layers (the paper's choice), a
    `lora` on the same layers, or the `full` U-Net (the paper's ablation); rank, alpha: of the LoRA (alpha: rank by
    default); t_end: timesteps are drawn from the first fraction t_end of the schedule, (0, 1], the paper's is 0.5;
    prompt_drop: fraction of the samples whose prompt is dropped, [0, 1], the paper's is 0.2; distance: between the
    masked predictions, l2 by default; seed: of the LoRA's first weights.

    The original model, which predicts the targets, is the same network with its LoRA off, or with its original weights
    in place of the trained ones. So a second U-Net takes the memory of the trained part only, and none with a LoRA.

    The trained weights are float32. With a base in half precision every call of the U-Net, also by the pipeline, runs
    under autocast and returns float32.

    `loss` is Algorithm 1 on the parts `encode`, `sample_timesteps`, `encode_prompts`, `original` and `predict_x0`;
    stage 4 calls the same parts in its loop. Another objective is a method like it, such as `denoising_loss`.
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
        seed: int = 0,
    ):
        if train not in TRAIN:
            raise ValueError(f"`train` has to be one of {', '.join(TRAIN)} but is {train!r}")
        if not 0 < t_end <= 1:
            raise ValueError(f"`t_end` has to be in (0, 1] but is {t_end}")
        if not 0 <= prompt_drop <= 1:
            raise ValueError(f"`prompt_drop` has to be in [0, 1] but is {prompt_drop}")
        require_base(pipeline, "tune")
        self._pipeline, self.train = pipeline, train
        self.t_end, self.prompt_drop, self.distance = t_end, prompt_drop, distance
        self.noise_scheduler = make_noise_scheduler(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        pipeline.vae.enable_slicing()  # image by image: one of 1024 pixels takes 2.5 GB in the encoder
        if self.denoiser.dtype != torch.float32:
            _run_under_autocast(self.denoiser, self.denoiser.dtype)
        self._original: dict[str, Tensor] = {}
        with seeded(seed, "lora"):
            self._select_trained(rank, rank if alpha is None else alpha)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        dtype: torch.dtype = torch.float32,
        vae: str | None = None,
        prediction_type: str = "auto",
        weights: bool = True,
        **options,
    ):
        """Load `base` (diffusers folder, single `.safetensors` file or hub id); `options` are the constructor's.

        weights: False builds its networks from their configs alone, to plan with.
        """
        return cls(load_pipeline(base, dtype, vae, prediction_type, weights=weights), **options)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained: the pipeline's U-Net or transformer."""
        return denoiser_of(self._pipeline)

    @property
    def resolution(self) -> int | None:
        """The base's native image size in pixels; None if its U-Net's config does not say."""
        size = self.denoiser.config.sample_size
        return size * self._pipeline.vae_scale_factor if isinstance(size, int) else None

    def to(self, device: torch.device | str) -> GuidanceTuner:
        self._pipeline.to(device)
        self._original = {name: tensor.to(device) for name, tensor in self._original.items()}
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the float32 parameters that are trained; every other weight keeps the dtype it was loaded in."""
        return [parameter for _, parameter in self._trained()]

    # ---- parts of Algorithm 1

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the scaled latents z_0 = E(x): (B, 3, H, W) in [-1, 1] -> (B, C, h, w), the posterior's mean."""
        return encode_latents(self._pipeline.vae, pixel_values)

    def encode_pairs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both sides' latents E(x_g) and E(x_b), (B, C, h, w) each, and the mask on their grid, (B, 1, h, w)."""
        good, bad = self.encode(torch.cat([batch["good"], batch["bad"]])).chunk(2)
        return good, bad, downsample_mask(batch["mask"].to(good.device), good.shape[-2:])

    def sample_timesteps(self, generators: list[torch.Generator], t_end: float = 1.0) -> Tensor:
        """Draw one timestep per generator from the first fraction t_end of the schedule -> (B,), int64 or float.

        Algorithm 1 draws from [0, 0.5 T), section 5 writes [1, 0.5 T]: the same for steps that are counted from 0. For
        a flow matching base t_end means the same level of noise (see `timesteps_below`).
        """
        timesteps = timesteps_below(self.noise_scheduler, t_end)
        return timesteps[sample_timesteps(generators, 0, len(timesteps))].to(self.denoiser.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents z_t, by the base's own schedule: (B, C, h, w)."""
        return add_noise(self.noise_scheduler, latents, noise, timesteps)

    def encode_prompts(self, batch: dict[str, Any], generators: list[torch.Generator]) -> PromptEmbeddings:
        """Encode the batch's B prompts, of which the fraction `prompt_drop` is replaced by the empty one."""
        return encode_prompts(self._pipeline, drop_prompts(batch["prompt"], self.prompt_drop, generators))

    def predict_x0(
        self, denoiser: Callable | None, noisy_latents: Tensor, timesteps: Tensor, prompts: PromptEmbeddings
    ) -> Tensor:
        """Predict x_0 from x_t by one pass of `denoiser` (Face Score, Eqs. 4 and 6) -> (B, C, h, w), float32.

        denoiser: the prepared network, or what `original` gives; None: the tuner's own.
        """
        model_pred = predict(self._pipeline, noisy_latents, timesteps, prompts, denoiser)
        return pred_original_sample(self.noise_scheduler, model_pred, timesteps, noisy_latents)

    @contextmanager
    def original(self) -> Iterator[Callable]:
        """Give the network with the original weights, to call without gradients."""
        if self.train == "lora":
            with self._adapters_off():
                yield self.denoiser
        else:
            yield lambda *a, **k: torch.func.functional_call(self.denoiser, self._original, a, k)

    # ---- objectives

    def loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the guidance loss of a batch (Face Score, Eqs. 6 and 7, Algorithm 1), with gradients.

        batch: good, bad (B, 3, H, W) in [-1, 1]; mask (B, 1, H, W) in {0, 1}; prompt, B texts. generator: draws
        timesteps, noise and dropped prompts; a list has one per sample. denoiser: the prepared network (DDP), by
        default the tuner's own.
        """
        generators = _one_per_sample(generator, len(batch["good"]))
        good, bad, mask = self.encode_pairs(batch)
        timesteps = self.sample_timesteps(generators, self.t_end)
        noise = noise_like(good, generators)  # shared by both sides, as the timesteps are
        noisy_good, noisy_bad = (self.add_noise(z, noise, timesteps) for z in (good, bad))
        prompts = self.encode_prompts(batch, generators)
        with torch.no_grad(), self.original() as original:
            target = self.predict_x0(original, noisy_good, timesteps, prompts)
        prediction = self.predict_x0(denoiser, noisy_bad, timesteps, prompts)
        return guidance_loss(target, prediction, mask, self.distance)

    def denoising_loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the usual noise prediction loss on the good images, whole and at all timesteps; arguments as `loss`.

        Plain fine-tuning, a baseline to compare the guidance loss with; not in the paper.
        """
        generators = _one_per_sample(generator, len(batch["good"]))
        latents = self.encode(batch["good"])
        timesteps = self.sample_timesteps(generators)
        noise = noise_like(latents, generators)
        noisy_latents = self.add_noise(latents, noise, timesteps)
        prompts = self.encode_prompts(batch, generators)
        model_pred = predict(self._pipeline, noisy_latents, timesteps, prompts, denoiser)
        return noise_loss(model_pred, training_target(self.noise_scheduler, latents, noise, timesteps))

    # ---- training, sampling and files

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
        resolution: int | None = None,
    ) -> GuidanceTuner:
        """Train on `pairs`: a folder that stage 1 made, several separated by commas, or a dataset.

        resolution: side in pixels of the images of a folder, the base's own by default.
        A dataset has the samples that `loss` takes in batches. With `output`, a folder for the log and checkpoints, the
        training stops and resumes like stage 4.
        """
        if isinstance(pairs, str | Path):
            resolution = resolution or self.resolution
            if resolution is None:
                raise ValueError("the config of the base's U-Net has no `sample_size`: give `resolution`, in pixels")
            usable, problems = gather_pairs(pairs)
            for place, reason in problems:
                logger.warning("%s is skipped: %s", place, reason)
            report_long_prompts(self._pipeline, (pair.prompt for pair in usable))
            pairs = PairDataset(usable, resolution)
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
        accelerator = make_accelerator(device, mixed_precision, accumulation)
        self.to(accelerator.device)
        adam = make_optimizer(self.trainable_parameters(), optimizer, learning_rate)
        unet, adam = accelerator.prepare(self.denoiser, adam)
        run = TrainingRun(output, steps, accelerator, {"unet": unet}, {"unet": adam})
        for batch in run.batches(pairs, batch_size, seed):
            unet.train()
            with accelerator.accumulate(unet):
                loss = self.loss(batch, run.generators(batch), unet)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.trainable_parameters(), 1.0)
                adam.step()
                adam.zero_grad()
            run.log(loss=loss)
        return self

    def pipeline(self) -> DiffusionPipeline:
        """Return the pipeline with the tuned weights, for sampling."""
        self.denoiser.eval()
        return self._pipeline

    @contextmanager
    def untuned(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the original weights, to sample images as before the tuning."""
        if self.train == "lora":
            with self._adapters_off():
                yield self.pipeline()
            return
        tuned = {name: parameter.detach().clone() for name, parameter in self._trained()}
        try:
            self._copy(self._original)
            yield self.pipeline()
        finally:
            self._copy(tuned)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a LoRA file for `load_lora_weights` (see `lora.save_lora`); else a whole pipeline folder."""
        if self.train != "lora":
            self._pipeline.save_pretrained(folder)
            return
        save_lora(self._pipeline, folder)

    def _select_trained(self, rank: int, alpha: int) -> None:
        if self.train == "lora":
            kind = "unet" if hasattr(self._pipeline, "unet") else "transformer"
            block = LORA_TARGETS[kind]["self_attention"]
            targets = [f"{block}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
            config = LoraConfig(r=rank, target_modules=targets, lora_alpha=alpha, init_lora_weights="gaussian")
            self.denoiser.add_adapter(config)
        else:
            self._original = {name: parameter.detach().clone() for name, parameter in self._trained()}
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)
        if not self.trainable_parameters():
            raise ValueError("the base's U-Net has no self-attention layers (attn1) to train")
        cast_training_params(self.denoiser, torch.float32)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        # by name, not by requires_grad: peft turns the flag off while an adapter is disabled
        part = {"self_attention": ".attn1.", "lora": "lora_", "full": ""}[self.train]
        return [(name, parameter) for name, parameter in self.denoiser.named_parameters() if part in name]

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(tensors[name])


def dino_distance(vae: AutoencoderKL, network: FeatureNetwork) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the second distance of Face Score's Eq. 7, between a vision transformer's features of the decoded faces.

    The distance takes masked latents (B, C, h, w), decodes both with the frozen `vae` and returns 1 - cos of the
    network's [CLS] features, averaged over the batch; gradients reach the second of them. The paper names DINO but
    neither the model nor the features: DINO is trained on [CLS], and its features are compared by their cosine.
    """
    network.requires_grad_(False).eval()

    def distance(target: Tensor, prediction: Tensor) -> Tensor:
        network.to(prediction.device)
        with torch.no_grad():
            good = network.features(decode_latents(vae, target).float())
        bad = network.features(decode_latents(vae, prediction).float())
        return (1 - F.cosine_similarity(good, bad, dim=1)).mean()

    return distance


def load_tuned(
    folder: str | Path,
    base: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    prediction_type: str = "auto",
) -> DiffusionPipeline:
    """Load what `save_pretrained` wrote: a pipeline folder, or `base` with the LoRA in `folder`, by whatever file name.

    vae, prediction_type: of `base`, as in `load_pipeline`.
    """
    folder = Path(folder)
    if not (folder / LORA_FILE).is_file() and (folder / "model_index.json").is_file():
        return load_pipeline(str(folder), dtype)
    file = find_lora(folder)
    if file is None:
        raise FileNotFoundError(f"no tuned model in {folder}: `python stages/04_guidance_tune.py` makes one")
    pipeline = load_pipeline(base, dtype, vae, prediction_type)
    load_lora(pipeline, file)
    return pipeline


def _run_under_autocast(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Let a network of mixed dtypes run in `dtype` and return float32, as accelerate's `prepare` does."""
    forward = denoiser.forward

    def forward_under_autocast(*args, **kwargs):
        with torch.autocast(denoiser.device.type, dtype):
            return forward(*args, **kwargs)

    denoiser.forward = convert_outputs_to_fp32(forward_under_autocast)


def _one_per_sample(generator, count: int) -> list[torch.Generator]:
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} generators for {count} samples: give one for each")
        return generator
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return [generator] * count

"""A base model and what the methods need of it, in the order of the data: prompt embeddings, latents, noise, x_0.

Stable Diffusion 1.5 and SDXL architectures go through the same functions; a folder, a single `.safetensors` file and a
hub id load alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from faceprior.images import to_pil
from faceprior.models import first_line, load_part, require_weights, resolve_model

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


# ---- loading


def load_pipeline(base: str | Path, dtype: torch.dtype = torch.float32, vae: str | None = None) -> DiffusionPipeline:
    """Load a text-to-image pipeline from a diffusers folder, a single `.safetensors` file or a hub id.

    A single file holds weights only: its configs are taken from `model_index.json` and its sub-folders beside the file
    if they exist, else from the hub. `vae`: folder or hub id of a VAE that replaces the base's own (Realistic Vision is
    published without one). Models arrive on the CPU, in `dtype`, the VAE in float32 (SDXL's overflows in float16); the
    safety checker is not loaded.

    Raises FileNotFoundError if there is no such model on disk or on the hub, ValueError if its files are damaged or of
    another kind.
    """
    parts = {"vae": load_part(AutoencoderKL, vae, "VAE")} if vae else {}
    path = Path(base).expanduser()
    if path.is_file():
        pipeline = _load_single_file(path, dtype, parts)
    else:
        folder = resolve_model(
            base,
            "base model",
            "`--base` takes a diffusers folder, a .safetensors file, a hub id or `tiny`",
            required=("model_index.json",),
            download=partial(DiffusionPipeline.download, **parts, **_NO_CHECKER),
        )
        pipeline = _load_folder(folder, dtype, parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# It weighs 1.2 GB and blanks images: research scripts load without it.
_NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
# What diffusers and transformers raise for missing, truncated and foreign files.
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)


def _load_folder(path: Path, dtype: torch.dtype, parts: dict) -> DiffusionPipeline:
    try:
        config = DiffusionPipeline.load_config(path)
        if "safety_checker" in config:
            parts = {**parts, **_NO_CHECKER}
        if "vae" not in parts and not config.get("vae", [None])[0]:
            raise ValueError("it has no VAE: name one with `vae`, such as stabilityai/sd-vae-ft-mse for SD1.5")
        _require_folders(path, config, parts)
        # not loaded in `dtype` and cast back: that would round the VAE's weights
        pipeline = DiffusionPipeline.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype}, **parts)
        _require_complete(path, pipeline)
    except _LOADING_ERRORS as error:
        raise ValueError(f"the pipeline in {path} is damaged: {first_line(error)}") from error
    return pipeline


def _require_folders(path: Path, config: dict, parts: dict) -> None:
    named = [key for key, value in config.items() if isinstance(value, list) and value[0] and key[0] != "_"]
    missing = [name for name in named if name not in parts and not (path / name).is_dir()]
    if missing:
        raise ValueError(f"its model_index.json names {', '.join(missing)}, but there is no such folder")


def _require_complete(path: Path, pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for what the libraries accept: models without some weights, tokenizers without words."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            require_weights(name, part)
        if "tokenizer" in name and part is not None and len(part) <= len(part.all_special_ids):
            raise ValueError(f"{path / name} has no vocabulary")


def _load_single_file(path: Path, dtype: torch.dtype, parts: dict) -> DiffusionPipeline:
    # ---- the architecture, by the names of the tensors
    names = _tensor_names(path)
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"{path} has no U-Net (`model.diffusion_model`): a whole checkpoint is needed, not a LoRA or a VAE alone"
        )
    is_xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    pipeline_class = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    parts = {**parts, **({} if is_xl else _NO_CHECKER)}

    # ---- the weights, with the configs beside the file or from the hub
    config = str(path.parent) if (path.parent / "model_index.json").is_file() else None
    try:
        pipeline = pipeline_class.from_single_file(str(path), config=config, dtype=torch.float32, **parts)
        _require_complete(path.parent, pipeline)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{path} has weights only, and the hub did not provide the configs that belong to them: connect once, or "
            "put the file into a diffusers folder of the same architecture, beside its model_index.json"
        ) from error
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"{path} does not fit {config or 'the architecture that its tensors show'}: {first_line(error)}"
        ) from error

    # ---- `dtype` for all but the VAE
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.to(dtype)
    return pipeline


def _tensor_names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} has to be a .safetensors file: a pickle can run code and is not loaded")
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def make_noise_scheduler(pipeline: DiffusionPipeline):
    """Return the training scheduler that belongs to the pipeline's own: DDPM with its betas and prediction type.

    For a flow matching pipeline it is a copy of the pipeline's own.
    """
    scheduler = pipeline.scheduler
    scheduler_class = type(scheduler) if prediction_type(scheduler) == "flow_prediction" else DDPMScheduler
    return scheduler_class.from_config(scheduler.config)


def is_xl(pipeline: DiffusionPipeline) -> bool:
    """Tell whether the pipeline has SDXL's two text encoders."""
    return getattr(pipeline, "text_encoder_2", None) is not None


# ---- prompts


@dataclass
class PromptEmbeddings:
    """A batch of encoded prompts: prompt_embeds (B, L, D), and for SDXL pooled_prompt_embeds (B, P)."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None

    def __getitem__(self, index) -> PromptEmbeddings:
        pooled = self.pooled_prompt_embeds
        return PromptEmbeddings(self.prompt_embeds[index], None if pooled is None else pooled[index])


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeddings:
    """Encode `prompts` with the pipeline's text encoder(s); equal prompts are encoded once."""
    unique = sorted(set(prompts))
    device = pipeline.text_encoder.device
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if is_xl(pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(unique, **options)
    else:
        embeds, pooled = pipeline.encode_prompt(unique, **options)[0], None
    index = torch.tensor([unique.index(prompt) for prompt in prompts], device=embeds.device)
    return PromptEmbeddings(embeds, pooled)[index]


def added_conditions(embeddings: PromptEmbeddings, height: int, width: int) -> dict[str, Tensor] | None:
    """Return SDXL's `added_cond_kwargs` for uncropped images of (height, width) pixels; None for other models."""
    pooled = embeddings.pooled_prompt_embeds
    if pooled is None:
        return None
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=pooled.device, dtype=pooled.dtype)
    return {"text_embeds": pooled, "time_ids": time_ids.repeat(len(pooled), 1)}


# ---- latents


def encode_latents(vae: AutoencoderKL, pixel_values: Tensor, generator=None) -> Tensor:
    """Encode (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w): z = (E(x) - shift) scale.

    `generator` (one, or a list with one per sample) samples E(x) from the posterior; without it the mean is taken.
    """
    posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    if generator is None:
        latents = posterior.mode()
    else:
        latents = posterior.mean + posterior.std * noise_like(posterior.mean, generator)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to (B, 3, H, W), about [-1, 1], with gradients: x = D(z / scale + shift)."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample


def downsample_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a face mask (B, 1, H, W) to the latent grid `size`: a cell counts as face if any of its pixels does."""
    return F.adaptive_max_pool2d(mask.float(), size)


# ---- noise, and what the network predicts


def noise_like(latents: Tensor, generator) -> Tensor:
    """Draw normal noise of the latents' shape (B, C, h, w); with a list of B generators each sample has its own."""
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, len(latents)):
        raise ValueError(f"`generator` has to be one or {len(latents)}, one per sample, but is {len(generators)}")
    shape = (len(latents) // len(generators), *latents.shape[1:])
    noise = [torch.randn(shape, generator=g, device=g.device) for g in generators]
    return torch.cat([n.to(latents.device) for n in noise]).to(latents.dtype)


def prediction_type(noise_scheduler) -> str:
    """Return what the network predicts, one of PREDICTION_TYPES; `flow_prediction` for flow matching schedulers."""
    if "FlowMatch" in type(noise_scheduler).__name__:
        return "flow_prediction"
    kind = noise_scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` has to be one of {', '.join(PREDICTION_TYPES)} but is {kind!r}")
    return kind


def training_target(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network has to predict: the noise, the velocity, the flow e - x_0, or x_0."""
    kind = prediction_type(noise_scheduler)
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents, "flow_prediction": noise - latents}[kind]


# ---- x_0


def pred_original_sample(noise_scheduler, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
    """Predict x_0 from x_t in one step (DDPM, Eq. 15; Face Score, Eq. 4), for every prediction type.

    timesteps: (B,), int64 steps of a discrete scheduler, or the flow scheduler's own; model_output, sample:
    (B, C, H, W). Returns (B, C, H, W) float32. With a for alpha_bar_t and s for the flow scheduler's sigma_t:

        epsilon          x_t = sqrt(a) x_0 + sqrt(1 - a) e      x_0 = (x_t - sqrt(1 - a) e) / sqrt(a)
        v_prediction     v = sqrt(a) e - sqrt(1 - a) x_0        x_0 = sqrt(a) x_t - sqrt(1 - a) v
        flow_prediction  x_t = (1 - s) x_0 + s e, v = e - x_0   x_0 = x_t - s v
        sample                                                  x_0 itself
    """
    sample, model_output = sample.float(), model_output.float()
    kind = prediction_type(noise_scheduler)
    if kind == "sample":
        return model_output
    if kind == "flow_prediction":
        return sample - _flow_sigmas(noise_scheduler, timesteps, sample) * model_output
    alpha_bar = noise_scheduler.alphas_cumprod.to(sample.device, torch.float32)[timesteps].view(-1, 1, 1, 1)
    if kind == "v_prediction":
        return alpha_bar.sqrt() * sample - (1 - alpha_bar).sqrt() * model_output
    return (sample - (1 - alpha_bar).sqrt() * model_output) / alpha_bar.sqrt()


def _flow_sigmas(noise_scheduler, timesteps: Tensor, sample: Tensor) -> Tensor:
    """Return the noise level s of each of the scheduler's timesteps -> (B, 1, 1, 1)."""
    found = noise_scheduler.timesteps.to(sample.device) == timesteps.to(sample.device)[:, None]  # (B, steps)
    if not found.any(dim=1).all():
        raise ValueError("`timesteps` have to be among the scheduler's own (`noise_scheduler.timesteps`)")
    sigmas = noise_scheduler.sigmas.to(sample.device, sample.dtype)
    return sigmas[found.int().argmax(dim=1)].view(-1, 1, 1, 1)


# ---- sampling


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    size: int,
    steps: int = 50,
    guidance_scale: float = 7.5,
) -> list[Image.Image]:
    """Sample one size x size image per prompt, each from the noise of its own seed.

    The latents are decoded here and not by the pipeline, whose networks may run in another dtype than the VAE.
    """
    latents = pipeline(
        prompts,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    return to_pil(decode_latents(pipeline.vae, latents.float()))


SAMPLERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # the linear multistep alone, as Stable Diffusion uses it
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # clipping is meant for pixels and would damage latents
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
}


def make_sampler(name: str, scheduler):
    """Return the scheduler to sample by, with the noise schedule and prediction type of a base's own `scheduler`.

    name: `base` (its own), `pndm` (arXiv 2202.09778; Face Score, section 6.1), `ddim` (2010.02502), `ddpm` (2006.11239;
    AuthFace), `euler` (2206.00364) or `dpm++` (2211.01095). Raises ValueError for another name, and where the sampler
    does not know what the base was trained with.
    """
    if name == "base":
        return scheduler
    if name not in SAMPLERS:
        raise ValueError(f"`sampler` has to be base or one of {', '.join(SAMPLERS)} but is {name!r}")
    class_name, options = SAMPLERS[name]
    own, sampler_class = type(scheduler).__name__, getattr(diffusers, class_name)
    known = inspect.signature(sampler_class.__init__).parameters
    needs_snr = scheduler.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known
    if "FlowMatch" in own or "EDM" in own or needs_snr:
        reason = "zero terminal SNR" if needs_snr else own
        raise ValueError(f"`sampler` is {name}, which cannot sample a base with {reason}: use base")
    return sampler_class.from_config(scheduler.config, **options)


@contextmanager
def sampled_with(name: str, pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """Give the pipeline with another sampler (see `make_sampler`); afterwards it has its own again, which is saved."""
    own = pipeline.scheduler
    pipeline.scheduler = make_sampler(name, own)
    try:
        yield pipeline
    finally:
        pipeline.scheduler = own

"""A base model and what the methods need of it: latents, prompt embeddings, the prediction of x_0.

Stable Diffusion 1.5 and SDXL architectures go through the same functions; a folder, a single `.safetensors` file and a
hub id load alike.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from faceprior.images import to_pil

logger = logging.getLogger(__name__)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def load_pipeline(base: str | Path, dtype: torch.dtype = torch.float32, vae: str | None = None) -> DiffusionPipeline:
    """Load a text-to-image pipeline from a diffusers folder, a single `.safetensors` file or a hub id.

    The local path is looked at first. A single file holds weights only: the configs that go with them are taken from
    `model_index.json` and its sub-folders beside the file, if they are there, else from the hub. `vae`: folder or id of
    a VAE that replaces the base's own (Realistic Vision is published without one). Models arrive on the CPU, in
    `dtype`, the VAE in float32 (SDXL's overflows in float16); the safety checker is left out.

    Raises FileNotFoundError when there is no such model here nor on the hub, ValueError for a file of another kind.
    """
    base, path = str(base), Path(base).expanduser()
    parts = {"vae": load_part(AutoencoderKL, vae, "VAE")} if vae else {}
    if path.is_dir():
        pipeline = _load_folder(path, dtype, parts)
    elif path.is_file():
        pipeline = _load_single_file(path, dtype, parts)
    elif looks_like_path(base):
        raise FileNotFoundError(f"no base model at {base}: it is neither a diffusers folder nor a .safetensors file")
    else:
        pipeline = _load_folder(_download(base, parts), dtype, parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def looks_like_path(name: str) -> bool:
    """Tell a path from a hub id (`owner/name`)."""
    return (
        name.startswith((".", "/", "~", "checkpoints/"))
        or name.count("/") > 1
        or "\\" in name
        or Path(name).suffix in _WEIGHTS
    )


_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def load_part(model_class, name: str, what: str, dtype: torch.dtype = torch.float32, subfolder: str | None = None):
    """Load one model by its class from a folder or a hub id, with an error that says which of the two was missing."""
    root = Path(name).expanduser()
    folder = root / (subfolder or "")
    if (folder / "config.json").is_file():
        try:
            model = model_class.from_pretrained(folder, dtype=dtype)
            _require_weights(what, model)
        except _DAMAGED as error:
            raise ValueError(f"the {what} in {folder} is not whole: {_first_line(error)}") from error
        return model
    if root.exists() or looks_like_path(name):
        raise FileNotFoundError(f"no {what} at {folder}: a folder with config.json and safetensors weights is expected")
    options = {"dtype": dtype, "subfolder": subfolder or ""}
    try:
        return model_class.from_pretrained(name, local_files_only=True, **options)
    except (OSError, ValueError):
        logger.debug("%s is not in the hub's cache", name)
    try:
        # Asks the hub once. Loading by id asks for every file, and without a network tries each for half a minute.
        snapshot_download(name, allow_patterns=[(Path(subfolder or "") / "config.json").as_posix()])
        return model_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(hub_error(what, name)) from error


def hub_error(what: str, name: str) -> str:
    """Return the message for a model that is neither on the disk nor to be had from the hub."""
    return (
        f"no {what} {name!r}: there is no such folder here, and the hub did not give it (offline, gated, or a wrong "
        f"id). Download it where there is a network (`hf download {name} --local-dir FOLDER`) and give the folder"
    )


# What diffusers and transformers raise for missing, torn and foreign files.
_DAMAGED = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load_folder(path: Path, dtype: torch.dtype, parts: dict) -> DiffusionPipeline:
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    try:
        config = DiffusionPipeline.load_config(path)
        if "safety_checker" in config:
            parts = {**parts, **_NO_CHECKER}
        if "vae" not in parts and not config.get("vae", [None])[0]:
            raise ValueError("it has no VAE: name one with `vae`, such as stabilityai/sd-vae-ft-mse for SD1.5")
        _require_folders(path, config, parts)
        # not loaded in `dtype` and cast back: that would round the VAE's weights
        pipeline = DiffusionPipeline.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype}, **parts)
        _require_whole(path, pipeline)
    except _DAMAGED as error:
        raise ValueError(f"the pipeline in {path} is not whole: {_first_line(error)}") from error
    return pipeline


def _require_folders(path: Path, config: dict, parts: dict) -> None:
    named = [key for key, value in config.items() if isinstance(value, list) and value[0] and key[0] != "_"]
    missing = [name for name in named if name not in parts and not (path / name).is_dir()]
    if missing:
        raise ValueError(f"its model_index.json names {', '.join(missing)}, but there is no such folder")


def _require_whole(path: Path, pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for what the libraries let pass: models without some weights, tokenizers without words."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            _require_weights(name, part)
        if "tokenizer" in name and part is not None and len(part) <= len(part.all_special_ids):
            raise ValueError(f"{path / name} has no vocabulary")


def _require_weights(name: str, model: torch.nn.Module) -> None:
    missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"the weights of {name} lack {', '.join(missing[:3])} ({len(missing)} in all)")


# It weighs 1.2 GB and blanks pictures: research scripts load without it.
_NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}


def _download(base: str, parts: dict) -> Path:
    """Return the folder of a pipeline of the hub without `parts`; its cache is used where there is no network."""
    try:
        return Path(DiffusionPipeline.download(base, **parts, **_NO_CHECKER))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(hub_error("base model", base)) from error


def _load_single_file(path: Path, dtype: torch.dtype, parts: dict) -> DiffusionPipeline:
    names = _tensor_names(path)
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"{path} has no U-Net (`model.diffusion_model`): a whole checkpoint is wanted, not a LoRA or a VAE alone"
        )
    is_xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    pipeline_class = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    parts = {**parts, **({} if is_xl else _NO_CHECKER)}
    config = str(path.parent) if (path.parent / "model_index.json").is_file() else None
    try:
        pipeline = pipeline_class.from_single_file(str(path), config=config, dtype=torch.float32, **parts)
        _require_whole(path.parent, pipeline)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{path} has weights only, and the configs that go with them could not be had from the hub: connect once, "
            "or put the file into a diffusers folder of the same architecture, beside its model_index.json"
        ) from error
    except _DAMAGED as error:
        raise ValueError(
            f"{path} does not fit {config or 'the architecture that its names show'}: {_first_line(error)}"
        ) from error
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
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def make_noise_scheduler(pipeline: DiffusionPipeline):
    """Return the training scheduler that belongs to the pipeline's own: DDPM with its betas and prediction type.

    For a flow matching pipeline it is a copy of the pipeline's own.
    """
    scheduler = pipeline.scheduler
    scheduler_class = type(scheduler) if prediction_type(scheduler) == "flow_prediction" else DDPMScheduler
    return scheduler_class.from_config(scheduler.config)


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
    """Encode `prompts` by the pipeline's text encoder(s), each different prompt once."""
    unique = sorted(set(prompts))
    device = pipeline.text_encoder.device
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if is_xl(pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(unique, **options)
    else:
        embeds, pooled = pipeline.encode_prompt(unique, **options)[0], None
    index = torch.tensor([unique.index(prompt) for prompt in prompts], device=embeds.device)
    return PromptEmbeddings(embeds, pooled)[index]


def is_xl(pipeline: DiffusionPipeline) -> bool:
    """Tell whether the pipeline has SDXL's two text encoders."""
    return getattr(pipeline, "text_encoder_2", None) is not None


def added_conditions(embeddings: PromptEmbeddings, height: int, width: int) -> dict[str, Tensor] | None:
    """Return SDXL's `added_cond_kwargs` for uncropped (height, width) pictures; None for other models."""
    pooled = embeddings.pooled_prompt_embeds
    if pooled is None:
        return None
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=pooled.device, dtype=pooled.dtype)
    return {"text_embeds": pooled, "time_ids": time_ids.repeat(len(pooled), 1)}


def encode_latents(vae: AutoencoderKL, pixel_values: Tensor, generator=None) -> Tensor:
    """Encode (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w).

    `generator` (one, or a list with one per sample) draws from the posterior; without it the mean is taken.
    """
    posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    if generator is None:
        latents = posterior.mode()
    else:
        latents = posterior.mean + posterior.std * noise_like(posterior.mean, generator)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1], with gradients."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    size: int,
    steps: int = 50,
    guidance_scale: float = 7.5,
) -> list[Image.Image]:
    """Draw one size x size picture per prompt, each from the noise of its own seed.

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


def noise_like(latents: Tensor, generator) -> Tensor:
    """Draw normal noise of the latents' shape (B, C, h, w); a list of B generators gives every sample its own."""
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, len(latents)):
        raise ValueError(f"`generator` has to be one or {len(latents)}, one per sample, but is {len(generators)}")
    shape = (len(latents) // len(generators), *latents.shape[1:])
    noise = [torch.randn(shape, generator=g, device=g.device) for g in generators]
    return torch.cat([n.to(latents.device) for n in noise]).to(latents.dtype)


def downsample_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a face mask (B, 1, H, W) to the latent grid `size`: a cell counts as face when any of its pixels does."""
    return F.adaptive_max_pool2d(mask.float(), size)


def pred_original_sample(noise_scheduler, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
    """Predict x_0 from x_t (DDPM, Eq. 15; Face Score, Eq. 4), whatever the network was trained to predict.

    timesteps: (B,), int64 steps of a discrete scheduler or the flow scheduler's own; model_output, sample:
    (B, C, H, W). For flow matching x_t = (1 - s) x_0 + s e and the network gives v = e - x_0, so x_0 = x_t - s v.
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


def training_target(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network should predict: the noise, the velocity, the flow, or x_0."""
    kind = prediction_type(noise_scheduler)
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents, "flow_prediction": noise - latents}[kind]


def prediction_type(noise_scheduler) -> str:
    """Return the scheduler's prediction type, `flow_prediction` for the flow matching schedulers."""
    if "FlowMatch" in type(noise_scheduler).__name__:
        return "flow_prediction"
    kind = noise_scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` has to be one of {', '.join(PREDICTION_TYPES)} but is {kind!r}")
    return kind


def _flow_sigmas(noise_scheduler, timesteps: Tensor, sample: Tensor) -> Tensor:
    """Return the noise share s of each of the scheduler's timesteps -> (B, 1, 1, 1)."""
    found = noise_scheduler.timesteps.to(sample.device) == timesteps.to(sample.device)[:, None]
    if not found.any(dim=1).all():
        raise ValueError("`timesteps` have to be among the scheduler's own (`noise_scheduler.timesteps`)")
    sigmas = noise_scheduler.sigmas.to(sample.device, sample.dtype)
    return sigmas[found.int().argmax(dim=1)].view(-1, 1, 1, 1)

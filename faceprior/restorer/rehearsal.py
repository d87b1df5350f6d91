"""The memory that restoring takes of a graphics card, planned without loading a weight (see `faceprior.plan`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline

from faceprior.bases import load_pipeline
from faceprior.diffusion import decode_latents
from faceprior.memory import SAMPLES, Rehearsal
from faceprior.models import looks_like_path, quantize
from faceprior.plan import show_plan
from faceprior.restorer.restorer import PARTS, AuthFaceRestorer
from faceprior.restorer.sampling import make_generator
from faceprior.restorer.settings import SETTINGS_FILE, RestorerSettings, read_settings

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"  # of which AuthFace's prior is a tuned copy
OFFLOADS = ("none", "model", "sequential")
ENCODING, DECODING = "encoding", "decoding"


@dataclass
class RestoringConfig:
    checkpoint: str = "Ethanliang99/AuthFace"  # restorer's folder; any other name is planned at the size of SDXL
    recipe: str = ""  # recipe of the sampling; empty: the checkpoint's own settings
    batch_size: int = 4  # faces per pass through the networks, [1, inf)
    dtype: str = "float32"  # data type of the weights, but for the VAE's: float32, float16 or bfloat16
    quantization: str = "none"  # quantization of all networks but the VAE: none, 8bit or nf4
    offload: str = (
        "none"  # what of the networks is on the card: none (all), model (one at a time), sequential (a layer)
    )
    vae_tiling: bool = False  # the VAE works image by image
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N

    def __post_init__(self):
        if self.offload not in OFFLOADS:
            raise ValueError(f"`offload` has to be one of {', '.join(OFFLOADS)} but is {self.offload!r}")


def print_restoring_plan(options: argparse.Namespace) -> int:
    """Print the memory of `faceprior restore` with its options, for `--plan [SIZE]`; see `plan.show_plan`.

    options: those of RestoringConfig, and plan, the size of a card, or empty.
    """
    names = RestoringConfig.__dataclass_fields__
    values = {name: value for name, value in vars(options).items() if name in names and value is not None}
    config = RestoringConfig(**values)
    return show_plan(
        rehearse, config, options.plan or "", f"restore: {config.batch_size} face{'s' * (config.batch_size > 1)},", "-"
    )


def rehearse(config: RestoringConfig, rehearsal: Rehearsal) -> None:
    """Restore a batch of faces without data, by the functions that restore: phases ENCODING, SAMPLES and DECODING."""
    folder = Path(config.checkpoint).expanduser()
    stored = folder / SETTINGS_FILE
    # in the interval of guidance: a step without it takes half the memory
    settings = (read_settings(stored) if stored.is_file() else RestorerSettings()).override(config.recipe or None)
    settings = settings.override(guidance_low=0.0, guidance_high=1.0, num_inference_steps=1)
    side, dtype = settings.resolution, getattr(torch, config.dtype)
    with rehearsal, torch.no_grad():
        # ---- the networks
        restorer = empty_restorer(config.checkpoint, dtype, config.quantization)
        pipeline, sampler = restorer.pipeline, restorer.sampler
        if config.vae_tiling:
            restorer.enable_vae_tiling()
        rehearsal.name_pipeline(pipeline)
        texts, denoisers = [pipeline.text_encoder, pipeline.text_encoder_2], [pipeline.unet, pipeline.controlnet]
        networks = [*texts, *denoisers, pipeline.vae]

        # ---- which of them are on the card: accelerate keeps ControlNet and VAE there until the end
        encoding, sampling, decoding = texts, [*denoisers], [pipeline.controlnet, pipeline.vae]
        if settings.start == "degraded":
            sampling.append(pipeline.vae)
        if config.offload == "none":
            encoding, sampling, decoding = networks, [*denoisers, pipeline.vae], [*denoisers, pipeline.vae]

        # ---- prompts: the text encoders leave the card behind them
        with _placed(rehearsal, config.offload, networks, encoding), rehearsal.phase(ENCODING):
            for prompt in {settings.prompt, settings.negative_prompt}:
                sampler.encode(prompt)

        # ---- x_T -> x_0, and its pixels
        condition = torch.zeros(config.batch_size, 3, side, side)
        generator = make_generator(settings, config.batch_size)
        with _placed(rehearsal, config.offload, networks, sampling), rehearsal.phase(SAMPLES):
            latents = sampler(condition, settings, generator, "latent")
        with _placed(rehearsal, config.offload, networks, decoding), rehearsal.phase(DECODING):
            decode_latents(pipeline.vae, latents)


@contextmanager
def _placed(rehearsal: Rehearsal, offload: str, networks: list, here: list) -> Iterator[None]:
    """Count the networks that are on the card."""
    if offload == "sequential":
        away = rehearsal.away_by_layer(*networks)
    else:
        away = rehearsal.away(*(network for network in networks if all(network is not one for one in here)))
    with away:
        yield


def empty_restorer(checkpoint: str, dtype: torch.dtype, quantization: str) -> AuthFaceRestorer:
    """Build a restorer from the configs in its folder; of any other name, on SDXL as it is published."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        parts = {}
        for name, part in PARTS.items():
            if issubclass(part, torch.nn.Module):
                config = json.loads((folder / name / "config.json").read_text())
                build = part.from_config if hasattr(part, "from_config") else _from_transformers_config(part)
                parts[name] = build(config).eval()
            else:
                parts[name] = part.from_pretrained(folder / name)
        controlnet = parts.pop("controlnet").to(dtype)
        prior = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    elif looks_like_path(checkpoint):
        raise FileNotFoundError(f"no restorer at {checkpoint}: the path does not exist")
    else:
        prior = load_pipeline(SDXL, dtype, weights=False)
        controlnet = ControlNetModel.from_unet(prior.unet).to(dtype)
    restorer = AuthFaceRestorer.from_prior(prior, controlnet)
    for name, part in restorer.pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            quantize(part.to(dtype), quantization)
    return restorer


def _from_transformers_config(part: type):
    return lambda config: part(part.config_class(**config))

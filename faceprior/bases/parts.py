"""The parts of a base without their weights, and what they say of its kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError

from faceprior.models import first_line, require_weights

SD1, SD2, SDXL, REFINER = "Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "SDXL refiner"
SD3, FLUX = "Stable Diffusion 3", "FLUX"  # transformers with flow matching; 3 is 3 and 3.5
# It weighs 1.2 GB and blanks images: research scripts load without it.
NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
# What diffusers and transformers raise for missing, truncated and foreign files.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
TEXT_TO_IMAGE = {
    SD1: StableDiffusionPipeline,
    SD2: StableDiffusionPipeline,
    SDXL: StableDiffusionXLPipeline,
    REFINER: StableDiffusionXLPipeline,
    SD3: StableDiffusion3Pipeline,
    FLUX: FluxPipeline,
}
VAE_HINT = "name one with `--vae`, such as stabilityai/sd-vae-ft-mse for Stable Diffusion 1.5"


class Part(NamedTuple):
    """A part of a pipeline without its weights: the name of its class, and its config."""

    class_name: str
    config: dict[str, Any]


def architecture_of(parts: dict[str, Part]) -> str:
    network = parts.get("unet") or parts.get("transformer") or Part("pipeline without U-Net", {})
    if network.class_name != "UNet2DConditionModel":
        known = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}
        return known.get(network.class_name, network.class_name)
    if "text_encoder_2" in parts:
        return SDXL if "text_encoder" in parts else REFINER
    return SD2 if network.config.get("cross_attention_dim") == 1024 else SD1


def class_problem(class_name: str, architecture: str) -> str | None:
    """Return why a pipeline of this class is no base of the architecture that its parts have; None if it is one.

    Its parts are loaded as text-to-image whatever its class is, so only classes are taken whose parts are those of
    text-to-image: that itself, image-to-image, inpainting, ControlNet, T2I adapters, PAG and LCM. Others share parts
    but not their meaning: FLUX.1 Kontext and PixArt, to which a U-Net of Stable Diffusion would be foreign.
    """
    known = _CLASSES.get(architecture)
    if not class_name or known is None or re.fullmatch(known, class_name):
        return None
    right = TEXT_TO_IMAGE[architecture].__name__
    return (
        f"its pipeline is {class_name}, which is not known as one of {architecture}, the type of its parts: give a "
        f"text-to-image base, or name {right} in its model_index.json if it is one"
    )


_TASK = "(PAG)?(Img2Img|Inpaint|Inpainting)?Pipeline"
_CLASSES = {
    SD1: rf"StableDiffusion(ControlNet|ControlNetXS|Adapter)?{_TASK}|LatentConsistencyModel(Img2Img)?Pipeline",
    SDXL: rf"StableDiffusionXL(ControlNet|ControlNetUnion|ControlNetXS|Adapter)?{_TASK}",
    SD3: rf"StableDiffusion3(ControlNet)?{_TASK}",
    FLUX: rf"Flux(ControlNet)?{_TASK}",
}
_CLASSES |= {SD2: _CLASSES[SD1], REFINER: _CLASSES[SDXL]}


def noise_of(scheduler: Part) -> str:
    if "FlowMatch" in scheduler.class_name or scheduler.config.get("prediction_type") == "flow_prediction":
        return "flow"
    if not BETAS & scheduler.config.keys():
        return scheduler.class_name
    return "zero_snr" if scheduler.config.get("rescale_betas_zero_snr") else "ddpm"


# One of these is in the config of every scheduler of DDPM's noise, and in none of EDM's.
BETAS = {"beta_schedule", "beta_start", "trained_betas"}


def parts_of_pipeline(pipeline: DiffusionPipeline) -> dict[str, Part]:
    found = {name: part for name, part in pipeline.components.items() if hasattr(part, "config")}
    configs = {n: p.config.to_dict() if hasattr(p.config, "to_dict") else dict(p.config) for n, p in found.items()}
    return {name: Part(type(part).__name__, configs[name]) for name, part in found.items()}


def parts_of_folder(folder: Path, replaced: tuple[str, ...] = ()) -> dict[str, Part]:
    """Return the parts that a folder's model_index.json names, without those that are replaced."""
    try:
        index = read_json(folder / "model_index.json")
        named = {n: value for n, value in index.items() if isinstance(value, list) and value[0] and n[0] != "_"}
        named = {n: value for n, value in named.items() if n not in ("safety_checker", *replaced)}
        if missing := [name for name in named if not (folder / name).is_dir()]:
            raise ValueError(f"its model_index.json names {', '.join(missing)}, but there is no such folder")
        parts = {}
        for name, (_, class_name) in named.items():
            file = next((f for f in ("config.json", "scheduler_config.json") if (folder / name / f).is_file()), None)
            parts[name] = Part(class_name, read_json(folder / name / file) if file else {})
    except ValueError as error:
        raise ValueError(f"the pipeline in {folder} is damaged: {first_line(error)}") from error
    return parts


def left_out(folder: Path, described: dict[str, Part]) -> dict[str, Any]:
    """Return what `from_pretrained` is told to load a folder without: the safety checker, a T5 that is not there."""
    without_checker = NO_CHECKER if "safety_checker" in read_json(folder / "model_index.json") else {}
    # T5, which takes 9 GB, may be left out of Stable Diffusion 3
    has_t5 = architecture_of(described) != SD3 or "text_encoder_3" in described
    return {**without_checker, **({} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None})}


def pipeline_class_of_folder(folder: Path) -> str:
    """Return the name of the class in a folder's model_index.json; a class of its own code is listed with its file."""
    name = read_json(folder / "model_index.json").get("_class_name", "")
    return name if isinstance(name, str) else ".".join(map(str, name))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a valid JSON file") from error


def require_complete(path: Path, pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for what the libraries accept: models without some weights, tokenizers without words."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            require_weights(name, part)
        if "tokenizer" in name and part is not None and len(part) <= len(part.all_special_ids) + 1:  # T5: and a space
            raise ValueError(f"{path / name} has no vocabulary")

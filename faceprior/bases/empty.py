"""Bases without their weights: networks that are built from configs alone, to plan with (see `faceprior.memory`)."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTokenizer

from faceprior.bases.folder import find_folder, load_folder
from faceprior.bases.parts import SD1, SD2, SDXL, architecture_of, parts_of_folder, read_json
from faceprior.bases.single_file import parts_of_file
from faceprior.models import resolve_model

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).with_name("configs")  # of full-size models, which come with the package
_FOLDERS = {SD1: "sd15", SD2: "sd21", SDXL: "sdxl"}
# What the presets name, for planning where the hub is not reached: id -> the architecture.
KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
    "SG161222/Realistic_Vision_V5.1_noVAE": SD1,
    "stabilityai/sd-vae-ft-mse": SD1,
    "stabilityai/stable-diffusion-2-1": SD2,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/sdxl-vae": SDXL,
}


def load_empty(base: str | Path, dtype: torch.dtype, vae: str | None = None) -> DiffusionPipeline:
    """Build a base's pipeline by its configs; arguments and errors as those of `load_pipeline`.

    Configs and tokenizers of a hub id are downloaded, its weights are not. Where the hub is not reached, the configs of
    the architectures in KNOWN come with the package, as those of a single file do.
    """
    folder = _find_configs(base, vae)
    described = parts_of_folder(folder, replaced=("vae",) if vae else ())
    parts: dict[str, Any] = {"vae": empty_vae(vae)} if vae else {}
    for name, part in described.items():
        if name == "vae":
            parts[name] = AutoencoderKL.from_config(part.config)
        elif hasattr(diffusers, part.class_name) and "scheduler" not in name:
            parts[name] = getattr(diffusers, part.class_name).from_config(part.config).to(dtype)
        elif "encoder" in name:
            model_class = getattr(transformers, part.class_name)
            parts[name] = model_class(model_class.config_class(**part.config)).to(dtype)
            parts[name].tie_weights()
        elif folder.parent == CONFIGS and name.startswith("tokenizer"):
            parts[name] = _any_tokenizer()
    for module in parts.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    return load_folder(folder, dtype, parts)


def empty_vae(name: str) -> AutoencoderKL:
    """Build a VAE by its config alone; name: folder (of a pipeline, too), or hub id, as for `load_empty`."""
    return AutoencoderKL.from_config(read_json(_find_vae(name) / "config.json")).eval()


@cache
def _find_configs(base: str | Path, vae: str | None) -> Path:
    """Return the folder of a base's configs; it may lack weights. The hub is asked once."""
    path = Path(base).expanduser()
    if path.is_file():
        if (path.parent / "model_index.json").is_file():
            return path.parent
        architecture = architecture_of(parts_of_file(path))
        if architecture not in _FOLDERS:
            raise ValueError(f"{path} is of {architecture} type, whose configs do not come with the package")
        return CONFIGS / _FOLDERS[architecture]
    try:
        return find_folder(base, vae, weights=False)
    except FileNotFoundError:
        return _known_configs(str(base))


@cache
def _find_vae(name: str) -> Path:
    hint, subfolder = "`--vae` takes a folder of a VAE or a hub id", "vae" if Path(name, "vae").is_dir() else None
    try:
        return resolve_model(name, "VAE", hint, subfolder=subfolder, patterns=("*.json",))
    except FileNotFoundError:
        return _known_configs(name) / "vae"


def _known_configs(name: str) -> Path:
    if name not in KNOWN:
        raise FileNotFoundError(
            f"{name!r} is not on this machine, and the hub was not reached for its configs: connect once, or plan with "
            f"a base of the same architecture ({', '.join(KNOWN)})"
        )
    logger.info("%s: planned with the configs of %s, as the hub was not reached", name, KNOWN[name])
    return CONFIGS / _FOLDERS[KNOWN[name]]


def _any_tokenizer() -> CLIPTokenizer:
    """Build a tokenizer that knows no words: all prompts have CLIP's 77 tokens, and which they are does not matter."""
    special = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    return CLIPTokenizer(vocab={**special, "a</w>": 2}, merges=[], model_max_length=77)

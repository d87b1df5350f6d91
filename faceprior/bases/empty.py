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
from transformers import PreTrainedTokenizerBase, T5Tokenizer

from faceprior.bases.folder import find_folder
from faceprior.bases.parts import (
    LOADING_ERRORS,
    TEXT_TO_IMAGE,
    VAE_HINT,
    Part,
    architecture_of,
    class_problem,
    left_out,
    parts_of_folder,
    pipeline_class_of_folder,
    read_json,
)
from faceprior.bases.single_file import CONFIGS, configs_of_file, make_tokenizer, parts_of_file
from faceprior.models import first_line, looks_like_path, resolve_model

logger = logging.getLogger(__name__)
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
# What the presets name, for planning where the hub is not reached: id -> a folder of CONFIGS, and what the config of
# the base's own network has in place of what is there.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15", {}),
    "SG161222/Realistic_Vision_V5.1_noVAE": ("sd15", {}),
    "stabilityai/sd-vae-ft-mse": ("sd15", {}),
    "stabilityai/stable-diffusion-2-1": ("sd21", {}),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", {}),
    "stabilityai/sdxl-vae": ("sdxl", {}),
    "stabilityai/stable-diffusion-3.5-medium": ("sd35", {}),
    "stabilityai/stable-diffusion-3.5-large": (
        "sd35",
        {**_LARGE, "dual_attention_layers": [], "pos_embed_max_size": 192},
    ),
    "black-forest-labs/FLUX.1-dev": ("flux", {}),
    "black-forest-labs/FLUX.1-schnell": ("flux", {"guidance_embeds": False}),
}


def load_empty(
    base: str | Path, dtype: torch.dtype, vae: str | None = None, prediction_type: str = "auto"
) -> DiffusionPipeline:
    """Build a base's pipeline by its configs; arguments and errors as those of `load_pipeline`.

    Configs and tokenizers of a hub id are downloaded, its weights are not. Where the hub is not reached, the configs of
    the bases in KNOWN come with the package, as those of a single file do, whose shapes count.
    """
    folder, described = _describe(base, vae, prediction_type)
    architecture = architecture_of(described)
    if not vae and "vae" not in described:
        raise ValueError(f"{base} has no VAE: {VAE_HINT}")
    if problem := class_problem(pipeline_class_of_folder(folder), architecture):
        raise ValueError(f"{base} cannot be loaded: {problem}")

    # ---- the networks, and the tokenizers that are not in a folder of their own
    parts: dict[str, Any] = {"vae": empty_vae(vae)} if vae else {}
    for name, (class_name, config) in described.items():
        if name in parts:
            continue
        if name == "vae":
            parts[name] = AutoencoderKL.from_config(config)
        elif name in ("unet", "transformer"):
            parts[name] = getattr(diffusers, class_name).from_config(config).to(dtype)
        elif name.startswith("text_encoder"):
            model_class = getattr(transformers, class_name)
            parts[name] = model_class(model_class.config_class(**config)).to(dtype)
            parts[name].tie_weights()
        elif folder.parent == CONFIGS and name.startswith("tokenizer"):
            parts[name] = _any_t5_tokenizer() if class_name.startswith("T5") else make_tokenizer(folder / name)
    for module in parts.values():
        if isinstance(module, torch.nn.Module):
            module.eval()

    # ---- the pipeline, with the scheduler and the other tokenizers from their files
    parts |= left_out(folder, described)
    try:
        return TEXT_TO_IMAGE.get(architecture, DiffusionPipeline).from_pretrained(folder, **parts)
    except LOADING_ERRORS as error:
        raise ValueError(f"the pipeline in {folder} is damaged: {first_line(error)}") from error


def empty_vae(name: str) -> AutoencoderKL:
    """Build a VAE by its config alone; name: folder (of a pipeline, too), or hub id, as for `load_empty`."""
    return AutoencoderKL.from_config(read_json(_find_vae(name) / "config.json")).eval()


@cache
def _describe(base: str | Path, vae: str | None, prediction_type: str) -> tuple[Path, dict[str, Part]]:
    """Return the folder of a base's configs, which may lack weights, and its parts. The hub is asked once."""
    path, replaced = Path(base).expanduser(), ("vae",) if vae else ()
    if path.is_file():
        return configs_of_file(path), parts_of_file(path, prediction_type)
    try:
        folder = find_folder(base, vae, weights=False)
        return folder, parts_of_folder(folder, replaced)
    except FileNotFoundError:
        if looks_like_path(base) or path.exists():
            raise  # what is a path is not on the hub
        folder, changes = _known(str(base))
    parts = parts_of_folder(folder, replaced)
    network = "transformer" if "transformer" in parts else "unet"
    parts[network] = Part(parts[network].class_name, {**parts[network].config, **changes})
    return folder, parts


@cache
def _find_vae(name: str) -> Path:
    hint, subfolder = "`--vae` takes a folder of a VAE or a hub id", "vae" if Path(name, "vae").is_dir() else None
    try:
        return resolve_model(name, "VAE", hint, subfolder=subfolder, patterns=("*.json",))
    except FileNotFoundError:
        if looks_like_path(name) or Path(name).expanduser().exists():
            raise
        return _known(name)[0] / "vae"


def _known(name: str) -> tuple[Path, dict[str, Any]]:
    if name not in KNOWN:
        raise FileNotFoundError(
            f"{name!r} is not on this machine, and the hub was not reached for its configs: connect once, or plan with "
            f"a base of the same architecture ({', '.join(KNOWN)})"
        )
    folder, changes = KNOWN[name]
    logger.info("%s: planned with the configs that come with faceprior, as the hub was not reached", name)
    return CONFIGS / folder, changes


def _any_t5_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer that knows no words: all prompts are as long for T5, and which they are does not matter."""
    pieces = ("<pad>", "</s>", "<unk>", "▁")
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=512)

"""Bases in diffusers folders, on disk or from the hub."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from faceprior.bases.parts import (
    LOADING_ERRORS,
    NO_CHECKER,
    TEXT_TO_IMAGE,
    VAE_HINT,
    architecture_of,
    class_problem,
    left_out,
    parts_of_folder,
    pipeline_class_of_folder,
    require_complete,
)
from faceprior.models import first_line, load_part, resolve_model, weights_variant


def find_folder(base: str | Path, vae: str | None = None, weights: bool = True) -> Path:
    """Return the folder of a base by its name; a hub id is downloaded, `weights` False: without them."""
    return resolve_model(
        base,
        "base model",
        "`--base` takes a diffusers folder, a .safetensors file, a hub id or `tiny`",
        required=("model_index.json",),
        download=partial(_download, without_vae=bool(vae)) if weights else _download_configs,
    )


def _download(name: str, without_vae: bool, **options) -> str:
    """Download a pipeline, in half precision if there is nothing else."""
    options |= {**NO_CHECKER, **({"vae": None} if without_vae else {})}
    folder = DiffusionPipeline.download(name, **options)
    parts = [config.parent for config in Path(folder).glob("*/config.json")]
    if any(weights_variant(part) is None and not (without_vae and part.name == "vae") for part in parts):
        folder = DiffusionPipeline.download(name, variant="fp16", **options)
    return folder


def _download_configs(name: str, **options) -> str:
    return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"], **options)


def load_folder(path: Path, dtype: torch.dtype, parts: dict) -> DiffusionPipeline:
    described = parts_of_folder(path, replaced=tuple(parts))
    architecture = architecture_of(described)
    pipeline_class = TEXT_TO_IMAGE.get(architecture, DiffusionPipeline)
    if problem := class_problem(pipeline_class_of_folder(path), architecture):
        raise ValueError(f"the pipeline in {path} cannot be loaded: {problem}")
    try:
        if "vae" not in parts and "vae" not in described:
            raise ValueError(f"it has no VAE: {VAE_HINT}")
        config, parts = DiffusionPipeline.load_config(path), {**parts, **left_out(path, described)}

        # ---- parts that are there in a variant only
        for name, part in described.items():
            if weights_variant(path / name):
                part_class = getattr(importlib.import_module(config[name][0]), part.class_name)
                parts[name] = load_part(part_class, path / name, name, torch.float32 if name == "vae" else dtype)

        # ---- the others; not loaded in `dtype` and cast back: that would round the VAE's weights
        pipeline = pipeline_class.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype}, **parts)
        require_complete(path, pipeline)
    except LOADING_ERRORS as error:
        raise ValueError(f"the pipeline in {path} is damaged: {first_line(error)}") from error
    return pipeline

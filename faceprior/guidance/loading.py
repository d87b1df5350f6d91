"""A tuned model from its files: a pipeline folder, or its base with a LoRA or another U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from faceprior.bases import load_pipeline
from faceprior.diffusion import denoiser_of
from faceprior.lora import LORA_FILE, find_lora, load_lora
from faceprior.models import differing_tensors, load_part, looks_like_path

UNET_PLACES = ("unet", None)  # sub-folders where a published U-Net lies


def load_tuned(
    folder: str | Path,
    base: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    prediction_type: str = "auto",
) -> DiffusionPipeline:
    """Load what `save_pretrained` wrote: a pipeline folder, or `base` with the LoRA in `folder`, by whatever file name.

    folder: or `base` with another U-Net, from a folder or a hub id with that U-Net alone, in unet/ or at its top, such
    as `mhdang/dpo-sd1.5-text2image-v1` (Diffusion-DPO's, the row of Face Score's Table 5); vae, prediction_type: of
    `base`, as in `load_pipeline`.
    """
    path = Path(folder).expanduser()
    if path.exists() or looks_like_path(folder):
        if not (path / LORA_FILE).is_file() and (path / "model_index.json").is_file():
            return load_pipeline(str(path), dtype)
        file = find_lora(path)
        unets = [place for place in UNET_PLACES if (path / (place or "") / "config.json").is_file()]
        if file is None and not unets:
            raise FileNotFoundError(f"no tuned model in {path}: `python stages/04_guidance_tune.py` makes one")
    else:
        file, unets = None, UNET_PLACES
    pipeline = load_pipeline(base, dtype, vae, prediction_type)
    if file is not None:
        load_lora(pipeline, file)
    else:
        _replace_unet(pipeline, folder, unets, dtype)
    return pipeline


def _replace_unet(pipeline: DiffusionPipeline, name: str | Path, places: Sequence[str | None], dtype) -> None:
    """Replace a pipeline's U-Net by that of a folder or hub id; ValueError unless it has the same tensors."""
    for place in places:
        try:
            unet = load_part(UNet2DConditionModel, name, "U-Net", dtype, subfolder=place)
            break
        except FileNotFoundError:
            if place == places[-1]:
                raise
    own, new = (dict(network.named_parameters()) for network in (denoiser_of(pipeline), unet))
    if differing := differing_tensors(own, new):
        raise ValueError(
            f"the U-Net {name} does not fit the base: {len(differing)} tensors differ in name or shape, such as "
            f"{differing[0]}. Give the base that it was trained from"
        )
    pipeline.register_modules(unet=unet)

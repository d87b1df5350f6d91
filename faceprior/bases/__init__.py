"""Base models: what one is, by its configs alone; whether a method can use it; how it is loaded.

A folder, a single `.safetensors` file and a hub id go through the same functions: `describe_base` and `require_base`,
which read no weights, so that a base that a method cannot use is refused before any work, and `load_pipeline`.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from faceprior.bases.describe import BaseInfo, describe_base, require_base
from faceprior.bases.empty import empty_vae, load_empty
from faceprior.bases.export import require_single_file, save_single_file
from faceprior.bases.folder import find_folder, load_folder
from faceprior.bases.parts import BETAS
from faceprior.bases.single_file import load_single_file, set_schedule
from faceprior.models import load_part, quantize, require_quantization

__all__ = [
    "BaseInfo",
    "describe_base",
    "empty_vae",
    "load_pipeline",
    "require_base",
    "require_single_file",
    "save_single_file",
]


def load_pipeline(
    base: str | Path,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    prediction_type: str = "auto",
    quantization: str = "none",
    weights: bool = True,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline from a diffusers folder, a single `.safetensors` file or a hub id.

    A single file holds weights only: its configs are taken from `model_index.json` and its sub-folders beside the file
    if they exist, whose weights then stand in for parts that the file lacks; else they are the package's own, of Stable
    Diffusion 1.5, 2.1 or SDXL by the U-Net's shapes, so that no hub is asked. Of a file with averaged weights
    (`model_ema`) the plain ones are taken. `vae`: folder or hub id of a VAE that replaces the base's own (Realistic
    Vision is published without one). prediction_type: `epsilon` or `v_prediction` where the files do not say which, or
    wrongly; `auto` takes what they say. quantization: `none`, `8bit` or `nf4`, of the network and the text encoders,
    which can neither be trained nor saved then; never of the VAE (see `models.quantize`). weights: False builds the
    networks from their configs alone, to plan with. Whatever class a folder names, a text-to-image pipeline is loaded.
    Models arrive on the CPU, in `dtype`, the VAE in float32 (SDXL's overflows in float16); the safety checker is not
    loaded.

    Raises FileNotFoundError if there is no such model on disk or on the hub, ValueError if its files are damaged or of
    another kind.
    """
    if prediction_type not in ("auto", "epsilon", "v_prediction"):
        raise ValueError(f"`prediction_type` has to be auto, epsilon or v_prediction but is {prediction_type!r}")
    require_quantization(quantization)
    parts = {"vae": load_part(AutoencoderKL, vae, "VAE")} if vae and weights else {}
    path = Path(base).expanduser()
    if not weights:
        pipeline = load_empty(base, dtype, vae, prediction_type)
    elif path.is_file():
        pipeline = load_single_file(path, dtype, parts, prediction_type)
    else:
        pipeline = load_folder(find_folder(base, vae), dtype, parts)
    pipeline.vae.decode = MethodType(_decode_in_own_dtype, pipeline.vae)
    if prediction_type != "auto" and BETAS & pipeline.scheduler.config.keys():
        set_schedule(pipeline, {"prediction_type": prediction_type})
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            quantize(part, quantization)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _decode_in_own_dtype(vae: AutoencoderKL, latents: torch.Tensor, *args, **options):
    """Decode as the class does: pipelines in half precision hand latents to the VAE that are not in its float32."""
    return type(vae).decode(vae, latents.to(vae.dtype), *args, **options)

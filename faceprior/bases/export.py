"""Single `.safetensors` files in the original layout, as the web UIs load them: written from a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from faceprior.bases.parts import SD1, SDXL, architecture_of, parts_of_pipeline
from faceprior.original_layout import open_clip_tensors, unet_layer, vae_layer


def require_single_file(architecture: str) -> None:
    """Raise ValueError for a base that `save_single_file` does not write; architecture: as in `BaseInfo`."""
    if architecture not in (SD1, SDXL):
        raise ValueError(
            f"a single file is written of {SD1} and {SDXL} but the base is {architecture}: save the pipeline's folder"
        )


def save_single_file(pipeline: DiffusionPipeline, file: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write U-Net, VAE and text encoders to one `.safetensors` file in the original layout, whole or not at all.

    Besides the tensors the file says what the U-Net predicts, as the field does: a tensor `v_pred` for v-prediction,
    `ztsnr` for zero terminal SNR, and `modelspec` metadata. dtype: of all tensors.

    Raises ValueError for a pipeline other than Stable Diffusion 1 and SDXL, for a U-Net with a LoRA, and for weights
    that `dtype` does not hold, as above 65504 in float16.
    """
    architecture = architecture_of(parts_of_pipeline(pipeline))
    require_single_file(architecture)
    if getattr(pipeline.unet, "peft_config", None):
        raise ValueError("a single file holds no LoRA: save the LoRA's own file, which is loaded beside its base")
    settings = pipeline.scheduler.config
    is_velocity = settings.get("prediction_type") == "v_prediction"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": {SD1: "stable-diffusion-v1", SDXL: "stable-diffusion-xl-v1-base"}[architecture],
        "modelspec.prediction_type": "v" if is_velocity else "epsilon",
    }
    # one tensor after the other leaves the device, which has no room for a second U-Net
    named = original_tensors(pipeline, is_xl=architecture == SDXL)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in named.items()}
    if spoilt := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{file} cannot be written in {kind}, in which weights are not finite: {', '.join(spoilt[:3])} "
            f"({len(spoilt)} in all). Write it in float32 (`--single_file fp32`)"
        )
    tensors |= {"v_pred": torch.zeros(0)} if is_velocity else {}
    tensors |= {"ztsnr": torch.zeros(0)} if settings.get("rescale_betas_zero_snr") else {}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")  # always the same, so that what a kill leaves of it is replaced
    save_file(tensors, temporary, metadata)
    temporary.replace(file)


def original_tensors(pipeline: DiffusionPipeline, is_xl: bool) -> dict[str, Tensor]:
    """Return the tensors of a pipeline by their names in the original layout."""
    unet, vae = pipeline.unet, pipeline.vae

    # ---- the U-Net and the VAE, whose attention has 1 x 1 convolutions there
    tensors = {f"model.diffusion_model.{_named(unet_layer, n, unet.config)}": t for n, t in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        is_kernel = "attentions" in name and tensor.ndim == 2
        original = f"first_stage_model.{_named(vae_layer, name, vae.config)}"
        tensors[original] = tensor[:, :, None, None] if is_kernel else tensor

    # ---- the text encoders: CLIP with its own names, and SDXL's second one with OpenCLIP's
    start = "conditioner.embedders.0.transformer" if is_xl else "cond_stage_model.transformer"
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"{start}.text_model.{name.removeprefix('text_model.')}"] = tensor
    if is_xl:
        open_clip = open_clip_tensors(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip.items()}
    return tensors


def _named(layer_name: Callable[[str, Any], str], tensor: str, config: Any) -> str:
    layer, end = tensor.rsplit(".", 1)
    return f"{layer_name(layer, config)}.{end}"

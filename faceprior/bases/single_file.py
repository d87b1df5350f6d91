"""Single `.safetensors` files in the original layout: what one holds, by the names of its tensors, and its loading."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from faceprior.bases.parts import (
    LOADING_ERRORS,
    NO_CHECKER,
    REFINER,
    SD2,
    SDXL,
    TEXT_TO_IMAGE,
    VAE_HINT,
    Part,
    architecture_of,
    parts_of_folder,
    require_complete,
)
from faceprior.models import as_safetensors, first_line

logger = logging.getLogger(__name__)


class _Tensors(NamedTuple):
    """The names and shapes of a file's tensors, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.shapes)

    def size(self, end: str, axis: int, default: int) -> int:
        """Return the size along `axis` of the first tensor whose name ends with `end`."""
        return next((shape[axis] for name, shape in self.shapes.items() if name.endswith(end)), default)


def _read_tensors(path: Path) -> _Tensors:
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} has to be a .safetensors file: a pickle can run code and is not loaded")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return _Tensors(shapes, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def parts_of_file(path: Path) -> dict[str, Part]:
    """Return the parts of a checkpoint in the original layout, by its tensors and the configs beside it."""
    tensors = _read_tensors(path)
    _require_network(path, tensors)
    parts = parts_of_folder(path.parent) if (path.parent / "model_index.json").is_file() else {}
    config = parts["unet"].config if "unet" in parts else {}

    # ---- the U-Net and the VAE; the file's tensors overrule the configs beside it
    start = "model.diffusion_model."
    sizes = {
        "in_channels": tensors.size(f"{start}input_blocks.0.0.weight", 1, 4),
        "out_channels": tensors.size(f"{start}out.2.weight", 0, 4),
        "cross_attention_dim": tensors.size("attn2.to_k.weight", 1, 0),
    }
    parts["unet"] = Part("UNet2DConditionModel", {**config, **sizes})
    parts.pop("vae", None)
    if tensors.has("first_stage_model."):
        channels = tensors.size("first_stage_model.decoder.conv_in.weight", 1, 4)
        parts["vae"] = Part("AutoencoderKL", {"latent_channels": channels})

    # ---- the text encoders
    for name, starts in _TEXT_ENCODERS.items():
        parts.pop(name, None)
        if start := next((start for start in starts if tensors.has(start)), None):
            ends = ("token_embedding.weight",)
            widths = [shape[1] for n, shape in tensors.shapes.items() if n.startswith(start) and n.endswith(ends)]
            parts[name] = Part("CLIPTextModel", {"hidden_size": widths[0] if widths else 0})

    # ---- the scheduler
    scheduler = parts.get("scheduler", Part("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}))
    if tensors.has("edm_mean"):
        scheduler = Part("EDMDPMSolverMultistepScheduler", {})
    else:
        guess = {} if scheduler.config.get("prediction_type") else {"prediction_type": _guess(sizes)}
        scheduler = Part(scheduler.class_name, {**scheduler.config, **guess, **_marks(tensors)})
    return {**parts, "scheduler": scheduler}


# How the names of the text encoders' tensors start: Stable Diffusion 1 and 2, SDXL; the second of SDXL, its refiner.
_TEXT_ENCODERS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model."),
}


def _require_network(path: Path, tensors: _Tensors) -> None:
    """Raise ValueError for a file without the U-Net of a whole checkpoint."""
    for block, architecture in (("joint_blocks.", "Stable Diffusion 3"), ("double_blocks.", "FLUX")):
        if any(block in name for name in tensors.shapes):
            raise ValueError(
                f"{path} is a {architecture} checkpoint without a U-Net: give one of Stable Diffusion 1, 2 or SDXL"
            )
    if not tensors.has("model.diffusion_model."):
        raise ValueError(
            f"{path} has no U-Net (`model.diffusion_model`): a whole checkpoint is needed, not a LoRA or a VAE alone"
        )


def _marks(tensors: _Tensors) -> dict[str, Any]:
    """Return the scheduler's settings that a checkpoint states: by its tensors, or by the metadata of its trainer."""
    marks: dict[str, Any] = {}
    if tensors.has("v_pred") or tensors.metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        marks["prediction_type"] = "v_prediction"
    if tensors.has("ztsnr"):
        marks |= _ZERO_SNR
    return marks


_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _guess(sizes: dict[str, int]) -> str:
    """Return what diffusers takes a file without marks for: Stable Diffusion 2 is published with both."""
    return "v_prediction" if sizes["cross_attention_dim"] == 1024 else "epsilon"


# ---- loading


def load_single_file(path: Path, dtype: torch.dtype, parts: dict, prediction_type: str) -> DiffusionPipeline:
    # ---- what the file holds, by the names of its tensors
    tensors, found = _read_tensors(path), parts_of_file(path)
    architecture = architecture_of(found)
    if tensors.has("edm_mean"):
        raise ValueError(f"{path} has EDM noise (`edm_mean`), which is not supported: give a base with DDPM noise")
    if architecture == REFINER:
        raise ValueError(f"{path} is SDXL's refiner, without the first text encoder: give the SDXL base itself")
    if "vae" not in {**found, **parts}:
        raise ValueError(f"{path} has no VAE (`first_stage_model`): {VAE_HINT}")
    if "text_encoder" not in found:
        raise ValueError(
            f"{path} has no text encoder (`cond_stage_model`, `conditioner`): give the whole checkpoint, or a "
            "diffusers folder, whose text_encoder/ holds it"
        )
    pipeline_class = TEXT_TO_IMAGE[architecture]
    parts = {**parts, **({} if architecture == SDXL else NO_CHECKER)}

    # ---- the weights, with the configs beside the file or from the hub
    config = str(path.parent) if (path.parent / "model_index.json").is_file() else None
    try:
        with as_safetensors(path) as file:
            pipeline = pipeline_class.from_single_file(str(file), config=config, dtype=torch.float32, **parts)
        require_complete(path.parent, pipeline)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{path} has weights only, and the hub did not provide the configs that belong to them: connect once, or "
            "put the file into a diffusers folder of the same architecture, beside its model_index.json"
        ) from error
    except LOADING_ERRORS as error:
        raise ValueError(
            f"{path} does not fit {config or 'the architecture that its tensors show'}: {first_line(error)}"
        ) from error

    # ---- what it predicts: the file's marks, else the configs', which nobody has stated if they come from the hub
    if marks := _marks(tensors):
        set_schedule(pipeline, marks)
    elif architecture == SD2 and not config and prediction_type == "auto":
        guess = pipeline.scheduler.config.get("prediction_type", "epsilon")
        logger.warning("%s does not say what it predicts: %s is a guess, `--prediction_type` states it", path, guess)

    # ---- `dtype` for all but the VAE
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.to(dtype)
    return pipeline


def set_schedule(pipeline: DiffusionPipeline, settings: dict[str, Any]) -> None:
    """Change settings of the pipeline's scheduler; one that cannot end at zero SNR is replaced by DDIM."""
    scheduler = pipeline.scheduler
    scheduler_class = type(scheduler)
    if not settings.keys() <= inspect.signature(scheduler_class).parameters.keys():
        scheduler_class, settings = DDIMScheduler, {**settings, "clip_sample": False}
    pipeline.scheduler = scheduler_class.from_config(scheduler.config, **settings)

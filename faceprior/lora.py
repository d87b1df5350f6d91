"""LoRA files: what a tuned network's adapter is written to, and how it is found, checked and loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from faceprior.diffusion import denoiser_of
from faceprior.models import as_safetensors, first_line

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_INFO = "faceprior_lora"  # key in the file's metadata: rank and alpha as they were trained


# ---- writing


def save_lora(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Write the adapter of the pipeline's network to LORA_FILE in `folder`, for `load_lora_weights`.

    The scale alpha / rank is folded into the weights, and the metadata say alpha = rank, so that a loader that reads
    tensors only draws the same images. The trained alpha is in the metadata under LORA_INFO.
    """
    denoiser, part = denoiser_of(pipeline), "unet" if hasattr(pipeline, "unet") else "transformer"
    layers, config = fold_lora(denoiser)
    trained = denoiser.peft_config["default"]
    info = {"rank": trained.r, "alpha": trained.lora_alpha, "rank_stabilized": trained.use_rslora}
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps({f"{part}.{key}": value for key, value in config.items()}),
        LORA_INFO: json.dumps(info),
    }
    pipeline.save_lora_weights(
        save_directory=folder,
        **{f"{part}_lora_layers": convert_state_dict_to_diffusers(layers)},
        save_function=partial(save_file, metadata=metadata),
    )


def fold_lora(denoiser: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the LoRA of a network with its scale folded into lora_B, and its config with alpha = rank.

    The scale is alpha / rank, or alpha / sqrt(rank) of a rank-stabilized LoRA. The network is not changed.
    """
    layers, config = get_peft_model_state_dict(denoiser), denoiser.peft_config["default"].to_dict()
    for name, module in denoiser.named_modules():
        if isinstance(module, LoraLayer):
            layers[f"{name}.lora_B.weight"] = layers[f"{name}.lora_B.weight"] * module.scaling["default"]
    config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}
    return layers, {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


# ---- reading


def find_lora(path: Path) -> Path | None:
    """Return the LoRA file at `path` or in this folder, LORA_FILE or the only one that holds a LoRA; None without one.

    Raises ValueError if there are several.
    """
    if path.is_file() or (path / LORA_FILE).is_file():
        return path if path.is_file() else path / LORA_FILE
    found = [p for p in sorted(path.glob("*")) if p.suffix.lower() == ".safetensors" and _is_lora(p)]
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} LoRAs, {', '.join(p.name for p in found)}: give the file itself")
    return found[0] if found else None


def load_lora(pipeline: DiffusionPipeline, file: Path) -> None:
    """Load a LoRA into a pipeline; ValueError if it does not fit, or if a part of it would be dropped."""
    denoiser, part = denoiser_of(pipeline), "unet" if hasattr(pipeline, "unet") else "transformer"
    if any("dora_scale" in name for name in _tensor_names(file)):
        raise ValueError(
            f"{file} is a DoRA, whose `dora_scale` diffusers would drop: merge it into its base where it was trained"
        )
    try:
        with as_safetensors(file) as path:
            given = {"weight_name": path.name}
            if part == "unet":
                given["unet_config"] = denoiser.config
            tensors = pipeline.lora_state_dict(path.parent, **given)
            tensors = tensors[0] if isinstance(tensors, tuple) else tensors
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the LoRA {file} does not fit the base: give one of the kind that it was trained on ({first_line(error)})"
        ) from error
    given = sum(name.startswith(f"{part}.") for name in tensors)
    config = getattr(denoiser, "peft_config", {})
    loaded = sum(len(get_peft_model_state_dict(denoiser, adapter_name=name)) for name in config)
    if loaded != given or not given:
        raise ValueError(f"the LoRA {file} does not fit the base: of its {given} tensors for the network {loaded} do")


def _is_lora(file: Path) -> bool:
    return any("lora_" in name or ".lora." in name for name in _tensor_names(file))


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {first_line(error)}") from error

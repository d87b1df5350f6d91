"""LoRA: the layers that get one, the files that it is written to, and how a file is found, checked and loaded.

A file is in diffusers' format, with the strength alpha / rank folded into the weights, or in kohya's for the web UIs,
with its true alpha. Beside a trained LoRA there is one that is extracted from trained weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from faceprior.diffusion import denoiser_of, is_xl, prediction_type
from faceprior.files import atomic_write
from faceprior.models import as_safetensors, first_line
from faceprior.original_layout import unet_layer

# Format -> the name of its file: that which diffusers looks for, and one that reads well in a web UI.
LORA_FORMATS = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "faceprior_lora.safetensors"}
LORA_FILE = LORA_FORMATS["diffusers"]
LORA_INFO = "faceprior_lora"  # key in the file's metadata: rank and alpha as they were trained
LORA_VARIANTS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}

# ---- the layers that get a LoRA


# Preset -> the layers' names, by the kind of network. A transformer's self-attention is joint with the text's: the
# presets part its image side from both. `all` leaves out the layers that scale and shift by the timestep.
_ATTENTION = r"to_(q|k|v|out\.0)"
_JOINT = rf"attn2?\.({_ATTENTION}|add_[qkv]_proj|to_add_out)"
_FEED_FORWARD = r"net\.(0\.proj|2)"
LORA_TARGETS = {
    "unet": {
        "self_attention": rf".*\.attn1\.{_ATTENTION}",
        "attention": rf".*\.attn[12]\.{_ATTENTION}",
        "all": rf".*\.(attn[12]\.{_ATTENTION}|ff\.{_FEED_FORWARD}|proj_(in|out))",
    },
    "transformer": {
        "self_attention": rf".*blocks\.\d+\.attn2?\.{_ATTENTION}",
        "attention": rf".*blocks\.\d+\.{_JOINT}",
        "all": rf".*blocks\.\d+\.({_JOINT}|ff(_context)?\.{_FEED_FORWARD}|proj_(mlp|out))",
    },
}


def find_lora_layers(pipeline: DiffusionPipeline, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the network's layers that get a LoRA.

    targets: a preset, `self_attention`, `attention` (cross-attention too) or `all` (the linear layers of the
    transformer blocks and what leads in and out of them), or names of layers, in a list or separated by commas, each
    of which stands for the layers whose names end with it, as in peft.

    Raises ValueError for a name that no linear layer or convolution has.
    """
    denoiser = denoiser_of(pipeline)
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    presets = LORA_TARGETS[_part(pipeline)]
    if isinstance(targets, str) and targets in presets:
        found = [layer for layer in layers if re.fullmatch(presets[targets], layer)]
        if not found:
            raise ValueError(f"the base has no layers of `lora_targets` {targets}: name some of its layers")
        return found
    names = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else list(targets)
    for name in names:
        if not name or not any(f".{layer}".endswith(f".{name}") for layer in layers):
            raise ValueError(
                f"`lora_targets` names {name!r}, and no linear layer or convolution of the base ends so: give "
                f"{', '.join(presets)}, or names such as attn1.to_q"
            )
    return [layer for layer in layers if any(f".{layer}".endswith(f".{name}") for name in names)]


def add_lora(
    pipeline: DiffusionPipeline, rank: int, alpha: int, targets: str | Sequence[str], variant: str = "plain"
) -> None:
    """Put an untrained LoRA on the pipeline's network, which changes nothing yet.

    targets: see `find_lora_layers`. variant: `plain`; `rslora` has the strength alpha / sqrt(rank) (arXiv 2312.03732);
    `dora` trains the length of each output's weights too (arXiv 2402.09353).

    Raises ValueError for a `rank` below 1, an `alpha` that is not above 0, and a network that has a LoRA already.
    """
    require_no_lora(pipeline)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` has to be a whole number of at least 1 but is {rank}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` has to be above 0 but is {alpha}")
    if variant not in LORA_VARIANTS:
        raise ValueError(f"`lora_variant` has to be one of {', '.join(LORA_VARIANTS)} but is {variant!r}")
    options = {"init_lora_weights": "gaussian", **LORA_VARIANTS[variant]}
    layers = find_lora_layers(pipeline, targets)
    denoiser_of(pipeline).add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, **options))


def require_no_lora(pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for a network that has a LoRA, which would be trained and saved as a part of it."""
    if getattr(denoiser_of(pipeline), "peft_config", None):
        raise ValueError(
            "the pipeline's network has a LoRA already: `pipeline.fuse_lora()` and then "
            "`pipeline.unload_lora_weights()` put it into the weights, or load the base anew"
        )


def adapters_of(denoiser: nn.Module) -> list[LoraLayer]:
    """Return the layers of a network that have a LoRA."""
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def describe_lora(denoiser: nn.Module) -> str:
    """Return what the trained LoRA of a network is, in words by which another one is known; empty without one."""
    config = getattr(denoiser, "peft_config", {}).get("default")
    if config is None:
        return ""
    variants = [name for name in ("use_rslora", "use_dora") if getattr(config, name)]
    return ", ".join([f"{len(adapters_of(denoiser))} layers, rank {config.r}, alpha {config.lora_alpha:g}", *variants])


def _part(pipeline: DiffusionPipeline) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


# ---- a LoRA's tensors


@dataclass
class Lora:
    """The tensors of a LoRA, not folded, and what is said of it in a file.

    tensors: by peft's names, such as `mid_block.attentions.0.proj_in.lora_A.weight`; alphas: by layer, so that the
    strength is alpha / rank, whatever the variant; config: peft's; info: what stands under LORA_INFO.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    config: LoraConfig
    info: dict[str, Any] = field(default_factory=dict)

    def loss(self) -> str:
        """Return what an extracted LoRA loses, in words."""
        return "a LoRA of rank {rank}, without {lost:.1%} of the change ({most_lost:.1%} in {most_lost_layer})".format(
            **self.info
        )


def trained_lora(denoiser: nn.Module) -> Lora:
    """Return the LoRA that was trained on a network; nothing is copied."""
    config = denoiser.peft_config["default"]
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
    return Lora(
        tensors=get_peft_model_state_dict(denoiser),
        alphas={name: layer.scaling["default"] * layer.r["default"] for name, layer in layers.items()},
        config=config,
        info={"rank": config.r, "alpha": config.lora_alpha, "rank_stabilized": config.use_rslora},
    )


def extract_lora(original: dict[str, Tensor], trained: dict[str, Tensor], rank: int) -> Lora:
    """Return the LoRA of `rank` that comes nearest to a change of weights, with what it loses.

    original, trained: tensors by name. Each matrix's change is cut after its `rank` largest singular values, which no
    other matrix of that rank beats (Eckart and Young, 1936). What a LoRA has no place for, such as a bias, is lost.

    `info` has the loss as a fraction of the change, both by their Frobenius norm: `lost` of all tensors together,
    `most_lost` of the layer where it is largest, with its bias.
    """
    if rank < 1:
        raise ValueError(f"`rank` has to be at least 1 but is {rank}")
    tensors: dict[str, Tensor] = {}
    squares: dict[str, list[float]] = {}  # layer -> [sum of squares of its change, and of what is lost of it]
    for name, before in original.items():
        layer, kind = name.rsplit(".", 1)
        change = trained[name].detach().float() - before.float()
        rest = change
        if kind == "weight" and change.ndim == 2:
            left, values, right = torch.linalg.svd(change, full_matrices=False)  # (m, k), (k,), (k, n)
            root, empty = values[:rank].sqrt(), max(0, rank - len(values))
            down, up = root[:, None] * right[:rank], left[:, :rank] * root
            rest = change - up @ down
            tensors[f"{layer}.lora_A.weight"] = F.pad(down, (0, 0, 0, empty))  # (rank, n)
            tensors[f"{layer}.lora_B.weight"] = F.pad(up, (0, empty))  # (m, rank)
        sums = squares.setdefault(layer, [0.0, 0.0])
        sums[0] += change.square().sum().item()
        sums[1] += rest.square().sum().item()

    losses = {layer: _ratio(lost, total) for layer, (total, lost) in squares.items()}
    most = max(losses, key=losses.get)
    lost = _ratio(sum(lost for _, lost in squares.values()), sum(total for total, _ in squares.values()))
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return Lora(
        tensors=tensors,
        alphas=dict.fromkeys(layers, float(rank)),
        config=LoraConfig(r=rank, lora_alpha=rank, target_modules=layers),
        info={"rank": rank, "alpha": rank, "lost": lost, "most_lost": losses[most], "most_lost_layer": most},
    )


def _ratio(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total else 0.0


# ---- writing


def require_lora_format(lora_format: str, variant: str, is_unet: bool) -> None:
    """Raise ValueError for a LoRA that the format, or its readers, would lose; is_unet: not on a transformer."""
    if lora_format not in LORA_FORMATS:
        raise ValueError(f"`lora_format` has to be one of {', '.join(LORA_FORMATS)} but is {lora_format!r}")
    if lora_format == "kohya" and not is_unet:
        raise ValueError("`lora_format` kohya is for U-Nets, and the base has a transformer: use diffusers")
    if lora_format == "kohya" and variant == "dora":
        raise ValueError(
            "`lora_format` is kohya, from which diffusers drops the magnitudes of a DoRA: use the format diffusers, or "
            "another `lora_variant`"
        )


def save_lora(pipeline: DiffusionPipeline, lora: Lora, folder: str | Path, lora_format: str = "diffusers") -> Path:
    """Write a LoRA of the pipeline's network to the file of its format in `folder`, whole or not at all.

    diffusers: the strength alpha / rank is folded into the weights, and the metadata say alpha = rank, so that a loader
    that reads tensors only draws the same images. kohya: with the true alpha of each layer, and the names that the
    field's files have: diffusers' for Stable Diffusion 1 and 2, the original layout's for SDXL.

    Returns the file. Raises ValueError for what the format loses, see `require_lora_format`.
    """
    require_lora_format(lora_format, "dora" if lora.config.use_dora else "plain", hasattr(pipeline, "unet"))
    tensors, metadata = (_kohya if lora_format == "kohya" else _folded)(pipeline, lora)
    metadata |= {"format": "pt", LORA_INFO: json.dumps(lora.info)}
    file = Path(folder) / LORA_FORMATS[lora_format]
    with atomic_write(file) as opened:
        opened.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata))
    return file


def _folded(pipeline: DiffusionPipeline, lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of diffusers' format: B (alpha / rank) in place of B, also for a DoRA.

    Its weight is m (W + s B A) / |W + s B A|, in which s stands nowhere but before B.
    """
    part, tensors = _part(pipeline), dict(lora.tensors)
    for layer, alpha in lora.alphas.items():
        up = tensors[f"{layer}.lora_B.weight"]
        tensors[f"{layer}.lora_B.weight"] = up * (alpha / up.shape[1])
    config = lora.config.to_dict()
    config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}
    config = {f"{part}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {f"{part}.{name}": t for name, t in tensors.items()}, {LORA_ADAPTER_METADATA_KEY: json.dumps(config)}


def _kohya(pipeline: DiffusionPipeline, lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of kohya's format: `lora_unet_LAYER.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    The web UIs tell the kind of base by `ss_base_model_version` and `ss_v2`.
    """
    unet, tensors = pipeline.unet, {}
    for layer, alpha in lora.alphas.items():
        name = (unet_layer(layer, unet.config) if is_xl(pipeline) else layer).replace(".", "_")
        tensors[f"lora_unet_{name}.lora_down.weight"] = lora.tensors[f"{layer}.lora_A.weight"]
        tensors[f"lora_unet_{name}.lora_up.weight"] = lora.tensors[f"{layer}.lora_B.weight"]
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(alpha))
    is_second = not is_xl(pipeline) and unet.config.cross_attention_dim == 1024
    velocity = "_v" if prediction_type(pipeline.scheduler) == "v_prediction" else ""
    metadata = {
        "ss_v2": str(is_second),
        "ss_base_model_version": "sdxl_base_v1-0" if is_xl(pipeline) else f"sd_v{1 + is_second}{velocity}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.info["rank"]),
        "ss_network_alpha": str(next(iter(lora.alphas.values()))),
    }
    return tensors, metadata


def fuse_lora(tuned: DiffusionPipeline, base: DiffusionPipeline) -> DiffusionPipeline:
    """Return `base` with the trained LoRA of `tuned` in its weights.

    base: the same pipeline, or, where its weights are quantized, which nothing can be added to, the base loaded anew.
    """
    if base is not tuned:
        network, trained = denoiser_of(base), denoiser_of(tuned)
        network.add_adapter(trained.peft_config["default"])
        set_peft_model_state_dict(network, get_peft_model_state_dict(trained))
    base.fuse_lora()
    base.unload_lora_weights()
    return base


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
    denoiser, part = denoiser_of(pipeline), _part(pipeline)
    if any("dora_scale" in name for name in _tensor_names(file)):
        raise ValueError(
            f"{file} is a DoRA, whose `dora_scale` diffusers would drop: merge it into its base where it was trained"
        )
    try:
        with as_safetensors(file) as path:
            source, given = path.parent, {"weight_name": path.name}
            if any(name.endswith(".alpha") for name in _tensor_names(file)):
                # kohya's alphas are folded here: where they differ, diffusers takes one of them for all layers
                source, given = _without_alphas(load_file(path)), {}
            config = {"unet_config": denoiser.config} if part == "unet" else {}
            tensors = pipeline.lora_state_dict(copy(source), **given, **config)  # a copy: diffusers empties it
            tensors = tensors[0] if isinstance(tensors, tuple) else tensors
            pipeline.load_lora_weights(source, **given)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the LoRA {file} does not fit the base: give one of the kind that it was trained on ({first_line(error)})"
        ) from error
    given = sum(name.startswith(f"{part}.") for name in tensors)
    config = getattr(denoiser, "peft_config", {})
    loaded = sum(len(get_peft_model_state_dict(denoiser, adapter_name=name)) for name in config)
    if loaded != given or not given:
        raise ValueError(f"the LoRA {file} does not fit the base: of its {given} tensors for the network {loaded} do")


def _without_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold each layer's alpha / rank into its second matrix."""
    for name in [name for name in tensors if name.endswith(".alpha")]:
        for up in (name.replace(".alpha", end) for end in (".lora_up.weight", ".lora_B.weight")):
            if up in tensors:
                tensors[up] = tensors[up] * (tensors.pop(name) / tensors[up].shape[1])
    return tensors


def _is_lora(file: Path) -> bool:
    return any("lora_" in name or ".lora." in name for name in _tensor_names(file))


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {first_line(error)}") from error

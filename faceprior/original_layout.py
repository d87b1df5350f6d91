"""The original layout of Stable Diffusion checkpoints (CompVis, Stability AI): what a layer is called in it.

Single files that the web UIs load have these names, and the layers in kohya's LoRA files for SDXL.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor


def unet_layer(name: str, config: Any) -> str:
    """Return the original name of a U-Net's layer: `down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`.

    The blocks stand in one row, `layers_per_block` + 1 of them on each level, after the first convolution; in a block
    the ResNet layer is number 0, the transformer 1. config: the U-Net's.
    """
    if name in _UNET_ENDS:
        return _UNET_ENDS[name]
    match = _UNET_LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"the original layout of Stable Diffusion has no name for the U-Net's layer {name}")
    side, level, kind, index, inner = match.groups()
    inner, number = _RESNET.get(inner, inner) if kind == "resnets" else inner, 0 if kind == "resnets" else 1
    if side == "mid_block":
        return f"middle_block.{1 if number else 2 * int(index)}.{inner}"
    layers, level = config["layers_per_block"], int(level)
    first = level * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if kind == "upsamplers":  # after the transformer, where there is one
        return f"output_blocks.{first + layers}.{1 + ('CrossAttn' in config['up_block_types'][level])}.{inner}"
    if side == "down_blocks":
        return f"input_blocks.{1 + first + int(index)}.{number}.{inner}"
    return f"output_blocks.{first + int(index)}.{number}.{inner}"


_UNET_LAYER = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def vae_layer(name: str, config: Any) -> str:
    """Return the original name of a VAE's layer; the decoder's levels are counted from the finest. config: its own."""
    levels = len(config["block_out_channels"])
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, original in _VAE:
        name = name.replace(ours, original)
    return name


_VAE = (
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("down_blocks", "down"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def open_clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIP text encoder to OpenCLIP's, whose projections to queries, keys and values are one matrix."""
    renamed = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        if name == "text_projection.weight":
            tensor = tensor.T
        for ours, original in _OPEN_CLIP:
            name = name.replace(ours, original)
        renamed[name] = tensor
    return renamed


_OPEN_CLIP = (
    ("text_model.", ""),
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn.", "attn."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("final_layer_norm", "ln_final"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"),
    ("text_projection.weight", "text_projection"),
)

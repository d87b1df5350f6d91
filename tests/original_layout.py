"""The original layout of Stable Diffusion's single files, from diffusers' names; written for the tests alone.

The names are those of CompVis' latent-diffusion (U-Net, VAE), and of OpenCLIP for the text encoders of Stable
Diffusion 2 and the second one of SDXL.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def original_tensors(pipeline: DiffusionPipeline, openclip: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights of a Stable Diffusion or SDXL pipeline by their names in one file.

    openclip: whether the text encoder of a pipeline with one is OpenCLIP's, as Stable Diffusion 2's.
    """
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_tensors(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_tensors(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= clip_tensors(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= openclip_tensors(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif openclip:
        tensors |= openclip_tensors(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= clip_tensors(pipeline.text_encoder, "cond_stage_model.transformer.")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# ---- the U-Net


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_tensors(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    last = unet.config.layers_per_block
    attends = ["Attn" in name for name in unet.config.up_block_types]
    return {_unet_name(name, last, attends): tensor for name, tensor in unet.state_dict().items()}


def _unet_name(name: str, last: int, attends: list[bool]) -> str:
    """Number the blocks in one row, `last` + 1 of them on each level; a sampler ends the last block of its level."""
    stem, end = name.rsplit(".", 1)
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{end}"
    side, rest = re.fullmatch(r"(down_blocks\.\d|up_blocks\.\d|mid_block)\.(.+)", name).groups()
    part, layer, inner = re.fullmatch(r"(\w+)\.(\d)\.(.+)", rest).groups()
    if part == "resnets":
        stem, end = inner.rsplit(".", 1)
        inner = f"{_RESNET[stem]}.{end}"
    if side == "mid_block":
        return f"middle_block.{2 * int(layer) if part == 'resnets' else 1}.{inner}"
    level = int(side[-1])
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * (last + 1)}.0.{inner.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"output_blocks.{level * (last + 1) + last}.{2 if attends[level] else 1}.{inner}"
    first = 1 if side.startswith("down") else 0
    blocks = "input_blocks" if first else "output_blocks"
    return f"{blocks}.{first + level * (last + 1) + int(layer)}.{0 if part == 'resnets' else 1}.{inner}"


# ---- the VAE


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_tensors(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Number the decoder's levels from the image on; the attention's projections are convolutions of 1 x 1."""
    levels, tensors = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name.replace("down_blocks", "down"))
        name = name.replace("resnets", "block").replace("downsamplers.0", "downsample")
        name = name.replace("upsamplers.0", "upsample")
        if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            name = f"{match[1]}.mid.attn_1.{_ATTENTION[match[2]]}.{match[3]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        tensors[name] = tensor
    return tensors


# ---- the text encoders


def clip_tensors(encoder: torch.nn.Module, start: str) -> dict[str, torch.Tensor]:
    return {f"{start}text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.state_dict().items()}


_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def openclip_tensors(encoder: torch.nn.Module, start: str) -> dict[str, torch.Tensor]:
    """Query, key and value are one matrix, and the projection stands the other way round."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {new: state[old] for old, new in _OPENCLIP.items()}
    for name, tensor in state.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            number, inner, end = match.groups()
            block = f"transformer.resblocks.{number}"
            if inner in _LAYER:
                tensors[f"{block}.{_LAYER[inner]}.{end}"] = tensor
            elif inner == "self_attn.out_proj":
                tensors[f"{block}.attn.out_proj.{end}"] = tensor
            elif inner == "self_attn.q_proj":
                three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                tensors[f"{block}.attn.in_proj_{end}"] = torch.cat(three)
    if "text_projection.weight" in state:
        tensors["text_projection"] = state["text_projection.weight"].T
        tensors["logit_scale"] = torch.zeros((), device=tensors["text_projection"].device)
    return {start + name: tensor for name, tensor in tensors.items()}


# ---- files of full size


def write_zeros(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of half precision zeros with the shapes of `tensors`: a hole, which takes no disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

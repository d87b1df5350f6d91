"""Base models: described and refused by their configs, loaded from folders, single files and the hub's cache."""

import json
import logging
import re
import shutil

import huggingface_hub
import pytest
import torch
from conftest import load_stage
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from faceprior.bases import BaseInfo, describe_base, load_pipeline, require_base
from faceprior.diffusion import make_noise_scheduler, pred_original_sample
from faceprior.tiny import tiny_sd15, tiny_sdxl


@pytest.fixture(scope="module")
def sd15():
    return tiny_sd15()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.fixture(scope="module")
def sd15_folder(sd15, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd15.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl_folder(sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    sdxl.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(sd15_folder, tmp_path):
    """A copy of the pipeline's folder, to be damaged."""
    return shutil.copytree(sd15_folder, tmp_path / "sd15")


def same_weights(module, other):
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


# ---- loading


def test_folder_round_trip(sd15, sd15_folder):
    loaded = load_pipeline(str(sd15_folder))
    for name in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(sd15, name), getattr(loaded, name))
    assert loaded.tokenizer("a face.").input_ids == sd15.tokenizer("a face.").input_ids
    assert loaded.safety_checker is None


def test_other_lists_in_the_index_are_no_parts(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_ignore_files": ["old.bin"]}))
    load_pipeline(copy)


def test_dtype_leaves_the_vae_in_float32_unrounded(sd15, sd15_folder):
    loaded = load_pipeline(str(sd15_folder), torch.float16)
    assert (loaded.unet.dtype, loaded.text_encoder.dtype) == (torch.float16, torch.float16)
    assert loaded.vae.dtype == torch.float32 and same_weights(loaded.vae, sd15.vae)


def test_another_vae_takes_the_place_of_the_bases_own(sdxl, copy, tmp_path):
    """Also where the base has none, as Realistic Vision."""
    sdxl.vae.save_pretrained(tmp_path / "vae")
    assert same_weights(load_pipeline(str(copy), vae=str(tmp_path / "vae")).vae, sdxl.vae)
    shutil.rmtree(copy / "vae")
    assert same_weights(load_pipeline(str(copy), vae=str(tmp_path / "vae")).vae, sdxl.vae)


def test_a_base_without_vae_says_how_to_name_one(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(ValueError, match="it has no VAE: name one with `--vae`"):
        load_pipeline(str(copy))


def test_missing_path_is_looked_at_before_the_network(tmp_path):
    for name in (tmp_path / "nothing", tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match="no base model at .*does not exist; `--base` takes a diffusers"):
            load_pipeline(str(name))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="no base model in .*: there is no model_index.json; `--base` takes"):
        load_pipeline(str(tmp_path))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(path, name):
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "truncated weights": (lambda f: truncate(f / UNET), "diffusion_pytorch_model"),
    "missing weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "model.safetensors"),
    "missing tensor": (lambda f: drop_tensor(f / UNET, "conv_out.bias"), "weights of unet lack conv_out.bias"),
    "missing folder": (lambda f: shutil.rmtree(f / "tokenizer"), "names tokenizer"),
    "empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "tokenizer has no vocabulary"),
    "torn config": (lambda f: (f / "vae/config.json").write_text("{"), "not a valid JSON"),
    "torn index": (lambda f: (f / "model_index.json").write_text("{"), "not a valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(copy, damage):
    harm, reason = DAMAGES[damage]
    harm(copy)
    with pytest.raises(ValueError, match=f"(?s)the pipeline in .*sd15 is damaged: .*{reason}"):
        load_pipeline(str(copy))


def test_an_unknown_hub_id_names_the_command():
    """Without a network the error comes at once; with one, there is no such model either."""
    with pytest.raises(FileNotFoundError, match="no base model 'faceprior/none'.*hf download faceprior/none"):
        load_pipeline("faceprior/none")


def test_hub_ids_are_served_from_the_cache_without_a_network(sd15, sd15_folder, tmp_path, monkeypatch):
    cache = tmp_path / "models--faceprior--cached"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("1" * 40)
    shutil.copytree(sd15_folder, cache / "snapshots" / ("1" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same_weights(load_pipeline("faceprior/cached").unet, sd15.unet)


# ---- single files in the original (CompVis) layout


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name, last=1):
    """The name of a U-Net tensor in the original layout: blocks in one row, `last` + 1 of them on each level."""
    stem, end = name.rsplit(".", 1)
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{end}"
    side, rest = re.fullmatch(r"(down_blocks\.\d|up_blocks\.\d|mid_block)\.(.+)", name).groups()
    part, layer, inner = re.fullmatch(r"(\w+)\.(\d)\.(.+)", rest).groups()
    if part == "resnets":
        stem, end = inner.rsplit(".", 1)
        inner = f"{RESNET[stem]}.{end}"
    if side == "mid_block":
        return f"middle_block.{2 * int(layer) if part == 'resnets' else 1}.{inner}"
    level = int(side[-1])
    if part == "downsamplers":
        return f"input_blocks.{1 + level * (last + 1) + last}.0.{inner.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"output_blocks.{level * (last + 1) + last}.2.{inner}"
    first = 1 if side.startswith("down") else 0
    blocks = "input_blocks" if first else "output_blocks"
    return f"{blocks}.{first + level * (last + 1) + int(layer)}.{0 if part == 'resnets' else 1}.{inner}"


def original_vae_name(name, levels=3):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name.replace("down_blocks", "down"))
    name = name.replace("resnets", "block").replace("downsamplers.0", "downsample")
    return name.replace("upsamplers.0", "upsample")


@pytest.fixture(scope="module")
def single_file(sd15, tmp_path_factory):
    """The tiny pipeline's weights in one file, as checkpoints are traded."""
    tensors = {f"model.diffusion_model.{original_unet_name(k)}": v for k, v in sd15.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{original_vae_name(k)}": v for k, v in sd15.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {prefix + k.removeprefix("text_model."): v for k, v in sd15.text_encoder.state_dict().items()}
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def test_single_file_beside_the_configs_of_its_architecture(sd15, single_file, copy):
    """The file's weights, not those of the folder, which only lends its configs and tokenizer."""
    for weights in copy.glob("*/*.safetensors"):
        weights.unlink()
    shutil.copy(single_file, copy)
    loaded = load_pipeline(str(copy / single_file.name), torch.float16)
    assert loaded.vae.dtype == torch.float32 and same_weights(loaded.vae, sd15.vae)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == torch.float16
    assert same_weights(loaded.unet.float(), tiny_sd15().unet.half().float())
    assert same_weights(loaded.text_encoder.float(), tiny_sd15().text_encoder.half().float())
    assert loaded.safety_checker is None


def test_single_file_without_configs_or_network_says_what_to_do(single_file):
    with pytest.raises(FileNotFoundError, match="weights only.*beside its model_index.json"):
        load_pipeline(str(single_file))


def test_single_file_of_another_architecture_is_named(sdxl, single_file, tmp_path):
    sdxl.save_pretrained(tmp_path / "sdxl")
    shutil.copy(single_file, tmp_path / "sdxl")
    with pytest.raises(ValueError, match="model.safetensors does not fit .*sdxl"):
        load_pipeline(str(tmp_path / "sdxl" / single_file.name))


def test_truncated_single_file(single_file, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(single_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torn.safetensors is truncated or no safetensors file"):
        load_pipeline(str(torn))


def test_a_pickle_is_not_loaded(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    with pytest.raises(ValueError, match="has to be a .safetensors file: a pickle can run code"):
        load_pipeline(str(tmp_path / "model.ckpt"))


def test_a_lora_is_no_base(tmp_path):
    save_file({"lora_unet_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors has no U-Net.*not a LoRA"):
        load_pipeline(str(tmp_path / "lora.safetensors"))

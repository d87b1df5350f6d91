"""The original layout: names against diffusers' own conversion at full size, and single files read back."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_bases import build

from faceprior.bases import load_pipeline, save_single_file
from faceprior.bases.export import original_tensors
from faceprior.guidance import GuidanceTuner
from faceprior.original_layout import unet_layer, vae_layer

CROSS = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
# The U-Nets of Stable Diffusion 1.5 and SDXL, but for their widths, which names do not depend on.
SD15 = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": (CROSS["down"],) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + (CROSS["up"],) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("DownBlock2D", CROSS["down"], CROSS["down"]),
    "up_block_types": (CROSS["up"], CROSS["up"], "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32,
}


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_every_name_of_a_unet_leads_back(config):
    """Through diffusers' conversion of original checkpoints."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    original, weights = {}, unet.state_dict()
    for name, tensor in weights.items():
        layer, end = name.rsplit(".", 1)
        original[f"model.diffusion_model.{unet_layer(layer, unet.config)}.{end}"] = tensor
    assert len(original) == len(weights)
    back = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert back.keys() == weights.keys() and all(back[name] is tensor for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("config", "ours", "original"),
    [
        (SD15, "down_blocks.1.attentions.0.transformer_blocks.0", "input_blocks.4.1.transformer_blocks.0"),
        (SD15, "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (SD15, "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        (SD15, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),  # no transformer before it
        (SD15, "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        (SD15, "up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        (SDXL, "down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        (SDXL, "down_blocks.2.attentions.1.transformer_blocks.9", "input_blocks.8.1.transformer_blocks.9"),
        (SDXL, "mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        (SDXL, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        (SDXL, "add_embedding.linear_2", "label_emb.0.2"),
        (SDXL, "conv_in", "input_blocks.0.0"),
    ],
)
def test_names_as_published_checkpoints_have_them(config, ours, original):
    assert unet_layer(ours, config) == original


def test_a_layer_without_an_original_name():
    with pytest.raises(ValueError, match="no name for the U-Net's layer class_embedding"):
        unet_layer("class_embedding", SD15)


def test_every_name_of_a_vae_leads_back():
    """With attention in the middle, as the published ones have it: linear layers here, 1 x 1 convolutions there."""
    pipeline = build("sd1")
    pipeline.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
    )
    start, weights = "first_stage_model.", pipeline.vae.state_dict()
    original = {name: t for name, t in original_tensors(pipeline, is_xl=False).items() if name.startswith(start)}
    assert original[f"{start}decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    back = convert_ldm_vae_checkpoint(dict(original), dict(pipeline.vae.config))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)
    assert vae_layer("decoder.up_blocks.0.resnets.2.conv1", pipeline.vae.config) == "decoder.up.3.block.2.conv1"
    assert vae_layer("encoder.down_blocks.0.downsamplers.0.conv", SD15) == "encoder.down.0.downsample.conv"
    assert vae_layer("encoder.mid_block.attentions.0.to_out.0", SD15) == "encoder.mid.attn_1.proj_out"
    assert vae_layer("decoder.conv_norm_out", SD15) == "decoder.norm_out"


# ---- single files


def draw(pipeline):
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": torch.Generator().manual_seed(3)}
    return np.asarray(pipeline("a man", output_type="np", **options).images)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sdxl-v-ztsnr"])
def test_a_single_file_read_back(tmp_path, kind):
    """By `load_pipeline` and by stock diffusers: bit-equal weights and images; what it predicts is in the file."""
    pipeline = build(kind)
    pipeline.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()  # its configs stay, as a tiny base is not published
    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    scheduler.from_config(scheduler.config, rescale_betas_zero_snr=False).save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "model.safetensors"
    save_single_file(pipeline, file, torch.float32)
    stock = type(pipeline).from_single_file(str(file), config=str(tmp_path), local_files_only=True)
    for loaded in (load_pipeline(file), stock):
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                weights, expected = getattr(loaded, name).state_dict(), part.state_dict()
                assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in weights)
    config = load_pipeline(file).scheduler.config
    assert config.prediction_type == pipeline.scheduler.config.prediction_type
    assert bool(config.get("rescale_betas_zero_snr")) == (kind == "sdxl-v-ztsnr")
    assert (draw(load_pipeline(file)) == draw(pipeline)).all()


def test_a_single_file_in_half_precision(tmp_path):
    pipeline = build("sd1")
    save_single_file(pipeline, tmp_path / "new/model.safetensors")
    tensors = load_file(tmp_path / "new/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    expected = original_tensors(pipeline, is_xl=False)
    assert all(torch.equal(tensors[name], tensor.half()) for name, tensor in expected.items())
    with safe_open(tmp_path / "new/model.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_weights_that_half_precision_does_not_hold(tmp_path):
    """Float16 ends at 65504: beyond it the file would hold infinities, and every image of it would be black."""
    pipeline, file = build("sd1"), tmp_path / "model.safetensors"
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0] = 1e5
    with pytest.raises(ValueError, match=r"cannot be written in float16, .*input_blocks.0.0.weight \(1 in all\)"):
        save_single_file(pipeline, file)
    assert not list(tmp_path.iterdir())
    save_single_file(pipeline, file, torch.float32)
    assert load_file(file)["model.diffusion_model.input_blocks.0.0.weight"].max() == 1e5


def test_the_tuner_writes_the_trained_weights(tmp_path):
    tuner = GuidanceTuner(build("sd1"))
    with torch.no_grad():
        tuner.trainable_parameters()[0].add_(1)
    tuner.save_single_file(tmp_path / "model.safetensors", torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name, parameter in tuner.denoiser.named_parameters() if parameter.requires_grad)
    layer, end = name.rsplit(".", 1)
    original = f"model.diffusion_model.{unet_layer(layer, tuner.denoiser.config)}.{end}"
    assert torch.equal(tensors[original], tuner.trainable_parameters()[0])


@pytest.mark.parametrize("kind", ["sd2", "sd3", "flux-dev"])
def test_other_bases_are_refused(tmp_path, kind):
    with pytest.raises(
        ValueError, match="of Stable Diffusion 1 and SDXL but the base is .*: save the pipeline's folder"
    ):
        save_single_file(build(kind), tmp_path / "model.safetensors")


def test_a_lora_is_no_checkpoint(tmp_path):
    tuner = GuidanceTuner(build("sd1"), "lora", rank=2)
    with pytest.raises(ValueError, match="a single file holds no LoRA: save the LoRA's own file"):
        tuner.save_single_file(tmp_path / "model.safetensors")

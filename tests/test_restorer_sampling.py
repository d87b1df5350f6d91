"""How faces are sampled: the official inference to the letter, the settings and recipes, and what saves time or memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from skimage import data
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faceprior import tiny
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.restorer import AuthFaceRestorer

PARTS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "scheduler": DDPMScheduler,
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint of the official layout: no index, SDXL's factor of 8, its Euler scheduler, a ControlNet at work.

    The scheduler's file says nothing of clipping, so that the official code's DDPM clips; x_0 of these weights lies
    beyond 1 almost everywhere.
    """
    path, prior = tmp_path_factory.mktemp("official"), tiny.tiny_sdxl()
    torch.manual_seed(0)
    prior.vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    controlnet = ControlNetModel.from_unet(prior.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    with torch.no_grad():
        zeros = (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)
        for layer in (*zeros, controlnet.controlnet_cond_embedding.conv_out):
            layer.weight.add_(0.5 * torch.randn(layer.weight.shape))
    for name in PARTS.keys() - {"controlnet", "scheduler"}:
        prior.components[name].save_pretrained(path / name)
    controlnet.save_pretrained(path / "controlnet")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(path / "scheduler")
    return path


@pytest.fixture(scope="module")
def restorer(folder):
    return AuthFaceRestorer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def official(folder):
    """The official inference by stock diffusers alone: every part by its sub-folder, residuals in float16."""
    parts = {name: part.from_pretrained(folder, subfolder=name) for name, part in PARTS.items()}
    assert parts["scheduler"].config.clip_sample and parts["scheduler"].config.timestep_spacing == "leading"
    parts["controlnet"].register_forward_hook(
        lambda module, inputs, outputs: ([residual.half() for residual in outputs[0]], outputs[1].half())
    )
    pipeline = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def official_latents(official, images, seed=123, prompt="a man", negative_prompt="bad", **options):
    negative = None if negative_prompt is None else [negative_prompt] * len(images)
    return official(
        prompt=[prompt] * len(images),
        negative_prompt=negative,
        image=images,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    ).images


@torch.no_grad()
def official_pixels(official, latents):
    """(B, H, W, 3) in [0, 1]."""
    pixels = official.vae.decode(latents.float() / official.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def official_image(official, image, upscale, process_size, **options):
    """The official code from image to image, by Pillow, numpy and torch."""
    image = image.resize((image.width * upscale, image.height * upscale))
    image = image.resize((image.width // 8 * 8, image.height // 8 * 8))
    pixels = official_pixels(official, official_latents(official, [image], **options))[0]
    sampled = (pixels * 255).round().astype(np.uint8)
    fixed = stablesr_wavelets(sampled, np.asarray(image))
    return Image.fromarray(fixed).resize((process_size, process_size), Image.LANCZOS)


def stablesr_wavelets(content, style):
    """Two (H, W, 3) uint8 -> the same: the detail of the one on the colours of the other, as published by StableSR."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line)[None, None].repeat(3, 1, 1, 1)
    bands = []
    for array in (content, style):
        image, detail = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float().div(255), 0
        for level in range(5):
            reach = 2**level
            blurred = F.conv2d(F.pad(image, (reach,) * 4, mode="replicate"), kernel, groups=3, dilation=reach)
            detail, image = detail + (image - blurred), blurred
        bands.append((detail, image))
    return ((bands[0][0] + bands[1][1]).clamp(0, 1) * 255).byte()[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def pair():
    """Two images of 56 x 72 pixels."""
    photograph = Image.fromarray(data.astronaut())
    return [photograph.resize((56, 72)), photograph.crop((100, 0, 356, 256)).resize((56, 72))]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


# ------------------------------------------------------------------------- the official inference to the letter


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 8.0},
        {"guidance_scale": 8.0, "prompt": "", "negative_prompt": ""},
        {"guidance_scale": 3.0, "prompt": "", "negative_prompt": None},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.5, "controlnet_conditioning_scale": 0.7},
        {"guidance_scale": 3.0, "control_guidance_start": 0.2, "control_guidance_end": 0.7},
    ],
    ids=str,
)
def test_sampling_is_the_official_codes(restorer, official, pair, options):
    """Of a batch of two, not square, with one generator; latents unscaled, then pixels."""
    expected = official_latents(official, pair, seed=7, num_inference_steps=4, **options)
    options = {"prompt": "a man", "negative_prompt": "bad", **options, "num_inference_steps": 4}
    latents = restorer.sample(pair, **options, generator=torch.Generator().manual_seed(7), output_type="latent")
    assert latents.shape == (2, 4, 9, 7)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    pixels = restorer.sample(pair, **options, generator=torch.Generator().manual_seed(7), output_type="np")
    assert pixels.shape == (2, 72, 56, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, official_pixels(official, expected), atol=1e-4)


@pytest.mark.parametrize(("size", "upscale", "process_size"), [((70, 67), 2, 96), ((64, 64), 1, None)])
def test_the_official_way_from_image_to_image(restorer, official, size, upscale, process_size, tmp_path):
    """70 x 67 becomes 140 x 134, then 136 x 128; the result is a square. Compared as PNG files."""
    image = Image.fromarray(data.astronaut()).crop((150, 0, 350, 200)).resize(size)
    expected = official_image(
        official, image, upscale, process_size or 512, seed=5, num_inference_steps=3, guidance_scale=8.0
    )
    options = {"recipe": "official", "prompt": "a man", "negative_prompt": "bad", "num_inference_steps": 3, "seed": 5}
    image.save(tmp_path / "in.png")
    result = restorer.restore(tmp_path / "in.png", aligned=True, upscale=upscale, process_size=process_size, **options)
    result.image.save(tmp_path / "out.png")
    found = Image.open(tmp_path / "out.png")
    assert found.size == expected.size and found.mode == "RGB"
    apart = difference(found, expected)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # where a value lies on the edge between two grey levels


def test_the_official_recipe_takes_nothing_but_the_size_from_the_checkpoint(restorer, official, pair):
    """Its prompts, 50 steps, CFG 8, seed 123, whatever the checkpoint's settings."""
    own = AuthFaceRestorer(
        restorer.pipeline, restorer.settings.override(prompt="b", negative_prompt="c", start="degraded", seed=1)
    )
    settings = own.settings.override("official")
    assert settings == restorer.settings.override("official") != own.settings
    assert (settings.num_inference_steps, settings.guidance_scale, settings.seed) == (50, 8.0, 123)
    square = pair[0].resize((64, 64))
    prompts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "guidance_scale": 8.0}
    expected = official_image(official, square, 1, 512, num_inference_steps=2, **prompts)
    found = own.restore(square, recipe="official", aligned=True, num_inference_steps=2).image
    assert difference(found, expected).max() <= 1


def test_the_wavelets_are_stablesrs():
    """To the last grey level on a photograph, and where content and style are one colour, which float sums miss."""
    photograph = data.astronaut()[:128, 100:228]
    other = data.coffee()[100:228, 100:228]
    flat = np.full((64, 64, 3), 77, np.uint8)
    from faceprior.color import wavelet_color_fix
    from faceprior.restorer.sampling import to_condition

    for content, style in ((photograph, other), (other, photograph), (photograph, photograph), (flat, flat)):
        pixels = wavelet_color_fix(*(to_condition([Image.fromarray(array)]) for array in (content, style)))
        ours = (pixels.clamp(0, 1) * 255).byte()[0].permute(1, 2, 0).numpy()
        apart = difference(ours, stablesr_wavelets(content, style))
        print(apart.max(), (apart > 0).mean())

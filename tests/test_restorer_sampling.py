"""How faces are sampled: the official inference to the letter, settings and recipes, and what saves time or memory."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from skimage import data
from small_restorer import make_effective, small_restorer
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faceprior import tiny
from faceprior.color import wavelet_color_fix
from faceprior.images import to_pil
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.restorer import RECIPES, AuthFaceRestorer, RestorerSettings
from faceprior.restorer.sampling import to_condition

FAST = {"num_inference_steps": 2}
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
    """A random checkpoint of the official layout, without an index: SDXL's factor of 8 and its Euler scheduler.

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
    make_effective(controlnet)
    for name in PARTS.keys() - {"controlnet", "scheduler"}:
        prior.components[name].save_pretrained(path / name)
    controlnet.save_pretrained(path / "controlnet")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(path / "scheduler")
    return path


@pytest.fixture(scope="module")
def published(folder):
    return AuthFaceRestorer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def official(folder):
    return official_pipeline(folder)


def official_pipeline(folder, dtype=torch.float32):
    """The official inference by stock diffusers alone: every part by its sub-folder, residuals in float16.

    dtype: of all but the VAE; the residuals are in float16 where it is that, or float32.
    """
    dtypes = {name: torch.float32 if name == "vae" else dtype for name in PARTS}
    dtypes |= dict.fromkeys(("tokenizer", "tokenizer_2", "scheduler"))
    options = {name: {"torch_dtype": kind} if kind else {} for name, kind in dtypes.items()}
    parts = {name: part.from_pretrained(folder, subfolder=name, **options[name]) for name, part in PARTS.items()}
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


@pytest.fixture(scope="module")
def restorer():
    return small_restorer()


@pytest.fixture(scope="module")
def crops():
    return [Image.fromarray(draw_portrait(seed, 64).image) for seed in (1, 2, 3)]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


# ---------------------------------------------------------------------------------------- sampling aligned crops


def sample_by_hand(
    restorer,
    crop,
    prompt,
    negative_prompt,
    num_inference_steps,
    guidance_scale,
    controlnet_conditioning_scale,
    seed,
    start="noise",
):
    """DDPM with classifier-free guidance, one step after the other; pixels (1, 3, R, R)."""
    pipeline, size = restorer.pipeline, crop.width
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    texts = [pipeline.encode_prompt(text, **options) for text in (negative_prompt, prompt)]
    embeds, pooled = torch.cat([text[0] for text in texts]), torch.cat([text[2] for text in texts])
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[float(size), size, 0, 0, size, size]] * 2)}
    degraded = torch.from_numpy(np.asarray(crop) / np.float32(255)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, 4, size // 4, size // 4, generator=generator)
    if start == "degraded":
        clean = pipeline.vae.encode(2 * degraded[:1] - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
        kept = scheduler.alphas_cumprod[scheduler.timesteps[0]]
        z = kept.sqrt() * clean + (1 - kept).sqrt() * z
    for t in scheduler.timesteps:
        entry = z.repeat(2, 1, 1, 1)
        down, mid = pipeline.controlnet(
            entry,
            t,
            encoder_hidden_states=embeds,
            controlnet_cond=degraded,
            added_cond_kwargs=conditions,
            return_dict=False,
        )
        without, with_prompt = pipeline.unet(
            entry,
            t,
            encoder_hidden_states=embeds,
            added_cond_kwargs=conditions,
            down_block_additional_residuals=[controlnet_conditioning_scale * residual for residual in down],
            mid_block_additional_residual=controlnet_conditioning_scale * mid,
        ).sample.chunk(2)
        noise = without + guidance_scale * (with_prompt - without)
        z = scheduler.step(noise, t, z, generator=generator).prev_sample
    return pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample


@torch.no_grad()
@pytest.mark.parametrize("start", ["noise", "degraded"])
def test_sampling_by_hand(restorer, crops, start):
    """As the official code: pure noise, DDPM, CFG, time ids (H, W, 0, 0, H, W), condition in [0, 1], its scale."""
    values = {
        "prompt": "a man",
        "negative_prompt": "bad face",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 5,
    }
    values["start"] = start
    expected = to_pil(sample_by_hand(restorer, crops[0], controlnet_conditioning_scale=0.7, **values))[0]
    ours = restorer.restore_crops(crops[:1], color_fix="none", controlnet_conditioning_scale=0.7, **values)[0]
    assert difference(ours, expected).max() <= 1
    for change in (
        {"controlnet_conditioning_scale": 1.0},
        {"guidance_scale": 2.0},
        {"prompt": "a woman"},
        {"seed": 6},
        {"num_inference_steps": 2},
    ):
        other = restorer.restore_crops(
            crops[:1], color_fix="none", **{"controlnet_conditioning_scale": 0.7, **values, **change}
        )[0]
        assert difference(other, expected).max() > 1, change


def test_a_fresh_controlnet_leaves_the_base_unchanged(crops):
    """Its outputs are zero: for every face the image is that of the SDXL pipeline alone."""
    fresh = tiny.tiny_restorer()
    images = fresh.restore_crops(crops[:2], color_fix="none", resolution=64, **FAST)
    assert images[0].tobytes() == images[1].tobytes()
    parts = {name: part for name, part in fresh.pipeline.components.items() if name != "controlnet"}
    base = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
    expected = base("", negative_prompt="", generator=torch.Generator().manual_seed(123), **options).images[0]
    assert difference(images[0], expected).max() <= 1


@pytest.mark.parametrize(("grey", "value"), [(255, 1.0), (0, 0.0), (51, 0.2)])
def test_the_condition_is_the_face_in_0_to_1(restorer, grey, value):
    seen = []
    controlnet = restorer.pipeline.controlnet
    hook = controlnet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    restorer.restore_crops([Image.new("RGB", (64, 64), (grey,) * 3)], num_inference_steps=1)
    hook.remove()
    torch.testing.assert_close(seen[0]["controlnet_cond"], torch.full((1, 3, 64, 64), value))
    assert seen[0]["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]


def test_latents_are_not_clipped():
    """Schedulers without the key, as Euler's, would make a DDPM that clips at 1, which is for pixels."""
    prior = tiny.tiny_sdxl()
    prior.scheduler = EulerDiscreteScheduler()
    made = AuthFaceRestorer.from_prior(prior, tiny.tiny_controlnet(prior.unet))
    assert type(made.pipeline.scheduler) is DDPMScheduler and not made.pipeline.scheduler.config.clip_sample
    assert type(prior.scheduler) is EulerDiscreteScheduler


def test_crops_keep_their_order_whatever_the_batch(restorer, crops):
    """Each depends on its own pixels only; sums in another batch round differently, by one grey level at most."""
    alone = [restorer.restore_crops([crop], **FAST)[0] for crop in crops]
    for batch_size in (1, 2, 4):
        together = restorer.restore_crops(crops, batch_size=batch_size, **FAST)
        assert len(together) == 3
        assert max(difference(a, b).max() for a, b in zip(alone, together, strict=True)) <= 1
    assert min(difference(alone[0], other).max() for other in alone[1:]) > 1
    assert restorer.restore_crops([]) == []
    with pytest.raises(ValueError, match="`batch_size` has to be at least 1 but is 0"):
        restorer.restore_crops(crops, batch_size=0)


def test_threads_share_a_restorer(restorer, crops):
    """Each gets its own face back, though what a network embeds is kept for all steps of one call."""
    alone = [restorer.restore_crops([crop], **FAST)[0].tobytes() for crop in crops]
    with ThreadPoolExecutor(len(crops)) as threads:
        for _ in range(3):
            together = threads.map(lambda crop: restorer.restore_crops([crop], **FAST)[0].tobytes(), crops)
            assert list(together) == alone


def test_the_seed_matters_and_repeats(restorer, crops):
    first, again, other = (restorer.restore_crops(crops[:1], **FAST, seed=seed)[0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() and difference(first, other).max() > 1


def test_colours_come_from_the_degraded_face(restorer, crops):
    """The mean of each channel: `wavelet` takes the lowest band, `adain` mean and deviation; to 12 grey levels, as the
    results are clamped to 8 bits."""
    plain, *fixed = (
        restorer.restore_crops(crops[:1], color_fix=kind, **FAST)[0] for kind in ("none", "wavelet", "adain")
    )
    mean = np.asarray(crops[0]).mean(axis=(0, 1))
    before = np.abs(np.asarray(plain).mean(axis=(0, 1)) - mean).max()
    for image in fixed:
        assert np.abs(np.asarray(image).mean(axis=(0, 1)) - mean).max() < min(12, before)


def test_an_unknown_color_fix_or_setting(restorer, crops):
    with pytest.raises(ValueError, match="`color_fix` has to be one of wavelet, adain, none but is 'lab'"):
        restorer.restore_crops(crops, color_fix="lab")
    with pytest.raises(ValueError, match="`start` has to be one of noise, degraded but is 'lq'"):
        restorer.restore_crops(crops, start="lq")
    with pytest.raises(TypeError, match="stepps"):
        restorer.restore(crops[0], faces=[], stepps=3)


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
def test_sampling_is_the_official_codes(published, official, pair, options):
    """Of a batch of two, not square, with one generator; latents unscaled, then pixels."""
    expected = official_latents(official, pair, seed=7, num_inference_steps=4, **options)
    options = {"prompt": "a man", "negative_prompt": "bad", **options, "num_inference_steps": 4}
    latents = published.sample(pair, **options, generator=torch.Generator().manual_seed(7), output_type="latent")
    assert latents.shape == (2, 4, 9, 7)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    pixels = published.sample(pair, **options, generator=torch.Generator().manual_seed(7), output_type="np")
    assert pixels.shape == (2, 72, 56, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, official_pixels(official, expected), atol=1e-4)


def test_in_float16_too(folder, pair):
    """To the bit: with another order of the condition's pixels in memory its last digits differed."""
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": None}
    expected = official_latents(official_pipeline(folder, torch.float16), pair, seed=7, **options)
    published = AuthFaceRestorer.from_pretrained(str(folder), dtype=torch.float16)
    generator = torch.Generator().manual_seed(7)
    found = published.sample(pair, prompt="a man", **options, generator=generator, output_type="latent")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("size", "upscale", "process_size"), [((70, 67), 2, 96), ((64, 64), 1, None)])
def test_the_official_way_from_image_to_image(published, official, size, upscale, process_size, tmp_path):
    """70 x 67 becomes 140 x 134, then 136 x 128; the result is a square. Compared as PNG files."""
    image = Image.fromarray(data.astronaut()).crop((150, 0, 350, 200)).resize(size)
    expected = official_image(
        official, image, upscale, process_size or 512, seed=5, num_inference_steps=3, guidance_scale=8.0
    )
    options = {"recipe": "official", "prompt": "a man", "negative_prompt": "bad", "num_inference_steps": 3, "seed": 5}
    image.save(tmp_path / "in.png")
    result = published.restore(tmp_path / "in.png", aligned=True, upscale=upscale, process_size=process_size, **options)
    result.image.save(tmp_path / "out.png")
    found = Image.open(tmp_path / "out.png")
    assert found.size == expected.size and found.mode == "RGB"
    apart = difference(found, expected)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # where a value lies on the edge between two grey levels


def test_the_official_recipe_takes_nothing_but_the_size_from_the_checkpoint(published, official, pair):
    """Its prompts, 50 steps, CFG 8, seed 123, whatever the checkpoint's settings."""
    own = AuthFaceRestorer(
        published.pipeline, published.settings.override(prompt="b", negative_prompt="c", start="degraded", seed=1)
    )
    settings = own.settings.override("official")
    assert settings == published.settings.override("official") != own.settings
    assert (settings.num_inference_steps, settings.guidance_scale, settings.seed) == (50, 8.0, 123)
    square = pair[0].resize((64, 64))
    prompts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "guidance_scale": 8.0}
    expected = official_image(official, square, 1, 512, num_inference_steps=2, **prompts)
    found = own.restore(square, recipe="official", aligned=True, num_inference_steps=2).image
    assert difference(found, expected).max() <= 1


def test_the_wavelets_are_stablesrs():
    """But for values on the edge between two grey levels: many where an image gets its own colours, back to k / 255."""
    photograph = data.astronaut()[:128, 100:228]
    other = data.coffee()[100:228, 100:228]
    flat = np.full((64, 64, 3), 77, np.uint8)
    for content, style in ((photograph, other), (other, photograph), (photograph, photograph), (flat, flat)):
        pixels = wavelet_color_fix(*(to_condition([Image.fromarray(array)]) for array in (content, style)))
        ours = (pixels.clamp(0, 1) * 255).byte()[0].permute(1, 2, 0).numpy()
        apart = difference(ours, stablesr_wavelets(content, style))
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_what_cannot_be_sampled_is_named(published, pair):
    with pytest.raises(ValueError, match="of one size but are 56 x 72, 64 x 64"):
        published.sample([pair[0], pair[0].resize((64, 64))])
    with pytest.raises(ValueError, match="of one size but are none"):
        published.sample([])
    with pytest.raises(ValueError, match=r"multiples of 8 but are \(60, 72\)"):
        published.sample([pair[0].resize((60, 72))])
    with pytest.raises(ValueError, match="`output_type` has to be np or latent but is 'pil'"):
        published.sample(pair, output_type="pil")
    with pytest.raises(ValueError, match="`upscale` has to be a whole number of at least 1 but is 1.5"):
        published.restore(pair[0], aligned=True, upscale=1.5)
    with pytest.raises(ValueError, match="8 pixels on each side but is 7 x 20"):
        published.restore(pair[0].resize((7, 20)), aligned=True, recipe="official")
    with pytest.raises(ValueError, match="has to be square but is 56 x 72"):
        published.restore(pair[0], aligned=True)
    with pytest.raises(ValueError, match="`recipe` has to be one of official, fast but is 'quick'"):
        published.restore_crops(pair, recipe="quick")


def test_only_prompts_of_the_user_are_reported_as_cut(caplog):
    made, official = tiny.tiny_restorer(), RestorerSettings()
    for prompt in (official.prompt, official.negative_prompt):
        made.sampler.encode(prompt)
    assert "were cut" not in caplog.text
    made.sampler.encode(official.prompt + ", of my grandmother")
    assert "1 of 1 prompts are longer than 77 tokens and were cut" in caplog.text


def test_an_aligned_image_by_another_recipe(restorer, crops):
    """Is restored as a crop is, at the restorer's resolution; nothing is looked for in it."""
    image = crops[0].resize((80, 80))
    expected = restorer.restore_crops([image], **FAST)[0]
    result = restorer.restore(image, aligned=True, detector="no such detector", **FAST).image
    assert result.size == (64, 64) and difference(result, expected).max() == 0
    larger = restorer.restore(image, aligned=True, process_size=96, **FAST).image
    assert difference(larger, expected.resize((96, 96), Image.LANCZOS)).max() == 0


# ------------------------------------------------------------------------------------------- less work


def count_calls(monkeypatch, module):
    """Count a network's passes and the samples in each."""
    calls, forward = [], module.forward

    def counted(*args, **kwargs):
        calls.append(len(args[0]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return calls


def test_a_prompt_is_encoded_once(crops, monkeypatch):
    """Whatever the batch; and the negative one only with guidance."""
    made = tiny.tiny_restorer()
    encoders = [count_calls(monkeypatch, getattr(made.pipeline, name)) for name in ("text_encoder", "text_encoder_2")]
    options = {"resolution": 64, "num_inference_steps": 1, "batch_size": 2, "prompt": "a man"}
    made.restore_crops(crops, **options)
    made.restore_crops(crops[:1], **options)
    assert [len(calls) for calls in encoders] == [1, 1]
    made.restore_crops(crops, **options, guidance_scale=2.0, negative_prompt="bad")
    made.restore_crops(crops, **options, guidance_scale=3.0, negative_prompt="bad")
    assert [len(calls) for calls in encoders] == [2, 2]
    made.restore_crops(crops, **options, guidance_scale=3.0, negative_prompt="a man")
    assert [len(calls) for calls in encoders] == [2, 2]
    made.restore_crops(crops, **{**options, "prompt": "a woman"})
    assert [len(calls) for calls in encoders] == [3, 3]


def test_guidance_costs_nothing_where_it_is_off(restorer, crops, monkeypatch):
    """5 steps at 801, 601, 401, 201 and 1 of 1000: two of them in [0.4, 0.7], where the networks see twice B."""
    passes = [count_calls(monkeypatch, getattr(restorer.pipeline, name)) for name in ("unet", "controlnet")]
    options = {"guidance_scale": 2.0, "prompt": "a man", "num_inference_steps": 5, "scheduler": "ddpm"}
    restorer.restore_crops(crops[:2], **options, guidance_low=0.4, guidance_high=0.7)
    assert passes == [[2, 4, 4, 2, 2]] * 2


def test_guidance_in_an_interval_by_hand(restorer, crops):
    """Off everywhere but at no step, it is guidance 1; on everywhere, it is that of all steps."""
    options = {"prompt": "a man", "negative_prompt": "bad", "num_inference_steps": 4, "color_fix": "none"}
    restore = partial(restorer.restore_crops, crops[:1], **options)
    without, everywhere = restore(guidance_scale=1.0)[0], restore(guidance_scale=5.0)[0]
    assert difference(restore(guidance_scale=5.0, guidance_low=0.9)[0], without).max() == 0
    assert difference(restore(guidance_scale=5.0, guidance_low=0.0, guidance_high=0.8)[0], everywhere).max() == 0
    part = restore(guidance_scale=5.0, guidance_low=0.4, guidance_high=0.6)[0]
    assert min(difference(part, other).max() for other in (without, everywhere)) > 1


def test_the_condition_is_embedded_once(restorer, crops, monkeypatch):
    """For each size of batch, with guidance and without; new for each call."""
    convolved = count_calls(monkeypatch, restorer.pipeline.controlnet.controlnet_cond_embedding.conv_in)
    options = {"guidance_scale": 2.0, "guidance_low": 0.4, "guidance_high": 0.7, "num_inference_steps": 5}
    for _ in range(2):
        restorer.restore_crops(crops[:2], **options)
    assert convolved == [2, 4] * 2


def test_the_control_net_does_not_run_where_it_is_off(restorer, crops, monkeypatch):
    passes = [count_calls(monkeypatch, getattr(restorer.pipeline, name)) for name in ("unet", "controlnet")]
    restorer.restore_crops(crops[:1], num_inference_steps=5, control_guidance_start=0.2, control_guidance_end=0.8)
    assert [len(calls) for calls in passes] == [5, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "dpm++", "strength": 0.5, "start": "degraded"},
        {"scheduler": "ddpm", "strength": 0.25, "start": "degraded"},
    ],
    ids=str,
)
def test_the_strength_is_the_part_of_the_steps_that_is_run(restorer, crops, monkeypatch, options):
    """From the noised input at the first of these steps, so that little of the input is lost."""
    calls = count_calls(monkeypatch, restorer.pipeline.unet)
    restorer.restore_crops(crops[:1], num_inference_steps=8, **options)
    assert len(calls) == 8 * options["strength"]


# ---------------------------------------------------------------------------------- less memory, more speed


@pytest.fixture
def own(restorer):
    """The same networks, in a place of their own."""
    return AuthFaceRestorer.from_prior(
        copy_of(restorer.pipeline), copy.deepcopy(restorer.pipeline.controlnet), restorer.settings
    )


def test_networks_offloaded_by_model(restorer, own, crops):
    """accelerate's hooks bring each network to its device, here a CPU's, and take it away again."""
    options = {"guidance_scale": 2.0, "prompt": "a man", "num_inference_steps": 2, "start": "degraded"}
    expected = restorer.restore_crops(crops[:2], **options)
    assert own.enable_model_cpu_offload(device="cpu") is own
    for _ in range(2):
        found = own.restore_crops(crops[:2], **options)
        assert max(difference(a, b).max() for a, b in zip(found, expected, strict=True)) <= 1
    with pytest.raises(ValueError, match="it is offloaded"):
        own.to("cpu")


def test_networks_offloaded_by_layer(restorer, own, crops):
    """The hooks of accelerate's `cpu_offload`, without its map of tied weights, which fails from CPU to CPU."""
    options = {"guidance_scale": 2.0, "prompt": "a man", "num_inference_steps": 2, "start": "degraded"}
    expected = restorer.restore_crops(crops[:2], **options)
    networks = [part for part in own.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        add_hook_to_module(network, AlignDevicesHook(io_same_device=True), append=True)
        attach_align_device_hook(network, "cpu", offload=True, weights_map=weights)
    for _ in range(2):
        assert {p.device.type for network in networks for p in network.parameters()} == {"meta"}
        assert own.device.type == "cpu"
        found = own.restore_crops(crops[:2], **options)
        assert max(difference(a, b).max() for a, b in zip(found, expected, strict=True)) <= 1


def test_offloading_by_layer_leaves_no_weight(own):
    assert own.enable_sequential_cpu_offload(device="cpu") is own
    assert {p.device.type for p in own.pipeline.unet.parameters()} == {"meta"} and own.device.type == "cpu"


def copy_of(pipeline):
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items() if name != "controlnet"}
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def test_a_tiled_vae_restores_alike(restorer, own, crops):
    """One tile holds these images, which go through it one by one."""
    assert own.enable_vae_tiling() is own
    assert own.pipeline.vae.use_slicing and own.pipeline.vae.use_tiling
    options = {"num_inference_steps": 2, "start": "degraded"}
    one, other = (r.restore_crops(crops[:2], **options) for r in (restorer, own))
    assert max(difference(a, b).max() for a, b in zip(one, other, strict=True)) <= 1


@pytest.mark.slow
def test_compiled_networks_restore_alike(restorer, own, crops):
    """In place, so that what is saved keeps its names; `eager` traces the graph and leaves out the code generation."""
    names = [*own.pipeline.unet.state_dict()]
    assert own.compile(backend="eager") is own
    found, expected = (r.restore_crops(crops[:1], num_inference_steps=2)[0] for r in (own, restorer))
    assert difference(found, expected).max() <= 1
    assert [*own.pipeline.unet.state_dict()] == names


def test_moved_networks_leave_the_text_encoders_on_the_cpu():
    """To a device without storage, as this machine has no other."""
    made = tiny.tiny_restorer()
    made.to("meta")
    devices = {
        name: next(part.parameters()).device.type
        for name, part in made.pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert {name for name, kind in devices.items() if kind == "cpu"} == {"text_encoder", "text_encoder_2"}
    assert made.device.type == "meta"


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheduler": "heun"}, "`scheduler` has to be one of base, "),
        ({"noise": "image"}, "`noise` has to be one of face, batch but is 'image'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be at least 1 but is 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` has to be a whole number but is 2.5"),
        ({"resolution": 0}, "`resolution` has to be at least 1 but is 0"),
        ({"resolution": True}, "`resolution` has to be a whole number but is True"),
        ({"seed": 2**70}, "`seed` has to be a whole number from "),
        ({"seed": None}, "`seed` has to be a whole number but is None"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` has to be a finite number but is nan"),
        ({"controlnet_conditioning_scale": -1}, "`controlnet_conditioning_scale` has to be at least 0 but is -1"),
        ({"prompt": None}, "`prompt` has to be a text but is None"),
        ({"negative_prompt": 3}, "`negative_prompt` has to be a text but is 3"),
        ({"half_residuals": "yes"}, "`half_residuals` has to be true or false but is 'yes'"),
        ({"strength": 0.0, "start": "degraded"}, r"`strength` has to be in \(0, 1\] but is 0.0"),
        ({"strength": 0.5}, "`strength` is 0.5, below 1, which only `start` degraded can have"),
        ({"guidance_low": 0.6, "guidance_high": 0.5}, "but are 0.6 and 0.5"),
        ({"control_guidance_end": 1.5}, "but are 0.0 and 1.5"),
    ],
    ids=str,
)
def test_settings_out_of_range(options, reason):
    with pytest.raises(ValueError, match=reason):
        RestorerSettings(**options)


def test_numbers_of_numpy_are_numbers():
    made = RestorerSettings(resolution=np.int64(64), guidance_scale=np.float32(2), seed=-1, negative_prompt=None)
    assert made == RestorerSettings(resolution=64, guidance_scale=2.0, seed=-1, negative_prompt=None)
    for fidelity in ("1", True, float("nan")):
        with pytest.raises(ValueError, match="`fidelity` has to be a finite number but is"):
            made.override(fidelity=fidelity)


def test_what_the_networks_cannot_sample_is_said_before_they_run(restorer):
    with pytest.raises(ValueError, match="`resolution` has to be a multiple of 4 for this base but is 66"):
        restorer.restore_crops([], resolution=66)
    with pytest.raises(ValueError, match="`num_inference_steps` has to be a whole number from 1 to 1000 but is 1001"):
        restorer.restore_crops([], num_inference_steps=1001)


def test_the_fast_recipe_leaves_what_is_the_checkpoints():
    own = RestorerSettings(resolution=64, guidance_scale=3.0, prompt="a", negative_prompt="b", seed=9)
    fast = own.override("fast")
    assert fast != own and fast.num_inference_steps <= 12
    for name in ("resolution", "guidance_scale", "prompt", "negative_prompt", "seed", "controlnet_conditioning_scale"):
        assert getattr(fast, name) == getattr(own, name)
    assert own.override("fast", num_inference_steps=5).num_inference_steps == 5
    assert RECIPES.keys() == {"official", "fast"}


def test_the_fidelity_by_hand():
    """1 runs the last tenth of the steps with the ControlNet's own scale, 0 all of them with 0.7 of it."""
    own = RestorerSettings(controlnet_conditioning_scale=0.8)
    for fidelity, strength, scale in ((0.0, 1.0, 0.56), (0.5, 0.55, 0.68), (1.0, 0.1, 0.8)):
        found = own.override(fidelity=fidelity)
        assert found.start == "degraded" and found.strength == pytest.approx(strength)
        assert found.controlnet_conditioning_scale == pytest.approx(scale)
    assert own.override("official", 1.0, strength=0.4).strength == 0.4
    with pytest.raises(ValueError, match=r"`fidelity` has to be in \[0, 1\] but is 1.1"):
        own.override(fidelity=1.1)


def test_a_higher_fidelity_is_closer_to_the_input():
    """By the shipped restorer, colours left as they come: the mean square difference falls from each to the next."""
    trained = AuthFaceRestorer.from_pretrained(tiny.resolve("tiny", "restorer"))
    portraits = [Image.fromarray(draw_portrait(seed, 128).image) for seed in (7, 8)]
    errors = []
    for fidelity in (0.0, 0.5, 1.0):
        restored = trained.restore_crops(portraits, color_fix="none", recipe="fast", fidelity=fidelity)
        errors.append(np.mean([np.square(difference(a, b)).mean() for a, b in zip(restored, portraits, strict=True)]))
    assert errors[0] > errors[1] > errors[2]


def test_settings_are_read_as_they_were_written(restorer, crops, tmp_path):
    settings = restorer.settings.override("official", negative_prompt=None, resolution=32)
    AuthFaceRestorer(restorer.pipeline, settings).save_pretrained(tmp_path)
    assert AuthFaceRestorer.from_pretrained(tmp_path).settings == settings

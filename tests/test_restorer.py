"""AuthFaceRestorer: sampling by hand, and the folders that it reads."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from faceprior import tiny
from faceprior.images import to_pil
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.restorer import NEGATIVE_PROMPT, PROMPT, AuthFaceRestorer, RestorerSettings

FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def restorer():
    """A restorer of 64 pixels whose ControlNet has an effect: its zero-initialised outputs are changed."""
    made = tiny.tiny_restorer()
    generator = torch.Generator().manual_seed(0)
    controlnet = made.pipeline.controlnet
    with torch.no_grad():
        for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            layer.weight.add_(0.5 * torch.randn(layer.weight.shape, generator=generator))
        last = controlnet.controlnet_cond_embedding.conv_out
        last.weight.add_(torch.randn(last.weight.shape, generator=generator))
    settings = RestorerSettings(resolution=64, guidance_scale=1.0, prompt="", negative_prompt="")
    return AuthFaceRestorer(made.pipeline, settings)


@pytest.fixture(scope="module")
def folder(restorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("restorer")
    restorer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def crops():
    return [Image.fromarray(draw_portrait(seed, 64).image) for seed in (1, 2, 3)]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


# -------------------------------------------------------------------------------------------- sampling


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


# ------------------------------------------------------------------------------------------------ files


def test_saving_and_loading(restorer, folder, crops):
    loaded = AuthFaceRestorer.from_pretrained(folder)
    assert loaded.settings == restorer.settings
    images = [r.restore_crops(crops[:1], **FAST)[0] for r in (restorer, loaded)]
    assert difference(*images).max() <= 1  # the place of weights in memory decides how sums round


def write_official_layout(folder, target):
    """As it is published: no index, one key more and one less in the ControlNet's config, CLIP's vocab.json."""
    shutil.copytree(folder, target)
    for name in ("model_index.json", "restorer_config.json"):
        (target / name).unlink()
    path = target / "controlnet/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "mid_block_type"}
    path.write_text(json.dumps({**config, "use_pre_img_encoder": False}))
    for name in ("tokenizer", "tokenizer_2"):
        model = json.loads((target / name / "tokenizer.json").read_text())["model"]
        (target / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (target / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (target / name / "tokenizer.json").unlink()


def test_the_official_layout(restorer, folder, tmp_path, crops):
    write_official_layout(folder, tmp_path / "official")
    loaded = AuthFaceRestorer.from_pretrained(str(tmp_path / "official"))
    assert loaded.settings == RestorerSettings()  # the official code's
    assert (loaded.settings.num_inference_steps, loaded.settings.guidance_scale, loaded.settings.seed) == (50, 8.0, 123)
    options = {"resolution": 64, "guidance_scale": 3.0, "prompt": "a man", "negative_prompt": "bad face", **FAST}
    images = [r.restore_crops(crops[:1], **options)[0] for r in (restorer, loaded)]
    assert difference(*images).max() <= 1


def test_the_official_prompts():
    """As published, with the spaces that are missing there."""
    assert PROMPT.startswith("hyper-realistic portrait, face close-up,") and PROMPT.endswith("without deformations")
    assert (
        "R camera,hyper detailed photo - realistic" in PROMPT
        and "ultra HD,extreme meticulous detailing, skin" in PROMPT
    )
    assert "sketch,cartoon, CG Style" in NEGATIVE_PROMPT and NEGATIVE_PROMPT.endswith(
        "hands/fingers, ugly, easy negative"
    )
    assert "  " not in PROMPT + NEGATIVE_PROMPT


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("controlnet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder_2", "config.json"),
        ("tokenizer", "tokenizer.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
def test_a_missing_part_is_named(folder, tmp_path, part, file):
    """Also where only its main file is missing: a tokenizer without words would load silently."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / part / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {part} in .*copy: there is no .*{part}/{file}"):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    with pytest.raises(FileNotFoundError, match=f"no {part} in "):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no restorer at .*06_train_restorer.py"):
        AuthFaceRestorer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"resolution": 64, "stepz": 3}', "unknown keys: stepz; it knows resolution, num_inference_steps"),
        ('{"steps": "50"}', "`num_inference_steps` has to be"),
        ('{"seed": true}', "`seed` has to be"),
        ('{"start": "lq"}', "`start` has to be one of noise, degraded"),
        ('{"resolution": 64', "line 1 column 18"),
        ("[1, 2]", "sequence"),
    ],
)
def test_bad_settings_are_named(folder, tmp_path, text, reason):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/restorer_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"restorer_config.json does not hold a restorer's settings: .*{reason}"):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")


def test_settings_may_be_given_in_part(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/restorer_config.json").write_text('{"resolution": 64, "guidance_scale": 2}')
    loaded = AuthFaceRestorer.from_pretrained(tmp_path / "copy")
    assert loaded.settings == RestorerSettings(resolution=64, guidance_scale=2)


def test_parts_in_bfloat16_beside_a_vae_in_float32(restorer, folder, crops):
    loaded = AuthFaceRestorer.from_pretrained(folder, torch.bfloat16)
    assert {loaded.pipeline.unet.dtype, loaded.pipeline.controlnet.dtype} == {torch.bfloat16}
    assert loaded.pipeline.vae.dtype == torch.float32
    options = {"guidance_scale": 2.0, "prompt": "a man", "color_fix": "none", "start": "degraded", **FAST}
    images = [r.restore_crops(crops[:1], **options)[0] for r in (restorer, loaded)]
    assert difference(*images).mean() < 3


def test_a_prior_of_another_type():
    prior = tiny.tiny_sd15()
    with pytest.raises(ValueError, match="SDXL type, with two text encoders, but is a StableDiffusionPipeline"):
        AuthFaceRestorer.from_prior(prior, tiny.tiny_controlnet(prior.unet))

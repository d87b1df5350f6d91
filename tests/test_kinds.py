"""Every kind of base through guidance tuning: the loss of the flow matching ones by hand, their LoRA files, stage 4."""

import copy
import json
import os
import shutil
import signal
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_stage
from PIL import Image
from safetensors.torch import load_file
from tiny_bases import KINDS, SIZE, TRANSFORMERS, build

from faceprior.bases import load_pipeline
from faceprior.detect import box_mask
from faceprior.diffusion import (
    PromptEmbeddings,
    encode_prompts,
    is_flux,
    make_noise_scheduler,
    pack_latents,
    predict,
    sample_images,
    timesteps_below,
    unpack_latents,
)
from faceprior.guidance import GuidanceTuner, load_tuned
from faceprior.images import save_image
from faceprior.jsonl import read_rows
from faceprior.losses import masked_l2
from faceprior.models import quiet_libraries
from faceprior.pairs import FacePair
from faceprior.procedural import draw_portrait


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@cache
def shared(kind):
    """A pipeline that no test changes."""
    return build(kind)


def tuner_of(kind, train="lora", **options):
    return GuidanceTuner(copy.deepcopy(shared(kind)), train, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @cache
    def folder(kind):
        path = tmp_path_factory.mktemp(kind.replace(".", "-")) / "base"
        shared(kind).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture(scope="module")
def batch():
    generator, mask = torch.Generator().manual_seed(0), torch.zeros(2, 1, SIZE, SIZE)
    mask[0, :, 5:19, 7:22], mask[1, :, 6:20, 7:23] = 1, 1
    good, bad = (torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1 for _ in range(2))
    return {"good": good, "bad": bad, "mask": mask, "prompt": ["a man", "portrait photo, a woman"]}


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def perturb(tuner, scale=0.1):
    """Move the trained weights, as training would."""
    stream = generator(5)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=stream))


def draw(pipeline, prompt="a man"):
    options = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "generator": generator(3)}
    return pipeline(prompt, output_type="np", **options).images


def same_image(one, other):
    """To the rounding of sums, which the place of loaded weights in memory decides; pixels lie in [0, 1]."""
    return np.abs(one - other).max() < 1e-4


def stock(kind, folder):
    """The base as diffusers loads it, to which a folder without T5 has to be explained."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3-no-t5" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------- the network


def stock_velocity(pipeline, transformer, noisy, timesteps, prompts):
    """What the stock pipelines do in a step: their own calls, packing, and ids."""
    device = {"device": "cpu", "dtype": torch.float32}
    if not is_flux(pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device="cpu")
        return transformer(noisy, timestep=timesteps, encoder_hidden_states=embeds, pooled_projections=pooled).sample
    count, channels, height, width = noisy.shape
    distilled = transformer.config.guidance_embeds
    embeds, pooled, text_ids = pipeline.encode_prompt(prompts, None, max_sequence_length=512 if distilled else 256)
    output = transformer(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.ones(count) if distilled else None,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, **device),
    ).sample
    return pipeline._unpack_latents(output, 2 * height, 2 * width, 2)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_predict_is_the_stock_pipelines_call(kind):
    """Also where an image is no square, 24 x 32 latents; the prompt and the level of noise matter."""
    pipeline, prompts = shared(kind), ["a man", "portrait photo, a woman"]
    noisy, timesteps = normal(2, 16, 12, 16), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        embeddings = encode_prompts(pipeline, prompts)
        ours = predict(pipeline, noisy, timesteps, embeddings)
        torch.testing.assert_close(ours, stock_velocity(pipeline, pipeline.transformer, noisy, timesteps, prompts))
        swapped = embeddings[torch.tensor([1, 0])]
        pooled = PromptEmbeddings(embeddings.prompt_embeds, swapped.pooled_prompt_embeds)
        for given in ((timesteps.flip(0), embeddings), (timesteps, swapped), (timesteps, pooled)):
            assert (predict(pipeline, noisy, *given) - ours).abs().max() > 1e-3


def test_tokens_are_those_of_flux():
    """2 x 2 latents of a channel are neighbours in a token: channel 0 of latents 0 1 / 4 5 comes first."""
    latents = torch.arange(32.0).view(1, 2, 4, 4)
    tokens = pack_latents(latents)
    assert tokens.shape == (1, 4, 8) and tokens[0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    odd = normal(3, 16, 6, 10)
    assert torch.equal(pack_latents(odd), diffusers.FluxPipeline._pack_latents(odd, 3, 16, 6, 10))
    assert torch.equal(unpack_latents(pack_latents(odd), 3, 5), odd)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_sampled_images_are_the_stock_pipelines(kind):
    """Latents decoded with their shift, and of FLUX unpacked; FLUX.1 dev minds the guidance scale, schnell does not."""
    pipeline = shared(kind)
    longest = {"max_sequence_length": 512 if kind == "flux-dev" else 256}
    options = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, **longest}
    images = {}
    for scale in (1.0, 4.0):
        images[scale] = sample_images(pipeline, ["a man"], [7], SIZE, steps=2, guidance_scale=scale)[0]
        expected = pipeline(["a man"], generator=[generator(7)], guidance_scale=scale, **options).images[0]
        assert np.abs(np.asarray(images[scale], int) - np.asarray(expected, int)).max() <= 1
    assert (images[1.0] == images[4.0]) == (kind == "flux-schnell")


@pytest.mark.parametrize("kind", ["sd1", "sd3", "flux-dev"])
def test_a_negative_prompt_is_that_of_the_stock_pipeline(kind):
    """FLUX.1 has no classifier-free guidance that it could lead."""
    pipeline, options = shared(kind), {"size": SIZE, "steps": 2, "guidance_scale": 4.0}
    if kind == "flux-dev":
        with pytest.raises(ValueError, match="`negative_prompt` is 'ugly', which FLUX.1 cannot use"):
            sample_images(pipeline, ["a man"], [7], **options, negative_prompt="ugly")
        return
    plain, negative = (sample_images(pipeline, ["a man"], [7], **options, negative_prompt=p)[0] for p in ("", "ugly"))
    sizes = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "guidance_scale": 4.0}
    expected = pipeline(["a man"], negative_prompt=["ugly"], generator=[generator(7)], **sizes).images[0]
    assert np.abs(np.asarray(negative, int) - np.asarray(expected, int)).max() <= 1
    assert negative != plain


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_prompts_of_the_transformers(kind):
    """T5's 256 or 512 tokens, of Stable Diffusion 3 behind CLIP's 77, in T5's width; T5's are zeros where it is absent.

    A dropped prompt is the encoding of the empty one, which Stable Diffusion 3 is sampled against.
    """
    pipeline = shared(kind)
    embeddings = encode_prompts(pipeline, ["a man", None, "", "a man"])
    lengths = {"flux-dev": 512, "flux-schnell": 256}
    assert embeddings.prompt_embeds.shape == (4, lengths.get(kind, 77 + 256), 64)
    assert embeddings.pooled_prompt_embeds.shape == (4, 16 if is_flux(pipeline) else 48)
    assert torch.equal(embeddings.prompt_embeds[0], embeddings.prompt_embeds[3])
    assert torch.equal(embeddings.prompt_embeds[1], embeddings.prompt_embeds[2])
    assert not torch.equal(embeddings.prompt_embeds[0], embeddings.prompt_embeds[1])
    if not is_flux(pipeline):
        _, sampled, _, pooled = pipeline.encode_prompt("a man", None, None)
        torch.testing.assert_close(embeddings.prompt_embeds[1:2], sampled)
        torch.testing.assert_close(embeddings.pooled_prompt_embeds[1:2], pooled)
    assert (embeddings.prompt_embeds[:, 77:].abs().max() == 0) == (kind == "sd3-no-t5")


# ------------------------------------------------------------------------------------------------ loss


def level_of(t_end):
    """s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) of a = alpha_bar, the product of 1 - beta over the first steps.

    The betas of Stable Diffusion go from .00085 to .012, evenly in their roots.
    """
    alpha_bar = torch.prod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)[: int(1000 * t_end)] ** 2)
    return ((1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())).item()


def test_t_end_is_a_level_of_noise():
    """s at a quarter, half, three quarters and just below all of Stable Diffusion's schedule, in two digits.

    With shift 3, s = 3 u / (1 + 2 u), so u = s / (3 - 2 s): of s = .62, u is .353, about 353 of 1000 timesteps.
    """
    assert [round(level_of(t_end), 2) for t_end in (0.25, 0.5, 0.75, 0.9999)] == [0.41, 0.62, 0.80, 0.94]
    for kind, shift in (("sd3", 3), ("flux-dev", 1), ("flux-schnell", 1)):
        scheduler = make_noise_scheduler(shared(kind))
        for t_end in (0.25, 0.5, 0.75, 0.9999):
            timesteps = timesteps_below(scheduler, t_end)
            shares = torch.arange(1, 1001) / 1000
            levels = shift * shares / (1 + (shift - 1) * shares)
            torch.testing.assert_close(timesteps, 1000 * levels[levels <= level_of(t_end)])
        torch.testing.assert_close(timesteps_below(scheduler), 1000 * levels)
        assert torch.equal(timesteps_below(scheduler, 1e-9), timesteps_below(scheduler, 0.001))


def test_the_training_scheduler_of_a_flow_base_that_is_sampled_by_another():
    """A multistep solver with flow sigmas calls its shift by another name."""
    pipeline = copy.copy(shared("sd3"))
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    torch.testing.assert_close(make_noise_scheduler(pipeline).sigmas, make_noise_scheduler(shared("sd3")).sigmas)
    pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(make_noise_scheduler(pipeline).sigmas, make_noise_scheduler(shared("sd3")).sigmas)


def loss_by_hand(pipeline, trained, batch, shift):
    """Algorithm 1 with z_t = (1 - s) z_0 + s e and x_0 = z_t - s v; (loss, target, prediction, mask).

    Random numbers come in the order timesteps, noise. Of the 1000 levels s = shift u / (1 + (shift - 1) u), u = 1/1000
    ... 1, those up to the level of t_end = .5 are drawn from.
    """
    shares, stream = torch.arange(1, 1001) / 1000, generator()
    levels = shift * shares / (1 + (shift - 1) * shares)
    levels = levels[levels <= level_of(0.5)]
    drawn = torch.cat([torch.randint(0, len(levels), (1,), generator=stream) for _ in range(2)])
    sigmas = levels[drawn].view(2, 1, 1, 1)
    noise = torch.cat([torch.randn(1, 16, 16, 16, generator=stream) for _ in range(2)])
    predicted, config = [], pipeline.vae.config
    for transformer, pixels in ((pipeline.transformer, batch["good"]), (trained, batch["bad"])):
        latents = (pipeline.vae.encode(pixels).latent_dist.mean - config.shift_factor) * config.scaling_factor
        noisy = (1 - sigmas) * latents + sigmas * noise
        velocity = stock_velocity(pipeline, transformer, noisy, 1000 * sigmas.flatten(), batch["prompt"])
        predicted.append(noisy - sigmas * velocity)
    target, prediction = predicted
    mask = F.max_pool2d(batch["mask"], 2)
    return ((mask * (target - prediction)) ** 2).mean(), target, prediction, mask


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_loss_by_hand(batch, kind):
    """The target by the base, the prediction by the transformer with a moved LoRA."""
    seen, base = [], shared(kind)
    tuner = tuner_of(kind, prompt_drop=0, distance=lambda *a: seen.append(a) or masked_l2(*a))
    perturb(tuner)
    loss = tuner.loss(batch, generator())
    with torch.no_grad():
        shift = 1 if is_flux(base) else 3
        expected, target, prediction, mask = loss_by_hand(base, tuner.denoiser, batch, shift)
    assert (target - prediction).abs().max() > 0.1  # the two sides do differ
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for given, right in zip(seen[0], (target, prediction, mask), strict=True):
        torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-4)
    assert not seen[0][0].requires_grad and seen[0][1].requires_grad


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_the_denoising_loss_by_hand(batch, kind):
    """Mean squared error of the flow e - z_0 on the good images, at all levels of noise."""
    base, tuner, stream = shared(kind), tuner_of(kind, prompt_drop=0), generator(2)
    loss = tuner.denoising_loss(batch, generator(2))
    shares = (torch.cat([torch.randint(0, 1000, (1,), generator=stream) for _ in range(2)]) + 1) / 1000
    sigmas = (shares if is_flux(base) else 3 * shares / (1 + 2 * shares)).view(2, 1, 1, 1)
    assert sigmas.max() > level_of(0.5)  # where the guidance loss never goes
    noise = torch.cat([torch.randn(1, 16, 16, 16, generator=stream) for _ in range(2)])
    with torch.no_grad():
        vae = base.vae
        latents = (vae.encode(batch["good"]).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
        noisy = (1 - sigmas) * latents + sigmas * noise
        velocity = stock_velocity(base, base.transformer, noisy, 1000 * sigmas.flatten(), batch["prompt"])
    torch.testing.assert_close(loss, F.mse_loss(velocity, noise - latents), rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------- the tuner


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tuned_by_a_lora(batch, kind):
    """Equal sides give no loss before, to the last bit; then gradients reach every layer of the LoRA.

    The original network stays the base's, to the last bit, and so do images without the tuning.
    """
    tuner, base = tuner_of(kind, rank=2), shared(kind)
    assert tuner.loss({**batch, "bad": batch["good"]}, generator()).item() == 0
    perturb(tuner)
    tuner.loss(batch, generator()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tuner.trainable_parameters())
    frozen = {id(p) for p in tuner.trainable_parameters()}
    parts = [part for part in tuner.pipeline().components.values() if isinstance(part, torch.nn.Module)]
    assert all(p.grad is None for part in parts for p in part.parameters() if id(p) not in frozen)

    channels, side = base.vae.config.latent_channels, SIZE // base.vae_scale_factor
    timesteps = tuner.sample_timesteps([generator(1), generator(2)])
    given = (normal(2, channels, side, side), timesteps, encode_prompts(base, ["a man", "a woman"]))
    with torch.no_grad():
        expected = predict(base, *given)
        with tuner.original() as original:
            assert torch.equal(predict(tuner.pipeline(), *given, original), expected)
        assert (predict(tuner.pipeline(), *given) - expected).abs().max() > 1e-3
    before = draw(base)
    with tuner.untuned() as untuned:
        assert (draw(untuned) == before).all()
    assert np.abs(draw(tuner.pipeline()) - before).max() > 1e-3


@pytest.mark.parametrize("kind", [pytest.param("sd2-v", marks=pytest.mark.slow), "sdxl-v-ztsnr", "sd3.5", "flux-dev"])
def test_fit_lowers_the_loss(kind):
    """Grey images with brighter bad sides, at timesteps and noise that training did not draw.

    The factor brings the latents of the untrained VAE, which differ little, to a spread of about one.
    """
    tuner, plain = tuner_of(kind, rank=8), torch.ones(2, 3, SIZE, SIZE)
    tuner.pipeline().vae.register_to_config(scaling_factor=5.0)
    good = torch.tensor([-0.9, -0.5]).view(2, 1, 1, 1) * plain
    batch = {"good": good, "bad": good + 1, "mask": plain[:, :1], "prompt": ["a man", "a woman"]}

    def mean_loss():
        with torch.no_grad():
            return sum(tuner.loss(batch, generator(seed)).item() for seed in range(4)) / 4

    dataset = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    before = mean_loss()
    tuner.fit(dataset, steps=12, learning_rate=2e-2, device="cpu")
    assert mean_loss() < 0.98 * before  # the attention of so small a network changes little


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl-v-ztsnr", "sd3", "sd3-no-t5", "sd3.5", "flux-dev", "flux-schnell"])
def test_a_base_in_bfloat16(folders, batch, kind):
    """The LoRA is float32, the others stay; the loss is near that in float32, and images are drawn."""
    tuner = GuidanceTuner.from_pretrained(folders(kind), torch.bfloat16, train="lora", rank=2)
    pipeline, trained = tuner.pipeline(), {id(p) for p in tuner.trainable_parameters()}
    assert pipeline.vae.dtype == torch.float32
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipeline, name, None)
        assert encoder is None or encoder.dtype == torch.bfloat16
    for parameter in tuner.denoiser.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16)
    assert tuner.loss({**batch, "bad": batch["good"]}, generator()).item() == 0
    loss = tuner.loss(batch, generator())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(tuner_of(kind).loss(batch, generator()).item(), rel=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in tuner.trainable_parameters() if p.grad is not None)
    (base_image,) = sample_images(pipeline, ["a man"], [0], SIZE, steps=2)
    perturb(tuner)
    assert sample_images(pipeline, ["a man"], [0], SIZE, steps=2)[0] != base_image
    with tuner.untuned() as original:
        assert sample_images(original, ["a man"], [0], SIZE, steps=2)[0] == base_image


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd3.5", "flux-dev"])
def test_gradient_checkpointing_gives_the_same_gradients(folders, batch, kind, dtype):
    gradients = []
    for enabled in (False, True):
        tuner = GuidanceTuner.from_pretrained(folders(kind), dtype, train="lora", rank=2)
        perturb(tuner)
        tuner.denoiser.train()
        if enabled:
            tuner.denoiser.enable_gradient_checkpointing()
        tuner.loss(batch, generator()).backward()
        gradients.append([p.grad for p in tuner.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "sd2" else k for k in KINDS])
def test_a_lora_draws_the_tuned_image_in_stock_diffusers(folders, tmp_path, kind):
    """By its file's tensors and metadata, where alpha / rank = 2.5; and by `load_tuned`, as stage 7 loads it."""
    tuner = GuidanceTuner.from_pretrained(folders(kind), train="lora", rank=4, alpha=10)
    perturb(tuner)
    tuner.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    part = "transformer" if kind in TRANSFORMERS else "unet"
    assert all(name.startswith(f"{part}.") for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    tuned, pipeline = draw(tuner.pipeline()), stock(kind, folders(kind))
    before = draw(pipeline)
    assert np.abs(before - tuned).max() > 0.01
    pipeline.load_lora_weights(tmp_path)
    assert same_image(draw(pipeline), tuned)
    assert same_image(draw(load_tuned(tmp_path, folders(kind))), tuned)
    pipeline.unload_lora_weights()
    assert same_image(draw(pipeline), before)


def test_a_lora_of_another_kind_is_refused(folders, tmp_path):
    tuner_of("flux-dev", rank=2).save_pretrained(tmp_path)
    for other in ("sd3", "sd1"):
        with pytest.raises(ValueError, match="does not fit the base"):
            load_tuned(tmp_path, folders(other))


@pytest.mark.parametrize("train", ["self_attention", "full"])
@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_of_a_transformer_only_a_lora_is_trained(folders, tmp_path, monkeypatch, kind, train):
    """By the constructor, and by `from_pretrained` and stage 4 before a weight is loaded or an output made."""
    reason = f"`train` is {train}, and of a transformer only a LoRA is trained: give `--train lora`"
    with pytest.raises(ValueError, match=reason):
        tuner_of(kind, train)
    with pytest.raises(ValueError, match=reason):
        GuidanceTuner.from_pretrained(configs_only(folders(kind), tmp_path / "base"), train=train)
    stage = load_stage("04_guidance_tune")
    monkeypatch.setattr(stage, "gather_pairs", lambda folders: ([], []))
    config = stage.Config(base=str(tmp_path / "base"), output=str(tmp_path / "out"), train=train, device="cpu")
    with pytest.raises(ValueError, match=reason):
        stage.main(config)
    assert not (tmp_path / "out").exists()


def configs_only(folder, copied):
    """A copy of a base without its weights."""
    return str(shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*.safetensors")))


def test_the_native_resolution():
    """8 latents of 4 pixels of the U-Nets, 16 of 2 of SD3's transformer; FLUX's pipeline has 128, as at full size."""
    for kind, side in {"sd1": 32, "sdxl": 32, "sd3": 32, "flux-dev": 256}.items():
        assert tuner_of(kind).resolution == side


# ----------------------------------------------------------------------------------------------- stage 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder as stage 1 leaves it: a drawn face, upright and upside down."""
    folder, drawing = tmp_path_factory.mktemp("pairs"), draw_portrait(1, 64)
    row = FacePair(
        id="a", photograph="a.png", good="good.png", bad="bad.png", mask="mask.png", box=list(drawing.box),
        landmarks=None, confidence=1.0, area_ratio=0.2, strength=0.4, prompt="a man", seed=0, base="tiny",
        difference=9.0,
    ).to_row()  # fmt: skip
    good = Image.fromarray(drawing.image)
    for name, image in (("good", good), ("bad", good.rotate(180)), ("mask", box_mask((64, 64), drawing.box))):
        save_image(image, folder / f"{name}.png")
    rows = [{**row, "id": str(i), "prompt": prompt} for i, prompt in enumerate(("a man", "a woman", "a boy"))]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def settings(folder, pairs, output, **values):
    common = {"train": "lora", "rank": 2, "resolution": SIZE, "steps": 3, "batch_size": 2, "save_every": 1}
    common |= {"num_samples": 1, "sample_steps": 2, "learning_rate": 1e-2, "device": "cpu"}
    return {"base": folder, "pairs": pairs, "output": str(output), **common, **values}


@pytest.mark.parametrize("kind", ["sd3.5", "flux-dev"])
def test_stage_4_is_killed_and_resumed(folders, pairs, tmp_path, monkeypatch, kind):
    """Stopped by SIGTERM in its second step, the same command ends with the weights, log and samples of a whole run."""
    stage = load_stage("04_guidance_tune")
    stage.main(stage.Config(**settings(folders(kind), pairs, tmp_path / "whole")))
    cut, calls, loss = stage.Config(**settings(folders(kind), pairs, tmp_path / "cut")), [], stage.guidance_loss

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(stage, "guidance_loss", interrupted)
        stage.main(cut)
    state = json.loads((tmp_path / "cut/resume/state.json").read_text())
    assert state["step"] == 2 and not (tmp_path / "cut/done.json").exists()
    stage.main(cut)
    for file in ("metrics.jsonl", "samples/000_before.png", "samples/000_after.png"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    cut, whole = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("cut", "whole"))
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in cut)
    rows, _ = read_rows(tmp_path / "whole/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    pipelines = {"before": load_pipeline(folders(kind)), "after": load_tuned(tmp_path / "whole", folders(kind))}
    for side, pipeline in pipelines.items():
        (drawn,) = sample_images(pipeline, ["a man"], [0], SIZE, steps=2, guidance_scale=2.5)
        with Image.open(tmp_path / f"whole/samples/000_{side}.png") as saved:
            assert np.abs(np.asarray(drawn, int) - np.asarray(saved, int)).max() <= 1


@pytest.mark.parametrize("kind", [pytest.param("sd3-no-t5", marks=pytest.mark.slow), "flux-schnell"])
def test_a_lora_of_stage_4_in_stage_7(folders, pairs, tmp_path, kind):
    """Both in bfloat16, with checkpointing: stage 7 draws what `load_tuned` does, and not what the base does."""
    four, seven = load_stage("04_guidance_tune"), load_stage("07_eval")
    values = {"mixed_precision": "bf16", "gradient_checkpointing": True, "resolution": 64, "num_samples": 0}
    four.main(four.Config(**settings(folders(kind), pairs, tmp_path / "guided", **values)))
    (tmp_path / "prompts.txt").write_text("a man")
    config = seven.Config(
        protocols=("generation",), generators=("base", f"tuned={tmp_path / 'guided'}"), base=folders(kind), scorer="",
        output=str(tmp_path / "results"), prompts=str(tmp_path / "prompts.txt"), generation_resolution=64,
        sample_steps=2, mixed_precision="bf16", detector="mtcnn", device="cpu",
    )  # fmt: skip
    seven.main(config)
    pipelines = {
        "base": load_pipeline(folders(kind), torch.bfloat16),
        "tuned": load_tuned(tmp_path / "guided", folders(kind), torch.bfloat16),
    }
    pictures = {}
    for name, pipeline in pipelines.items():
        (drawn,) = sample_images(pipeline, ["a man"], [0], 64, steps=2, guidance_scale=2.5)
        with Image.open(tmp_path / f"results/generation/images/{name}/00000.png") as saved:
            pictures[name] = np.asarray(saved, int)
        assert np.abs(np.asarray(drawn, int) - pictures[name]).max() <= 1
    assert (pictures["base"] != pictures["tuned"]).any()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"resolution": 66}, "`resolution` has to be a multiple of 4 for this base but is 66"),
        ({"sampler": "ddim"}, "`sampler` is ddim, which cannot sample a base with FlowMatchEuler.*: use base"),
    ],
)
def test_stage_4_refuses_what_a_transformer_cannot_do_before_it_trains(folders, pairs, tmp_path, values, reason):
    stage = load_stage("04_guidance_tune")
    with pytest.raises(ValueError, match=reason):
        stage.main(stage.Config(**settings(folders("flux-dev"), pairs, tmp_path / "out", **values)))
    assert not (tmp_path / "out/metrics.jsonl").exists()

"""What the methods need of a base: prompts, latents and noise; x_0 against the schedulers' own steps."""

import logging

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_bases import build

from faceprior.diffusion import (
    added_conditions,
    decode_checkpointed,
    decode_latents,
    downsample_mask,
    encode_latents,
    encode_prompts,
    is_xl,
    make_noise_scheduler,
    make_sampler,
    noise_like,
    pred_original_sample,
    prediction_type,
    report_long_prompts,
    report_small_side,
    require_side,
    sampled_with,
    training_target,
)
from faceprior.tiny import tiny_sd15, tiny_sdxl


@pytest.fixture(scope="module")
def sd15():
    return tiny_sd15()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# x_0, targets and schedulers


DISCRETE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_x0_is_that_of_the_schedulers_own_step(scheduler_class, kind):
    scheduler = scheduler_class(prediction_type=kind, **DISCRETE)
    scheduler.set_timesteps(1000)
    sample, model_output = normal(2, 4, 3, 5, seed=1), normal(2, 4, 3, 5, seed=2)
    for step in (0, 20, 500, 999):
        own = scheduler.step(model_output, step, sample, generator=torch.Generator()).pred_original_sample
        ours = pred_original_sample(scheduler, model_output, torch.tensor([step, step]), sample)
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_every_sample_has_its_own_timestep():
    scheduler = DDPMScheduler(**DISCRETE)
    sample, model_output, timesteps = normal(3, 4, 2, 2, seed=1), normal(3, 4, 2, 2, seed=2), torch.tensor([900, 1, 40])
    together = pred_original_sample(scheduler, model_output, timesteps, sample)
    apart = [
        pred_original_sample(scheduler, model_output[i : i + 1], timesteps[i : i + 1], sample[i : i + 1])
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_comes_back_from_the_training_target(kind):
    """A network that predicts its target exactly has predicted x_0 exactly, for every target."""
    scheduler = DDPMScheduler(prediction_type=kind, **DISCRETE)
    latents, noise, timesteps = normal(3, 4, 2, 2, seed=1), normal(3, 4, 2, 2, seed=2), torch.tensor([0, 300, 800])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = training_target(scheduler, latents, noise, timesteps)
    torch.testing.assert_close(pred_original_sample(scheduler, target, timesteps, noisy), latents, rtol=1e-4, atol=1e-4)


def test_flow_matching_by_hand():
    """x_0 = x_t - s v. With T = 4 and no shift the noise levels s at timesteps 4, 3, 2, 1 are 1, 3/4, 1/2, 1/4."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=4)
    sample, velocity = torch.full((2, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1), 2.0)
    x0 = pred_original_sample(scheduler, velocity, torch.tensor([3.0, 1.0]), sample)
    assert x0.flatten().tolist() == [5 - 0.75 * 2, 5 - 0.25 * 2]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_against_the_schedulers_own_noise(shift):
    """Its scale_noise makes x_t = (1 - s) x_0 + s e, from which the target e - x_0 leads back to x_0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise = normal(3, 4, 2, 2, seed=1), normal(3, 4, 2, 2, seed=2)
    timesteps = scheduler.timesteps[torch.tensor([10, 500, 990])]
    noisy = scheduler.scale_noise(latents, timesteps, noise)
    target = training_target(scheduler, latents, noise, timesteps)
    torch.testing.assert_close(target, noise - latents)
    torch.testing.assert_close(pred_original_sample(scheduler, target, timesteps, noisy), latents, rtol=0, atol=1e-5)
    scheduler.set_timesteps(1)  # its one step, from pure noise to s = 0, is the same formula
    stepped = scheduler.step(target, scheduler.timesteps[0], noise).prev_sample
    ours = pred_original_sample(scheduler, target, scheduler.timesteps.repeat(3), noise)
    torch.testing.assert_close(ours, stepped)


def test_flow_timesteps_have_to_be_the_schedulers_own():
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="among the scheduler's own"):
        pred_original_sample(scheduler, normal(1, 1, 1, 1), torch.tensor([0.25]), normal(1, 1, 1, 1))


def test_half_precision_is_computed_in_float32():
    """At t = 999 alpha_bar is 0.0047: dividing by its root in float16 would lose two digits."""
    scheduler = DDPMScheduler(**DISCRETE)
    sample, model_output = normal(1, 4, 2, 2, seed=1).half(), normal(1, 4, 2, 2, seed=2).half()
    x0 = pred_original_sample(scheduler, model_output, torch.tensor([999]), sample)
    expected = pred_original_sample(scheduler, model_output.float(), torch.tensor([999]), sample.float())
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, expected)


def test_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="has to be one of epsilon, .* but is 'noise'"):
        prediction_type(DDPMScheduler(prediction_type="noise"))


def test_training_scheduler_keeps_the_betas_of_the_pipeline(sd15):
    scheduler = make_noise_scheduler(sd15)
    assert isinstance(scheduler, DDPMScheduler)
    torch.testing.assert_close(scheduler.alphas_cumprod, sd15.scheduler.alphas_cumprod)
    assert prediction_type(scheduler) == "epsilon"


def test_training_scheduler_of_a_flow_model_is_its_own():
    pipeline = tiny_sd15()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = make_noise_scheduler(pipeline)
    assert prediction_type(scheduler) == "flow_prediction"
    torch.testing.assert_close(scheduler.sigmas, pipeline.scheduler.sigmas)


# latents and masks


def test_latents_are_scaled(sd15):
    """The mean of the posterior times the VAE's scaling factor; decoding undoes the factor."""
    pixel_values, vae = normal(2, 3, 16, 24).clamp(-1, 1), sd15.vae
    with torch.no_grad():
        latents = encode_latents(vae, pixel_values)
        mean = vae.encode(pixel_values).latent_dist.mean
        torch.testing.assert_close(latents, mean * vae.config.scaling_factor)
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)
    assert latents.shape == (2, 4, 4, 6)


def test_shifted_latents():
    """(z - shift) * scale in, z / scale + shift out: the two cancel."""
    torch.manual_seed(0)
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(8,), scaling_factor=0.5, shift_factor=0.25)
    with torch.no_grad():
        pixel_values = normal(1, 3, 8, 8)
        mean = vae.encode(pixel_values).latent_dist.mean
        latents = encode_latents(vae, pixel_values)
        torch.testing.assert_close(latents, (mean - 0.25) * 0.5)
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(mean).sample)


def test_latents_with_a_mean_and_deviation_per_channel(sd15):
    """(z - mean) * scale / std in, z * std / scale + mean out, as Playground's VAE has it: the two cancel."""
    torch.manual_seed(0)
    mean, std = [-1.66, 1.89, -1.38, 2.52], [8.49, 5.90, 6.55, 5.23]
    vae = AutoencoderKL(
        latent_channels=4,
        norm_num_groups=8,
        block_out_channels=(8,),
        scaling_factor=0.5,
        latents_mean=mean,
        latents_std=std,
    )
    with torch.no_grad():
        pixel_values = normal(2, 3, 8, 8)
        raw = vae.encode(pixel_values).latent_dist.mean
        latents = encode_latents(vae, pixel_values)
        for channel in range(4):
            torch.testing.assert_close(latents[:, channel], (raw[:, channel] - mean[channel]) * 0.5 / std[channel])
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


def test_a_sample_of_the_posterior_depends_on_its_own_generator(sd15):
    """(mean + std e) * scale, e drawn from the sample's generator, in every batch."""
    pixel_values, vae = normal(3, 3, 16, 16).clamp(-1, 1), sd15.vae
    with torch.no_grad():
        together = encode_latents(vae, pixel_values, generators(5, 6, 7))
        apart = [encode_latents(vae, pixel_values[i : i + 1], generators(5 + i)) for i in range(3)]
        posterior = vae.encode(pixel_values[1:2]).latent_dist
    torch.testing.assert_close(together, torch.cat(apart))
    expected = (posterior.mean + posterior.std * normal(1, 4, 4, 4, seed=6)) * vae.config.scaling_factor
    torch.testing.assert_close(together[1:2], expected)


def test_gradients_reach_the_latents(sd15):
    latents = normal(1, 4, 4, 4).requires_grad_()
    decode_latents(sd15.vae, latents).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_decoding_with_checkpoints_is_decoding(sd15):
    """The same pixels and gradients; between the passes only the latents are kept, not the decoder's activations."""
    results, kept = [], []
    for decode in (decode_latents, decode_checkpointed):
        latents, sizes = normal(2, 4, 8, 8).requires_grad_(), []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pixels = decode(sd15.vae, latents)
        kept.append(sum(sizes))
        (gradient,) = torch.autograd.grad(pixels.square().sum(), latents)
        results.append((pixels.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert kept[1] <= 2 * latents.numel() < kept[0] / 100


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    latents = torch.zeros(3, 4, 2, 2)
    noise = noise_like(latents, generators(1, 2, 3))
    assert torch.equal(noise[1:2], noise_like(latents[:1], generators(2)))
    assert torch.equal(noise_like(latents, torch.Generator().manual_seed(1)), normal(3, 4, 2, 2, seed=1))
    assert noise_like(latents.half(), generators(1, 2, 3)).dtype == torch.float16


def test_a_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="one or 4, one per sample, but is 2"):
        noise_like(torch.zeros(4, 1, 1, 1), generators(1, 2))


def test_mask_cell_is_face_when_any_of_its_pixels_is():
    """8 x 8 pixels on a grid of 2 x 2 cells of 4 x 4: one pixel at (0, 3) belongs to cell (0, 0), (5, 4) to (1, 1)."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 0, 3] = mask[..., 5, 4] = 1
    assert downsample_mask(mask, (2, 2)).tolist() == [[[[1, 0], [0, 1]]]]
    assert downsample_mask(mask.bool(), (2, 2)).dtype == torch.float32


# prompts


def test_prompts_are_encoded_in_their_order(sd15):
    embeddings = encode_prompts(sd15, ["a face", "", "a face"])
    assert embeddings.prompt_embeds.shape == (3, 77, 64) and embeddings.pooled_prompt_embeds is None
    assert torch.equal(embeddings.prompt_embeds[0], embeddings.prompt_embeds[2])
    torch.testing.assert_close(embeddings.prompt_embeds[1:2], encode_prompts(sd15, [""]).prompt_embeds)
    assert not torch.allclose(embeddings.prompt_embeds[0], embeddings.prompt_embeds[1])
    assert not embeddings.prompt_embeds.requires_grad


def test_sdxl_has_pooled_embeddings_and_size_conditions(sdxl, sd15):
    assert is_xl(sdxl) and not is_xl(sd15)
    embeddings = encode_prompts(sdxl, ["a face", ""])
    assert embeddings.prompt_embeds.shape == (2, 77, 128) and embeddings.pooled_prompt_embeds.shape == (2, 64)
    conditions = added_conditions(embeddings, 96, 128)
    assert conditions["time_ids"].tolist() == [[96, 128, 0, 0, 96, 128]] * 2
    assert torch.equal(conditions["text_embeds"], embeddings.pooled_prompt_embeds)
    assert torch.equal(embeddings[:1].pooled_prompt_embeds, embeddings.pooled_prompt_embeds[:1])
    assert added_conditions(encode_prompts(sd15, [""]), 96, 128) is None


def test_a_dropped_prompt_is_what_is_sampled_without_one(sdxl, sd15):
    """SDXL's encode_prompt gives the unconditional branch: zeros, or the encoding of "" where its config says so."""
    for zeros in (True, False):
        sdxl.register_to_config(force_zeros_for_empty_prompt=zeros)
        _, sampled, _, pooled = sdxl.encode_prompt("a face", do_classifier_free_guidance=True)
        embeddings = encode_prompts(sdxl, ["a face", None, ""])
        torch.testing.assert_close(embeddings.prompt_embeds[1:2], sampled)
        torch.testing.assert_close(embeddings.pooled_prompt_embeds[1:2], pooled)
        assert (embeddings.prompt_embeds[1].abs().max() == 0) == zeros
        assert embeddings.prompt_embeds[2].abs().max() > 0  # an empty caption is no dropped one
    sampled = sd15.encode_prompt("a face", "cpu", 1, do_classifier_free_guidance=True)[1]
    torch.testing.assert_close(encode_prompts(sd15, ["a face", None]).prompt_embeds[1:], sampled)


def test_prompts_that_are_cut_are_counted_and_the_first_is_named(sd15, sdxl, caplog):
    """Each word of the tiny tokenizer's list is a token; start and end are two more, so 75 words fit and 76 do not."""
    fitting, long, longer = ("face " * count + "man" for count in (74, 75, 200))
    for pipeline in (sd15, sdxl):
        caplog.clear()
        report_long_prompts(pipeline, [fitting, "", "a man", long, longer, long])
        shown = "face " * 16 + "..."
        assert caplog.messages == [f'2 of 4 prompts are longer than 77 tokens and were cut: "{shown}"']
        caplog.clear()
        report_long_prompts(pipeline, [fitting, "a man"])
        report_long_prompts(pipeline, [])
        assert not caplog.messages


@pytest.mark.parametrize(
    ("kind", "read"), [("sd3", 256), ("sd3.5", 256), ("flux-schnell", 256), ("flux-dev", 512), ("sd3-no-t5", None)]
)
def test_what_t5_reads_of_long_prompts(kind, read, caplog):
    """Each word is a token of both; CLIP adds a start and an end, T5 an end, so it reads `read` - 1 words.

    Without T5 a prompt is cut where CLIP cuts it.
    """
    caplog.set_level(logging.INFO, "faceprior")
    short, long = "face " * 74 + "man", "face " * 75 + "man"
    report_long_prompts(build(kind), [short, "", "a man"])
    assert not caplog.messages
    if read is None:
        report_long_prompts(build(kind), [short, long])
        shown = "face " * 16 + "..."
        assert caplog.messages == [f'1 of 2 prompts are longer than 77 tokens and were cut: "{shown}"']
        return
    read_whole, cut = "face " * (read - 2) + "man", "red " * (read - 1) + "man"
    said = f"prompts are longer than the 77 tokens that CLIP reads: T5 reads up to {read}"
    report_long_prompts(build(kind), [short, long, read_whole])
    assert caplog.messages == [f"2 of 3 {said}"]
    caplog.clear()
    report_long_prompts(build(kind), [short, read_whole, cut])
    shown = "red " * 20 + "..."
    assert caplog.messages == [
        f"2 of 3 {said}",
        f'1 of 3 prompts are longer than {read} tokens and were cut: "{shown}"',
    ]
    # the reader agrees: one word more before the end changes nothing
    embeddings = encode_prompts(build(kind), [cut, cut.replace("man", "woman"), read_whole, read_whole[:-4]])
    t5 = embeddings.prompt_embeds[:, -read:]
    assert torch.equal(t5[0], t5[1]) and not torch.equal(t5[2], t5[3])


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3"])
def test_a_side_that_is_small_for_the_base_is_said(kind, caplog):
    """The tiny bases are meant for 32 pixels."""
    pipeline = build(kind)
    report_small_side(pipeline, 16)
    assert not caplog.messages
    report_small_side(pipeline, 12)
    (message,) = caplog.messages
    assert message.startswith("`resolution` is 12, and this base is meant for 32 pixels")


@pytest.mark.parametrize(("kind", "multiple"), [("sd1", 4), ("sdxl", 4), ("sd3", 4), ("flux-dev", 4)])
def test_sides_that_a_base_cannot_make(kind, multiple):
    """The U-Nets' tiny VAE halves twice, the transformers' once, and they join 2 x 2 latents."""
    pipeline = build(kind)
    require_side(pipeline, 32 + multiple)
    with pytest.raises(ValueError, match=f"`resolution` has to be a multiple of {multiple} for this base but is 34"):
        require_side(pipeline, 34)


def test_the_vae_keeps_its_dtype_under_autocast(sd15):
    pixel_values = normal(1, 3, 64, 64).clamp(-1, 1)
    latents = encode_latents(sd15.vae, pixel_values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_latents(sd15.vae, pixel_values), latents)
        assert torch.equal(decode_latents(sd15.vae, latents), decode_latents(sd15.vae, latents.float()))
        assert decode_latents(sd15.vae, latents).dtype == torch.float32


# samplers


@pytest.mark.parametrize("name", ["pndm", "ddim", "ddpm", "euler", "dpm++", "sde-dpm++"])
def test_samplers_have_the_noise_schedule_of_the_base(name):
    """PNDM in 50 steps calls the network 51 times, the linear multistep alone; the base's own comes back afterwards."""
    own = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    sampler = make_sampler(name, own)
    torch.testing.assert_close(sampler.alphas_cumprod, own.alphas_cumprod)
    assert sampler.config.prediction_type == "v_prediction" and not sampler.config.get("clip_sample")
    sampler.set_timesteps(50)
    assert len(sampler.timesteps) == (51 if name == "pndm" else 50)
    assert make_sampler("base", own) is own


def test_samplers_that_do_not_fit_are_refused():
    own = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(
        ValueError, match="`sampler` is pndm, which cannot sample a base with zero terminal SNR: use base"
    ):
        make_sampler("pndm", own)
    assert make_sampler("euler", own).config.rescale_betas_zero_snr
    multistep = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for flow in (FlowMatchEulerDiscreteScheduler(), multistep):
        with pytest.raises(ValueError, match=f"cannot sample a base with {type(flow).__name__}: use base"):
            make_sampler("ddim", flow)
        assert make_sampler("base", flow) is flow
    with pytest.raises(ValueError, match="`sampler` has to be base or one of pndm, .* but is 'heun'"):
        make_sampler("heun", own)


def test_a_pipeline_gets_its_own_sampler_back(sd15):
    own = sd15.scheduler
    with pytest.raises(KeyboardInterrupt), sampled_with("pndm", sd15) as other:
        assert type(other.scheduler).__name__ == "PNDMScheduler"
        raise KeyboardInterrupt
    assert sd15.scheduler is own

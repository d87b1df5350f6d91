"""Base models: loaded from folders, single files and the hub's cache; x_0 against the schedulers' own steps."""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from faceprior.diffusion import (
    added_conditions,
    decode_latents,
    downsample_mask,
    encode_latents,
    encode_prompts,
    is_xl,
    load_pipeline,
    make_noise_scheduler,
    make_sampler,
    noise_like,
    pred_original_sample,
    prediction_type,
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


@pytest.fixture(scope="module")
def sd15_folder(sd15, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd15.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(sd15_folder, tmp_path):
    """A copy of the pipeline's folder, to be damaged."""
    return shutil.copytree(sd15_folder, tmp_path / "sd15")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def same_weights(module, other):
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


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


# loading


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
    with pytest.raises(ValueError, match="it has no VAE: name one with `vae`"):
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


# single files in the original (CompVis) layout


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


# samplers


@pytest.mark.parametrize("name", ["pndm", "ddim", "ddpm", "euler", "dpm++"])
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
    with pytest.raises(ValueError, match="cannot sample a base with FlowMatchEulerDiscreteScheduler"):
        make_sampler("ddim", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="`sampler` has to be base or one of pndm, .* but is 'heun'"):
        make_sampler("heun", own)


def test_a_pipeline_gets_its_own_sampler_back(sd15):
    own = sd15.scheduler
    with pytest.raises(KeyboardInterrupt), sampled_with("pndm", sd15) as other:
        assert type(other.scheduler).__name__ == "PNDMScheduler"
        raise KeyboardInterrupt
    assert sd15.scheduler is own

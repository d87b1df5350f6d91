"""GuidanceTuner: the loss of Face Score's Eqs. 6 and 7 by hand, what is trained, and what is saved."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_stage
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.detect import box_mask
from faceprior.dino import dino_distance
from faceprior.features import FeatureNetwork
from faceprior.guidance import TRAIN, GuidanceTuner, load_tuned
from faceprior.images import save_image
from faceprior.losses import masked_l2
from faceprior.models import quiet_libraries
from faceprior.pairs import FacePair
from faceprior.procedural import draw_portrait
from faceprior.training import seeded

ONE = {"num_images_per_prompt": 1}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def bases():
    """Untuned pipelines by kind; a tuner gets a copy."""
    velocity = tiny.tiny_sd15()
    velocity.scheduler = velocity.scheduler.from_config(velocity.scheduler.config, prediction_type="v_prediction")
    return {"sd15": tiny.tiny_sd15(), "v_prediction": velocity, "sdxl": tiny.tiny_sdxl()}


@pytest.fixture(scope="module")
def batch():
    return make_batch(size=64)


def make_batch(size, count=2):
    """Pairs of noise whose masks are boxes that do not fall on the latents' grid of 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, size, size)
    for index in range(count):
        mask[index, :, 9 + index : size // 2 + index, 13 : size // 2 + 5] = 1
    good, bad = (torch.rand(count, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    return {"good": good, "bad": bad, "mask": mask, "prompt": ["a man", "portrait photo, a woman"][:count]}


def samples(size=32, count=4):
    """A dataset for `fit`: the batch in pieces."""
    batch = make_batch(size, count)
    return [{**{k: batch[k][i] for k in ("good", "bad", "mask")}, "prompt": "a man"} for i in range(count)]


def perturb(tuner, scale=0.1):
    """Move the trained weights, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def draw(pipeline, prompt="a man", size=64):
    options = {"num_inference_steps": 3, "height": size, "width": size, "generator": generator(3)}
    return np.asarray(pipeline(prompt, output_type="np", **options).images)


def same_image(one, other):
    """To the rounding of sums, which the place of loaded weights in memory decides; pixels lie in [0, 1]."""
    return np.abs(one - other).max() < 1e-4


# ------------------------------------------------------------------------------------------------ loss


def loss_by_hand(original, trained, pipeline, batch):
    """Algorithm 1, with the scheduler's own `add_noise` and `step`; (loss, target, prediction, mask).

    Random numbers come in the order timesteps, noise, dropped prompts. A latent cell belongs to the face when any of
    its 4 x 4 pixels does.
    """
    scheduler, stream = DDPMScheduler.from_config(pipeline.scheduler.config), generator()
    timesteps = torch.cat([torch.randint(0, 500, (1,), generator=stream) for _ in range(2)])
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=stream) for _ in range(2)])
    encoded = pipeline.encode_prompt(batch["prompt"], device="cpu", do_classifier_free_guidance=False, **ONE)
    conditions = None
    if len(encoded) == 4:
        conditions = {"text_embeds": encoded[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    predicted = []
    for unet, pixels in ((original, batch["good"]), (trained, batch["bad"])):
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = unet(noisy, timesteps, encoded[0], added_cond_kwargs=conditions).sample
        steps = [scheduler.step(output[i : i + 1], int(timesteps[i]), noisy[i : i + 1]) for i in range(2)]
        predicted.append(torch.cat([step.pred_original_sample for step in steps]))
    mask = F.max_pool2d(batch["mask"], 4)
    target, prediction = predicted
    return ((mask * (target - prediction)) ** 2).mean(), target, prediction, mask


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        ("sd15", "self_attention"),
        ("sd15", "lora"),
        ("v_prediction", "full"),
        ("sdxl", "self_attention"),
        ("sdxl", "lora"),
    ],
)
def test_the_loss_by_hand(bases, batch, kind, train):
    """The target by a copy of the base, the prediction by the network with moved weights."""
    base = bases[kind]
    seen = []
    tuner = GuidanceTuner(
        copy.deepcopy(base), train, prompt_drop=0, distance=lambda *a: seen.append(a) or masked_l2(*a)
    )
    perturb(tuner, 0.02)
    loss = tuner.loss(batch, generator())
    with torch.no_grad():
        expected, target, prediction, mask = loss_by_hand(base.unet, tuner.denoiser, base, batch)
    assert (target - prediction).abs().max() > 0.1  # the two sides do differ
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen[0], (target, prediction, mask), rtol=1e-4, atol=1e-4)
    assert not seen[0][0].requires_grad and seen[0][1].requires_grad


@pytest.mark.parametrize("kind", ["sd15", "v_prediction"])
def test_the_denoising_loss_by_hand(bases, batch, kind):
    """Mean squared error of the noise, or velocity, on the good images, whole and at all 1000 timesteps.

    The velocity is sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents; the second timestep lies in the upper half,
    where the guidance loss never goes.
    """
    pipeline, stream = bases[kind], generator(2)
    tuner = GuidanceTuner(copy.deepcopy(pipeline), prompt_drop=0)
    loss = tuner.denoising_loss(batch, generator(2))
    timesteps = torch.cat([torch.randint(0, 1000, (1,), generator=stream) for _ in range(2)])
    assert timesteps.max() >= 500
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=stream) for _ in range(2)])
    with torch.no_grad():
        latents = pipeline.vae.encode(batch["good"]).latent_dist.mean * pipeline.vae.config.scaling_factor
        alpha_bar = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        encoded = pipeline.encode_prompt(batch["prompt"], device="cpu", do_classifier_free_guidance=False, **ONE)
        model_pred = pipeline.unet(noisy, timesteps, encoded[0]).sample
    target = noise if kind == "sd15" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    torch.testing.assert_close(loss, ((model_pred - target) ** 2).mean(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tuner.trainable_parameters())


# ------------------------------------------------------------------------------------------------ DPO


def dpo_by_hand(original, trained, pipeline, batch, beta):
    """Diffusion-DPO with the scheduler's own `add_noise` and `get_velocity`; numbers in the order of `loss_by_hand`."""
    scheduler, stream = DDPMScheduler.from_config(pipeline.scheduler.config), generator()
    timesteps = torch.cat([torch.randint(0, 1000, (1,), generator=stream) for _ in range(2)])
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=stream) for _ in range(2)])
    encoded = pipeline.encode_prompt(batch["prompt"], device="cpu", do_classifier_free_guidance=False, **ONE)
    conditions = None
    if len(encoded) == 4:
        conditions = {"text_embeds": encoded[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    inside = torch.zeros(2)
    for sign, unet, side in ((-1, trained, "good"), (1, original, "good"), (1, trained, "bad"), (-1, original, "bad")):
        latents = pipeline.vae.encode(batch[side]).latent_dist.mean * pipeline.vae.config.scaling_factor
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = unet(noisy, timesteps, encoded[0], added_cond_kwargs=conditions).sample
        inside += sign * ((output - target) ** 2).flatten(1).mean(dim=1)
    return torch.log(1 + torch.exp(-beta / 2 * inside)).mean()


@pytest.mark.parametrize(
    ("kind", "train"),
    [("sd15", train) for train in TRAIN] + [("v_prediction", "lora"), ("sdxl", "self_attention")],
)
def test_the_dpo_loss_by_hand(bases, batch, kind, train):
    base = bases[kind]
    tuner = GuidanceTuner(copy.deepcopy(base), train, prompt_drop=0, dpo_beta=5000.0)
    perturb(tuner, 0.05)
    loss = tuner.objective_loss("dpo", batch, generator())
    with torch.no_grad():
        expected = dpo_by_hand(base.unet, tuner.denoiser, base, batch, beta=5000.0)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    assert abs(expected.item() - np.log(2)) > 2e-3  # the models do differ


@pytest.mark.parametrize("train", TRAIN)
def test_dpo_starts_at_ln_2_and_falls(bases, batch, train):
    """Whatever the images are; steps then lower the good side's error against the bad one's."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), train, rank=4)
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=1e-3)
    seen = []
    for _ in range(4):
        loss = tuner.dpo_loss(batch, generator())
        seen.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuner.trainable_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0] == pytest.approx(np.log(2)) and seen[-1] < seen[0]
    assert tuner.dpo_loss({**batch, "bad": batch["good"]}, generator()).item() == pytest.approx(np.log(2))


def test_fit_takes_the_objective(bases):
    """The first loss of Diffusion-DPO is ln 2, before the weights have moved."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), "lora", rank=2)
    before = [p.detach().clone() for p in tuner.trainable_parameters()]
    tuner.fit(samples(), objective="dpo", steps=1, learning_rate=1e-3, device="cpu")
    assert any(not torch.equal(*pair) for pair in zip(before, tuner.trainable_parameters(), strict=True))
    with pytest.raises(ValueError, match="`objective` has to be one of guidance, denoising, dpo, .* but is 'ppo'"):
        tuner.fit(samples(), objective="ppo")


# ------------------------------------------------------------------------------------- parts of the loss


def test_one_generator_per_sample_gives_a_sample_its_own_stream(bases, batch):
    """The two losses of batches of one, at their own seeds, average to that of the batch of two."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]))
    together = tuner.loss(batch, [generator(1), generator(2)])
    alone = [tuner.loss({key: value[i : i + 1] for key, value in batch.items()}, [generator(i + 1)]) for i in range(2)]
    torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="`generator` has 1 generators for 2 samples"):
        tuner.loss(batch, [generator(1)])
    assert tuner.loss(batch) != tuner.loss(batch)  # without one, numbers differ from call to call


@pytest.mark.parametrize("train", TRAIN)
def test_equal_sides_and_untouched_weights_give_no_loss(bases, batch, train):
    """The trained network is the original one then, to the last bit."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), train)
    assert tuner.loss({**batch, "bad": batch["good"]}, generator()).item() == 0
    perturb(tuner)
    assert tuner.loss({**batch, "bad": batch["good"]}, generator()).item() > 0


@pytest.fixture(scope="module")
def features():
    """An untrained feature network of 64 px images."""
    with seeded(0):
        return FeatureNetwork.from_tags({"sex": ("woman", "man")}, 64, 16, hidden_size=16, layers=1, heads=2)


def test_dino_distance_by_hand(bases, features):
    """1 - cos of the [CLS] features of the faces in what diffusers' own VAE decodes, averaged over the batch.

    The face covers 4 x 6 cells of 4 pixels. The square around it is 1.5 times its longer side, 36 of 64 pixels, and is
    centred on it, (24, 20), as far as it fits: from (6, 2), but for the second face, on the edge, from (0, 0).
    """
    vae = copy.deepcopy(bases["sd15"].vae)
    vae.register_to_config(scaling_factor=0.5)
    good, bad = (4 * torch.randn(2, 4, 16, 16, generator=generator(seed)) for seed in (0, 1))
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 2:8, 4:8] = mask[1, :, 0:6, 0:4] = 1
    decoded = [vae.decode(torch.where(mask > 0, side, good) / 0.5).sample for side in (good, bad)]
    one, other = (
        torch.cat([features.features(x[:1, :, 2:38, 6:42]), features.features(x[1:, :, :36, :36])]) for x in decoded
    )
    expected = 1 - ((one * other).sum(dim=1) / one.norm(dim=1) / other.norm(dim=1)).mean()
    distance = dino_distance(vae, features)
    torch.testing.assert_close(distance(good, bad, mask), expected)
    assert expected > 1e-4 and abs(distance(good, good, mask).item()) < 1e-6


def test_the_dino_distance_sees_the_face_only(bases, features):
    """Gradients reach the prediction where the mask is 1, and nothing where it is empty."""
    distance = dino_distance(copy.deepcopy(bases["sd15"].vae), features)
    target, prediction = (torch.randn(2, 4, 8, 8, generator=generator(seed)).requires_grad_() for seed in (0, 1))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 3:5] = 1
    distance(target.detach(), prediction, mask).backward()
    assert torch.equal(prediction.grad.abs().sum(dim=1, keepdim=True) > 0, mask > 0)
    assert target.grad is None


def test_the_dino_distance_trains_the_unet_only(bases, batch, features):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]))
    tuner.distance = dino_distance(tuner.pipeline().vae, features)
    perturb(tuner)
    tuner.loss(batch, generator()).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tuner.trainable_parameters())
    frozen = [*features.parameters(), *tuner.pipeline().vae.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_stage_4_finds_the_network_of_the_dino_distance(features, tmp_path, monkeypatch):
    """By its folder, and for `tiny` among the tiny models, where an untrained one is no answer."""
    stage = load_stage("04_guidance_tune")
    monkeypatch.setattr(stage.tiny, "tiny_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="make_tiny --only features"):
        stage.load_features("tiny")
    features.save_pretrained(tmp_path / "features")
    for name in ("tiny", str(tmp_path / "features")):
        assert stage.load_features(name).groups == features.groups


def test_an_empty_mask_gives_no_loss(bases, batch):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]))
    assert tuner.loss({**batch, "mask": torch.zeros_like(batch["mask"])}, generator()).item() == 0


@pytest.mark.parametrize("train", TRAIN)
def test_the_target_does_not_depend_on_the_trained_weights(bases, batch, train):
    targets = []
    tuner = GuidanceTuner(
        copy.deepcopy(bases["sd15"]), train, distance=lambda t, p, m: targets.append(t) or masked_l2(t, p, m)
    )
    first = tuner.loss(batch, generator())
    perturb(tuner)
    assert tuner.loss(batch, generator()) != first
    assert torch.equal(*targets)


@pytest.mark.parametrize("train", TRAIN)
def test_gradients_reach_what_is_trained_and_nothing_else(bases, batch, train):
    """self_attention: attn1 of the base; lora: new weights beside attn1; full: the U-Net. A step changes no others."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), train, rank=4)
    parts = {"unet": tuner.denoiser, "vae": tuner.pipeline().vae, "text_encoder": tuner.pipeline().text_encoder}
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    expected = {
        "self_attention": {name for name in parameters if name.startswith("unet.") and ".attn1." in name},
        "lora": {name for name in parameters if ".attn1." in name and "lora_" in name},
        "full": {name for name in parameters if name.startswith("unet.")},
    }[train]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert {id(parameters[name]) for name in expected} == {id(p) for p in tuner.trainable_parameters()}
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=10.0)
    tuner.loss(batch, generator()).backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == expected
    optimizer.step()
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert changed and changed <= expected
    if train == "lora":  # B starts at zero, so that A has no gradient at first
        assert changed == {name for name in expected if "lora_B" in name}
        assert all(parameters[n].shape[0 if "lora_A" in n else 1] == 4 for n in expected)


@pytest.mark.parametrize("train", TRAIN)
def test_what_is_trained_stays_so_after_the_original_was_used(bases, batch, train):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), train)
    tuner.denoiser.train()
    for sampling in (tuner.untuned, tuner.sampling):
        with sampling() as pipeline:
            assert not pipeline.unet.training
        assert tuner.denoiser.training
    tuner.loss(batch, generator())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in tuner.trainable_parameters())
    assert len(tuner.trainable_parameters()) == sum(p.requires_grad for p in tuner.denoiser.parameters())


@pytest.mark.parametrize(("t_end", "low", "high"), [(0.02, 0, 20), (0.5, 400, 500), (1.0, 900, 1000), (1e-6, 0, 1)])
def test_timesteps_come_from_the_first_fraction_of_the_schedule(bases, t_end, low, high):
    """Of 64 draws from [0, 1000 t_end) the largest is in the last tenth but for 0.9^64 = .1% of the seeds."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), t_end=t_end)
    drawn = []
    hook = tuner.denoiser.register_forward_pre_hook(lambda _, args: drawn.append(args[1]))
    batch = {key: value[:1].expand(64, *value.shape[1:]) for key, value in make_batch(16).items() if key != "prompt"}
    tuner.loss({**batch, "prompt": [""] * 64}, generator())
    hook.remove()
    assert torch.equal(drawn[0], drawn[1])  # good and bad share their timestep
    assert low <= drawn[0].max() < high and drawn[0].min() >= 0


@pytest.mark.parametrize(("prompt_drop", "kept"), [(0.0, True), (1.0, False)])
def test_dropped_prompts(bases, batch, prompt_drop, kept):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), prompt_drop=prompt_drop)
    seen = []
    hook = tuner.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[2]), with_kwargs=True)
    tuner.loss(batch, generator())
    hook.remove()
    prompts = batch["prompt"] if kept else ["", ""]
    expected = bases["sd15"].encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False, **ONE)[0]
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "attention"}, "`train` has to be one of self_attention, lora, full but is 'attention'"),
        ({"t_end": 0}, r"`t_end` has to be in \(0, 1\] but is 0"),
        ({"t_end": 500}, "but is 500"),
        ({"dpo_beta": 0}, "`dpo_beta` has to be above 0 but is 0"),
        ({"prompt_drop": 1.2}, r"`prompt_drop` has to be in \[0, 1\] but is 1.2"),
    ],
)
def test_options_out_of_range(bases, options, message):
    with pytest.raises(ValueError, match=message):
        GuidanceTuner(bases["sd15"], **options)


def test_a_base_of_another_kind(bases):
    from diffusers import DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        32, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(ValueError, match="has to be of Stable Diffusion 1, .* or FLUX type but is UNet2DModel"):
        GuidanceTuner(DDPMPipeline(unet, DDPMScheduler()))


# ------------------------------------------------------------------------------------ images and files


@pytest.mark.parametrize("train", TRAIN)
def test_untuned_gives_the_bases_image_and_puts_the_weights_back(bases, train):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), train)
    perturb(tuner)
    base, tuned = draw(bases["sd15"]), draw(tuner.pipeline())
    assert np.abs(base - tuned).max() > 0.01
    with tuner.untuned() as original:
        assert (draw(original) == base).all()
    assert (draw(tuner.pipeline()) == tuned).all()
    with pytest.raises(KeyboardInterrupt), tuner.untuned():
        raise KeyboardInterrupt
    assert (draw(tuner.pipeline()) == tuned).all()


def test_the_first_weights_of_a_lora_come_from_its_seed(bases):
    tuners = [GuidanceTuner(copy.deepcopy(bases["sd15"]), "lora", rank=6, seed=seed) for seed in (0, 0, 1)]
    assert tuners[0].denoiser.peft_config["default"].lora_alpha == 6  # the rank, by default
    same, again, other = (torch.cat([p.flatten() for p in t.trainable_parameters()]) for t in tuners)
    assert torch.equal(same, again) and not torch.equal(same, other)


@pytest.mark.parametrize("train", ["self_attention", "full"])
def test_a_tuned_pipeline_loads_with_stock_diffusers(bases, tmp_path, train):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), train)
    perturb(tuner)
    tuner.save_pretrained(tmp_path)
    tuned = draw(tuner.pipeline())
    assert same_image(draw(DiffusionPipeline.from_pretrained(tmp_path)), tuned)
    assert same_image(draw(load_tuned(tmp_path, "not/looked/at")), tuned)


def test_a_base_without_sample_size_asks_for_the_resolution(bases, tmp_path):
    base = copy.deepcopy(bases["sd15"])
    base.unet.register_to_config(sample_size=None)
    tuner = GuidanceTuner(base)
    assert tuner.resolution is None
    with pytest.raises(ValueError, match="U-Net has no `sample_size`: give `resolution`, in pixels"):
        tuner.fit(tmp_path, steps=1)


@pytest.mark.parametrize("place", ["unet", ""])
def test_a_folder_with_a_unet_alone_is_put_into_the_base(bases, tiny_models, tmp_path, place):
    """As Diffusion-DPO's U-Net is published: no pipeline around it, in unet/ or at the top."""
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), "full")
    perturb(tuner)
    tuner.denoiser.save_pretrained(tmp_path / place)
    loaded = load_tuned(tmp_path, str(tiny_models / "sd15"), torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float32
    loaded = load_tuned(tmp_path, str(tiny_models / "sd15"))
    assert same_image(draw(loaded), draw(tuner.pipeline())) and not same_image(draw(loaded), draw(bases["sd15"]))
    with pytest.raises(ValueError, match=r"the U-Net .* does not fit the base: \d+ tensors differ in name or shape"):
        load_tuned(tmp_path, str(tiny_models / "sdxl"))


def test_a_hub_id_that_is_not_there(tiny_models, monkeypatch):
    """The id of a U-Net is asked of the hub, and the error names it; a path is not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no U-Net 'owner/dpo': there is no such folder, and the hub did not"):
        load_tuned("owner/dpo", str(tiny_models / "sd15"))


def test_load_tuned_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tuned model in .*04_guidance_tune.py` makes one"):
        load_tuned(tmp_path, "base")


# ------------------------------------------------------------------------------------------------- fit


def mean_loss(tuner, dataset):
    """Over four draws of timesteps and noise."""
    batch = {key: torch.stack([sample[key] for sample in dataset]) for key in ("good", "bad", "mask")}
    batch["prompt"] = [sample["prompt"] for sample in dataset]
    with torch.no_grad():
        return sum(tuner.loss(batch, generator(seed)).item() for seed in range(4)) / 4


@pytest.mark.parametrize(("train", "rate"), [("self_attention", 5e-3), ("lora", 1e-2), ("full", 1e-4)])
def test_fit_lowers_the_loss(bases, train, rate):
    """Grey images with brighter bad sides, at timesteps and noise that training did not draw.

    The factor brings the latents of the untrained VAE, which differ little, to a spread of about one.
    """
    base = copy.deepcopy(bases["sd15"])
    base.vae.register_to_config(scaling_factor=5.0)
    tuner, plain = GuidanceTuner(base, train, rank=8), torch.ones(3, 32, 32)
    dataset = [
        {"good": value * plain, "bad": (value + 1) * plain, "mask": plain[:1], "prompt": "a man"}
        for value in (-0.9, -0.5)
    ]
    before = mean_loss(tuner, dataset)
    assert tuner.fit(dataset, steps=12, learning_rate=rate, device="cpu") is tuner
    assert mean_loss(tuner, dataset) < 0.95 * before


def test_fit_resumes(bases, tmp_path):
    """Two and then two steps more, by a new tuner, end at the weights of four steps, to the last bit."""
    tuners, options = [], {"learning_rate": 1e-3, "device": "cpu", "seed": 3, "accumulation": 2}
    for name, counts in (("whole", [4]), ("parts", [2, 4])):
        for steps in counts:
            tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), "lora", rank=2)
            tuner.fit(samples(), steps=steps, output=tmp_path / name, **options)
        tuners.append(tuner)
    for one, other in zip(*(tuner.trainable_parameters() for tuner in tuners), strict=True):
        assert torch.equal(one, other)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 2, 3, 4]


def test_fit_does_not_go_on_with_something_else(bases, tmp_path):
    """Another objective, rate, base or number of pairs; the same tuner goes on, with weights that are others by now."""
    options = {"output": tmp_path / "run", "learning_rate": 1e-3, "device": "cpu"}
    tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]))
    tuner.fit(samples(), steps=1, **options)
    other = copy.deepcopy(bases["sd15"])
    with torch.no_grad():
        next(other.vae.parameters()).add_(0.1)
    for changes, pairs, base, message in (
        ({"objective": "dpo"}, samples(), bases["sd15"], "objective: guidance then, dpo now"),
        ({"learning_rate": 1e-4}, samples(), bases["sd15"], "learning_rate: 0.001 then, 0.0001 now"),
        ({}, samples()[:3], bases["sd15"], "pairs: 4 samples then, 3 samples now"),
        ({}, samples(), other, r"base: \d+ tensors \(.*\) then"),
    ):
        with pytest.raises(FileExistsError, match=f"began with other input, {message}"):
            GuidanceTuner(copy.deepcopy(base)).fit(pairs, steps=2, **{**options, **changes})
    tuner.fit(samples(), steps=2, **options)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_an_empty_cache_is_none(bases, tmp_path, monkeypatch):
    """As in stage 4: nothing is written to the folder that Python runs in."""
    monkeypatch.chdir(tmp_path)
    GuidanceTuner(copy.deepcopy(bases["sd15"]), "lora", rank=2).fit(samples(), steps=1, cache="", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_fit_reads_the_folder_of_stage_1(tiny_models, tmp_path, caplog):
    """One step on a drawn pair at the base's own 128 pixels, without the pair whose file is empty; a LoRA is saved."""
    drawing = draw_portrait(1, 64)
    pair = FacePair(
        id="a", photograph="a.png", good="good.png", bad="bad.png", mask="mask.png", box=list(drawing.box),
        landmarks=None, confidence=1.0, area_ratio=0.2, strength=0.4, prompt="a man", seed=0, base="tiny",
        difference=9.0,
    )  # fmt: skip
    good = Image.fromarray(drawing.image)
    for name, image in (("good", good), ("bad", good.rotate(180)), ("mask", box_mask((64, 64), drawing.box))):
        save_image(image, tmp_path / f"{name}.png")
    (tmp_path / "empty.png").touch()
    rows = [pair.to_row(), {**pair.to_row(), "id": "b", "bad": "empty.png"}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuner = GuidanceTuner.from_pretrained(str(tiny_models / "sd15"), train="lora", rank=2)
    assert tuner.resolution == 128
    sizes = []
    hook = tuner.denoiser.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    tuner.fit(tmp_path, steps=1, batch_size=1, device="cpu").save_pretrained(tmp_path / "tuned")
    hook.remove()
    assert set(sizes) == {(1, 4, 32, 32)}
    assert [record.getMessage().startswith("b is skipped: ") for record in caplog.records] == [True]
    weights = load_file(tmp_path / "tuned/pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and ".attn1." in key for key in weights)
    assert any(weights[key].abs().max() > 0 for key in weights if "lora_B" in key or "lora.up" in key)


# -------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(
    ("kind", "train"), [("sd15", "self_attention"), ("sd15", "lora"), ("sd15", "full"), ("sdxl", "lora")]
)
def test_a_base_in_bfloat16(tiny_models, batch, kind, train):
    """Trained weights are float32, the others stay; the loss is near that in float32, and images are drawn."""
    base = str(tiny_models / kind)
    tuner = GuidanceTuner.from_pretrained(base, torch.bfloat16, train=train)
    trained = {id(p) for p in tuner.trainable_parameters()}
    for parameter in tuner.denoiser.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16)
    loss = tuner.loss(batch, generator())
    assert loss.dtype == torch.float32
    expected = GuidanceTuner(load_pipeline(base), train).loss(batch, generator())
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in tuner.trainable_parameters() if p.grad is not None)
    base_image = draw(tuner.pipeline())
    perturb(tuner)
    assert np.abs(draw(tuner.pipeline()) - base_image).max() > 0.01
    with tuner.untuned() as original:
        assert (draw(original) == base_image).all()


def test_equal_sides_give_no_loss_in_bfloat16(tiny_models, batch):
    for train in TRAIN:
        tuner = GuidanceTuner.from_pretrained(str(tiny_models / "sd15"), torch.bfloat16, train=train)
        assert tuner.loss({**batch, "bad": batch["good"]}, generator()).item() == 0


def test_gradient_checkpointing_gives_the_same_gradients(bases, batch):
    gradients = []
    for enabled in (False, True):
        tuner = GuidanceTuner(copy.deepcopy(bases["sd15"]), "lora", rank=2)
        perturb(tuner)
        tuner.denoiser.train()
        if enabled:
            tuner.denoiser.enable_gradient_checkpointing()
        tuner.loss(batch, generator()).backward()
        gradients.append([p.grad for p in tuner.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)

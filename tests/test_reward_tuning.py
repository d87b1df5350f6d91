"""Face Score as a reward: sampling with gradients against stock pipelines and finite differences; the watch by hand."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_bases import KINDS, build

from faceprior import tiny
from faceprior.detect import Face
from faceprior.diffusion import denoiser_of, encode_prompts, noise_like
from faceprior.dino import dino_distance
from faceprior.features import FeatureNetwork
from faceprior.guidance import OBJECTIVES, TRAIN, GuidanceTuner
from faceprior.images import to_pixel_values
from faceprior.losses import masked_l2
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.reward_tuning import (
    LEAST_IMAGES,
    WINDOW,
    FaceReward,
    moved_measures,
    sample_latents,
    sampler_of,
    summary,
)
from faceprior.training import sample_generators, seeded

BOX = (6, 4, 27, 29)
FAST = ("sd1", "sdxl-v-ztsnr")
KINDS_TUNED = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def scorer():
    return tiny.tiny_scorer().eval()


@pytest.fixture(scope="module")
def bases():
    return {kind: build(kind) for kind in ("sd1", "sd2-v", "sdxl")}


def everywhere(rgb):
    """A detector for images of untrained bases, which show no faces: one in each, at the same place."""
    return [Face(BOX, None, 0.99)]


def nowhere(rgb):
    return []


def draws(count=2, seed=1):
    return sample_generators(seed, range(count))


def noise_of(pipeline, size=8, count=2):
    shape = (count, pipeline.vae.config.latent_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("sd1", 1.0), ("sd1", 4.0), ("sd2-v", 4.0), ("sdxl", 4.0), ("sdxl-v-ztsnr", 4.0), ("sd3", 4.0)]
    + [("flux-dev", 1.0), ("flux-schnell", 1.0)],
)
def test_the_latents_are_those_of_the_stock_pipeline(kind, scale):
    """From the same noise, prompts and sampler; PNDM and Euler bases are sampled by DDIM."""
    pipeline, prompts = build(kind), ["a man", "portrait photo, a woman"]
    is_flux = kind.startswith("flux")
    noise = noise_of(pipeline, 16 if is_flux or kind == "sd3" else 8)
    embeddings, dropped = (encode_prompts(pipeline, texts) for texts in (prompts, [None, None]))
    ours = sample_latents(pipeline, embeddings, dropped, noise, draws(), steps=4, last=1, guidance_scale=scale)
    assert ours.requires_grad
    pipeline.scheduler = sampler_of(pipeline)
    size = {"height": 32, "width": 32}
    if is_flux:
        size["max_sequence_length"] = embeddings.prompt_embeds.shape[1]
    start = pipeline._pack_latents(noise, *noise.shape) if is_flux else noise
    stock = pipeline(
        prompts, latents=start, num_inference_steps=4, guidance_scale=scale, output_type="latent", **size
    ).images
    stock = pipeline._unpack_latents(stock, 32, 32, pipeline.vae_scale_factor) if is_flux else stock
    torch.testing.assert_close(ours.detach(), stock, rtol=1e-3, atol=1e-4)


def test_an_ancestral_sampler_draws_from_each_samples_generator():
    """The tiny base has DDPM as its sampler: the images are the pipeline's, by the same generators."""
    pipeline = tiny.tiny_sd15()
    noise = noise_of(pipeline)
    prompts = encode_prompts(pipeline, ["a man", "a woman"])
    ours = sample_latents(pipeline, prompts, prompts, noise, draws(), steps=4, last=2)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "height": 32, "width": 32}
    stock = pipeline(["a man", "a woman"], latents=noise, generator=draws(), **options).images
    torch.testing.assert_close(ours.detach(), stock, rtol=1e-3, atol=1e-4)
    again = sample_latents(pipeline, prompts, prompts, noise, draws(seed=2), steps=4, last=2)
    assert not torch.allclose(ours, again, atol=1e-2)


@pytest.mark.parametrize(("kind", "last"), [("sd1", 1), ("sd1", 3), ("sd3", 2)])
def test_the_gradient_is_that_of_the_last_steps(kind, last):
    """Against the difference quotient of a network that is moved in the last K of 3 steps only, in float64.

    The passes of the network are repeated in the backward pass, K of them with two branches each.
    """
    pipeline = build(kind)
    network = denoiser_of(pipeline).double()
    prompts, dropped = (encode_prompts(pipeline, texts) for texts in (["a man"], [None]))
    for embeddings in (prompts, dropped):
        for name, value in vars(embeddings).items():
            setattr(embeddings, name, value if value is None else value.double())
    parameters = dict(network.named_parameters())
    name = next(key for key in parameters if "attn" in key and "to_q.weight" in key)
    noise = noise_of(pipeline, 16 if kind == "sd3" else 8, count=1)
    direction = torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(3)).double()
    calls = []

    def functional(step):
        """The network, whose weight is moved by `step` in the last K steps."""

        def call(latents, *args, **kwargs):
            calls.append(latents)
            moved = parameters[name] + step * direction if len(calls) > 2 * (3 - last) else parameters[name]
            args = [a.double() if a.is_floating_point() else a for a in args]
            return torch.func.functional_call(network, {name: moved}, (latents.double(), *args), kwargs)

        return call

    def value(step):
        calls.clear()
        latents = sample_latents(pipeline, prompts, dropped, noise, draws(1), 3, last, 2.0, functional(step))
        return latents.double().square().sum()

    (gradient,) = torch.autograd.grad(value(0.0), parameters[name])
    assert len(calls) == 2 * 3 + 2 * last
    with torch.no_grad():
        quotient = (value(1e-2) - value(-1e-2)) / 2e-2
    assert (gradient * direction).sum().item() == pytest.approx(quotient.item(), rel=2e-2)
    assert abs(quotient.item()) > 1e-4


def test_samplers_without_a_differentiable_step_become_ddim(bases):
    sampler = sampler_of(bases["sd1"])
    assert isinstance(sampler, DDIMScheduler) and not sampler.config.clip_sample
    assert sampler.config.beta_start == bases["sd1"].scheduler.config.beta_start
    flow = build("sd3").scheduler
    assert type(flow) is type(sampler_of(build("sd3")))


# -------------------------------------------------------------------------------------------- the reward


def portraits(count, size=96):
    return [draw_portrait(seed, size) for seed in range(count)]


def test_the_reward_is_the_face_score(scorer):
    """Of the images as they would be saved; 8-bit rounding moves pixels by up to 1/255. An empty image has none."""
    drawings = portraits(2)
    blank = np.full_like(drawings[0].image, 90)
    images = to_pixel_values([d.image for d in drawings] + [blank]).requires_grad_()
    reward = FaceReward(scorer, "mtcnn", min_confidence=0.5)
    faces = reward.find_faces(images)
    rewards = reward(images)
    assert faces[2] is None and rewards[2].isnan()
    expected = [scorer.score(d.image, faces=[f])[0].score for d, f in zip(drawings, faces, strict=False)]
    torch.testing.assert_close(rewards[:2].detach(), torch.tensor(expected), rtol=1e-2, atol=1e-2)

    # ---- the gradient lies in the faces' boxes
    (gradient,) = torch.autograd.grad(rewards[:2].sum(), images)
    for index, face in enumerate(faces[:2]):
        x0, y0, x1, y1 = (round(edge) for edge in face.box)
        touched = gradient[index].abs().sum(dim=0) > 0
        assert touched[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4].any()
        assert not touched[: max(0, y0 - 2)].any() and not touched[:, x1 + 3 :].any()
    assert not gradient[2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4, "last": 5}, r"`last` has to be in \[1, steps\], so up to 4, but is 5"),
        ({"last": 0}, "but is 0"),
        ({"weight": 0}, "`weight` has to be above 0 but is 0"),
    ],
)
def test_reward_options_out_of_range(scorer, options, message):
    with pytest.raises(ValueError, match=message):
        FaceReward(scorer, **options)


# ----------------------------------------------------------------------------------- tuning with the reward


def make_batch(count=2, size=32):
    generator = torch.Generator().manual_seed(0)
    good, bad = (torch.rand(count, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, 8:20, 8:20] = 1
    return {"good": good, "bad": bad, "mask": mask, "prompt": ["a man", "a woman"][:count]}


def make_tuner(base, scorer, train="lora", detector=everywhere, **options):
    settings = {"steps": 3, "last": 3, "guidance_scale": 2.0} | options
    return GuidanceTuner(copy.deepcopy(base), train, rank=2, reward=FaceReward(scorer, detector, **settings))


@pytest.mark.parametrize(
    ("kind", "train"),
    [("sd1", "self_attention"), ("sdxl", "lora")]
    + [pytest.param(*slow, marks=pytest.mark.slow) for slow in (("sd1", "lora"), ("sd1", "full"), ("sd2-v", "lora"))],
)
def test_steps_up_the_gradient_raise_the_score(bases, scorer, kind, train):
    """At the same noise; only what is trained gets gradients, the scorer and the VAE none."""
    tuner, batch = make_tuner(bases[kind], scorer, train), make_batch()
    seen = []
    for _ in range(4):
        loss = tuner.objective_loss("reward", batch, draws())
        assert loss.item() == pytest.approx(-tuner.measures["face_score"].item())
        assert tuner.measures["found"].item() == 1
        seen.append(tuner.measures["face_score"].item())
        gradients = torch.autograd.grad(loss, tuner.trainable_parameters(), allow_unused=True)
        norm = sum(g.square().sum() for g in gradients if g is not None).sqrt()
        with torch.no_grad():
            for parameter, gradient in zip(tuner.trainable_parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.05 * gradient / norm
    assert norm > 0 and seen[-1] > seen[0]
    frozen = [*scorer.parameters(), *tuner.pipeline().vae.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.parametrize("kind", KINDS_TUNED)
def test_every_objective_trains_every_kind_of_base(scorer, kind):
    """A LoRA gets gradients from each loss and nothing else does; Diffusion-DPO starts at ln 2."""
    with seeded(0):
        network = FeatureNetwork.from_tags({"sex": ("woman", "man")}, 32, 16, hidden_size=16, layers=1, heads=2)
    tuner, batch = make_tuner(build(kind), scorer, last=1), make_batch()
    for objective, distance in [(name, "l2") for name in OBJECTIVES] + [("guidance", "dino")]:
        tuner.distance = dino_distance(tuner.pipeline().vae, network) if distance == "dino" else masked_l2
        loss = tuner.objective_loss(objective, batch, draws())
        loss.backward()
        assert any(p.grad.any() for p in tuner.trainable_parameters()), objective
        assert objective != "dpo" or loss.item() == pytest.approx(math.log(2))
        parts = [part for part in tuner.pipeline().components.values() if isinstance(part, torch.nn.Module)]
        trained = {id(p) for p in tuner.trainable_parameters()}
        assert not any(p.grad is not None for part in parts for p in part.parameters() if id(p) not in trained)
        for parameter in tuner.trainable_parameters():
            parameter.grad = None


def test_images_without_a_face_give_no_loss(bases, scorer):
    tuner = make_tuner(bases["sd1"], scorer, detector=nowhere)
    loss = tuner.objective_loss("reward", make_batch(), draws())
    loss.backward()
    assert loss.item() == 0 and tuner.measures["found"].item() == 0
    assert not any(p.grad.any() for p in tuner.trainable_parameters() if p.grad is not None)


def test_the_guidance_loss_is_added_as_a_regulariser(bases, scorer):
    """guidance_reward is the sum of both, the reward with its weight, from one stream of random numbers."""
    tuner, batch = make_tuner(bases["sd1"], scorer, weight=0.25), make_batch()
    generators = draws()
    guidance, reward = tuner.loss(batch, generators), tuner.reward_loss(batch, generators)
    score = tuner.measures["face_score"].item()
    assert reward.item() == pytest.approx(-0.25 * score, rel=1e-5)
    total = tuner.objective_loss("guidance_reward", batch, draws())
    assert total.item() == pytest.approx((guidance + reward).item(), rel=1e-5)
    assert tuner.measures["guidance_loss"].item() == pytest.approx(guidance.item(), rel=1e-5)


def test_prompts_of_rewarded_images_are_never_dropped(bases, scorer):
    """`prompt_drop` belongs to the losses on pairs."""
    tuner, batch = make_tuner(bases["sd1"], scorer), make_batch()
    kept = tuner.draw(batch, draws())
    tuner.prompt_drop = 1.0
    torch.testing.assert_close(tuner.draw(batch, draws()), kept)


def test_a_reward_objective_needs_a_reward(bases):
    tuner = GuidanceTuner(copy.deepcopy(bases["sd1"]), "lora", rank=2)
    with pytest.raises(ValueError, match=r"no `reward`: give `reward=FaceReward\(FaceScorer"):
        tuner.fit([], objective="guidance_reward", steps=1, device="cpu")
    with pytest.raises(ValueError, match="`objective` has to be one of guidance, .* but is 'draft'"):
        tuner.objective_loss("draft", make_batch())


@pytest.mark.parametrize("train", TRAIN)
def test_the_watch_compares_with_the_original_weights(bases, scorer, train):
    """At the same noise: equal at first, different once the weights have moved; the history is JSON."""
    tuner, batch, history = make_tuner(bases["sd1"], scorer, train), make_batch(), []
    same = tuner.watch_reward(batch, draws(), history)
    assert same["score_change"] == same["drift"] == 0 and same["contrast_ratio"] == 1
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    moved = tuner.watch_reward(batch, draws(), history)
    assert moved["drift"] > 0 and moved["score_change"] != 0
    assert len(json.loads(json.dumps(history))) == 4


def test_fit_with_the_reward_resumes(bases, scorer, tmp_path):
    """One and then one step more end at the weights and the log of two, the watch included."""
    batch, weights = make_batch(), []
    data = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    for name, counts in (("whole", [2]), ("parts", [1, 2])):
        for steps in counts:
            tuner = make_tuner(bases["sd1"], scorer, steps=2, last=1)
            options = {"learning_rate": 1e-2, "device": "cpu", "reward_watch": 1, "output": tmp_path / name}
            tuner.fit(data, objective="reward", steps=steps, **options)
        weights.append(tuner.trainable_parameters())
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    row = json.loads(logs[0].splitlines()[0])
    assert {"face_score", "found", "score_change", "drift", "hacking"} <= row.keys()


# ------------------------------------------------------------------------------------------- the watch


def rows(count, score=1.0, **changes):
    """Rows of `count` images whose score rises by `score` and a little noise; changes: after - before, or factors."""
    made = []
    for index in range(count):
        row = {"score": [0.0, score + 0.01 * (index % 2)], "confidence": [0.99, 0.99]}
        row |= {name: [0.2, 0.2] for name in ("sharpness", "saturation", "contrast")}
        for name, value in changes.items():
            row[name] = [row[name][0], row[name][0] * value]
        made.append(row)
    return made


def without_face(count):
    """Rows of images whose face is lost."""
    lost = {"score": [0.0, None], "confidence": [0.99, None], "sharpness": [0.2, None]}
    return [{**row, **lost} for row in rows(count)]


@pytest.mark.parametrize(
    ("window", "moved"),
    [
        (rows(16), []),
        (rows(16, saturation=1.4, contrast=0.7), []),
        (rows(16, saturation=1.6), ["saturation"]),
        (rows(16, sharpness=0.6, contrast=1.6), ["sharpness", "contrast"]),
        (rows(16, confidence=0.98), ["confidence"]),
        (rows(16, confidence=0.995), []),
        (rows(12) + without_face(4), ["found"]),
        (rows(14) + without_face(2), []),
        (without_face(8), ["found"]),  # no pair is left to tell what the score does
        (rows(8, score=-1.0) + without_face(8), ["found"]),
        (rows(16, score=-1.0, saturation=1.6), []),  # the score falls: nothing is gained by it
        (rows(8, score=1.0) + rows(8, score=-1.0, saturation=1.6), []),  # not more than chance
        (rows(LEAST_IMAGES - 1, saturation=1.6), []),
    ],
)
def test_the_rule_of_reward_hacking(window, moved):
    """0.99 times 0.98 is lower by 0.02. 4 lost faces of 16 are 2.2 standard errors (1/4 to 0.11), 2 are 1.5."""
    assert moved_measures(window) == moved


def test_the_summary_by_hand():
    """Three images, one of which loses its face: the others' scores change by 1 and 1.01, their contrast doubles."""
    values = summary(rows(2, contrast=2.0) + without_face(1))
    assert values["score_change"] == pytest.approx(1.005)
    assert values["found_change"] == pytest.approx(-1 / 3)
    assert values["contrast_ratio"] == pytest.approx((0.4 + 0.4 + 0.2) / 0.6, rel=5e-3)
    assert values["confidence_change"] == 0 and values["sharpness_ratio"] == 1
    assert summary([])["score_change"] == 0


def test_a_rising_score_without_colour_is_reported_once(scorer, caplog):
    """A portrait in colour and in grey: whichever the scorer likes better is the tuned side."""
    drawing = draw_portrait(0, 96)
    colour = to_pixel_values([drawing.image] * LEAST_IMAGES)
    grey = to_pixel_values([Image.fromarray(drawing.image).convert("L").convert("RGB")] * LEAST_IMAGES)
    reward = FaceReward(scorer, lambda rgb: [Face(drawing.box, None, 0.99)])
    better, worse = (colour, grey) if (reward(colour) - reward(grey)).mean() > 0 else (grey, colour)
    with caplog.at_level(logging.WARNING):
        history = []
        values = [reward.compare(worse, better, history) for _ in range(2)]
    assert values[0]["score_change"] > 0 and values[0]["hacking"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "while saturation is" in caplog.text and "reward hacking" in caplog.text
    reward.compare(worse, better, history)
    assert len(history) == WINDOW < 3 * LEAST_IMAGES


def test_noise_of_the_watch_is_not_that_of_the_training():
    train, watch = (sample_generators(0, [3], purpose) for purpose in ("noise", "watch"))
    latents = torch.zeros(1, 4, 2, 2)
    assert not torch.equal(noise_like(latents, train), noise_like(latents, watch))

"""The training of the tiny models, in a few steps on a few drawings."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

from checkpoints.tiny_models import bases, reward
from checkpoints.tiny_models import ladders as ladders_module
from checkpoints.tiny_models.damage import DAMAGES, PHOTOMETRIC, TRAINING_ONLY, UNSEEN
from checkpoints.tiny_models.data import Drawings, describe, draw_one, save_arrays
from checkpoints.tiny_models.judge import FaceJudge, train_judge
from checkpoints.tiny_models.ladders import RUNGS, People, alike, make_ladders
from checkpoints.tiny_models.readme import note_duration, write_readme
from checkpoints.tiny_models.reward import SEEN, STEEPNESS, WAYS, DrawnFaces, make_ladder, train_reward
from checkpoints.tiny_models.stages import GUIDANCE, save_lora_in_half, ship
from checkpoints.tiny_models.vae import (
    PIPELINES,
    DrawingsAndFaces,
    encode_mean,
    normalise_latents,
    pixel_batches,
    train_vae,
)
from faceprior import tiny
from faceprior.guidance import GuidanceTuner, load_tuned
from faceprior.images import save_image, to_pil, to_pixel_values
from faceprior.lora import LORA_FILE, adapters_of
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.scorer import FaceScorer
from faceprior.training import TrainingRun


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Ten training drawings, two of them scenes, four for validation, and as many in place of aligned faces."""
    folder = tmp_path_factory.mktemp("work")
    for split, count in (("train", 10), ("validation", 4)):
        drawings = [draw_one(128, split, i) for i in range(count)]
        save_arrays(
            folder / split / "000000.npz",
            images=np.stack([d.image for d in drawings]),
            captions=np.array([d.caption() for d in drawings]),
            records=np.array([json.dumps(describe(d)) for d in drawings]),
        )
    for number, drawing in enumerate(drawings):
        save_image(Image.fromarray(drawing.image), folder / "faces" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def config():
    return SimpleNamespace(
        resolution=128, vae_steps=2, vae_learning_rate=1e-3, base_steps=2, sdxl_steps=2, base_learning_rate=1e-3,
        reward_steps=2, reward_learning_rate=1e-3, judge_steps=2, judge_learning_rate=1e-3, num_ladder_people=2,
        ema_decay=0.9,
        mixed_precision="no", device="cpu", go_on=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the trained models go instead of checkpoints/tiny."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "tiny_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def vae(work, config, home):
    train_vae(config, work)
    return AutoencoderKL.from_pretrained(work / "vae")


def test_drawings_know_what_they_show(work):
    drawings = Drawings(work, "train")
    assert [record["kind"] for record in drawings.records[:6]] == ["scene", *["portrait"] * 4, "scene"]
    assert drawings.images.shape == (10, 128, 128, 3) and len(drawings) == 10
    landmarks = np.array(drawings.records[1]["faces"][0]["landmarks"])
    assert landmarks.shape == (5, 2) and (landmarks > 0).all() and (landmarks < 128).all()
    assert (
        drawings.records[1]["faces"][0]["tags"]["hair_color"] in drawings.captions[1] or "bald" in drawings.captions[1]
    )
    with pytest.raises(FileNotFoundError, match="--only draw"):
        Drawings(work, "test")


def test_the_latents_are_normalised_and_the_image_stays(vae, work):
    """z' = (z - m) / s inside of the 1x1 convolutions: deviation 1 per channel, the same reconstruction."""
    drawings = Drawings(work, "train")
    means = encode_mean(vae, next(pixel_batches(drawings, 10)))
    torch.testing.assert_close(means.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(means.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    fresh = tiny.make_vae()
    pixels = next(pixel_batches(drawings, 2))
    with torch.no_grad():
        before = fresh.decode(fresh.encode(pixels).latent_dist.mean).sample
        normalise_latents(fresh, drawings)
        after = fresh.decode(fresh.encode(pixels).latent_dist.mean).sample
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    assert json.loads((work / "vae/done.json").read_text())["psnr"] > 3


def test_the_bases_are_trained_and_load_with_stock_diffusers(vae, work, config, home, monkeypatch):
    monkeypatch.setattr(bases, "BATCH", 2)
    bases.train_sd15(config, work)
    bases.train_sdxl(config, work)
    for kind, pipeline_class in (("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)):
        assert tiny.info(home / kind) == {"kind": kind, "seed": 0, "trained": True, "steps": 2}
        pipeline = pipeline_class.from_pretrained(home / kind)
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline("portrait photo", num_inference_steps=1, height=128, width=128).images[0]
        assert image.size == (128, 128)
        assert not any(str(home.parent) in path.read_text() for path in (home / kind).rglob("*.json"))
    first, second = (json.loads(line) for line in (work / "sd15/metrics.jsonl").read_text().splitlines())
    assert first["loss"] <= first["mse"] and second["step"] == 2
    changed = StableDiffusionPipeline.from_pretrained(home / "sd15").text_encoder.state_dict()
    kept = StableDiffusionXLPipeline.from_pretrained(home / "sdxl").text_encoder.state_dict()
    fresh = tiny.tiny_sd15().text_encoder.state_dict()
    assert all(torch.equal(changed[key], kept[key]) for key in changed)
    assert any(not torch.allclose(changed[key].float(), fresh[key], atol=1e-4) for key in changed)


def test_the_shipped_base_is_trained_further_except_its_text_encoder(vae, work, config, home, tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "BATCH", 2)
    bases.train_sd15(config, work)
    before = StableDiffusionPipeline.from_pretrained(home / "sd15")
    shutil.rmtree(work / "sd15")
    bases.train_sd15(SimpleNamespace(**{**vars(config), "go_on": True}), work)
    after = StableDiffusionPipeline.from_pretrained(home / "sd15")
    for part, same in (("text_encoder", True), ("vae", True), ("unet", False)):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same
        assert same or all(torch.allclose(a, b, atol=0.02) for a, b in pairs)


def test_a_decoder_is_trained_further_and_the_latents_stay(vae, work, config, home, tmp_path):
    bases.train_sd15(config, work)
    before = AutoencoderKL.from_pretrained(home / "sd15/vae")
    for name in ("train", "validation", "faces"):
        (tmp_path / name).symlink_to(work / name)
    train_vae(SimpleNamespace(**{**vars(config), "go_on": True}), tmp_path)
    after = AutoencoderKL.from_pretrained(tmp_path / "vae")
    for part, same in (("encoder", True), ("quant_conv", True), ("decoder", False), ("post_quant_conv", False)):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same, part
    for name in PIPELINES:
        shipped = AutoencoderKL.from_pretrained(home / name / "vae")
        assert str(home.parent) not in (home / name / "vae/config.json").read_text()
        for a, b in zip(after.parameters(), shipped.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_every_second_image_of_the_autoencoder_is_a_face(work):
    drawings, held_out = (Drawings(work, split) for split in ("train", "validation"))
    images = DrawingsAndFaces(drawings, work / "faces")
    assert len(images) == 20
    for index, source, number in ((2, drawings, 1), (3, held_out, 1), (9, held_out, 0)):  # four faces, again and again
        torch.testing.assert_close(images[index]["pixel_values"], source[number]["pixel_values"], atol=1e-5, rtol=0)


def test_the_record_keeps_the_runs_of_other_work_folders(work, config, home, tmp_path, monkeypatch):
    """Two folders, a run each: both rows stay, writing again adds none, and what people wrote below them stays."""
    settings = SimpleNamespace(num_drawn=10, resolution=128)
    for folder, steps in ((tmp_path / "a", 1), (tmp_path / "b", 2)):
        (folder / "vae").mkdir(parents=True)
        (folder / "vae/metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 0.5}) + "\n")
        (folder / "vae/done.json").write_text(json.dumps({"steps": steps, "psnr": 30.0}))
        note_duration(folder, "vae", 36.0)
        for _ in range(2):
            write_readme(settings, folder)
            page = (home / "README.md").read_text()
            (home / "README.md").write_text(page + f"{steps} by hand\n")
    page = (home / "README.md").read_text()
    assert page.count("| vae | ") == 2 and "| vae | 2 | 0.5 | 0.01 | psnr 30 |" in page
    assert page.endswith("\n1 by hand\n1 by hand\n2 by hand\n2 by hand\n") and page.count("# The tiny models") == 1


def test_the_sdxl_type_starts_as_the_other_base():
    """With the first text encoder's states in the first columns and no size condition both predict the same."""
    first, second = tiny.tiny_sd15().unet.eval(), tiny.tiny_sdxl().unet.eval()
    bases.warm_start(second, first)
    for parameter in second.add_embedding.parameters():
        torch.nn.init.zeros_(parameter)
    noisy, timesteps = torch.randn(2, 4, 32, 32), torch.tensor([3, 700])
    states = torch.randn(2, 77, 64)
    conditions = {"text_embeds": torch.randn(2, 64), "time_ids": torch.randn(2, 6)}
    with torch.no_grad():
        expected = first(noisy, timesteps, states).sample
        both = torch.cat([states, torch.randn(2, 77, 64)], dim=-1)
        found = second(noisy, timesteps, both, added_cond_kwargs=conditions).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_captions_of_mirror_images_and_short_ones():
    caption = "portrait photo, young woman, soft light from the left, studio background"
    assert (
        bases.swap_sides(caption) == caption.replace("left", "right")
        and bases.swap_sides(bases.swap_sides(caption)) == caption
    )
    rng = np.random.default_rng(0)
    short = {bases.thin_out(caption, rng) for _ in range(200)}
    assert caption in short and "portrait photo" in short and len(short) == 8  # every subset of the three tags
    assert all(text.startswith("portrait photo") for text in short)


def test_min_snr_weights_by_hand():
    """SNR = a / (1 - a): a = .5 gives 1, weight 1; a = .9 gives 9, weight 5 / 9."""
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([0.9, 0.5, 0.1]))
    weights = bases.min_snr_weights(scheduler, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(weights, torch.tensor([5 / 9, 1.0, 1.0]))


def test_every_damage_grows_with_its_strength():
    drawing = draw_portrait(10_007, 128)
    for name, damage in {**DAMAGES, **TRAINING_ONLY}.items():
        weak, strong = (damage(drawing.image, drawing.landmarks, s, np.random.default_rng(1)) for s in (0.2, 1.0))
        again = damage(drawing.image, drawing.landmarks, 1.0, np.random.default_rng(1))
        assert strong.shape == drawing.image.shape and strong.dtype == np.uint8 and (strong == again).all(), name
        change = [np.abs(side.astype(float) - drawing.image).mean() for side in (weak, strong)]
        assert 0 < change[0] < change[1], name
        corner = (slice(0, 8), slice(0, 8))
        if name not in PHOTOMETRIC:
            assert (strong[corner] == drawing.image[corner]).all(), name
    assert {*UNSEEN} < DAMAGES.keys()


def test_the_rungs_of_a_ladder_differ_in_the_damage_only():
    """What is done to all rungs leaves equal images equal; the kinds that are held out are never used."""
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for seed in range(20):
        (first, second), box = alike([image, image.copy()], [1.0, 5.0, 120.0, 128.0], np.random.default_rng(seed))
        assert (first == second).all() and box in ([1.0, 5.0, 120.0, 128.0], [8.0, 5.0, 127.0, 128.0])
    assert not {*SEEN} & {*UNSEEN}


@pytest.fixture(scope="module")
def ladders(vae, work, config, home):
    """Two people on the ladders of both bases, which are untrained."""
    for kind in ("sd15", "sdxl"):
        tiny.resolve("tiny", kind, home)
    with pytest.MonkeyPatch.context() as patch:  # fewer steps on the same rungs
        patch.setattr(ladders_module, "STEPS", 5)
        patch.setattr(ladders_module, "CLIMBS", [(ladders_module.STRENGTHS[1::2], "base")])
        make_ladders(config, work)
    return work


def test_people_climb_both_bases(ladders):
    """Other people for the judge than for the scorer; what the base leaves of a portrait changes with its strength."""
    scorers, judges = People(ladders, "sd15"), People(ladders, "sdxl")
    assert len(scorers) == len(judges) == 2
    assert not any((a.portrait.image == b.portrait.image).all() for a in scorers for b in judges)
    person = scorers[1]
    assert list(person.strengths) == sorted(person.strengths) and len(person.rungs) == 5
    assert all(rung.image.shape == (128, 128, 3) and rung.box == person.portrait.box for rung in person.rungs)
    # the face is larger in its aligned crop than in the portrait, and still in it
    assert person.aligned.face_width > person.portrait.face_width and person.aligned.box[3] <= 128
    files = {path: path.stat().st_mtime_ns for path in ladders.glob("ladders_*/*.npz")}
    assert len(files) == 2
    with pytest.raises(FileNotFoundError, match="--only ladders"):
        People(ladders / "train", "sd15")


def test_the_judge_is_trained_and_loads_with_stock_transformers(ladders, config, home):
    """In float16; it reads boxes and whole images, and the same run again does nothing."""
    train_judge(config, ladders)
    assert tiny.info(home / "judge") == {"kind": "judge", "seed": 1, "trained": True, "steps": 2}
    judge = FaceJudge.from_pretrained(home / "judge")
    image = Image.fromarray(Drawings(ladders, "train").images[1])
    scores = judge.score([image] * 3, [(30, 30, 90, 100), (30, 30, 90, 100), (0, 0, 128, 128)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[2] - scores[0]) > 1e-4
    train_judge(config, ladders)
    assert len((ladders / "judge/metrics.jsonl").read_text().splitlines()) == 2


def test_the_reward_model_is_pretrained(vae, ladders, config, home, monkeypatch):
    """On spoiled copies, on pairs of stage 1, and on ladders; the average of its weights ships, in float16."""
    kept = []

    def keep_run(output, steps, accelerator, modules, *args, **named):
        kept.append((TrainingRun(output, steps, accelerator, modules, *args, **named), modules["scorer"]))
        return kept[-1][0]

    monkeypatch.setattr(reward, "TrainingRun", keep_run)
    work = ladders
    image = Drawings(work, "train").images[1]
    for name, pixels in (("good", image), ("bad", image[::-1]), ("mask", image)):
        save_image(pixels, work / f"reward_pairs/{name}.png")
    pair = {
        "id": "a", "photograph": "a.png", "good": "good.png", "bad": "bad.png", "mask": "mask.png",
        "box": [30, 30, 90, 100], "landmarks": None, "confidence": 1.0, "area_ratio": 0.2, "strength": 0.4,
        "prompt": "", "seed": 0, "base": "tiny", "difference": 9.0, "round_trip": True,
    }  # fmt: skip
    (work / "reward_pairs/manifest.jsonl").write_text(json.dumps(pair) + "\n")
    train_reward(config, work)
    assert tiny.info(home / "reward")["trained"] is True
    scorer = FaceScorer.from_pretrained(home / "reward")
    ((run, trained),) = kept
    assert run.describe() == "2 steps, averaged weights"
    with run.averaged():
        pairs = zip(trained.parameters(), scorer.parameters(), strict=True)
        assert all(torch.equal(average.half(), shipped.half()) for average, shipped in pairs)
    assert scorer.score_crops([np.zeros((64, 64, 3), np.uint8)])
    assert 0 <= json.loads((work / "reward/done.json").read_text())["validation_accuracy"] <= 1
    train_reward(config, work)  # complete: nothing is done again
    assert len((work / "reward/metrics.jsonl").read_text().splitlines()) == 2
    faces = DrawnFaces(work, "train", vae, work / "reward_pairs", People(work, "sd15"))
    good, bad, again = faces[3]["pair"]
    assert (good.image == image).all() and (bad.image == image[::-1]).all() and good.box == [30, 30, 90, 100]
    reconstructed = vae.decode(vae.encode(to_pixel_values(image)).latent_dist.mode()).sample.detach()
    assert np.abs(np.asarray(to_pil(reconstructed)[0], int) - again.image).max() <= 1 and again.box == good.box
    rows = [{**pair, "id": name} for name in ("a", "b")]  # one more: the kept reconstructions are too few
    (work / "reward_pairs/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(DrawnFaces(work, "train", vae, work / "reward_pairs").pairs) == 2
    for way in WAYS:
        for seed in range(6):
            images, boxes, kind = make_ladder(faces[seed], np.random.default_rng(seed), way)
            assert len(images) == RUNGS and len({rung.shape for rung in images}) == 1 and kind in STEEPNESS, way
            assert len(boxes) == RUNGS, way
            assert all(0 <= box[0] < box[2] <= 128 and 0 <= box[1] < box[3] <= 128 for box in boxes), way
            assert all((rung != images[0]).any() for rung in images[1:]), way


def test_a_tuned_lora_ships_in_half_precision(tiny_models, home, work):
    """With its metadata, for stock diffusers; the layers of the recipe reach the convolutions too."""
    options = {key: GUIDANCE[key] for key in ("train", "rank", "alpha", "lora_targets")}
    tuner = GuidanceTuner.from_pretrained(str(tiny_models / "sd15"), **options)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.1)
    tuner.save_lora(work / "guided")
    for _ in range(2):  # the second time it is there already
        ship(work / "guided", lambda folder: save_lora_in_half(work / "guided", folder), 3)
    assert tiny.info(home / "guided") == {"kind": "guided", "seed": 0, "trained": True, "steps": 3}
    whole, half = (safe_open(folder / "guided" / LORA_FILE, "pt") for folder in (work, home))
    assert half.metadata() == whole.metadata()
    names = set(half.keys())
    assert names == set(whole.keys()) and any(".resnets.0.conv1.lora_A" in name for name in names)
    for name in names:
        assert torch.equal(half.get_tensor(name), whole.get_tensor(name).half())
    pipeline = load_tuned(home / "guided", str(tiny_models / "sd15"))
    assert len(adapters_of(pipeline.unet)) == len(names) // 2

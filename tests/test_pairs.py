"""Pairs: the strength, the inpainted bad face, the manifest, the dataset."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image

from faceprior import tiny
from faceprior.detect import area_bin, box_mask, face_square
from faceprior.images import save_image, to_pil, to_pixel_values
from faceprior.inpaint import (
    BATCH_TOLERANCE,
    FaceInpainter,
    PairBatch,
    change_outside,
    check_strength,
    cut_out,
    masked_difference,
    plan_face,
    prepare_photograph,
    put_back,
    strength_of,
)
from faceprior.pairs import FacePair, PairDataset, gather_pairs, prompts_by_size
from faceprior.procedural import draw_portrait
from faceprior.training import seeded

TYPES = ("sd15", "nine channels", "sdxl")


@pytest.fixture(scope="module")
def pipelines():
    """One tiny base of each type that can inpaint."""
    base = tiny.tiny_sd15()
    with seeded(1):
        unet = UNet2DConditionModel.from_config({**base.unet.config, "in_channels": 9})
    nine = StableDiffusionInpaintPipeline(**{**base.components, "unet": unet}, requires_safety_checker=False)
    return {"sd15": base, "nine channels": nine, "sdxl": tiny.tiny_sdxl()}


@pytest.fixture(scope="module")
def faces():
    """Two images of 64 x 64 pixels with the masks of their faces."""
    drawings = [draw_portrait(seed, 64) for seed in (1, 2)]
    return [(Image.fromarray(d.image), box_mask((64, 64), d.box)) for d in drawings]


# ------------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize(
    ("ratio", "strength"),
    [
        (1e-9, 0.06), (0.005, 0.06), (math.nextafter(0.005, 1), 0.1), (0.01, 0.1), (math.nextafter(0.01, 1), 0.2),
        (0.1, 0.2), (math.nextafter(0.1, 1), 0.4), (1.0, 0.4),
    ],
)  # fmt: skip
def test_strengths_of_table_8(ratio, strength):
    """(0, 0.5%] .06, (0.5%, 1%] .1, (1%, 10%] .2, (10%, 100%] .4: a limit belongs to the lower bin."""
    assert strength_of(ratio) == strength


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, math.nan])
def test_an_area_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=rf"has to be in \(0, 1.0\] but is {ratio}"):
        area_bin(ratio)


def test_bins_of_ones_own():
    assert [area_bin(ratio, (0.2, 0.5)) for ratio in (0.2, 0.3, 0.5)] == [0, 1, 1]
    with pytest.raises(ValueError, match=r"\(0, 0.5\]"):
        area_bin(0.6, (0.2, 0.5))


# ------------------------------------------------------------------------------------- image and mask


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 200), (160, 112)), ((200, 300), (112, 160)), ((128, 128), (128, 128)), ((40, 40), (128, 128))],
)
def test_prepared_photographs(size, expected):
    """300 x 200 at 128: 128 / sqrt(60000) = .523, 156.8 and 104.5 pixels, in multiples of 16: 160 and 112."""
    photograph = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    assert prepare_photograph(photograph, 128, 16).size == expected


@pytest.mark.parametrize(
    ("size", "max_resolution", "expected"),
    [
        ((128, 128), 512, (128, 128)),
        ((300, 200), 512, (288, 192)),
        ((512, 500), 512, (512, 496)),
        ((40, 40), 512, (128, 128)),
        ((1024, 1024), 512, (512, 512)),
        ((600, 400), 256, (320, 208)),
        ((600, 400), 128, (160, 112)),
        ((3000, 30), 512, (2992, 16)),
        ((3000, 12), 512, (2992, 16)),
    ],
)
def test_photographs_between_two_resolutions_keep_their_size(size, max_resolution, expected):
    """600 x 400 at 256: 256 / sqrt(240000) = .523, 313.5 and 209.0 pixels, in multiples of 16: 320 and 208."""
    assert prepare_photograph(Image.new("RGB", size), 128, 16, max_resolution).size == expected


def test_a_photograph_that_keeps_its_size_keeps_its_pixels():
    """300 x 200: 6 columns are cut off on each side, and 4 rows."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    prepared = prepare_photograph(Image.fromarray(pixels), 128, 16, 512)
    assert (np.asarray(prepared) == pixels[4:196, 6:294]).all()


def test_prepared_photographs_are_not_distorted():
    """A ramp of equal slope along x and y still has equal slopes, and what is cut off is cut off on both sides.

    300 x 200 becomes 160 x 112, by max(160 / 300, 112 / 200) = .56: 168 x 112 pixels, 4 cut off left and right.
    """
    y, x = np.mgrid[:200, :300]
    ramp = np.stack([x * 0.8, y * 0.8, np.zeros_like(x)], axis=2).astype(np.uint8)
    result = np.asarray(prepare_photograph(Image.fromarray(ramp), 128, 16), np.float64)
    along_x = np.polyfit(np.arange(100), result[50, 20:120, 0], 1)
    along_y = np.polyfit(np.arange(60), result[20:80, 50, 1], 1)
    assert along_x[0] == pytest.approx(0.8 / 0.56, rel=0.01)
    assert along_y[0] == pytest.approx(0.8 / 0.56, rel=0.01)
    assert result[50, 80, 0] == pytest.approx(150 * 0.8, abs=1.5)  # the middle stays in the middle


@pytest.mark.parametrize("size", [(1, 1), (3000, 30), (31, 17), (500, 333)])
@pytest.mark.parametrize("multiple", [8, 64])
def test_prepared_sides_are_multiples(size, multiple):
    prepared = prepare_photograph(Image.new("RGB", size), 128, multiple)
    assert prepared.width % multiple == prepared.height % multiple == 0


def test_a_box_is_rounded_outwards():
    """x from floor(10.2) = 10 to ceil(20.1) = 21, y from floor(5.9) = 5 to 8."""
    expected = np.zeros((30, 40), np.uint8)
    expected[5:8, 10:21] = 255
    assert (np.asarray(box_mask((40, 30), (10.2, 5.9, 20.1, 8.0))) == expected).all()


def test_a_box_over_the_border_is_cut_off():
    assert np.asarray(box_mask((40, 30), (-9, -9, 4, 99))).sum() == 255 * 4 * 30
    for box in ((-9, 0, -4, 10), (41, 0, 50, 10), (3, 30, 9, 31)):
        with pytest.raises(ValueError, match="covers no pixel of an image of 40 x 30"):
            box_mask((40, 30), box)


def test_masked_difference_by_hand():
    """Of 4 pixels inside, one differs by (30, 0, 0) and one by (6, 6, 6): (30 + 18) / 12 values = 4."""
    good = np.full((4, 4, 3), 100, np.uint8)
    bad = good.copy()
    bad[0, 0, 0], bad[0, 1], bad[3, 3] = 70, 106, 255
    mask = box_mask((4, 4), (0, 0, 2, 2))
    assert masked_difference(Image.fromarray(good), Image.fromarray(bad), mask) == pytest.approx(4)


def test_a_change_outside_of_the_mask_is_seen():
    """One value of one pixel beside the mask, by 3; inside of it anything may change."""
    good = np.full((4, 4, 3), 100, np.uint8)
    bad = good.copy()
    bad[:2, :2] = 0
    mask = box_mask((4, 4), (0, 0, 2, 2))
    assert change_outside(Image.fromarray(good), Image.fromarray(bad), mask) == 0
    bad[2, 0, 1] = 97
    assert change_outside(Image.fromarray(good), Image.fromarray(bad), mask) == 3
    assert change_outside(Image.fromarray(good), Image.fromarray(bad), box_mask((4, 4), (0, 0, 4, 4))) == 0


# ----------------------------------------------------------------------------------------------- plans


def found_row(size, *boxes) -> dict:
    faces = [{"box": list(box), "landmarks": None, "confidence": 1.0} for box in boxes]
    return {"photograph": "a/b.png", "good": "good/b.png", "prompt": "a man", "size": list(size), "faces": faces}


@pytest.mark.parametrize(
    ("box", "crop_strengths", "crop", "view_size", "strength"),
    [
        ((50, 50, 90, 90), None, None, (512, 256), 0.2),  # 1600 / 131072 = 1.2%
        ((50, 50, 90, 90), (0.3, 0.4, 0.5, 0.6), (6, 6, 134, 134), (128, 128), 0.5),
        ((50, 50, 60, 60), (0.3, 0.4, 0.5, 0.6), (0, 0, 128, 128), (128, 128), 0.3),  # 0.08%
        ((0, 0, 256, 256), (0.3, 0.4, 0.5, 0.6), (0, 0, 256, 256), (128, 128), 0.6),  # half of it
    ],
)
def test_the_plan_of_a_face(box, crop_strengths, crop, view_size, strength):
    plan = plan_face(found_row((512, 256), (0, 0, 9, 9), box), 1, 5, 128, crop_strengths=crop_strengths)
    assert (plan.crop, plan.view_size, plan.strength) == (crop, view_size, strength)
    assert plan.id.startswith("a_b_") and plan.id.endswith("_1") and (plan.seed, plan.prompt) == (5, "a man")


def test_a_face_that_fills_its_image_needs_no_crop():
    plan = plan_face(found_row((128, 128), (20, 20, 100, 100)), 0, 0, 128, crop_strengths=(0.1,) * 4)
    assert plan.crop is None and plan.view_size == (128, 128) and plan.strength == 0.4


def test_faces_of_one_photograph_are_pairs_of_their_own(pipelines, tmp_path):
    """Each pair of the two changes its own face only; what the network saw of the other is not pasted."""
    drawings = [draw_portrait(seed, 64) for seed in (1, 2)]
    image = Image.fromarray(np.concatenate([drawing.image for drawing in drawings], axis=1))
    save_image(image, tmp_path / "good/b.png")
    boxes = [drawing.box + np.array([64, 0, 64, 0]) * number for number, drawing in enumerate(drawings)]
    row = found_row(image.size, *boxes)
    plans = [plan_face(row, index, index, 64, crop_strengths=(0.3,) * 4) for index in (0, 1)]
    assert all(plan.crop for plan in plans)
    batch = PairBatch.load(tmp_path, 64, plans).inpaint(FaceInpainter(pipelines["sd15"], steps=10), round_trip=True)
    for number, pair in enumerate(batch.candidates()):
        assert pair.plan is plans[number] and np.array_equal(pair.photograph, image)
        assert np.array_equal(pair.mask, box_mask(image.size, boxes[number]))
        for side in (pair.good, pair.bad):
            assert change_outside(image, side, pair.mask) == 0 and masked_difference(image, side, pair.mask) > 0
        assert not np.array_equal(pair.good, pair.bad)


def test_without_a_round_trip_the_good_side_of_a_shrunk_crop_is_the_photograph_s(pipelines, tmp_path):
    """The network sees the face at half its size, but what is judged is what lies on the disk."""
    drawing = draw_portrait(1, 256)
    image = Image.fromarray(drawing.image)
    save_image(image, tmp_path / "good/b.png")
    plan = plan_face(found_row(image.size, drawing.box), 0, 0, 64, crop_strengths=(0.3,) * 4)
    batch = PairBatch.load(tmp_path, 64, [plan]).inpaint(FaceInpainter(pipelines["sd15"], steps=10), round_trip=False)
    (pair,) = batch.candidates()
    assert plan.crop and plan.crop[2] - plan.crop[0] > 64
    assert np.array_equal(pair.good, image) and not np.array_equal(pair.bad, image)


# ----------------------------------------------------------------------------------------- inpainting


@pytest.mark.parametrize(("strength", "calls"), [(0.06, 3), (0.1, 5), (0.2, 10)])
def test_a_part_of_the_steps_is_run(pipelines, faces, strength, calls):
    """int(.06 x 50) = 3, int(.1 x 50) = 5, int(.2 x 50) = 10 calls of the network, however many faces."""
    inpainter = FaceInpainter(pipelines["sd15"], steps=50)
    counted = []
    hook = inpainter.pipeline.unet.register_forward_hook(lambda *_: counted.append(1))
    inpainter([face for face, _ in faces], [mask for _, mask in faces], strength, ["a", "b"], [0, 1])
    hook.remove()
    assert len(counted) == calls


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (0.06, "0.06 x 10 steps runs no step: give at least 17 steps"),
        (0.0, r"in \(0, 1\] but is 0"),
        (1.1, "but is 1.1"),
        (math.nan, "but is nan"),
    ],
)
def test_a_strength_that_runs_no_step(pipelines, faces, strength, message):
    inpainter = FaceInpainter(pipelines["sd15"], steps=10)
    with pytest.raises(ValueError, match=message):
        inpainter([faces[0][0]], [faces[0][1]], strength, [""], [0])
    check_strength(0.06, steps=17)


@pytest.mark.parametrize("kind", TYPES)
def test_only_the_mask_changes(pipelines, faces, kind):
    inpainter = FaceInpainter(pipelines[kind], steps=10)
    bads = inpainter([face for face, _ in faces], [mask for _, mask in faces], 0.3, ["a man", ""], [0, 1])
    for (good, mask), bad in zip(faces, bads, strict=True):
        inside = np.asarray(mask) > 0
        good, bad = np.asarray(good), np.asarray(bad)
        assert (good[~inside] == bad[~inside]).all()
        assert (good[inside] != bad[inside]).mean() > 0.5


def decoded_values(inpainter, *arguments) -> tuple[list[Image.Image], torch.Tensor]:
    """Return the images, and the values that the VAE decoded them from."""
    values = []
    hook = inpainter.pipeline.vae.decoder.register_forward_hook(lambda _, __, output: values.append(output))
    images = inpainter(*arguments)
    hook.remove()
    return images, values[0]


@pytest.mark.parametrize("kind", TYPES)
def test_a_face_depends_on_its_own_seed_only(pipelines, faces, kind):
    """The same face alone, among three, and among them in another order: equal to BATCH_TOLERANCE.

    Only its seed makes it differ from another: with the next seed it is another face.
    """
    inpainter = FaceInpainter(pipelines[kind], steps=10)
    (face, mask), (other, other_mask) = faces
    asked = {
        "alone": ([face], [mask], 0.2, ["a man"], [7]),
        "last": ([other, other, face], [other_mask, other_mask, mask], 0.2, ["", "a man", "a man"], [8, 7, 7]),
        "first": ([face, other, other], [mask, other_mask, other_mask], 0.2, ["a man", "a man", ""], [7, 7, 8]),
    }
    images, values = {}, {}
    for name, arguments in asked.items():
        place = -1 if name == "last" else 0
        drawn, decoded = decoded_values(inpainter, *arguments)
        images[name], values[name] = np.asarray(drawn[place], int), decoded[place]
    for name in ("last", "first"):
        torch.testing.assert_close(values[name], values["alone"], rtol=0, atol=BATCH_TOLERANCE)
        assert np.abs(images[name] - images["alone"]).max() <= 1
    assert np.array_equal(images["alone"], np.asarray(inpainter(*asked["alone"])[0], int))
    another = np.asarray(inpainter([face], [mask], 0.2, ["a man"], [8])[0], int)
    assert np.abs(another - images["alone"]).max() > 1


def test_a_round_trip_is_the_vae_inside_of_the_mask(pipelines, faces):
    images, masks = zip(*faces, strict=True)
    tripped = FaceInpainter(pipelines["sd15"]).round_trip(images, masks)
    for image, mask, result in zip(images, masks, tripped, strict=True):
        with torch.no_grad():
            decoded = pipelines["sd15"].vae(to_pixel_values(image)).sample
        inside = np.asarray(mask) > 0
        expected = np.where(inside[..., None], np.asarray(to_pil(decoded)[0], int), np.asarray(image, int))
        assert np.abs(np.asarray(result, int) - expected).max() <= 1
        assert (np.asarray(result)[~inside] == np.asarray(image)[~inside]).all()
        assert (np.asarray(result)[inside] != np.asarray(image)[inside]).mean() > 0.5
    with pytest.raises(ValueError, match="one size"):
        FaceInpainter(pipelines["sd15"]).round_trip([images[0]], [masks[0].resize((32, 32))])


def inpaint_by_hand(pipeline, image, mask, steps, run, guidance_scale, prompt, seed):
    """DDIM (Song et al., Eq. 12, no noise) over the last `run` steps, the kept region being put back at every step."""
    vae, unet, ratio = pipeline.vae, pipeline.unet, 1000 // steps
    alpha_bar = pipeline.scheduler.alphas_cumprod
    scale, pixels = vae.config.scaling_factor, to_pixel_values(image)
    outside = torch.from_numpy(np.asarray(mask) < 128).float()[None, None]
    clean = vae.encode(pixels).latent_dist.mean * scale
    seen = vae.encode(pixels * outside).latent_dist.mean * scale
    inside = F.interpolate(1 - outside, clean.shape[-2:])
    text = torch.cat([pipeline.encode_prompt(p, "cpu", 1, False)[0] for p in ("", prompt)])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = lambda a: a.sqrt() * clean + (1 - a).sqrt() * noise  # noqa: E731
    timesteps = [k * ratio + 1 for k in range(run)][::-1]
    z = noised(alpha_bar[timesteps[0]])
    for number, t in enumerate(timesteps):
        entry = torch.cat([z, inside, seen], 1) if unet.config.in_channels == 9 else z
        without, with_prompt = unet(entry.repeat(2, 1, 1, 1), t, text).sample.chunk(2)
        e = without + guidance_scale * (with_prompt - without)
        before = alpha_bar[max(t - ratio, 0)]
        z = before.sqrt() * (z - (1 - alpha_bar[t]).sqrt() * e) / alpha_bar[t].sqrt() + (1 - before).sqrt() * e
        if unet.config.in_channels == 4:
            kept = clean if number == run - 1 else noised(alpha_bar[timesteps[number + 1]])
            z = inside * z + (1 - inside) * kept
    return Image.composite(to_pil(vae.decode(z / scale).sample)[0], image, mask)


@pytest.mark.parametrize("kind", ["sd15", "nine channels"])
@torch.no_grad()
def test_inpainting_by_hand(pipelines, faces, kind):
    """.3 of 10 steps: the timesteps 201, 101, 1 of `leading` spacing with offset 1, ending at alpha_bar[0]."""
    image, mask = faces[0]
    ours = FaceInpainter(pipelines[kind], steps=10, guidance_scale=3.0)([image], [mask], 0.3, ["a man"], [5])[0]
    expected = inpaint_by_hand(pipelines[kind], image, mask, 10, 3, 3.0, "a man", 5)
    assert np.abs(np.asarray(ours, int) - np.asarray(expected, int)).max() <= 1


def test_prompts_are_encoded_once(pipelines, faces):
    """Two different prompts among three, each with the empty one beside it: four calls, and the last batch is kept."""
    inpainter = FaceInpainter(pipelines["sd15"], steps=10)
    (face, mask), counted = faces[0], []
    hook = inpainter.pipeline.text_encoder.register_forward_hook(lambda *_: counted.append(1))
    inpainter([face] * 3, [mask] * 3, 0.1, ["a man", "a woman", "a man"], [0, 1, 2])
    assert len(counted) == 4
    inpainter([face], [mask], 0.1, ["a woman"], [0])
    hook.remove()
    assert len(counted) == 4 and inpainter._embeddings.keys() == {"a woman"}


def test_sdxl_gets_the_conditions_of_its_pipeline(pipelines, faces):
    """The size, uncropped, and zeros instead of the empty prompt, as `force_zeros_for_empty_prompt` says."""
    pipeline = tiny.tiny_sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)  # as SDXL's own
    inpainter = FaceInpainter(pipeline, steps=10)
    calls = []
    unet = inpainter.pipeline.unet
    hook = unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    inpainter([faces[0][0]], [faces[0][1]], 0.1, ["a man"], [0])
    hook.remove()
    conditions = calls[0]["added_cond_kwargs"]
    assert conditions["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    for values in (calls[0]["encoder_hidden_states"], conditions["text_embeds"]):
        assert values[0].abs().max() == 0 and values[1].abs().max() > 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_base_in_bfloat16_beside_a_vae_in_float32(tiny_models, faces, kind):
    from faceprior.bases import load_pipeline

    folder = str(tiny_models / kind)
    images = [
        FaceInpainter(load_pipeline(folder, dtype), steps=10)([faces[0][0]], [faces[0][1]], 0.2, ["a man"], [0])[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    difference = np.abs(np.asarray(images[0], int) - np.asarray(images[1], int))
    assert difference.max() > 0 and difference.mean() < 3


def test_images_that_do_not_fit(pipelines, faces):
    inpainter = FaceInpainter(pipelines["sd15"], steps=10)
    assert inpainter.multiple == 16  # the VAE's 4 times two halvings in the U-Net
    face, mask = faces[0]
    for images, masks in (([face, face.resize((32, 32))], [mask] * 2), ([face], [mask.resize((32, 32))])):
        with pytest.raises(ValueError, match=r"one size.*\[\(32, 32\), \(64, 64\)\]"):
            inpainter(images, masks, 0.2, [""] * len(images), [0] * len(images))
    with pytest.raises(ValueError, match=r"multiple of 16, but are \[\(40, 64\)\]"):
        inpainter([face.resize((40, 64))], [mask.resize((40, 64))], 0.2, [""], [0])


def test_the_base_is_left_as_it_was(pipelines):
    before = pipelines["sd15"].scheduler
    FaceInpainter(pipelines["sd15"], steps=10)
    assert pipelines["sd15"].scheduler is before and type(pipelines["sd15"]).__name__ == "StableDiffusionPipeline"


# -------------------------------------------------------------------------------- manifest and dataset

ROW = {
    "photograph": "a.png", "good": "good/a.png", "bad": "bad/a.png", "mask": "mask/a.png",
    "box": [30.0, 20.0, 50.0, 44.0],
    "landmarks": [[35.0, 28.0], [45.0, 28.0], [40.0, 33.0], [36.0, 38.0], [44.0, 38.0]],
    "confidence": 0.99, "area_ratio": 0.09375, "strength": 0.2, "prompt": "a man", "seed": 3, "base": "tiny",
    "difference": 12.5, "round_trip": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with the images of one pair, 80 x 64 pixels, and no manifest."""
    y, x = np.mgrid[:64, :80]
    good = np.stack([x * 3, y * 3, x + y], axis=2).astype(np.uint8)
    mask = box_mask((80, 64), ROW["box"])
    bad = np.where(np.asarray(mask)[..., None] > 0, 255 - good, good).astype(np.uint8)
    for name, image in (("good", good), ("bad", bad), ("mask", mask)):
        save_image(image, tmp_path / name / "a.png")
    return tmp_path


def in_folder(folder, **changes) -> FacePair:
    """The pair as it is read: its files are in the folder."""
    files = {side: str(folder / ROW[side]) for side in ("good", "bad", "mask")}
    return FacePair(id="a_0", **{**ROW, **files, **changes})


def write_manifest(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def test_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pairs in .*`python stages/01_make_pairs.py` makes them"):
        gather_pairs(tmp_path)


def test_a_row_makes_the_round_trip(folder):
    pair = FacePair(id="a_0", **ROW)
    write_manifest(folder, pair.to_row(), {**pair.to_row(), "id": "a_1", "landmarks": None, "extra": 1})
    pairs, problems = gather_pairs(folder)
    assert pairs[0] == in_folder(folder) and pairs[1].landmarks is None and not problems


def test_rows_before_the_round_trip_have_none(folder):
    write_manifest(folder, {key: value for key, value in {"id": "a", **ROW}.items() if key != "round_trip"})
    assert gather_pairs(folder)[0][0].round_trip is False and gather_pairs(folder)[0][0].lost is False


def test_pairs_of_several_folders(folder, tmp_path_factory, monkeypatch):
    """Separated by commas or in a list; the samples of both are found, and the problems of both are returned."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    shutil.copytree(folder, "more")
    write_manifest(folder, {"id": "a", **ROW})
    write_manifest(Path("more"), {"id": "b", **ROW}, "torn")
    pairs, problems = gather_pairs(f"{folder}, more")
    assert [pair.id for pair in pairs] == ["a", "b"] and pairs[1].bad == "more/bad/a.png"
    assert [place for place, _ in problems] == ["more/manifest.jsonl:2"]
    first, second = PairDataset(pairs, 32)
    assert torch.equal(first["bad"], second["bad"])
    assert gather_pairs([folder, "more"]) == (pairs, problems)
    assert gather_pairs("more")[0] == gather_pairs(Path("more"))[0] == pairs[1:]
    with pytest.raises(FileNotFoundError, match="no pairs in missing"):
        gather_pairs(f"{folder},missing")


BAD_ROWS = {
    "no mask": ({"mask": None}, "`mask` has to be"),
    "no confidence": ({"confidence": "high"}, "`confidence` has to be"),
    "missing": ({"good": "good/b.png"}, "good/b.png is missing"),
    "escaping": ({"bad": "../bad/a.png"}, "leads out of"),
    "absolute": ({"bad": "/etc/passwd"}, "leads out of"),
    "a folder": ({"bad": "bad"}, "bad is missing"),
    "box of text": ({"box": ["1", "2", "30", "40"]}, "`box` has to be four numbers"),
    "box of three": ({"box": [1, 2, 3]}, "`box` of a face has to be four finite numbers"),
    "box inverted": ({"box": [30, 2, 10, 40]}, "x0 <= x1"),
    "landmarks": ({"landmarks": [[1, 2]]}, r"have to be \(5, 2\)"),
    "seed": ({"seed": True}, "`seed` has to be"),
    "area": ({"area_ratio": 1.5}, r"has to be in \(0, 1.0\] but is 1.5"),
    "round trip": ({"round_trip": 1}, "`round_trip` has to be"),
    "lost": ({"lost": "no"}, "`lost` has to be"),
    "prompt of half a character": ({"prompt": "a \ud83d"}, "surrogates not allowed"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_the_rest_is_read(folder, name):
    changes, reason = BAD_ROWS[name]
    row = {"id": name, **ROW, **changes}
    write_manifest(folder, row, {"id": "whole", **ROW}, json.dumps({"id": "torn", **ROW})[:70], "[1, 2]")
    pairs, problems = gather_pairs(folder)
    assert [pair.id for pair in pairs] == ["whole"]
    assert len(problems) == 3
    ((place, why),) = [problem for problem in problems if problem[0].endswith(f": {name}")]
    assert re.search(reason, why)
    assert {place.rsplit(":", 1)[1] for place, why in problems if "torn or foreign row" in why} == {"3", "4"}


def test_a_row_without_a_key_and_one_with_nan(folder):
    rows = [{k: v for k, v in {"id": "a", **ROW}.items() if k != "prompt"}, {"id": "b", **ROW, "difference": math.nan}]
    write_manifest(folder, *rows, {"id": "whole", **ROW})
    pairs, problems = gather_pairs(folder)
    assert [pair.id for pair in pairs] == ["whole"]
    assert len(problems) == 2 and "the row has no `prompt`" in {why for _, why in problems}


def test_no_usable_pair_is_an_error_with_the_first_reason(folder):
    write_manifest(folder, {"id": "a", **ROW, "good": "good/b.png"})
    with pytest.raises(ValueError, match="no usable pair; the first problem: .*good/b.png is missing"):
        gather_pairs(folder)
    write_manifest(folder)
    with pytest.raises(ValueError, match="no usable pair"):
        gather_pairs(folder)


def test_a_sample(folder):
    """A face 20 x 43 high, middle (40, 32): 1.5 x 43 = 64.5 pixels do not fit, so of 80 x 64 the square is x 8..72.

    Halved to 32 x 32, the mask x 30..50, y 20..44 lies at x (30 - 8) / 2 = 11 .. 21, y 10..22.
    """
    dataset = PairDataset([in_folder(folder, box=[30.0, 10.5, 50.0, 53.5])], resolution=32)
    assert len(dataset) == 1
    sample = dataset[0]
    expected = torch.zeros(1, 32, 32)
    expected[:, 10:22, 11:21] = 1
    assert torch.equal(sample["mask"], expected)
    for side in ("good", "bad"):
        assert sample[side].shape == (3, 32, 32) and sample[side].dtype == torch.float32
        assert sample[side].abs().max() <= 1
    far = F.max_pool2d(expected[None], 9, 1, 4)[0] == 0  # beyond the resampling filter's reach
    assert torch.equal(sample["good"][:, far[0]], sample["bad"][:, far[0]])
    assert (sample["good"] - sample["bad"])[:, expected[0] > 0].abs().mean() > 0.2
    # the pixel at (0, 0) covers x 8..10, y 0..2 of the ramp 3 x: 27 of 255
    assert sample["good"][0, 5, 0].item() == pytest.approx((27 - 0.5 - 127.5) / 127.5, abs=0.02)
    assert sample["prompt"] == "a man"


def test_a_small_face_keeps_its_scale(folder):
    """The face is 24 high, so 36 pixels are enough, of which a resolution of 40 makes x 20..60, y 12..52."""
    sample = PairDataset([in_folder(folder)], resolution=40)[0]
    assert sample["id"] == "a_0"
    for side in ("good", "bad"):
        pixels = to_pixel_values(Image.open(folder / side / "a.png").crop((20, 12, 60, 52)))[0]
        assert torch.equal(sample[side], pixels)
    assert torch.equal(sample["mask"].nonzero().aminmax(dim=0).min, torch.tensor([0, 8, 10]))
    assert sample["mask"].sum() == 20 * 24


def test_sides_of_different_sizes_are_an_error(folder):
    save_image(np.zeros((64, 64, 3), np.uint8), folder / "bad/a.png")
    with pytest.raises(ValueError, match=r"pair a_0: .*\(80, 64\), \(64, 64\) and \(80, 64\)"):
        PairDataset([in_folder(folder)], 32)[0]


def test_sides_of_different_sizes_are_found_before_the_work(folder):
    """They are a problem of the pair, as other spoilt files are, and no error in the middle of a training."""
    save_image(np.zeros((64, 80, 3), np.uint8), folder / "bad/b.png")
    save_image(np.zeros((64, 64, 3), np.uint8), folder / "bad/a.png")
    write_manifest(folder, {"id": "a", **ROW}, {"id": "whole", **ROW, "bad": "bad/b.png"})
    pairs, ((place, why),) = gather_pairs(folder)
    assert [pair.id for pair in pairs] == ["whole"] and place == "a"
    assert re.search(r"must be of one size but are \(80, 64\), \(64, 64\) and \(80, 64\)", why)


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((80, 64), (30, 20, 50, 44), (8, 0, 72, 64)),
        ((80, 64), (0, 20, 10, 44), (0, 0, 64, 64)),
        ((80, 64), (70, 20, 80, 44), (16, 0, 80, 64)),
        ((50, 90), (0, 80, 20, 90), (0, 40, 50, 90)),
        ((64, 64), (3, 3, 9, 9), (0, 0, 64, 64)),
    ],
)
def test_the_square_around_a_face(size, box, expected):
    """As near to the face's middle as the border allows: 40 - 32 = 8; clamped to 0 .. 80 - 64 = 16."""
    assert face_square(size, box, 128) == face_square(size, box, max(size)) == expected


@pytest.mark.parametrize(
    ("box", "resolution", "expected"),
    [
        ((240, 100, 270, 136), 128, (191, 54, 319, 182)),
        ((240, 100, 440, 300), 128, (190, 50, 490, 350)),
        ((0, 500, 30, 512), 128, (0, 384, 128, 512)),
        ((100, 100, 500, 500), 128, (0, 0, 512, 512)),
        ((240, 100, 270, 136), 512, (0, 0, 512, 512)),
    ],
)
def test_the_square_around_a_small_face(box, resolution, expected):
    """Middle (255, 118) +- 64; a face of 200 takes 300; one of 400 the 512 that there are."""
    assert face_square((512, 512), box, resolution) == expected


def test_a_crop_is_put_back_where_it_was():
    """Of a view only the masked pixels come back, at their place; without a square the image itself is the view."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)) for _ in range(2)]
    masks = [box_mask((160, 96), (100, 20, 120, 44))] * 2
    squares = [(80, 10, 144, 74), None]
    views = cut_out(images, squares, 64)
    assert views[1] is images[1] and views[0].size == (64, 64)
    assert (np.asarray(views[0]) == np.asarray(images[0])[10:74, 80:144]).all()
    view_mask = np.asarray(cut_out(masks, squares, 64)[0])
    assert set(np.unique(view_mask)) == {0, 255} and (view_mask == np.asarray(masks[0])[10:74, 80:144]).all()
    black = [Image.new("RGB", view.size) for view in views]
    for image, result in zip(images, put_back(images, black, squares, masks), strict=True):
        inside = np.asarray(masks[0]) > 0
        assert (np.asarray(result)[inside] == 0).all()
        assert (np.asarray(result)[~inside] == np.asarray(image)[~inside]).all()
    larger = put_back(images, cut_out(images, [(60, 0, 156, 96), None], 64), [(60, 0, 156, 96), None], masks)
    assert (np.asarray(larger[1]) == np.asarray(images[1])).all()
    change = np.abs(np.asarray(larger[0]).astype(int) - np.asarray(images[0]))
    assert change[~inside].max() == 0 and change[inside].max() > 0  # shrunk by 2/3 and grown again


def test_prompts_of_the_largest_faces_first():
    """Equal prompts once, at the place of the largest face; equal faces by their id."""
    faces = {"c": (0.2, "a man"), "b": (0.5, "a woman"), "a": (0.2, "a child"), "d": (0.1, "a woman")}
    pairs = [
        FacePair(**{**ROW, "id": name, "area_ratio": area, "prompt": text}) for name, (area, text) in faces.items()
    ]
    assert prompts_by_size(pairs) == ["a woman", "a child", "a man"]

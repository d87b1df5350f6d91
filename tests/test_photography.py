"""Photographic tags that are measured: by hand on plain crops, and on a drawn portrait with known changes."""

import json
import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from checkpoints.tiny_models import photography as counting
from faceprior.align import align_face
from faceprior.photography import head_turn, measure_photography, measured_tags
from faceprior.procedural import draw_portrait


def lit(left, right, colour=(1.0, 1.0, 1.0), side=256):
    """A crop of one colour whose halves have two brightnesses, 0 to 255."""
    halves = np.full((side, side, 3), left, np.float32)
    halves[:, side // 2 :] = right
    return Image.fromarray((halves * colour).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("left", "right", "side"),
    [
        (120, 120, "front light"),
        (123, 117, "front light"),
        (130, 110, "light from the left"),
        (110, 130, "light from the right"),
    ],
)
def test_the_side_of_the_light(left, right, side):
    """The logarithm of linear light, ((v / 255 + .055) / 1.055)^2.4 and .002; limits at .115.

    123 to 117: ln .1981 - ln .1779 = .107; 130 to 110: .2232 and .1559, .356.
    """
    light = [((value / 255 + 0.055) / 1.055) ** 2.4 + 0.002 for value in (left, right)]
    values = measure_photography(lit(left, right))
    assert values["light side"] == pytest.approx(math.log(light[0] / light[1]), abs=1e-3)
    assert side in measured_tags(lit(left, right))


def test_the_turn_of_the_head_by_hand():
    """Eyes at 10 and 30 on a slope of 45 degrees; the nose 5 pixels along it from their middle, and off it."""
    slope, across = np.array([1, 1]) / math.sqrt(2), np.array([-1, 1]) / math.sqrt(2)
    points = [10 * slope, 30 * slope, 25 * slope + 12 * across, 12 * slope, 28 * slope]
    assert head_turn(np.array(points)) == pytest.approx(5 / 20)
    values = [measure_photography(lit(130, 110), turn)["light side"] for turn in (0, 0.25)]
    assert values[0] - values[1] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("colour", "tag"),
    [((1.0, 0.95, 0.85), "warm light"), ((1.0, 0.96, 0.94), "neutral light"), ((0.9, 0.95, 1.0), "cool light")],
)
def test_the_colour_of_the_light(colour, tag):
    """Green over blue, by the power of 2.2: .95 / .85 is .24, .96 / .94 .046, .95 / 1 -.11; limits .025 and .104."""
    assert tag in measured_tags(lit(200, 200, colour))


def test_dark_and_light_tones():
    tones = [{"dark tones", "light tones"} & set(measured_tags(lit(value, value))) for value in (50, 120, 220)]
    assert tones == [{"dark tones"}, set(), {"light tones"}]


def test_a_grey_picture_has_no_coloured_light():
    tags = measured_tags(lit(120, 120))
    assert "black and white" in tags and not [
        tag for tag in tags if tag in ("warm light", "cool light", "neutral light")
    ]


@pytest.fixture(scope="module")
def crop():
    drawing = draw_portrait(3, 320)
    return align_face(Image.fromarray(drawing.image), drawing.landmarks, 256).crop


def test_mirroring_swaps_the_sides(crop):
    value, mirrored = (measure_photography(image)["light side"] for image in (crop, ImageOps.mirror(crop)))
    assert value == pytest.approx(-mirrored, abs=0.02)


def test_blur_of_the_whole_picture_is_soft_focus(crop):
    blurred = Image.fromarray(cv2.GaussianBlur(np.asarray(crop), (0, 0), 2))
    assert "sharp details" in measured_tags(crop) and "soft focus" in measured_tags(blurred)
    assert not {"smooth skin", "textured skin"} & set(measured_tags(blurred))  # it cannot be seen


def test_smoothing_takes_the_texture_of_the_skin(crop):
    pixels = np.array(crop)
    smooth = pixels.copy()
    smooth[130:230, 60:196] = cv2.bilateralFilter(cv2.bilateralFilter(pixels, 9, 40, 5), 9, 40, 5)[130:230, 60:196]
    assert "textured skin" in measured_tags(crop) and "smooth skin" in measured_tags(Image.fromarray(smooth))


def test_a_blurred_background_has_blurred_edges(crop):
    """Stripes beside the head: sharp as they are, and blurred."""
    pixels = np.array(crop)
    stripes = np.where(np.arange(256)[:, None, None] // 16 % 2, 40, 200).astype(np.uint8)
    stripes = np.broadcast_to(stripes, (256, 40, 3))
    blurred = cv2.GaussianBlur(stripes, (0, 0), 5)
    for background, is_blurred in ((stripes, False), (blurred, True)):
        pixels[:, :40] = pixels[:, 216:] = background
        assert ("blurred background" in measured_tags(Image.fromarray(pixels))) == is_blurred


@pytest.mark.parametrize("sigma", [0.7, 1.5, 3.0])
def test_the_blur_of_edges_is_measured_in_pixels(crop, sigma):
    """Steps of 100 grey levels beside the head, blurred by a known Gaussian; the gradients are Sobel's, which adds to
    the two blurs alike, and noise below the edges' does not count."""
    pixels = np.array(crop, np.float32)
    steps = np.where(np.arange(256)[:, None, None] // 20 % 2, 50.0, 150.0) * np.ones((256, 256, 3))
    background = cv2.GaussianBlur(steps, (0, 0), sigma) + np.random.default_rng(0).normal(0, 1, pixels.shape)
    pixels[:, :44], pixels[:, 212:] = background[:, :44], background[:, 212:]
    value = measure_photography(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))["depth of field"]
    assert value == pytest.approx(sigma, abs=0.35)


def test_hair_on_one_side_and_a_plain_wall_do_not_count(crop):
    """Fine lines fill one side: the other one tells. Nothing to be seen on both: no tag, whatever it is."""
    pixels = np.array(crop)
    steps = np.where(np.arange(256)[:, None, None] // 20 % 2, 50.0, 150.0) * np.ones((256, 44, 3))
    pixels[:, 212:] = cv2.GaussianBlur(steps, (0, 0), 4)
    pixels[:, :44] = 128
    pixels[:110, :44] = 20 + 200 * (np.arange(44)[None, :, None] // 3 % 2)
    assert "blurred background" in measured_tags(Image.fromarray(pixels))
    pixels[:, :44] = pixels[:, 212:] = 128
    assert measure_photography(Image.fromarray(pixels))["depth of field"] is None


def test_small_crops_show_no_fine_detail(crop):
    values = measure_photography(crop.resize((128, 128)))
    assert {name for name, value in values.items() if value is None} == {"depth of field", "sharpness", "skin"}


def test_tags_do_not_depend_on_the_size_of_large_crops():
    assert measured_tags(lit(160, 80, side=256)) == measured_tags(lit(160, 80, side=512))


def test_the_best_limit_of_what_was_tried_by_hand():
    """Values 1 to 4 of soft, hard, soft, hard light: above 1.5, below 1.5 or above 3.5 are 3 of 4 right; by two
    measures that add up to the truth all 4. Always saying soft is right in 2."""
    tried = [(hard, {"one": value, "two": hard - value}) for value, hard in enumerate((False, True, False, True), 1)]
    rows = {row["measure"]: row["value"] for row in counting.hardness_rows(tried)}
    assert rows["always soft"] == 0.5 and rows["one"] == 0.75 and rows["all, combined"] == 1


def test_steep_and_deep_shadows_are_measured():
    """Two halves of a face with an edge between them: the harder the light, the steeper the edge and not the depth."""
    pixels = np.full((256, 256, 3), 180, np.float32)
    pixels[:, 128:] = 60
    soft, hard = (
        counting.tried_on_hardness(Image.fromarray(cv2.GaussianBlur(pixels, (0, 0), sigma).round().astype(np.uint8)))
        for sigma in (12, 1)
    )
    for name in ("steepness beside the nose", "steepness on the neck"):
        assert hard[name] > 2 * soft[name]
    assert hard["two peaks"] > soft["two peaks"]
    assert hard["light over shade"] == pytest.approx(soft["light over shade"], rel=0.1)


def test_backgrounds_in_which_nothing_is_to_be_seen_do_not_count():
    """The drawn person before a plain wall, and before steps."""
    person = counting.sample_person(5)
    wall = np.full((counting.SIZE, counting.SIZE, 3), 0.2, np.float32)
    steps = np.where(np.arange(counting.SIZE)[None, :, None] // 12 % 2, wall, 0.02).astype(np.float32)
    kept = [[name for name, _, _ in counting.photographs(person, behind)] for behind in (wall, steps)]
    assert kept[1].count("depth of field") - kept[0].count("depth of field") == 2


def test_the_command_counts_right_tags(tmp_path, capsys):
    """One person, photographed in 13 or 14 ways; of the sharp and the blurred one sharpness tells which is which."""
    counting.main(counting.Config(output=str(tmp_path), num_portraits=1, first_seed=5))
    rows = json.loads((tmp_path / "photography.json").read_text())["rows"]
    total = {row["attribute"]: row for row in rows if row["truth"] == "all"}
    assert [total[name]["photographs"] for name in ("light side", "colour temperature", "sharpness")] == [1, 1, 2]
    assert total["sharpness"]["value"] == 1 and total["sharpness"]["low"] < 0.5
    assert "| sharpness | all | 100.0% |" in (tmp_path / "photography.md").read_text()

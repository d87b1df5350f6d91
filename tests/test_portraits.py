"""Portraits: the measured quality, the tags of the light, the manifest, the dataset."""

import io
import json
import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from faceprior.detect import Face
from faceprior.images import save_image
from faceprior.portraits import (
    Portrait,
    PortraitDataset,
    measure_quality,
    read_portraits,
)
from faceprior.procedural import draw_portrait


@pytest.fixture(scope="module")
def drawing():
    return draw_portrait(3, 256)


@pytest.fixture(scope="module")
def face(drawing):
    return Face(drawing.box, drawing.landmarks, 1.0)


def compressed(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# --------------------------------------------------------------------------------------- a face's quality


def spoil(image, flaw, rng):
    """The image with one flaw: pixels (H, W, 3) uint8."""
    if flaw == "blur":
        return cv2.GaussianBlur(image, (0, 0), 4)
    if flaw == "noise":
        return (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
    if flaw == "pepper":
        return np.where(rng.random(image.shape[:2])[..., None] < 0.05, 0, image).astype(np.uint8)
    if flaw == "jpeg":
        return compressed(image, 5)
    if flaw == "smooth":
        return cv2.bilateralFilter(cv2.bilateralFilter(image, 9, 60, 9), 9, 60, 9)
    return (image * 3.0).clip(0, 255).astype(np.uint8)  # overexposed


@pytest.mark.parametrize(
    ("flaw", "number", "direction"),
    [
        ("blur", "sharpness", -1), ("blur", "texture", -1), ("smooth", "texture", -1), ("noise", "noise", 1),
        ("pepper", "pepper", 1), ("jpeg", "blocks", 1), ("overexposed", "clipped", 1),
    ],
)  # fmt: skip
def test_every_flaw_moves_its_number(drawing, face, flaw, number, direction):
    clean = measure_quality(Image.fromarray(drawing.image), face)
    spoiled = spoil(drawing.image, flaw, np.random.default_rng(0))
    measured = measure_quality(Image.fromarray(spoiled), face)
    assert direction * (measured[number] - clean[number]) > 0
    factor = measured[number] / clean[number] if clean[number] else math.inf
    assert factor > 1.3 or factor < 1 / 1.3


def test_quality_is_a_row_of_plain_numbers(drawing, face):
    quality = measure_quality(Image.fromarray(drawing.image), face)
    assert set(quality) == {"noise", "pepper", "blocks", "sharpness", "texture", "clipped"}
    assert json.loads(json.dumps(quality)) == quality


def test_pepper_and_noise_are_measured_on_the_photographs_own_pixels(drawing, face):
    """5% of black pixels on a face that is brighter than 40 grey levels: nearly that fraction is found, at any size."""
    spoiled = spoil(drawing.image, "pepper", np.random.default_rng(0))
    assert measure_quality(Image.fromarray(spoiled), face)["pepper"] == pytest.approx(0.05, abs=0.015)


def test_blocks_are_found_whatever_the_corner_of_the_box(drawing, face):
    """The grid of a JPEG begins at the corner of the image, not at the face's."""
    spoiled = Image.fromarray(compressed(drawing.image, 5))
    x0, y0, x1, y1 = face.box
    for shift in (0, 3, 5):
        moved = Face((x0 + shift, y0 + shift, x1, y1), face.landmarks, 1.0)
        assert measure_quality(spoiled, moved)["blocks"] > 1.5


def test_a_face_at_the_border_and_a_tiny_one(drawing, face):
    photograph = Image.fromarray(drawing.image)
    for box in ((0, 0, 256, 256), (200, 200, 256, 256), (0, 0, 5, 5), (248, 248, 256, 256)):
        quality = measure_quality(photograph, Face(box, face.landmarks, 1.0))
        assert all(math.isfinite(value) for value in quality.values())


def test_a_face_in_the_corner_is_not_measured_beyond_the_image(face):
    """The two blocks around a box of 8 x 8 pixels lie inside of an even image: no dark border, no pepper, no step."""
    photograph = Image.new("RGB", (256, 256), (200, 180, 170))
    quality = measure_quality(photograph, Face((248, 248, 256, 256), face.landmarks, 1.0))
    assert (quality["noise"], quality["pepper"], quality["blocks"]) == (0, 0, 1)


# -------------------------------------------------------------------------------- manifest and dataset

ROW = {
    "photograph": "a.png", "image": "images/a.png", "semantic": ["portrait photo", "young woman"],
    "photographic": ["smile", "soft light"], "confidence": 0.99, "face_size": 120.5,
    "quality": {"noise": 1.5, "blocks": 1},
}  # fmt: skip


@pytest.fixture
def portrait():
    groups = {"semantic": tuple(ROW["semantic"]), "photographic": tuple(ROW["photographic"])}
    return Portrait(id="a", **{**ROW, **groups})


@pytest.fixture
def folder(tmp_path):
    y, x = np.mgrid[:64, :64]
    save_image(np.stack([x * 4, y * 4, x + y], axis=2).astype(np.uint8), tmp_path / "images/a.png")
    return tmp_path


def write_manifest(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def test_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no portraits in .*03_curate_portraits.py` makes them"):
        read_portraits(tmp_path)


def test_a_row_makes_the_round_trip(folder, portrait):
    write_manifest(folder, portrait.to_row(), {**portrait.to_row(), "extra": 1})
    assert read_portraits(folder) == ([portrait, portrait], [])
    assert json.loads(json.dumps(portrait.to_row())) == portrait.to_row()
    assert portrait.to_row()["caption"] == "portrait photo, young woman, smile, soft light"


def test_a_row_of_an_older_manifest_has_a_caption_only(folder):
    old = {key: value for key, value in ROW.items() if key not in ("semantic", "photographic")}
    write_manifest(folder, {"id": "a", **old, "caption": "young woman, soft light"})
    ((portrait,), problems) = read_portraits(folder)
    assert (portrait.semantic, portrait.photographic) == (("young woman", "soft light"), ()) and not problems
    assert portrait.caption == portrait.prompt("semantic") == "young woman, soft light"


BAD_ROWS = {
    "missing": ({"image": "images/b.png"}, "images/b.png is missing"),
    "escaping": ({"image": "../a.png"}, "leads out of"),
    "absolute": ({"image": "/etc/passwd"}, "leads out of"),
    "semantic": ({"semantic": "young woman"}, "`semantic` has to be list"),
    "photographic": ({"photographic": ["smile", 1]}, "`photographic` has to be a list of strings"),
    "confidence": ({"confidence": "0.9"}, "`confidence` has to be"),
    "quality": ({"quality": [1, 2]}, "`quality` has to be"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_the_rest_is_read(folder, name):
    changes, reason = BAD_ROWS[name]
    write_manifest(folder, {"id": name, **ROW, **changes}, {"id": "whole", **ROW}, '{"id": "torn", "im')
    portraits, problems = read_portraits(folder)
    assert [portrait.id for portrait in portraits] == ["whole"] and len(problems) == 2
    assert any(place.endswith(f": {name}") and reason in why for place, why in problems)


def test_a_row_without_a_key(folder):
    write_manifest(folder, {"id": "whole", **ROW}, {"id": "a", "image": "images/a.png"}, {**ROW})
    portraits, problems = read_portraits(folder)
    assert len(portraits) == 1
    assert [why for _, why in problems] == ["the row has no `photograph`", "the row has no `id`"]
    assert problems[1][0].endswith(": row 3")


def test_no_usable_portrait_is_an_error_with_the_first_reason(folder):
    write_manifest(folder, {"id": "a", **ROW, "image": "images/b.png"})
    with pytest.raises(ValueError, match="no usable portrait; the first problem: .*b.png is missing"):
        read_portraits(folder)


def test_a_sample(folder, portrait):
    """64 pixels halved: the first pixel is the mean of x 0 and 1 of the ramp 4 x, 2 of 255."""
    dataset = PortraitDataset(folder, [portrait], resolution=32)
    (sample,) = [dataset[index] for index in range(len(dataset))]
    assert sample["pixel_values"].shape == (3, 32, 32) and sample["pixel_values"].dtype == torch.float32
    expected = (torch.arange(32) * 8 + 2) / 127.5 - 1
    torch.testing.assert_close(sample["pixel_values"][0, 10, 2:-2], expected[2:-2], rtol=0, atol=0.01)
    assert (sample["id"], sample["caption"]) == ("a", portrait.caption)


@pytest.mark.parametrize(
    ("tags", "caption"),
    [("none", ""), ("semantic", "portrait photo, young woman"),
     ("both", "portrait photo, young woman, smile, soft light")],
)  # fmt: skip
def test_the_groups_of_tags_that_make_the_caption(folder, portrait, tags, caption):
    (sample,) = [PortraitDataset(folder, [portrait], 32, tags)[0]]
    assert sample["caption"] == portrait.prompt(tags) == caption


def test_a_truncated_image_is_named(folder, portrait):
    path = folder / "images/a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="a.png"):
        PortraitDataset(folder, [portrait], resolution=32)[0]

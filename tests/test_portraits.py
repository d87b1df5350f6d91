"""Portraits: the tags of the light, the manifest, the dataset."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from faceprior.images import save_image
from faceprior.portraits import (
    Portrait,
    PortraitDataset,
    mentions_light,
    photographic_tags,
    read_portraits,
)
from faceprior.procedural import draw_portrait


@pytest.fixture(scope="module")
def drawing():
    return draw_portrait(3, 256)


# ------------------------------------------------------------------------------------------- the light


def lit(left, right, colour=(1.0, 1.0, 1.0), side=256):
    """A crop of one colour whose halves have two brightnesses, 0 to 255."""
    halves = np.full((side, side, 3), left, np.float32)
    halves[:, side // 2 :] = right
    return Image.fromarray((halves * colour).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("left", "right", "hardness", "side"),
    [
        (120, 120, "soft light", "front light"),
        (126, 114, "soft light", "front light"),  # (126 - 114) / 240 = .05
        (130, 110, "soft light", "light from the left"),  # 20 / 240 = .083
        (110, 130, "soft light", "light from the right"),
        (160, 80, "hard light", "light from the left"),  # 80 / 240 = .33
        (80, 160, "hard light", "light from the right"),
    ],
)
def test_side_and_hardness_of_the_light(left, right, hardness, side):
    """Below .06 the halves count as even, above .2 the light counts as hard."""
    assert photographic_tags(lit(left, right))[:2] == [hardness, side]


@pytest.mark.parametrize(
    ("colour", "tag"),
    [((1.0, 0.75, 0.5), "warm light"), ((1.0, 0.9, 0.75), "neutral light"), ((0.8, 0.9, 1.0), "cool light")],
)
def test_colour_of_the_light(colour, tag):
    """Red over blue: 2, 1.33 and .8; skin itself is redder than grey, so that 1.15 to 1.6 is neutral."""
    assert photographic_tags(lit(150, 150, colour))[2] == tag


def test_dark_and_light_tones():
    assert [photographic_tags(lit(value, value))[3:] for value in (50, 120, 220)] == [
        ["dark tones"],
        [],
        ["light tones"],
    ]


def test_mirroring_swaps_the_sides(drawing):
    """The light of a portrait whose right half is the mirrored left one, darkened, comes from the left."""
    half = drawing.image[:, :128].astype(np.float32)
    image = Image.fromarray(np.concatenate([half, half[:, ::-1] * 0.5], axis=1).astype(np.uint8))
    tags, mirrored = photographic_tags(image), photographic_tags(ImageOps.mirror(image))
    assert tags[:2] == ["hard light", "light from the left"]
    assert mirrored == ["hard light", "light from the right", *tags[2:]]


def test_tags_do_not_depend_on_the_size_of_the_crop():
    assert photographic_tags(lit(160, 80, side=64)) == photographic_tags(lit(160, 80, side=512))


@pytest.mark.parametrize(
    "caption",
    [
        "portrait photo, soft light", "hard light from the left, studio", "low-key lighting",
        "The light falls from above.", "backlit", "a woman in soft sunlight", "rim light", "golden hour",
        "Natural light. She smiles",
    ],
)  # fmt: skip
def test_captions_about_light(caption):
    assert mentions_light(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "light brown hair", "highlighted cheekbones", "light skin, slight smile", "a delighted man", "a lighthouse",
        "street lights bokeh background", "her hair is light", "light blue eyes, light beard", "traffic light",
        "lightly tanned",
    ],
)  # fmt: skip
def test_captions_that_only_have_light_in_them(caption):
    assert not mentions_light(caption)


# -------------------------------------------------------------------------------- manifest and dataset

ROW = {
    "photograph": "a.png", "image": "images/a.png", "caption": "portrait photo, young woman", "confidence": 0.99,
    "face_size": 120.5, "quality": {"noise": 1.5, "blocks": 1},
}  # fmt: skip


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


def test_a_row_makes_the_round_trip(folder):
    portrait = Portrait(id="a", **ROW)
    write_manifest(folder, portrait.to_row(), {**portrait.to_row(), "extra": 1})
    assert read_portraits(folder) == ([portrait, portrait], [])


BAD_ROWS = {
    "missing": ({"image": "images/b.png"}, "images/b.png is missing"),
    "escaping": ({"image": "../a.png"}, "leads out of"),
    "absolute": ({"image": "/etc/passwd"}, "leads out of"),
    "caption": ({"caption": None}, "`caption` has to be"),
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


def test_a_sample(folder):
    """64 pixels halved: the first pixel is the mean of x 0 and 1 of the ramp 4 x, 2 of 255."""
    dataset = PortraitDataset(folder, [Portrait(id="a", **ROW)], resolution=32)
    (sample,) = [dataset[index] for index in range(len(dataset))]
    assert sample["pixel_values"].shape == (3, 32, 32) and sample["pixel_values"].dtype == torch.float32
    expected = (torch.arange(32) * 8 + 2) / 127.5 - 1
    torch.testing.assert_close(sample["pixel_values"][0, 10, 2:-2], expected[2:-2], rtol=0, atol=0.01)
    assert (sample["id"], sample["caption"]) == ("a", ROW["caption"])


def test_a_truncated_image_is_named(folder):
    path = folder / "images/a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="a.png"):
        PortraitDataset(folder, [Portrait(id="a", **ROW)], resolution=32)[0]

"""Portraits: the tags of the light, the manifest, the dataset."""

import json

import numpy as np
import pytest
import torch

from faceprior.images import save_image
from faceprior.portraits import (
    Portrait,
    PortraitDataset,
    read_portraits,
)
from faceprior.procedural import draw_portrait


@pytest.fixture(scope="module")
def drawing():
    return draw_portrait(3, 256)


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
    "surrogate": ({"semantic": ["\ud800"]}, "surrogates not allowed"),
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


def test_a_damaged_image_is_named_and_the_rest_is_read(folder):
    """Pillow would decode one whose second half is zeros, which only the checksums show, with half of it grey."""
    whole = (folder / "images/a.png").read_bytes()
    damaged = {"zeros": whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2), "cut": whole[:60], "empty": b""}
    for name, data in damaged.items():
        (folder / f"images/{name}.png").write_bytes(data)
    write_manifest(folder, *({"id": name, **ROW, "image": f"images/{name}.png"} for name in (*damaged, "a")))
    portraits, problems = read_portraits(folder)
    assert [portrait.id for portrait in portraits] == ["a"]
    assert [place for place, _ in problems] == list(damaged)
    assert all(f"{name}.png" in reason for name, reason in problems)
    (folder / "images/a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable portrait; the first problem: zeros: .*zeros.png"):
        read_portraits(folder)


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

"""Stage 1: what its filters reject, and how it counts."""

import re

import pytest
from conftest import load_stage
from PIL import Image

from faceprior.detect import Face, detect_faces, resolve_detector
from faceprior.jsonl import KeyedRows
from faceprior.photos import Photograph
from faceprior.procedural import draw_portrait
from faceprior.quality import sharpness


@pytest.fixture(scope="module")
def stage():
    return load_stage("01_make_pairs")


@pytest.mark.parametrize(
    ("limits", "name", "reason"),
    [
        ((20, 0.9, 0.05), None, None),
        ((300, 0.9, 0.05), "too_small", r"face of \d+ pixels is below 300"),
        ((20, 1.1, 0.05), "low_confidence", r"confidence \d\.\d+ is below 1.1"),
        ((20, 0.9, 19.0), "blurry", r"sharpness \d\.\d+ is below 19.0"),
        ((300, 1.1, 19.0), "too_small", "face of"),  # the first one counts
    ],
)
def test_a_face_fails_by_the_first_rule_that_it_breaks(stage, limits, name, reason):
    image = Image.fromarray(draw_portrait(0, 256).image)
    (face,) = detect_faces(image, "mtcnn")
    keys = ("min_face_size", "min_confidence", "min_sharpness")
    row = stage.judge_face(stage.Config(**dict(zip(keys, limits, strict=True))), image, face)
    assert row.get("filter") == name
    assert name is None or re.search(reason, row["reason"])
    assert Face.from_dict(row) == face and row["sharpness"] == pytest.approx(sharpness(image, face.box), abs=1e-4)


def test_every_filter_is_counted_in_its_round(stage):
    """Of 3 pairs that were made, 2 were kept."""
    rejected = [{"filter": name} for name in ("no_face", "no_face", "blurry", "face_lost")]
    rounds = {row["of"]: row for row in stage.count_rounds(rejected, photographs=9, faces=5, pairs=2)}
    assert {of: row["in"] for of, row in rounds.items()} == {"photographs": 9, "faces": 5, "pairs": 3}
    counts = {name: n for row in rounds.values() for name, n in row["rejected"].items()}
    assert {name: n for name, n in counts.items() if n} == {"no_face": 2, "blurry": 1, "face_lost": 1}
    assert list(counts) == [name for names in stage.FILTERS.values() for name in names]


def test_pairs_are_counted_in_the_bin_of_their_area(stage):
    """0.5% belongs to the first bin, 0.6% and 0.8% to the second, with a mean of (2 + 4) / 2; the rest is empty.

    The strengths are those of the pairs, (0.1 + 0.3) / 2 in the mean, and the settings' where there is no pair.
    """
    keys = ("area_ratio", "difference", "strength")
    pairs = [dict(zip(keys, own, strict=True)) for own in ((0.005, 9.0, 0.2), (0.006, 2.0, 0.1), (0.008, 4.0, 0.3))]
    bins = stage.count_bins(stage.Config(), pairs)
    assert [(row["pairs"], row["difference"]) for row in bins] == [(1, 9.0), (2, 3.0), (0, 0.0), (0, 0.0)]
    assert [row["strengths"] for row in bins] == [[0.2], [0.1, 0.3], [], []]
    assert [row["noise_factor"] for row in bins] == [0.2, pytest.approx(0.2), 0.2, 0.4]


def test_a_turned_photograph_makes_upright_pairs(stage, tmp_path):
    """Its row says by how much, that of an upright one does not; both have the same face and the same good image."""
    upright = Image.fromarray(draw_portrait(5, 128).image)
    rows, images = [], []
    for name, image in (("upright.png", upright), ("quarter.png", upright.rotate(90))):
        image.save(tmp_path / name)
        files = [KeyedRows(tmp_path / f"{part}.jsonl") for part in ("photographs", "pairs", "rejected")]
        maker = stage.PairMaker(stage.Config(), tmp_path, resolve_detector("mtcnn"), 8, *files)
        rows.append(maker.find_faces(Photograph(name, tmp_path / name)))
        images.append(Image.open(tmp_path / rows[-1]["good"]))
    assert "turned" not in rows[0] and rows[1]["turned"] == 270
    assert rows[0]["faces"] == rows[1]["faces"] and images[0].tobytes() == images[1].tobytes()


def test_a_face_whose_landmarks_do_not_fit_is_rejected(stage):
    image = Image.fromarray(draw_portrait(0, 256).image)
    (face,) = detect_faces(image, "mtcnn")
    row = stage.judge_face(stage.Config(), image, Face(face.box, None, 1.0))
    assert row["filter"] == "low_confidence" and "landmarks do not fit" in row["reason"]

"""What stage 2 reports on a scorer: its scores, and the tests of its shortcuts."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from faceprior import tiny
from faceprior.images import save_image
from faceprior.inpaint import through_vae
from faceprior.procedural import draw_portrait
from faceprior.scorer_checks import (
    SHORTCUT_PAIRS,
    accuracy_by_area,
    describe,
    light_blur,
    measure_shortcuts,
    report_scores,
    round_trip,
)


def test_the_scores_by_hand():
    """Of 20 pairs 15 are in order, by one; the other five are the wrong way round by one."""
    good, bad = [1.0] * 15 + [0.0] * 5, [0.0] * 15 + [1.0] * 5
    report = report_scores(good, bad)
    assert report["pairs"] == 20 and report["accuracy"]["share"] == 0.75
    assert sum(row["pairs"] for row in report["calibration"]["bins"]) == 20
    histogram = report["histogram"]
    assert (histogram["edges"][0], histogram["edges"][-1], len(histogram["edges"])) == (0, 1, 21)
    assert (histogram["good"][0], histogram["good"][-1], sum(histogram["bad"])) == (5, 15, 20)


class Sharpness:
    """A scorer that knows nothing but sharpness: the mean absolute difference of neighbours in the box."""

    def __call__(self, pairs, *changes):
        return [[self.score(pair, side, c) for pair in pairs] for side, c in zip(("good", "bad"), changes, strict=True)]

    @staticmethod
    def score(pair, side, change):
        image = Image.open(getattr(pair, side)).convert("RGB")
        face = np.asarray((change(image, pair) if change else image).crop(pair.box), float)
        return np.abs(np.diff(face, axis=1)).mean()


@pytest.fixture(scope="module")
def vae():
    return tiny.tiny_sd15().vae


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, vae):
    """Bad sides that differ from the good ones by the VAE alone, in their face, which is also the mask."""
    folder, made = tmp_path_factory.mktemp("pairs"), []
    for seed in range(4):
        drawing = draw_portrait(seed, 128)
        mask = np.zeros((128, 128), np.uint8)
        x0, y0, x1, y1 = (int(edge) for edge in drawing.box)
        mask[y0:y1, x0:x1] = 255
        good = Image.fromarray(drawing.image)
        (decoded,) = through_vae(vae, [good])
        sides = {"good": good, "bad": Image.composite(decoded, good, Image.fromarray(mask)), "mask": mask}
        files = {name: str(save_image(side, folder / f"{seed}_{name}.png")) for name, side in sides.items()}
        made.append(SimpleNamespace(**files, box=(x0, y0, x1, y1), crop=None, round_trip=False))
    return made


def test_the_round_trip_is_what_the_bad_side_went_through(pairs, vae):
    """The good side after it is the bad one, pixel for pixel, so a scorer of traces is found out."""
    for pair in pairs:
        changed = round_trip(vae)(Image.open(pair.good).convert("RGB"), pair)
        np.testing.assert_array_equal(np.asarray(changed), np.asarray(Image.open(pair.bad)))
    rows = {row["test"]: row for row in measure_shortcuts(Sharpness(), pairs, vae, "tiny")}
    assert rows["good through the VAE, above bad"]["share"] == 0
    assert rows["good through the VAE, above bad"]["note"] == "VAE: tiny"
    assert len(rows) == 4 and all(row["n"] == 4 for row in rows.values())


def test_a_face_of_a_crop_goes_through_the_vae_enlarged(pairs, vae):
    """Only the masked pixels change, in the crop of 64 pixels that is brought to the VAE's 128."""
    pair = SimpleNamespace(**{**vars(pairs[0]), "crop": [32, 32, 96, 96]})
    good = Image.open(pair.good).convert("RGB")
    changed = np.asarray(round_trip(vae)(good, pair), int) != np.asarray(good, int)
    mask = np.asarray(Image.open(pair.mask)) > 0
    assert not changed[~mask].any() and changed[32:96, 32:96][mask[32:96, 32:96]].any()


def test_light_blur_is_one_pixel_of_the_networks_input(pairs):
    """A white line in a face of 448 pixels: sigma 2, so its middle keeps 1 / (2 sqrt(2 pi)) = .1995 of it."""
    line = np.zeros((448, 448, 3), np.uint8)
    line[:, 224] = 255
    blurred = np.asarray(light_blur(Image.fromarray(line), SimpleNamespace(box=(0, 0, 448, 448))))
    assert blurred[224, 224, 0] == pytest.approx(255 * 0.1995, abs=2)  # OpenCV's weights have 8 bits
    small = np.asarray(light_blur(Image.fromarray(line), SimpleNamespace(box=(0, 0, 20, 20))))
    assert small[224, 224, 0] > blurred[224, 224, 0]
    rows = {row["test"]: row["share"] for row in measure_shortcuts(Sharpness(), pairs, None, "")}
    assert rows["good lightly blurred, above bad"] <= rows["both as they are: good above bad"]


def test_without_a_vae_its_line_says_how_to_measure(pairs):
    rows = measure_shortcuts(Sharpness(), pairs, None, "")
    assert [row["share"] is None for row in rows] == [False, True, False, False]
    assert rows[1]["note"].startswith("not measured: `--vae`")
    report = report_scores([1.0, 0.0], [0.0, 1.0])
    report |= {"shortcuts": rows, "accuracy_by_area": accuracy_by_area([], [])}
    lines = describe(report)
    assert any("not measured" in line for line in lines) and "none held out" in lines[0]


def test_many_pairs_are_thinned_evenly():
    pairs = [SimpleNamespace(number=i, round_trip=False) for i in range(2 * SHORTCUT_PAIRS + 1)]
    seen = []

    def score(pairs, *changes):
        seen.append([pair.number for pair in pairs])
        return [1.0] * len(pairs), [0.0] * len(pairs)

    measure_shortcuts(score, pairs, None, "")
    assert seen[0] == list(range(0, 2 * SHORTCUT_PAIRS + 1, 3))

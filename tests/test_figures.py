"""The figures of the tiny models: statistics by hand, judges of shape, what is kept, and the table from end to end."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import linked_copy, load_stage
from PIL import Image
from scipy import stats

from checkpoints.tiny_models import bench as bench_module
from checkpoints.tiny_models import blind, figures
from checkpoints.tiny_models import figures_bases as bases
from checkpoints.tiny_models import figures_ladders as ladders
from checkpoints.tiny_models import figures_restorer as restorer
from checkpoints.tiny_models import figures_scorer as scorer
from checkpoints.tiny_models import figures_tuning as tuning
from checkpoints.tiny_models import ladders as ladders_module
from checkpoints.tiny_models.bench import Bench, digest_of
from checkpoints.tiny_models.faces import Proportions, eye_frame
from checkpoints.tiny_models.figures_scorer import damage_ladder
from checkpoints.tiny_models.judge import FaceJudge
from checkpoints.tiny_models.table import (
    columns,
    correlation_estimate,
    is_met,
    jackknife_estimate,
    make_row,
    rank_correlation,
)
from faceprior import tiny
from faceprior.config import make_config
from faceprior.features import FeatureNetwork
from faceprior.images import load_image, save_image
from faceprior.metrics import MetricUnavailable
from faceprior.models import quiet_libraries
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.tables import Estimate, fraction_estimate, mean_estimate

# --- statistics and rows ---


def test_correlation_by_hand():
    """Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = .8; a constant side orders nothing."""
    found = correlation_estimate([1, 2, 3, 4, 5], [20, 10, 40, 30, 500])
    assert found.value == pytest.approx(0.8) and found.n == 5
    half = 1.959964 * math.sqrt((1 + 0.32) / 2)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.8) - half))
    assert found.high == pytest.approx(math.tanh(math.atanh(0.8) + half))
    assert rank_correlation([1, 2, 3], [7, 7, 7]) == 0


def test_jackknife_of_a_mean():
    """Of a mean, one item left out at a time, it gives the mean's standard error s / sqrt(n) exactly."""
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.0, 3.0, 6.0, 9.0, 2.0, 4.0])
    found = jackknife_estimate(lambda items: values[items].mean(), 12, groups=6)
    groups = np.array([values[np.arange(12) % 6 == g].mean() for g in range(6)])
    half = stats.t.ppf(0.975, 5) * groups.std(ddof=1) / math.sqrt(6)
    assert found.value == pytest.approx(values.mean()) and found.n == 12
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_too_few_items_are_no_estimate():
    assert jackknife_estimate(np.mean, 3).reason == "3 usable images are too few, 4 are needed"
    assert correlation_estimate([1, 2, 3, 4], [1, 2, 3, 4]).reason == "4 usable images are too few, 5 are needed"
    row = make_row("fraction", fraction_estimate([], reason="no samples"), (">=", 0.95), "%")
    assert columns(row) == ("fraction", "-", "-", ">= 95.0%", "", "not measured: no samples")
    assert row["met"] is None


@pytest.mark.parametrize(
    ("low", "high", "aim", "met"),
    [
        (0.95, 0.99, (">=", 0.95), True),  # the interval's end on the bound
        (0.94, 0.99, (">=", 0.95), False),  # the value alone would meet it
        (0.1, 0.5, (">", 0), True),
        (0.0, 0.5, (">", 0), False),
        (0.2, 0.7, ("<=", 0.7), True),
        (0.2, 0.8, ("<=", 0.7), False),
        (-0.5, -0.1, ("<", 0), True),
        (-0.5, 0.0, ("<", 0), False),
        (-math.inf, math.inf, (">", 0), False),  # a single value
        (0.1, 0.5, None, None),
    ],
)
def test_an_aim_is_met_by_the_whole_interval(low, high, aim, met):
    assert is_met(Estimate((low + high) / 2, low, high, 9), aim) is met


def test_an_aim_with_a_p_value_needs_both():
    below, above = (Estimate(1, low, 2, 9, p_value=p) for low, p in ((0.5, 0.009), (0.5, 0.01)))
    assert is_met(below, (">", 0), 0.01) is True and is_met(above, (">", 0), 0.01) is False
    assert is_met(Estimate(1, -0.1, 2, 9, p_value=0.009), (">", 0), 0.01) is False
    assert is_met(above, (">", 0)) is True


def test_rows_and_their_texts():
    row = make_row("a", Estimate(0.96, 0.95, 0.99, 100, "more"), (">=", 0.95), "%", "note")
    assert columns(row) == ("a", "96.0% (95.0% to 99.0%)", "100", ">= 95.0%", "yes", "note; more")
    row = make_row("b", Estimate(1, -1, 3, 9, p_value=0.4), (">", 0), p_below=0.01)
    assert columns(row) == ("b", "1 (-1 to 3)", "9", "> 0, p < 0.01", "no", "paired t test, p = 0.4")
    row = make_row("c", mean_estimate([123.45]), unit="dB")
    assert row["low"] is None and columns(row) == ("c", "123.5 dB", "1", "", "", "")


# --- judges ---


def test_damage_ladder_of_made_scorers():
    """A scorer that knows the level falls perfectly, its opposite rises, one that sees nothing does neither.

    The made scorer measures the distance from the clean image, which grows with the strength of noise.
    """
    drawing = draw_portrait(3, 64)

    def distances(images, boxes):
        assert boxes == [drawing.box] * 6
        return [float(np.abs(np.asarray(image).astype(float) - drawing.image).mean()) for image in images]

    assert damage_ladder(lambda i, b: [-d for d in distances(i, b)], drawing, "noise", 0) == pytest.approx(1)
    assert damage_ladder(distances, drawing, "noise", 0) == pytest.approx(-1)
    assert damage_ladder(lambda images, boxes: [1.0] * 6, drawing, "noise", 0) == 0
    order = [5.0, 4.0, 3.0, 2.0, 0.0, 1.0]  # one swap of neighbours: 1 - 6 * 2 / (6 * 35)
    assert damage_ladder(lambda images, boxes: order, drawing, "noise", 0) == pytest.approx(1 - 12 / 210)


def faces(count=40):
    mean = np.array([[40, 50], [80, 50], [60, 75], [45, 95], [75, 95]], float)
    return [mean + np.random.default_rng(seed).normal(0, 1.5, (5, 2)) for seed in range(count)]


def test_the_eyes_frame_forgets_place_size_and_roll():
    """Eyes at (0, 0) and (2, 0), nose at (1, 1): half a unit below the middle. A similarity changes nothing."""
    points = np.array([[0, 0], [2, 0], [1, 1], [0, 2], [2, 2]], float)
    assert eye_frame(points) == pytest.approx([0, 0.5, -0.5, 1, 0.5, 1])
    turn = np.array([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    assert eye_frame(3 * points @ turn.T + (7, -5)) == pytest.approx([0, 0.5, -0.5, 1, 0.5, 1])
    with pytest.raises(ValueError, match="both eyes on one point"):
        eye_frame(np.zeros((5, 2)))


def test_distance_from_proportions():
    """0 for the mean face, and the further a nose is out of place, the larger."""
    proportions = Proportions.of(faces())
    x, y = proportions.mean.reshape(3, 2).T
    mean_face = np.array([[-0.5, 0], [0.5, 0], *zip(x, y, strict=True)]) * 40 + (60, 50)
    assert proportions.distance(mean_face) == pytest.approx(0, abs=1e-6)
    moved = [mean_face + np.array([[0, 0], [0, 0], [dx, 0], [0, 0], [0, 0]]) for dx in (2, 5, 10)]
    distances = [proportions.distance(face) for face in moved]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert distances[2] == pytest.approx(5 * distances[0])
    own = [proportions.distance(face) ** 2 for face in faces()]
    assert np.mean(own) == pytest.approx(6 * 39 / 40, rel=0.01)  # of the six dimensions, (n - 1) / n each
    with pytest.raises(MetricUnavailable, match="7 usable faces"):
        Proportions.of(faces(7))


def climber(count=4):
    """People whose rungs are images of grey levels 0, 10, 20 ..."""
    levels = [Image.new("RGB", (8, 8), (10 * step,) * 3) for step in range(len(ladders.STRENGTHS))]
    return [ladders.Climber(levels, (0, 0, 8, 8), ladders.SAMPLERS[i % 2]) for i in range(count)]


def brightness(images, boxes):
    return [float(np.asarray(image).mean()) for image in images]


def test_strength_rows_of_made_judges():
    """Darkness falls with every rung, so -1 for all; a judge without any answer has no value.

    Of one with an offset for every second person the order within a person stays, the pooled one does not.
    """
    aims = (("<=", -0.6), None)
    alone, pooled = ladders.strength_rows("a", lambda i, b: [-x for x in brightness(i, b)], climber(), aims)
    assert (alone["value"], pooled["value"]) == pytest.approx((-1, -1)) and alone["met"] is True and alone["n"] == 4
    assert alone["note"] == "by sampler: ddim -1.00, base -1.00" and pooled["met"] is None
    offsets = iter([0.0, 1000.0, 0.0, 1000.0])

    def with_offset(images, boxes):
        offset = next(offsets)
        return [offset - x for x in brightness(images, boxes)]

    alone, pooled = ladders.strength_rows("a", with_offset, climber())
    assert alone["value"] == pytest.approx(-1) and -0.9 < pooled["value"] < 0
    alone, _ = ladders.strength_rows("a", lambda i, b: [float("nan")] * len(i), climber())
    assert alone["value"] is None and "no answer" in alone["note"]


def test_no_answer_is_the_lowest():
    """Clean 10 above worse 0; equal ones are not above, and neither is a face without an answer."""
    bright, dark = (Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 0))
    framed = ladders.Framed("made", [bright, bright], [(0, 0, 8, 8)] * 2, 4.0)
    row = ladders.order_row("a", brightness, framed, [dark, bright], (">=", 0.95))
    assert row["value"] == 0.5 and row["n"] == 2 and row["met"] is False
    row = ladders.order_row("a", lambda i, b: [1.0 if i[0] is bright else float("nan")] * 2, framed, [dark, dark], None)
    assert row["value"] == 1
    assert ladders.blur_note(framed) == "sigma 1 px of 128, 25.0% of the face's width"


def test_the_same_people_in_three_framings():
    """A face fills more of its aligned crop than of its portrait; what is degraded differs from what is clean."""
    seeds = range(TEST_SEEDS, TEST_SEEDS + 2)
    portraits, tight, aligned = ladders.framings([draw_portrait(seed, 128) for seed in seeds], seeds)
    assert portraits.images == tight.images and portraits.boxes[0] == (0, 0, 128, 128) != tight.boxes[0]
    assert 30 < portraits.face_width < aligned.face_width < 128
    for preset in ladders.PRESETS:
        for clean, worse in zip(aligned.images, ladders.degraded(aligned.images, preset), strict=True):
            assert np.abs(np.asarray(clean, float) - np.asarray(worse)).mean() > 0.5
    assert np.abs(np.asarray(ladders.soft(tight.images[0]), float) - np.asarray(tight.images[0])).mean() > 0.3


def test_prompts_and_what_is_told():
    """Hidden hair is not asked for; glasses count by whether there are any."""
    hair, glasses = bases.TRAITS[:2]
    assert hair.is_named({"hair_style": "bob"}) and not hair.is_named({"hair_style": "bald"})
    assert glasses.read({"glasses": "round"}) is True and glasses.read({"glasses": "none"}) is False
    assert bases.most_common([1, 1, 2, 1]) == 0.75


def test_faces_to_restore():
    """True landmarks and masks go where the alignment brings the face: the mask lies around eyes and mouth."""
    face = restorer.draw_face(0)
    eyes_and_mouth = [*face.landmarks[:2], face.landmarks[3:].mean(axis=0)]
    for x, y in eyes_and_mouth:
        assert face.mask[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].max() == 1
    rows, columns = np.nonzero(face.mask)
    assert 0.01 < face.mask.mean() < 0.15 and 20 < rows.min() < rows.max() < 120 and columns.min() > 20
    assert face.clean.size == face.degraded.size == (128, 128)
    assert np.abs(np.asarray(face.clean).astype(int) - np.asarray(face.degraded)).mean() > 1


def test_pairs_of_values_on_both_sides():
    a = [tuning.Judged(1.0, 0.5, 0.9), tuning.Judged(None, None, 0.0), tuning.Judged(2.0, 0.4, 1.0)]
    b = [tuning.Judged(0.0, 0.6, 0.8), tuning.Judged(5.0, 0.1, 1.0), tuning.Judged(None, None, 0.7)]
    assert tuning.both(a, b, "score") == ([1.0], [0.0])
    assert tuning.both(a, b, "confidence") == ([0.9, 0.0, 1.0], [0.8, 1.0, 0.7])


def test_differences_are_tuned_minus_other():
    tuned = [tuning.Judged(score, 1.0, 0.9, 2 * score, 120.0) for score in (3.0, 4.0, 5.5)]
    base = [tuning.Judged(score, 3.0, 0.8, 2 * score, 100.0) for score in (1.0, 2.0, 3.0)]
    score, judged, confidence, distance, lightness = tuning.compare(
        tuned, base, "tuned - base", {"score": 0.02, "judged": 0.01}
    )
    assert score["value"] == pytest.approx(6.5 / 3) and score["met"] is True and score["aim"] == "> 0, p < 0.02"
    assert judged["value"] == pytest.approx(13 / 3) and judged["aim"] == "> 0, p < 0.01"
    assert confidence["value"] == pytest.approx(0.1) and confidence["met"] is True
    assert distance["value"] == -2 and distance["met"] is True
    assert lightness["value"] == 20 and lightness["met"] is None


def test_a_blind_look_hides_the_sides_and_its_tally_is_the_figure(settings, tmp_path, monkeypatch):
    """Four of six are decided, for the left, the left, the right and the left image: the sides are the rater's."""
    monkeypatch.setattr(blind.tiny, "tiny_folder", lambda: tmp_path / "tiny")
    bench = Bench(figures.Config(**settings))
    with pytest.raises(MetricUnavailable, match="blind` shows what to look at"):
        tuning.preferred(bench)
    comparing = blind.make_comparing(bench, "someone", 6)
    (sheet,) = blind.write_sheets(comparing, tmp_path / "sheets")
    images, name = comparing.comparison.images, comparing.questions[0].id
    left, right = (load_image(images[method][name]) for method in comparing.shown(0))
    shown = np.asarray(load_image(sheet))
    for place, image in ((4, left), (264, right)):
        enlarged = Image.fromarray(np.asarray(image)).resize((256, 256), Image.BICUBIC)
        np.testing.assert_array_equal(shown[18:274, place : place + 256], np.asarray(enlarged))
    with pytest.raises(ValueError, match="has to be 6 letters"):
        blind.write_answers(bench, comparing, "AB=")
    blind.write_answers(bench, comparing, "AA= B=A")
    sides = [comparing.shown(number)[letter == "B"] for number, letter in ((0, "A"), (1, "A"), (3, "B"), (5, "A"))]
    (row,) = tuning.measure_blind(bench)
    assert (row["value"], row["n"]) == (sides.count("tuned") / 4, 4) and "of 6 pairs 2 the same" in row["note"]
    (tmp_path / "tiny/blind/weights.json").write_text("{}")
    assert "about other weights" in tuning.measure_blind(bench)[0]["note"]


class MadeBench(SimpleNamespace):
    """A bench whose scorer measures the brightness of the box."""

    def score(self, images, boxes):
        return [float(np.asarray(image.crop(box)).mean()) for image, box in zip(images, boxes, strict=True)]


def test_order_of_pairs_by_a_made_scorer():
    """A brighter good side is in order, a darker one is not; a change is made on its own side only."""
    sides = [Image.new("RGB", (16, 16), (level,) * 3) for level in (50, 100, 150)]
    pairs = [scorer.PairFace(sides[a], sides[b], (2, 2, 10, 10), 0) for a, b in ((1, 0), (0, 1), (2, 1))]
    assert scorer.order_kept(MadeBench(), pairs) == [True, False, True]
    assert scorer.order_kept(MadeBench(), pairs, change_good=lambda image: sides[0]) == [False, False, False]
    assert scorer.order_kept(MadeBench(), pairs, None, lambda image: sides[0]) == [True, False, True]
    spot = np.zeros((9, 9, 3), np.uint8)
    spot[4, 4] = 90
    assert np.asarray(scorer.light_blur(Image.fromarray(spot)))[3:6, 3:6].tolist() == [[[10] * 3] * 3] * 3
    assert scorer.bin_names() == ["0.0% to 0.5%", "0.5% to 1.0%", "1.0% to 10.0%", "10.0% to 100.0%"]


def test_the_square_around_a_pair_s_face(tmp_path):
    """The box moves with the crop: what is in it stays the same, and the sides suit the autoencoder."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    good = save_image(Image.fromarray(noise), tmp_path / "good.png")
    for box in ([200, 150, 240, 190], [150, 60, 290, 250]):
        pair = SimpleNamespace(good=good, bad=good, box=box, area_ratio=0.008)
        face = scorer.pair_face(pair)
        assert face.bin == 1 and face.good.width == face.good.height and face.good.width % 16 == 0
        assert (np.asarray(face.bad.crop(face.box)) == noise[box[1] : box[3], box[0] : box[2]]).all()


def test_ratios_of_restored_to_degraded(models):
    """Faces given back as they came have ratio 1; the clean ones have no distance to themselves, and better marks."""
    faces = [restorer.draw_face(index) for index in range(6)]
    degraded, clean = [face.degraded for face in faces], [face.clean for face in faces]
    row, true = restorer.landmark_rows(faces, degraded)
    assert row["value"] == row["low"] == true["value"] == 1 and row["met"] is False
    assert "no face found in" in row["note"]
    row, true = restorer.landmark_rows(faces, clean)
    assert row["value"] == 0 < true["value"] != 1 and row["met"] is True
    blank, _ = restorer.landmark_rows(faces, [Image.new("RGB", (128, 128))] * 6)
    assert blank["value"] is None and "6 restored" in blank["note"]
    bench = Bench(figures.Config(models=str(models), untrained=True, device="cpu"))
    assert restorer.fid_row(bench, degraded, degraded, clean)["value"] == pytest.approx(1)
    assert restorer.fid_row(bench, degraded, clean, clean)["value"] == pytest.approx(0, abs=1e-3)


def test_the_score_of_restored_faces_between_degraded_and_clean_ones():
    """Scored by their grey level, whole: 10 to 13 degraded, 5 above them restored, and 5 above those or as before."""

    def score(images, boxes):
        assert set(boxes) == {(0.0, 0.0, 128.0, 128.0)}
        return [float(np.asarray(image).mean()) for image in images]

    bench = SimpleNamespace(score=score)
    before, after = ([Image.new("RGB", (128, 128), (grey,) * 3) for grey in range(g, g + 4)] for g in (10, 15))
    clean = [Image.new("RGB", (128, 128), (grey,) * 3) for grey in (20, 16, 22, 18)]
    gain, rest = restorer.score_rows(bench, before, after, clean)
    assert gain["value"] == 5 and gain["met"] is True and gain["figure"] == "Face Score, restored - degraded"
    assert rest["value"] == 2.5 and rest["met"] is False and rest["figure"] == "Face Score, clean - restored"
    means = "degraded 11.50, restored 16.50, clean 19.00; "
    assert gain["note"].startswith(means) and rest["note"].startswith(means)


# --- the whole ---


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory):
    """All shipped kinds, untrained."""
    quiet_libraries()
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd15", "sdxl", "scorer"):
        (folder / kind).symlink_to(tiny_models / kind)
    (folder / "guided").symlink_to(tiny_models / "sd15")
    tiny.write(folder / "restorer", "restorer")
    tags = {
        "hair_color": ("black", "brown"), "glasses": ("none", "round"), "beard": ("none", "full beard"),
        "light_side": ("left", "front", "right"),
    }  # fmt: skip
    torch.manual_seed(0)
    FeatureNetwork.from_tags(tags, hidden_size=16, layers=1, heads=2).save_pretrained(folder / "features")
    FaceJudge.untrained().save_pretrained(folder / "judge")
    for kind in ("features", "judge"):
        (folder / kind / tiny.INFO_FILE).write_text(json.dumps({"kind": kind, "trained": False}))
    return folder


@pytest.fixture
def settings(models, tmp_path):
    return {
        "work": str(tmp_path / "work"), "models": str(models), "output": str(tmp_path / "results"), "untrained": True,
        "num_portraits": 10, "num_samples": 6, "sample_steps": 1, "num_damaged": 2, "num_faces": 4, "num_climbers": 4,
        "restore_steps": 1,
        "pair_portraits": 2, "pair_scenes": 0, "pair_steps": 17, "train_ablations": False, "mixed_precision": "no",
        "device": "cpu",
    }  # fmt: skip


def finished_model(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    (folder / "done.json").write_text("{}")
    (folder / "config.yaml").write_text("04_guidance_tune:\n  steps: 1\n")


def keep_samples(bench, name: str, shift: int) -> None:
    """Put drawn portraits where the samples of a model would be: an untrained one draws no faces."""
    bench.samples(name)
    for index in range(bench.config.num_samples):
        image = draw_portrait(TEST_SEEDS + shift + index, 128).image
        save_image(Image.fromarray(image), bench.output / f"samples/{name}/{index:05d}.png")


def run_here(stage: str, output: Path, **options) -> None:
    """Run a stage in this process, which has its libraries loaded; the untrained VAE gives back no faces."""
    module = load_stage(stage)
    options = {"output": output, **options}
    module.main(make_config(module.Config, {k: str(v) for k, v in options.items()} | {"drop_not_found": False}))


def test_the_table_from_end_to_end(settings, models, tmp_path, monkeypatch, capsys):
    """Every piece; the same model twice differs by exactly nothing, and what is not there is named."""
    monkeypatch.setattr(scorer, "run", run_here)
    monkeypatch.setattr(ladders_module, "STEPS", 5)
    for module in (ladders_module, ladders):
        monkeypatch.setattr(module, "STRENGTHS", (0.2, 0.6, 1.0))
    config = figures.Config(**settings)
    for name, source in (("guided", "sd15"), ("guided_all", "sd15"), ("restorer", "restorer")):
        finished_model(models / source, tmp_path / "work" / name)
    finished_model(models / "restorer", tmp_path / "work/restorer_constant")
    bench = Bench(config)
    for name, shift in (("sd15", 0), ("guided", 100), ("guided_all", 100)):
        keep_samples(bench, name, shift)
    figures.main(config)
    saved = json.loads((tmp_path / "results/figures.json").read_text())
    assert list(saved["groups"]) == list(figures.make_pieces())
    cells = {name: group["cells"] for name, group in saved["groups"].items()}
    measured = ("vae", "samples_sd15", "prompts_sdxl", "damage", "sharpness", "ladders", "ranking", "tuning")
    assert cells["blind"][0]["value"] is None  # a look at other weights says nothing of these
    for name in (*measured, "ablations_all"):
        assert all(row["value"] is not None for row in cells[name]), (name, cells[name])
    assert cells["samples_sd15"][0]["value"] == 1 and cells["samples_sd15"][0]["n"] == 6
    assert {row["n"] for row in cells["ladders"]} == {4} and len(cells["ladders"]) == 2 + 3 * 5
    judged = {row["figure"]: row for row in cells["judges"]}
    assert len(judged) == 5 * 3 + 2 + 3 * 4 and judged["judge: clean above blurred, aligned faces"]["n"] == 4
    by_bin = cells["pairs"]
    assert [row["n"] for row in by_bin] == [0, 0, 0, 2, 2] and "not measured" in by_bin[0]["note"]
    psnr, *_, fid, gain, rest = cells["restorer"]
    assert psnr["n"] == gain["n"] == 4 and fid["value"] > 0 and gain["aim"] == rest["aim"] == "> 0, p < 0.01"
    assert [row["value"] for row in cells["ablations_all"][:5]] == [0] * 5
    assert not any(row["met"] for row in cells["ablations_all"])
    assert "--objective denoising` trains it" in cells["ablations_denoising"][0]["note"]
    time_aware, constant, difference, missing = cells["facial_loss"]
    assert time_aware["value"] == constant["value"] > 0 == difference["value"]
    assert "06_train_restorer.py --config" in missing["note"] and "--facial_loss none` trains it" in missing["note"]
    page = (tmp_path / "results/figures.md").read_text()
    assert page in capsys.readouterr().out
    assert "Drawn people only" in page and f"figures --work {tmp_path / 'work'}" in page and "torch" in page
    sheets = {path.stem for path in (tmp_path / "results/sheets").iterdir()}
    assert {"vae", "samples_sdxl", "pairs_bin3", "samples_best_and_worst", "base_and_tuned", "restored"} <= sheets


def test_what_is_measured_is_kept(settings, models, tmp_path, monkeypatch):
    """A second run measures nothing; other settings, other weights and `--overwrite` measure again."""
    measured = []

    def count(bench):
        measured.append(bench.config.num_portraits)
        return [make_row("a", mean_estimate([1.0, 2.0]))]

    pieces = {"a": figures.Piece("A", count, ("num_portraits",), ("scorer",))}
    monkeypatch.setattr(figures, "make_pieces", lambda: pieces)
    own = linked_copy(models, tmp_path / "models")
    settings = {**settings, "models": str(own)}
    for change, runs in (({}, 1), ({}, 1), ({"num_faces": 9}, 1), ({"num_portraits": 11}, 2), ({"overwrite": True}, 3)):
        settings |= change
        figures.main(figures.Config(**settings))
        assert len(measured) == runs, change
    settings["overwrite"] = False
    shutil.rmtree(own / "scorer")
    tiny.write(own / "scorer", "scorer", seed=5)
    figures.main(figures.Config(**settings))
    assert len(measured) == 4


def test_a_missing_model_is_named_and_tried_again(settings, tmp_path):
    """An untrained model counts as missing; what could not be measured is measured once it can be."""
    figures.main(figures.Config(**{**settings, "untrained": False, "only": "damage"}))
    path = tmp_path / "results/figures.json"
    (row,) = json.loads(path.read_text())["groups"]["damage"]["cells"]
    assert row["value"] is None and "make_tiny --only scorer` trains it" in row["note"]
    figures.main(figures.Config(**{**settings, "only": "damage"}))
    rows = json.loads(path.read_text())["groups"]["damage"]["cells"]
    assert len(rows) == 14 and all(row["value"] is not None for row in rows)
    with pytest.raises(ValueError, match="`only` has to be all or one of vae, samples_sd15"):
        figures.main(figures.Config(**{**settings, "only": "nothing"}))


def test_what_was_missing_is_tried_again(settings, models, tmp_path, monkeypatch):
    """With the same settings and models, too: an ablation that was not to be trained may be trained now."""
    there = []

    def measure(bench):
        if not there:
            raise MetricUnavailable("there is no ablation")
        return [make_row("a", mean_estimate([1.0, 2.0]))]

    monkeypatch.setattr(figures, "make_pieces", lambda: {"a": figures.Piece("A", measure, (), ())})
    for value in (None, 1.5):
        figures.main(figures.Config(**settings))
        (row,) = json.loads((tmp_path / "results/figures.json").read_text())["groups"]["a"]["cells"]
        assert row["value"] == value
        there.append(True)


def test_a_model_is_known_by_its_weights_and_by_how_it_is_sampled(tmp_path):
    """Another scheduler draws other images; a newer library that wrote the same settings does not."""
    settings = {"beta_start": 0.1, "_class_name": "DDIMScheduler", "_diffusers_version": "0.30.0"}

    def digest(weights=b"1", **changes):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({**settings, **changes}))
        (tmp_path / "model.safetensors").write_bytes(weights)
        return digest_of(tmp_path)

    first = digest()
    (tmp_path / "README.md").write_text("notes")
    assert first == digest(_diffusers_version="0.31.0")
    assert len({first, digest(b"2"), digest(_class_name="DDPMScheduler"), digest(beta_start=0.2)}) == 4


def test_samples_are_made_once_and_only_what_is_missing(settings, tmp_path):
    """More samples add images; other sampling makes all of them again."""

    def stamps(**changes):
        bench = Bench(figures.Config(**{**settings, **changes}))
        assert len(bench.samples("sd15")) == bench.config.num_samples
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results/samples/sd15").iterdir()}

    two, three = stamps(num_samples=2), stamps(num_samples=3)
    assert len(three) == 3 and two.items() <= three.items()
    other = stamps(num_samples=2, guidance_scale=3.0)
    assert other.keys() == two.keys() and other != two


def test_a_stage_trains_an_ablation(settings, models, tmp_path, monkeypatch):
    """The stage gets the other run's settings and the change; a model of another run is refused."""
    bench = Bench(figures.Config(**{**settings, "train_ablations": True}))
    finished_model(models / "sd15", tmp_path / "work/guided")
    calls = []

    def run(stage, output, **options):
        calls.append((stage, options))
        finished_model(models / "sd15", output)

    monkeypatch.setattr(bench_module, "run", run)
    for _ in range(2):
        assert bench.train("04_guidance_tune", "guided_all", "guided", t_end=1.0) == tmp_path / "work/guided_all"
    assert calls == [("04_guidance_tune", {"config": tmp_path / "work/guided/config.yaml", "t_end": 1.0})]
    weights = tmp_path / "work/guided/vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(MetricUnavailable, match="was trained for another"):
        bench.train("04_guidance_tune", "guided_all", "guided", t_end=1.0)


def test_half_precision_is_the_networks_only(settings):
    """Inside, a product is rounded to 8 bits of mantissa and comes back as float32; afterwards it is exact again."""
    bench = Bench(figures.Config(**{**settings, "mixed_precision": "bf16"}))
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 1.001)
    one = torch.ones(1, 1)
    with bench.half_precision(layer):
        assert layer(one).item() == 1.0 and layer(one).dtype == torch.float32
    assert layer(one).item() == pytest.approx(1.001)


def test_the_command_that_measures_the_same():
    config = figures.Config(num_faces=3, train_ablations=False, untrained=True, only="vae")
    assert figures.command_of(config) == (
        "python -m checkpoints.tiny_models.figures --work data/tiny --num_faces 3 --no-train_ablations --untrained"
    )

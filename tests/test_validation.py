"""Images during a training, the Face Score of each, and what the last line says of them."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from faceprior import tiny
from faceprior.detect import Face
from faceprior.diffusion import sample_images
from faceprior.guidance import GuidanceTuner
from faceprior.images import load_image
from faceprior.jsonl import read_rows
from faceprior.metrics import mean_interval, paired_test
from faceprior.models import quiet_libraries
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.training import TrainingRun, make_accelerator, make_optimizer
from faceprior.validation import (
    FIRST_SEED,
    MIN_IMAGES,
    WORTH,
    Validation,
    Verdict,
    mean_score,
    paired_differences,
    score_face,
)

SIZE, STEPS, PROMPTS = 32, 2, ["a man", "a woman, smiling"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def scorer():
    return tiny.tiny_scorer().eval()


@pytest.fixture(scope="module")
def base():
    """An untuned pipeline; its images are noise, in which `whole_image` sees a face and the real detectors none."""
    return tiny.tiny_sd15()


def whole_image(rgb):
    return [Face((0, 0, rgb.shape[1], rgb.shape[0]), None, 1.0)]


class Stop(Exception):
    """Stands for whatever ends a run."""


class Pairs(list):
    """Four pairs of noise; `stop_at` names the access that is broken off."""

    def __init__(self, stop_at=None):
        generator = torch.Generator().manual_seed(0)
        mask = torch.zeros(1, SIZE, SIZE)
        mask[:, 8:24, 8:24] = 1
        sides = [{s: torch.rand(3, SIZE, SIZE, generator=generator) * 2 - 1 for s in ("good", "bad")} for _ in range(4)]
        super().__init__({"id": f"pair_{i}", **side, "mask": mask, "prompt": "a man"} for i, side in enumerate(sides))
        self.stop_at, self.taken = stop_at, 0

    def __getitem__(self, index):
        self.taken += 1
        if self.taken == self.stop_at:
            raise Stop
        return super().__getitem__(index)


def fit(base, output, scorer, pairs=None, steps=4, **options):
    """Tune a LoRA for a few steps, with a validation after every second one; return the tuner."""
    tuner = GuidanceTuner(copy.deepcopy(base), "lora", rank=2)
    settings = {"learning_rate": 0.02, "batch_size": 1, "device": "cpu", "output": output}
    drawing = {"validate_every": 2, "num_validation": 3, "num_samples": 3, "prompts": PROMPTS, "resolution": SIZE}
    drawing |= {"sample_steps": STEPS, "guidance_scale": 2.0, "detector": whole_image}
    return tuner.fit(Pairs() if pairs is None else pairs, steps, scorer=scorer, **{**settings, **drawing, **options})


def rows(path):
    found, problems = read_rows(path)
    assert not problems
    return found


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the score of an image


def test_the_score_of_an_image_is_that_of_its_representative_face(scorer):
    """A large frontal face beside a small one; an image without a face has no score, nor has one without a scorer."""
    drawing = draw_portrait(TEST_SEEDS, 128)
    image = Image.new("RGB", (192, 128))
    image.paste(Image.fromarray(drawing.image))
    image.paste(Image.fromarray(draw_portrait(TEST_SEEDS + 1, 64).image), (128, 64))
    found = score_face(image, scorer)
    assert found["faces"] == 2 and 0.9 <= found["confidence"] <= 1
    scores = scorer.score(image)  # of both faces
    largest = max(scores, key=lambda score: score.box[2] - score.box[0])
    assert found["score"] == pytest.approx(largest.score, abs=1e-5)
    assert score_face(image, None) == {**found, "score": None}
    assert score_face(image.filter(ImageFilter.GaussianBlur(30)), scorer) == dict(faces=0, score=None, confidence=None)
    assert score_face(image, scorer, min_face_size=1000)["faces"] == 0


def test_scores_of_images_without_a_face_by_hand():
    """The worst untuned face is 1. Mean of 2, 1 and 6: 3. Differences: 2 - 3, 1 (lost) - 4, 6 - 1 (gained)."""
    untuned, tuned = [3.0, 4.0, None, None, 1.0], [2.0, None, 6.0, None, 1.5]
    assert mean_score([2.0, None, 6.0], untuned) == 3.0
    assert paired_differences(untuned, tuned) == [-1.0, -3.0, 5.0, 0.5]
    assert mean_score([2.0], [None]) is None and paired_differences([None, None], [2.0, None]) == []
    with pytest.raises(ValueError):
        paired_differences([1.0], [1.0, 2.0])


# ---- the verdict


def verdict_of(mean, half, n=16):
    """Return the verdict of n pairs whose differences have this mean and 95% half width."""
    spread = np.where(np.arange(n) % 2, 1.0, -1.0) * (1 if n % 2 == 0 else math.nan)
    spread *= half / mean_interval(spread).half_width
    return Verdict.of_scores([0.0] * n, list(mean + spread))


@pytest.mark.parametrize(
    ("mean", "half", "n", "outcome"),
    [
        (0.5, 0.4, 16, "better"),  # 0.1 to 0.9
        (0.3, 0.4, 16, "too few"),  # -0.1 to 0.7: both no gain and one that counts
        (0.05, 0.1, 16, "not better"),  # -0.05 to 0.15: no gain that counts
        (0.1, 0.05, 16, "better"),  # small, but certain
        (-0.5, 0.4, 16, "not better"),  # -0.9 to -0.1: worse
        (0.0, 0.3, 16, "too few"),
        (0.5, 0.4, MIN_IMAGES, "better"),
        (0.5, 0.1, MIN_IMAGES - 2, "too few"),
    ],
)
def test_what_an_interval_says(mean, half, n, outcome):
    verdict = verdict_of(mean, half, n)
    assert (verdict.low, verdict.high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert verdict.outcome == outcome and verdict.n == n == verdict.faces_after


def test_a_gain_that_counts_is_a_preference_of_55_percent():
    """Eq. 5 reads a difference as a probability: 1 / (1 + exp(-0.2)) = 0.5498."""
    assert 1 / (1 + math.exp(-WORTH)) == pytest.approx(0.55, abs=5e-4)


def test_the_words_of_a_verdict():
    assert str(verdict_of(0.5, 0.4)) == "better by 0.5 (95% interval 0.1 to 0.9, n = 16 paired images)"
    text = "not better (difference -0.5, 95% interval -0.9 to -0.1, n = 16 paired images)"
    assert str(verdict_of(-0.5, 0.4)) == text
    more = "; a larger `num_samples` draws more: at least 8 with a face are needed"
    few = "too few images to tell (n = 4, difference 0.5, 95% interval 0.25 to 0.75)"
    more_of_them = "; a larger `num_samples` draws more: about {} with a face would tell, if they are like these"
    assert str(verdict_of(0.5, 0.25, 4)) == few + more_of_them.format(8)
    wide = "too few images to tell (n = 16, difference 0.3, 95% interval -0.3 to 0.9)"
    assert str(verdict_of(0.3, 0.6)) == wide + more_of_them.format(65)  # half as wide: 4 times as many
    assert str(verdict_of(-0.1, 0.6)).endswith(more_of_them.format(65))  # 0.3 below the smallest gain that counts
    assert str(Verdict.of_scores([1.0], [3.0])) == "too few images to tell (n = 1, difference 2)" + more
    none = Verdict.of_scores([None, None], [None, 2.0])
    faces = "; 0 of 2 images had a face before, 1 after"
    assert str(none) == "too few images to tell (n = 0)" + faces + more
    lost = Verdict.of_scores([1.0, 2.0] * 8, [None, 2.0] * 8)
    assert lost.outcome == "not better" and str(lost).endswith("; 16 of 16 images had a face before, 8 after")
    assert str(Verdict(reason="no scorer")) == "not judged: no scorer"
    for verdict in (verdict_of(0.5, 0.4), none, Verdict(reason="no scorer")):
        assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["text"] == str(verdict)


def test_a_verdict_is_the_paired_t_test():
    """Its interval excludes 0 exactly where the test's p value is below 5%."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        untuned = rng.normal(0, 2, 12)
        tuned = untuned + rng.normal(0.5, 1, 12)
        verdict, test = Verdict.of_scores(untuned, tuned), paired_test(tuned, untuned)
        assert verdict.difference == pytest.approx(test.mean_difference)
        assert (verdict.low > 0 or verdict.high < 0) == (test.p_value < 0.05)


def symmetric_differences(rng, shape, kind):
    """Differences as they are where the tuning does nothing: both sides are alike, so they are symmetric around 0."""
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "skewed scores":
        return rng.exponential(size=shape) - rng.exponential(size=shape)
    rare = rng.random(shape) < 0.1  # a face that breaks or is mended in every tenth image
    return rng.normal(size=shape) + rare * rng.choice([-6, 6], shape)


@pytest.mark.parametrize("kind", ["normal", "skewed scores", "rare breaks"])
@pytest.mark.parametrize("n", [4, 8, 16, 32])
def test_the_interval_covers_the_truth(kind, n):
    """In 95% of 1,000 trainings that change nothing, give or take (deviation 0.7%), it holds 0; never much less often.

    A percentile bootstrap does not, which is why it is not used: at n = 4 it holds 0 in fewer than 85%.
    """
    rng = np.random.default_rng(n)
    drawn = symmetric_differences(rng, (1000, n), kind)
    intervals = [mean_interval(differences) for differences in drawn]
    covered = np.mean([abs(mean) <= half for mean, half in intervals])
    assert 0.93 <= covered <= 0.995
    if n == 4:
        resampled = drawn[:, rng.integers(0, n, (500, n))].mean(-1)  # (1000, 500)
        low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
        assert ((low <= 0) & (high >= 0)).mean() < 0.85


def test_the_images_that_choose_the_weights_may_not_judge_them():
    """Trainings that change nothing, with 20 validations each: the best one looks better on its own images far more
    often than the 2.5% of the interval, on images of other seeds it does not."""
    rng = np.random.default_rng(0)
    own = other = 0
    for _ in range(300):
        untuned, tuned = rng.normal(size=16), rng.normal(size=(20, 16))
        best = tuned[tuned.mean(1).argmax()]
        own += Verdict.of_scores(untuned, best).outcome == "better"
        other += Verdict.of_scores(rng.normal(size=16), rng.normal(size=16)).outcome == "better"
    assert own > 0.15 * 300 and other < 0.05 * 300


# ---- during a training


def test_a_training_with_validations(base, scorer, tmp_path):
    """Rows, log and images, each from what was drawn; the images on the disk are the pipeline's at their seeds."""
    tuner = fit(base, tmp_path, scorer)
    found = rows(tmp_path / "validation.jsonl")
    assert [(row["step"], row["seed"] - FIRST_SEED) for row in found] == [(s, i) for s in (0, 2, 4) for i in range(3)]
    assert [row["prompt"] for row in found[:3]] == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert scorer.device.type == "cpu" and not scorer.training

    # ---- the images: untuned at step 0, as the tuner draws them at the last
    for step, sampling in ((0, tuner.untuned), (4, tuner.sampling)):
        with sampling() as pipeline:
            expected = sample_images(pipeline, [PROMPTS[1]], [FIRST_SEED + 1], SIZE, STEPS, 2.0)[0]
        assert np.array_equal(load_image(tmp_path / f"validation/{step:06d}/001.png"), expected)
        (row,) = [row for row in found if (row["step"], row["seed"]) == (step, FIRST_SEED + 1)]
        assert row["score"] == pytest.approx(scorer.score_crops([expected])[0], abs=1e-5)

    # ---- the log
    scores = {step: [row["score"] for row in found if row["step"] == step] for step in (0, 2, 4)}
    log = {row["step"]: row for row in rows(tmp_path / "metrics.jsonl")}
    assert list(log) == [0, 1, 2, 3, 4]
    for step in (0, 2, 4):
        assert log[step]["validation_score"] == pytest.approx(np.mean(scores[step]))
        assert log[step]["validation_without_face"] == 0
    for step in (2, 4):
        mean, half = mean_interval(np.subtract(scores[step], scores[0]))
        logged = [log[step][f"validation_{name}"] for name in ("difference", "low", "high")]
        assert logged == pytest.approx([mean, mean - half, mean + half], rel=1e-4)
    assert not any(key.startswith("validation") for step in (1, 3) for key in log[step])

    # ---- the verdict, on images of other seeds
    samples = rows(tmp_path / "samples.jsonl")
    assert [row["seed"] for row in samples] == [0, 1, 2] and {row["seed"] for row in found}.isdisjoint(range(10_000))
    assert tuner.verdict == Verdict.of_scores(*([row[f"score_{s}"] for row in samples] for s in ("before", "after")))
    with tuner.untuned() as pipeline:
        expected = sample_images(pipeline, [PROMPTS[1]], [1], SIZE, STEPS, 2.0)[0]
    assert np.array_equal(load_image(tmp_path / samples[1]["before"]), expected)
    assert files(tmp_path)["samples/001_before.png"] != files(tmp_path)["samples/001_after.png"]


def test_a_shipped_model_draws_beside_the_run_and_does_not_judge_it(base, scorer, tmp_path):
    """The same prompts and seeds, as a third image with a score of its own."""
    tuner, shipped = GuidanceTuner(copy.deepcopy(base), "lora", rank=2), tiny.tiny_sd15(seed=5)
    optimizer = make_optimizer(tuner.trainable_parameters(), "adamw", 1e-3)
    run = TrainingRun(tmp_path, 1, make_accelerator("cpu", "no"), {"unet": tuner.denoiser}, {"unet": optimizer})
    drawing = {"resolution": SIZE, "sample_steps": STEPS, "guidance_scale": 2.0, "detector": whole_image}
    verdict = Validation(run, tuner, scorer, PROMPTS, **drawing).judge(2, shipped)
    samples = rows(tmp_path / "samples.jsonl")
    assert [row["shipped"] for row in samples] == ["samples/000_shipped.png", "samples/001_shipped.png"]
    expected = sample_images(shipped, [PROMPTS[1]], [1], SIZE, STEPS, 2.0)[0]
    assert np.array_equal(load_image(tmp_path / samples[1]["shipped"]), expected)
    assert samples[1]["score_shipped"] == score_face(expected, scorer, whole_image)["score"]
    assert verdict == Verdict.of_scores(*([row[f"score_{s}"] for row in samples] for s in ("before", "after")))


def test_validations_do_not_change_the_training(base, uninterrupted, tmp_path):
    _, watched = uninterrupted
    alone = GuidanceTuner(copy.deepcopy(base), "lora", rank=2)
    alone.fit(Pairs(), 5, learning_rate=0.02, batch_size=1, device="cpu", output=tmp_path)
    assert files(tmp_path)["resume/parameters.safetensors"] == watched["resume/parameters.safetensors"]
    assert alone.verdict is None


def test_the_averaged_weights_are_what_is_validated_and_kept(base, scorer, tmp_path):
    tuner = fit(base, tmp_path, scorer, ema_decay=0.9)
    average = load_file(tmp_path / "resume/average.safetensors")
    for name, parameter in tuner.denoiser.named_parameters():
        if f"unet.{name}" in average:
            assert torch.equal(parameter, average[f"unet.{name}"])
    with tuner.sampling() as pipeline:
        expected = sample_images(pipeline, [PROMPTS[0]], [FIRST_SEED], SIZE, STEPS, 2.0)[0]
    assert np.array_equal(load_image(tmp_path / "validation/000004/000.png"), expected)
    trained = load_file(tmp_path / "resume/parameters.safetensors")
    assert any(not torch.equal(value, trained[key]) for key, value in average.items())


ALL = {"validate_every": 1, "keep_best": True, "ema_decay": 0.5, "patience": 9, "save_every": 3, "steps": 5}
ALL |= {"num_validation": 1, "num_samples": 1}


@pytest.fixture(scope="module")
def uninterrupted(base, scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(base, folder, scorer, **ALL), files(folder)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_tuning_that_was_stopped_ends_with_the_same_files(base, scorer, tmp_path, stop_at, uninterrupted):
    """Before its first checkpoint, and between a validation and its checkpoint: no row twice, the same best weights."""
    with pytest.raises(Stop):
        fit(base, tmp_path, scorer, Pairs(stop_at), **ALL)
    again, (whole, expected) = fit(base, tmp_path, scorer, **ALL), uninterrupted
    assert files(tmp_path) == expected
    pairs = zip(whole.trainable_parameters(), again.trainable_parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs) and whole.verdict == again.verdict


def test_the_best_validation_is_what_remains(base, scorer, tmp_path):
    """The tuner draws the images of its best step again; patience ended the run two validations after it, if at all."""
    images = {"num_validation": 1, "num_samples": 1}
    tuner = fit(base, tmp_path, scorer, steps=8, validate_every=1, keep_best=True, patience=2, **images)
    log = [row for row in rows(tmp_path / "metrics.jsonl") if row["step"]]
    best = max(log, key=lambda row: row["validation_score"])["step"]
    assert len(log) == min(8, best + 2)
    with tuner.sampling() as pipeline:
        again = sample_images(pipeline, [PROMPTS[0]], [FIRST_SEED], SIZE, STEPS, 2.0)[0]
    assert np.array_equal(load_image(tmp_path / f"validation/{best:06d}/000.png"), again)


def test_images_without_a_face_are_counted(base, scorer, tmp_path, caplog):
    """A detector that sees a face in bright images only; with none in any untuned one there is nothing to compare."""

    def see_bright(threshold):
        return lambda rgb: whole_image(rgb) if rgb.mean() > threshold else []

    means = sorted(load_image(p).convert("L").resize((1, 1)).getpixel((0, 0)) for p in drawn(base, tmp_path / "drawn"))
    middle = float(np.mean(means[0:2]))
    fit(base, tmp_path / "some", scorer, steps=2, detector=see_bright(middle))
    found = [row for row in rows(tmp_path / "some/validation.jsonl") if row["step"] == 0]
    absent = [row["score"] is None for row in found]
    assert 0 < sum(absent) < 3
    (first, *_) = rows(tmp_path / "some/metrics.jsonl")
    worst = min(row["score"] for row in found if row["score"] is not None)
    assert first["validation_without_face"] == sum(absent) / 3
    assert first["validation_score"] == pytest.approx(
        np.mean([worst if row["score"] is None else row["score"] for row in found])
    )
    assert not any("no face" in message for message in caplog.messages)
    tuner = fit(base, tmp_path / "none", scorer, steps=2, detector=see_bright(300), keep_best=True)
    (said,) = (message for message in caplog.messages if "no face" in message)
    assert (
        said.startswith("no face was found in the 3 untuned validation images") and "the last weights are kept" in said
    )
    *_, last = rows(tmp_path / "none/metrics.jsonl")
    assert last["validation_without_face"] == 1 and "validation_score" not in last
    assert str(tuner.verdict).startswith("too few images to tell (n = 0); 0 of 3 images had a face before, 0 after")


def drawn(base, folder):
    """Return the files of the three untuned validation images."""
    fit(base, folder, None, steps=1, validate_every=1)
    return sorted((folder / "validation/000000").iterdir())


def test_without_a_scorer_there_are_images_only(base, tmp_path):
    tuner = fit(base, tmp_path, None, steps=2, num_validation=2)
    assert tuner.verdict is None and not (tmp_path / "samples.jsonl").exists()
    assert [row["score"] for row in rows(tmp_path / "validation.jsonl")] == [None] * 4
    assert not any(key.startswith("validation") for row in rows(tmp_path / "metrics.jsonl") for key in row)


def test_options_that_need_scores(base, scorer):
    for options in ({"keep_best": True, "scorer": None}, {"patience": 2, "validate_every": 0}):
        (name, _), *_ = options.items()
        with pytest.raises(ValueError, match=f"`{name}` goes by the Face Score of validations: it needs `validate_e"):
            fit(base, None, options.pop("scorer", scorer), **options)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        fit(base, None, scorer, prompts=[])


def test_validations_of_one_run_are_comparable(base, scorer, tmp_path):
    """Drawn otherwise they would not be; a finished run may draw its samples otherwise."""
    fit(base, tmp_path, scorer, steps=2)
    with pytest.raises(ValueError, match="were drawn with other `sample_steps`: scores of the run would not be"):
        fit(base, tmp_path, scorer, steps=4, sample_steps=3)
    before = files(tmp_path)
    fit(base, tmp_path, scorer, steps=2, sample_steps=3, num_samples=2)
    after = files(tmp_path)
    assert before["validation.jsonl"] == after["validation.jsonl"]
    assert before["samples/000_after.png"] != after["samples/000_after.png"]
    drawn = [f"samples/{seed:03d}_{side}.png" for seed in (0, 1) for side in ("after", "before")]
    assert sorted(name for name in after if name.startswith("samples/")) == drawn  # of three before


def test_nothing_is_written_without_an_output(base, scorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuner = fit(base, None, scorer, steps=2, keep_best=True)
    assert tuner.verdict.n == 3 and not list(tmp_path.iterdir())


def test_a_verdict_without_images(base, scorer):
    assert str(fit(base, None, scorer, steps=1, num_samples=0).verdict) == "not judged: `num_samples` is 0"

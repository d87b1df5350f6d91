import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from html_page import Page
from PIL import Image

from faceprior.images import load_image
from faceprior.jsonl import append_row
from faceprior.report import evaluation, opening, write_report
from faceprior.report.__main__ import REPORT_FILE, main
from faceprior.report.charts import bin_counts, histogram, running_mean, thinned, tick_texts, ticks
from faceprior.report.making import command_text
from faceprior.report.page import MAX_BYTES, SECTIONS
from faceprior.report.pairs import PAIRS
from faceprior.report.run import Run, face_window, points
from faceprior.report.summary import duration, format_number, reason_kind, spread

CAPTION = "portrait photo, young woman, long wavy red hair"
PROBLEMS = "What could not be read"


def picture(path, size=(24, 24), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def rows(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    for value in values:
        append_row(path, value)


def objects(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def pair(name, area_ratio=0.2, **changes):
    files = {side: f"{side}/{name}.png" for side in ("good", "bad", "mask")}
    row = {"id": name, **files, "box": [4.0, 4.0, 16.0, 18.0], "area_ratio": area_ratio, "strength": 0.4}
    return {**row, "prompt": CAPTION, "difference": 12.3, **changes}


def make_pairs(folder):
    for index, name in enumerate(("one", "two")):
        rows(folder / "manifest.jsonl", pair(name, (0.2, 0.004)[index], strength=(0.4, 0.06)[index]))
        for side in ("good", "bad", "mask"):
            picture(folder / side / f"{name}.png", seed=index)
    rows(folder / "rejected.jsonl", {"id": "b.png", "filter": "no_face", "reason": "no face found"})
    rows(folder / "rejected.jsonl", {"id": "three", "filter": "indistinguishable", "reason": "hard to tell apart: 0.5"})
    of_photographs = {"of": "photographs", "in": 1234, "rejected": {"no_face": 1, "near_duplicate": 0}}
    objects(folder / "report.json", {"rounds": [of_photographs], "pairs": 2})
    objects(folder / "done.json", {"pairs": 2, "rejected": 2, "photographs": 1234})
    settings = "01_make_pairs:\n  area_limits: [0.005, 0.01, 0.1, 1.0]\n  noise_factors: [0.06, 0.1, 0.2, 0.4]\n"
    (folder / "config.yaml").write_text(settings)


def make_training(folder, **done):
    for step in range(1, 4):
        rows(folder / "metrics.jsonl", {"step": step, "loss": 1.0 / step, "learning_rate": 1e-4})
    objects(folder / "done.json", {"steps": 3, **done})
    objects(folder / "tiny.json", {"kind": "sd15", "seed": 0, "trained": False})


def make_samples(folder, *sides, **more):
    for side in sides:
        picture(folder / f"samples/000_{side}.png", seed=len(side))
    rows(folder / "samples.jsonl", {**more, **{side: f"samples/000_{side}.png" for side in sides}})


def make_validation(folder):
    """Two images at three steps, of which the second is kept, and the verdict."""
    for step, score in ((0, -0.5), (20, 1.5), (40, 1.25)):
        for seed in (0, 1):
            name = f"validation/{step:06d}/{seed:03d}.png"
            picture(folder / name, seed=step + seed)
            row = {"step": step, "prompt": CAPTION, "seed": seed, "image": name, "score": score + seed / 4}
            rows(folder / "validation.jsonl", row)
        rows(folder / "metrics.jsonl", {"step": step, "validation_score": score + 1 / 8})
    verdict = {"outcome": "better", "text": "better by 1.5 (95% interval 0.5 to 2.5, n = 16 paired images)"}
    objects(folder / "done.json", {"steps": 40, "pairs": 2, "best_step": 20, "verdict": verdict})


def make_scorer(folder):
    make_training(folder, start_accuracy=0.5, accuracy=0.75, training_pairs=8, validation_pairs=4)
    rows(folder / "metrics.jsonl", {"step": 4, "loss": 0.2, "accuracy": 0.5, "validation_accuracy": 0.75})
    for name, good, bad in (("one", 1.0, 0.0), ("two", 2.0, 0.5), ("three", 0.0, 1.0), ("four", 1.5, 1.0)):
        rows(folder / "scores.jsonl", {"id": name, "area_ratio": 0.2, "good": good, "bad": bad})
    shortcut = {"test": "good through the VAE, above bad", "share": 0.725, "low": 0.571, "high": 0.839, "n": 40}
    missing = {**dict.fromkeys(("share", "low", "high")), "n": 0, "note": "not measured: `--vae` names a VAE"}
    calibration = {"expected_error": 0.0625, "bins": [{"pairs": 4, "margin": 0.75, "expected": 0.68, "right": 0.75}]}
    rows_of_tests = [{**shortcut, "note": "VAE: mine"}, {"test": "another test", **missing}]
    objects(folder / "report.json", {"pairs": 4, "calibration": calibration, "shortcuts": rows_of_tests})


def make_portraits(folder):
    picture(folder / "images/one.png")
    one = {"id": "one", "photograph": "one.png", "image": "images/one.png", "caption": CAPTION}
    rows(folder / "manifest.jsonl", {**one, "quality": {"sharpness": 9.5, "yaw": -20.0}})
    picture(folder / "rejected/two.png")
    blurred = {"reason": "sharpness 1.6 (blurred: at least 4.0)", "thumbnail": "rejected/two.png"}
    blurred |= {"faults": ["blurred"], "quality": {"sharpness": 1.6, "yaw": 10.0}}
    (folder / "config.yaml").write_text("03_curate_portraits:\n  min_laplacian: 4.0\n  max_yaw: 35.0\n")
    balance = {"portraits": 1, "skin_tones": {"light": 1}, "ages": {"young": 1}, "tags": {"red hat": 1}}
    objects(folder / "balance.json", {**balance, "missing": ["no portrait of the skin tone dark"]})
    rows(folder / "rejected.jsonl", {"id": "two", "photograph": "two.png", **blurred})
    rows(folder / "rejected.jsonl", {"id": "three", "photograph": "three.png", "reason": "no face found"})
    objects(folder / "done.json", {"accepted": 1, "rejected": 2})


def make_evaluation(folder):
    """One face by two methods, of which one is not measured by LPIPS, beside a published row."""
    words = {"protocol": "restoration", "better": "higher", "unit": "", "note": ""}
    empty = {"value": None, "low": None, "high": None, "median": None, "n": 0}
    psnr = {**words, "measure": "psnr", "title": "PSNR", "header": "PSNR (dB) ↑", "spec": ".2f"}
    lpips = {**words, **empty, "measure": "lpips", "title": "LPIPS", "header": "LPIPS ↓", "spec": ".4f"}
    numbers = {"value": 21.5, "low": 20.25, "high": 22.75, "median": 21.0, "n": 8, "worst": ["a"], "best": ["a"]}
    results = {
        "rows": [
            {**psnr, **empty, "n": 8, "is_infinite": True, "method": "untouched", "note": "8 of 8 equal the reference"},
            {**psnr, **numbers, "difference": -1.5, "diff_low": -2, "diff_high": -1, "p_value": 0.03, "method": "ours"},
            {**lpips, "method": "ours", "note": "not measured: the weights of AlexNet are not here"},
        ],
        "published": {
            "protocol": "restoration",
            "title": "Restorers on CelebA-Test",
            "source": "arXiv 2410.09864, Table 1",
            "rows": [{"method": "AuthFace", "values": {"psnr": 25.57, "lpips": 0.2143}}],
        },
        "notes": {"restoration": ["8 faces of a test set"]},
        "methods": [{"protocol": "restoration", "name": "ours", "text": "checkpoints/ours", "kind": "model"}],
        "versions": {"torch": "2.0"},
    }
    objects(folder / "results.json", results)
    for place, method in enumerate(("input", "untouched", "ours")):
        picture(folder / f"restoration/images/{method}/a.png", seed=place)
        image = {"image": f"restoration/images/{method}/a.png", "psnr": 21.5}
        rows(folder / "rows.jsonl", {"protocol": "restoration", "method": method, "id": "a", **image})


def make_photographs(root):
    picture(root / "photographs/astronaut.png", (40, 30))
    picture(root / "restored/astronaut.png", (40, 30), seed=1)
    face = {"score": 1.25, "percentile": 61.5, "box": [10, 5, 22, 20], "landmarks": None, "confidence": 0.99}
    rows(root / "photographs/scores.jsonl", {"file": "/somewhere/astronaut.png", "faces": [face]})


@pytest.fixture
def root(tmp_path):
    """A small whole run, as the stages leave it."""
    root = tmp_path / "run"
    make_pairs(root / "data/pairs")
    make_scorer(root / "checkpoints/scorer")
    make_portraits(root / "data/portraits")
    for name in ("guided", "prior"):
        make_training(root / "checkpoints" / name, trained_parameters=197184, pairs=2, portraits=1)
        make_samples(root / "checkpoints" / name, "before", "after", prompt=CAPTION, seed=0)
    make_validation(root / "checkpoints/guided")
    make_training(root / "checkpoints/restorer", faces=1)
    make_samples(root / "checkpoints/restorer", "clean", "degraded", "restored")
    make_evaluation(root / "results")
    make_photographs(root)
    command = ["/usr/bin/python3", "stages/01_make_pairs.py", "--output", f"{root}/data/pairs"]
    rows(root / "commands.jsonl", {"command": command, "seconds": 72.4})
    return root


def read(root):
    return Page(write_report(root, root.parent / "report.html"))


def decoded(source):
    return load_image(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


# --- the whole ---


def test_a_whole_run_has_every_part(root):
    page = read(root)
    assert page.balanced
    assert PROBLEMS not in page.text
    for section in SECTIONS:
        assert section.title in page.text
    for text in (
        "had not been trained",
        "10 to 100%", "strength", "hard to tell apart", "no face found",
        "1,234 photographs", "near duplicate",
        "50% before training and in 75% after it", "The good face scores higher in 3 of 4 pairs", "1.25", "61.5",
        "0.062 apart in the mean", "72.5%", "57.1% to 83.9%", "VAE: mine", "`--vae` names a VAE",
        CAPTION, "sharpness 1.6 (blurred: at least 4.0)", "197,184",
        "21.5", "20.25 to 22.75", "not measured", "the weights of AlexNet are not here",
        "infinite", "8 of 8 equal the reference", "-1.50 (-2.00 to -1.00), p = 0.03", "25.57", "8 faces of a test set",
        "better by 1.5 (95% interval 0.5 to 2.5, n = 16 paired images)", "step 20, kept: 1.75", "untuned: -0.25",
        "Face Score of the validation images",
        "python3 stages/01_make_pairs.py --output data/pairs", "1 min 12 s", "torch", "accelerate", "noise_factors",
    ):  # fmt: skip
        assert text in page.text, text


def test_validations_that_nobody_scored_are_images_alone(root):
    folder = root / "checkpoints/prior"
    for step in (0, 20):
        picture(folder / f"validation/{step:06d}/000.png", seed=step)
        row = {"step": step, "prompt": CAPTION, "seed": 0, "image": f"validation/{step:06d}/000.png", "score": None}
        rows(folder / "validation.jsonl", row)
    page = read(root)
    assert page.text.count("Face Score of the validation images") == page.text.count("The score is the mean") == 1
    assert page.text.count("The same prompts and noise every time.") == 2 and PROBLEMS not in page.text


def test_the_file_is_self_contained(root):
    """Nothing is loaded from elsewhere: all sources are data URIs, all links lead into the page."""
    page = read(root)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.elements:
        for key in ("src", "href", "data", "srcset", "action"):
            value = attributes.get(key, "data:")
            assert value.startswith(("data:", "#")), (name, key, value[:80])
            assert not value.startswith("#") or value[1:] in ids
    text = (root.parent / "report.html").read_text()
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert str(root) not in text and "/usr/bin" not in text and "/somewhere" not in text


def test_every_image_is_embedded_with_a_description(root):
    """3 x 2 in the opening, 3 x (whole + face) of two pairs, 2 portraits, 2 x 2 samples, 3 x 2 validations, 3 + 2
    of restoration, 2 sliders and 2 ends of the evaluation, 1 + 2 + 2 photographs."""
    images = read(root).all("img")
    assert len(images) == 6 + 12 + 2 + 4 + 6 + 5 + 6 + 5
    assert all(image["alt"] for image in images)
    by_name = {image["alt"]: decoded(image["src"]) for image in images}
    good = load_image(root / "data/pairs/good/one.png")
    np.testing.assert_array_equal(np.asarray(by_name["good image of one"]), np.asarray(good))
    crop = good.crop(face_window([4, 4, 16, 18], good.size))
    np.testing.assert_array_equal(np.asarray(by_name["good image of one, face"]), np.asarray(crop))


def test_sliders_are_range_inputs_over_two_images(root):
    page = read(root)
    inputs = page.all("input")
    assert [(i["type"], i["min"], i["max"], i["aria-label"]) for i in inputs] == [
        ("range", "0", "100", "Score: bad face: 0.5 to good face: 2.0"),
        ("range", "0", "100", "Tune: untuned to this run"),
        ("range", "0", "100", "Restore: degraded to restored"),
        ("range", "0", "100", "sample 1: degraded to restored"),
        ("range", "0", "100", "astronaut.png: original to restored"),
        ("range", "0", "100", "a: input to untouched"),
        ("range", "0", "100", "a: input to ours"),
    ]
    assert len(page.all("div", "frame")) == 7


def test_every_gate_that_judged_something_has_a_histogram_with_its_limit(root):
    """Sharpness 9.5 and 1.6 with the limit 4 between them, yaw 20 and 10 with 35 beyond them; no other numbers."""
    page = read(root)
    marks = page.all("line", "mark")
    assert len(marks) == 2
    figures = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert {"sharpness (blurred)", "yaw (turned away)"} <= set(figures)
    chart = histogram("", {"accepted": [9.5], "rejected": [1.6]}, "", "", limit=4.0)
    assert chart.axes.x(1.6) < chart.mark == chart.axes.x(4.0) < chart.axes.x(9.5)
    for text in ("at least 4", "at most 35", "red hat", "no portrait of the skin tone dark"):
        assert text in page.text, text


def test_the_boxes_of_scored_faces_are_drawn_in_pixels(root):
    page = read(root)
    (box,) = [r for r in page.all("rect") if "class" not in r]
    assert [float(box[key]) for key in ("x", "y", "width", "height")] == [10, 5, 12, 15]
    assert "0 0 40 30" in [svg["viewbox"] for svg in page.all("svg")]


def test_the_same_run_gives_the_same_images(root):
    assert read(root).all("img") == read(root).all("img")


# --- what is not there ---


def test_the_opening_shows_the_middle_of_what_was_scored(root):
    """Gains of 3, 1 and 2: the last sample; a job without images has its text alone."""
    folder = root / "checkpoints/guided"
    (folder / "samples.jsonl").unlink()
    for after in (3.0, 1.0, 2.0):
        make_samples(folder, "before", "after", score_before=0.0, score_after=after)
    (root / "checkpoints/scorer/scores.jsonl").unlink()
    score, tune, restore = opening.describe(Run(root))
    assert (tune.names, "of 3 samples the middle one" in tune.about) == (("untuned: 0.0", "this run: 2.0"), True)
    assert tune.third is None and score.before is None and restore.after.uri
    assert tune.origin == "By 40 steps of this run, on the tiny weights that ship with faceprior, untrained."


def test_the_opening_shows_what_the_shipped_weights_draw_beside_this_run(root):
    """Three images of one prompt and noise, each with its origin and its score; the samples below show it too."""
    folder = root / "checkpoints/guided"
    (folder / "samples.jsonl").unlink()
    scores = {"score_before": 0.0, "score_after": 1.0, "score_shipped": 3.0}
    make_samples(folder, "before", "after", "shipped", **scores)
    _, tune, _ = opening.describe(Run(root))
    assert (*tune.names, tune.third_name) == ("untuned: 0.0", "shipped weights: 3.0", "this run: 1.0")
    assert tune.origin.startswith("Right: by the LoRA that ships. Below: by 40 steps of this run")
    shown = [decoded(image.uri) for image in (tune.before, tune.after, tune.third)]
    for image, side in zip(shown, ("before", "shipped", "after"), strict=True):
        np.testing.assert_array_equal(image, np.asarray(load_image(folder / f"samples/000_{side}.png")))
    page = read(root)
    names = [image["alt"] for image in page.all("img")]
    assert names.count("shipped weights") == 1 and names.count("seed None, shipped weights") == 1
    assert "shipped weights: 3.0" in page.text


def test_the_opening_shows_an_evaluated_face_rather_than_one_of_the_training(root):
    """Gains of 4, 1 and 2: the last face; b lacks the input, and e is of an earlier evaluation."""
    folder = root / "results"
    (folder / "rows.jsonl").unlink()
    objects(folder / "results.json", {"items": {"restoration": ["a", "b", "c", "d"]}})
    before, after = {"a": 0.0, "c": 1.0, "d": 0.5, "e": 0.0}, {"a": 4.0, "b": 9.0, "c": 2.0, "d": 2.5, "e": 9.0}
    for method, scores in (("input", before), ("ours", after)):
        for place, (item, score) in enumerate(scores.items()):
            file = f"restoration/images/{method}/{item}.png"
            picture(folder / file, seed=place)
            row = {"protocol": "restoration", "method": method, "id": item, "image": file, "face_score": score}
            rows(folder / "rows.jsonl", row)
    *_, restore = opening.describe(Run(root))
    assert (restore.names, restore.section) == (("degraded: 0.5", "restored: 2.5"), "evaluation")
    assert "of 3 faces the middle one" in restore.about and restore.origin == "By ours."
    shown = np.asarray(load_image(folder / "restoration/images/ours/d.png"))
    np.testing.assert_array_equal(decoded(restore.after.uri), shown)


def test_where_a_comparison_of_published_rows_and_of_rejected_portraits_may_mislead_the_report_says_so(root):
    """Published rows are of other images; of several faults of a portrait the first one is counted."""
    text = read(root).text
    assert "published rows of arXiv 2410.09864, Table 1: Restorers on CelebA-Test; comparable where" in text
    assert "first reason" in text


def test_an_empty_folder_names_every_command(tmp_path):
    page = read(tmp_path)
    for section in SECTIONS:
        assert section.title in page.text
        if section.stage:
            assert f"This stage was not run: {section.command} makes it." in page.text
    assert "faceprior score photographs" in page.text and "make demo" in page.text
    assert page.balanced and not page.all("img") and PROBLEMS not in page.text
    assert not page.all("p", "banner")


def test_a_stage_without_done_json_is_not_finished(root):
    (root / "checkpoints/prior/done.json").unlink()
    (root / "checkpoints/guided/metrics.jsonl").unlink()
    text = read(root).text
    assert "This stage is not finished: python stages/05_prior_tune.py resumes it." in text
    assert "Started, but nothing to show yet: python stages/04_guidance_tune.py makes it." in text


def test_a_scorer_without_checks_says_when_they_are_made(root):
    (root / "checkpoints/scorer/report.json").unlink()
    assert "stage 2 measures them when its training ends" in read(root).text


@pytest.mark.parametrize(
    "wrong", [None, "text", 10**400, [], [None], {}, [{}], float("nan")], ids=lambda v: str(v)[:12]
)
def test_any_value_of_the_checks_may_be_wrong(tmp_path, wrong):
    """Whatever stands in the place of each, the page is whole and the other part of the checks is shown."""
    root = tmp_path / "run"  # of the scorer alone: a page without images is made faster
    make_scorer(root / "checkpoints/scorer")
    path = root / "checkpoints/scorer/report.json"
    whole = json.loads(path.read_text())
    parts = {"calibration": "57.1% to 83.9%", "shortcuts": "0.062 apart in the mean"}
    for part, other in parts.items():
        objects(path, {**whole, part: wrong})
        page = read(root)
        assert page.balanced and other in page.text
        first = whole[part]["bins"][0] if part == "calibration" else whole[part][0]
        for key in first:
            row = {**first, key: wrong}
            objects(path, {**whole, part: {"expected_error": 0.0, "bins": [row]} if part == "calibration" else [row]})
            page = read(root)
            assert page.balanced and other in page.text


def test_the_facial_loss_is_drawn(root):
    """The accuracy of both discriminators, the weight with the m that was measured, and the curve it is from."""
    folder = root / "checkpoints/restorer"
    for step in (1, 2):
        accuracy = {f"{region}_{side}": 0.5 for region in ("eyes", "mouth") for side in ("real", "fake")}
        rows(folder / "metrics.jsonl", {"step": step, "loss": 0.1, **accuracy})
    objects(
        folder / "confidence.json",
        {"t": [0, 0.5], "mean": [1, 0], "low": [1, 0], "high": [1, 0.1], "n": 7, "m": 0.25},
    )
    settings = {"facial_loss": "time_aware", "time_m": "auto", "time_s": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump({"06_train_restorer": settings}))
    text = (write_report(root, root / "report.html")).read_text()
    for title in ("discriminator, eyes", "discriminator, mouth", "m = 0.25, s = 0.5", "under noise, n = 7"):
        assert title in text
    (folder / "confidence.json").write_text('{"t": [0], "n": 7}')
    assert "confidence.json could not be shown" in write_report(root, root / "report.html").read_text()


def test_a_photograph_that_was_not_restored_is_named(root):
    (root / "restored/astronaut.png").unlink()
    page = read(root)
    assert "astronaut.png was not restored: faceprior restore" in page.text
    assert len(page.all("input")) == 6  # those of the opening, of a sample, and of the evaluation


def test_photographs_are_shown_without_the_stages(tmp_path):
    make_photographs(tmp_path)
    page = read(tmp_path)
    assert "1.25" in page.text and len(page.all("input")) == 1 and PROBLEMS not in page.text


def test_no_root_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="make demo"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nowhere")])
    assert stopped.value.code == 1


# --- what cannot be read ---


def test_hostile_text_stays_text(root):
    hostile = '"><img src=x onerror=alert(1)><script>alert(2)</script>$body \ud800 \x00 &lt;'
    folder = root / "data/portraits"
    caption = {"id": hostile, "photograph": hostile, "image": "images/one.png", "caption": hostile}
    (folder / "manifest.jsonl").write_text(json.dumps(caption) + "\n")
    (folder / "rejected.jsonl").write_text(json.dumps({"photograph": hostile, "reason": f"<b>{hostile}"}) + "\n")
    (root / "commands.jsonl").write_text(json.dumps({"command": [hostile, hostile], "seconds": 1}) + "\n")
    objects(root / "results/results.json", {"rows": [{"part": hostile, "metric": hostile, "note": hostile}]})
    objects(root / "data/portraits/done.json", {"accepted": hostile, "rejected": hostile})
    page = read(root)
    assert page.balanced
    assert len(page.all("script")) == 1
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert "<script>alert(2)</script>$body" in page.text and "&lt;" in page.text


@pytest.mark.parametrize("rounds", [3, [3], [{"of": "faces"}], [{"of": "faces", "in": "<b>", "rejected": {}}]])
def test_a_strange_count_of_the_filters_costs_its_table_only(root, rounds):
    objects(root / "data/pairs/report.json", {"rounds": rounds})
    page = read(root)
    assert page.balanced
    assert "near duplicate" not in page.text and "good image of two" in [i["alt"] for i in page.all("img")]


def test_a_long_reason_unfolds(root):
    """It is kept to its last word, in a failure that is named and in those of an evaluation and of portraits."""
    reason = "first " + "word " * 1000 + "last"
    results = json.loads((root / "results/results.json").read_text())
    results["rows"][2]["note"] = f"not measured: {reason} of LPIPS"
    results["notes"]["restoration"].append(f"{reason} of the notes")
    objects(root / "results/results.json", results)
    rows(
        root / "data/portraits/rejected.jsonl", {"id": "four", "photograph": "four.png", "reason": f"{reason} of four"}
    )
    rows(root / "photographs/scores.jsonl", {"file": "two.png", "error": f"{reason} of two"})
    page = read(root)
    assert page.balanced and page.count("details", "long") >= 5
    for name in ("of LPIPS", "of the notes", "of four", "of two"):
        assert f"last {name}" in page.text
    assert "last of two" in page.text.partition(PROBLEMS)[2]


def test_a_torn_row_is_named_and_the_rest_shown(root):
    with open(root / "data/pairs/manifest.jsonl", "a") as file:
        file.write('{"id": "torn", "good": "go')
    page = read(root)
    assert PROBLEMS in page.text and "data/pairs/manifest.jsonl:3" in page.text and "torn or foreign row" in page.text
    assert "good image of two" in [image["alt"] for image in page.all("img")]


def test_an_unreadable_image_is_named_and_has_a_placeholder(root):
    (root / "data/pairs/bad/one.png").write_bytes(b"no picture")
    (root / "data/pairs/mask/two.png").unlink()
    page = read(root)
    assert "data/pairs/bad/one.png" in page.text and "data/pairs/mask/two.png is missing" in page.text
    lost = [div["aria-label"] for div in page.all("div", "lost")]
    assert sum("cannot be read" in label for label in lost) == 4  # the picture and its face, twice
    assert len(page.all("img")) == 46 - 4


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname"])
def test_a_path_out_of_the_folder_is_not_followed(root, name):
    picture(root / "secret.png")
    rows(root / "data/pairs/manifest.jsonl", pair("three", good=name))
    page = read(root)
    assert "leads out of data/pairs" in page.text.replace(f"{root}/", "")
    assert "good image of three" not in [image["alt"] for image in page.all("img")]


def test_any_file_may_be_broken(root):
    """Each file in turn holds something else; the report is written, the file is named, and so is every other part."""
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != "config.yaml"):
        whole = path.read_bytes()
        path.write_bytes(b"\x80 [1, 2")
        page = read(root)
        path.write_bytes(whole)
        assert page.balanced
        assert path.relative_to(root).as_posix() in page.text, path
        assert "Evaluation" in page.text and PROBLEMS in page.text


WRONG = [None, "text", -1, 10**400, [], {}, [None] * 4, ["a"] * 4, True, float("nan"), float("inf")]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: str(value)[:12])
def test_any_value_may_be_wrong(root, wrong):
    """After the whole rows stand rows in which every value in turn is `wrong`; the whole ones are shown."""
    before = read(root)
    for path in root.rglob("*.jsonl"):
        lines = path.read_text().splitlines()
        first = json.loads(lines[0])
        changed = [{key: wrong for key in first}, *({**first, key: wrong} for key in first)]
        if first.get("faces"):
            faces = [{**first["faces"][0], key: wrong} for key in first["faces"][0]]
            changed.append({**first, "faces": [*faces, wrong]})
        path.write_text("\n".join([*lines, *map(json.dumps, changed)]) + "\n")
    results = json.loads((root / "results/results.json").read_text())["rows"]
    changed = [{**results[1], key: wrong} for key in results[1]]
    objects(root / "results/results.json", {"rows": [*results, *changed, wrong], "published": wrong, "notes": wrong})
    for path in [*root.rglob("done.json"), *root.rglob("tiny.json")]:
        objects(path, {key: wrong for key in json.loads(path.read_text())})
    page = read(root)
    assert page.balanced
    assert {image["src"] for image in before.all("img")} <= {image["src"] for image in page.all("img")}
    assert not [section.title for section in SECTIONS if f"{section.title} could not be shown" in page.text]


def test_a_folder_in_place_of_a_file_is_named(root):
    (root / "commands.jsonl").unlink()
    (root / "commands.jsonl").mkdir()
    assert "commands.jsonl" in read(root).text.partition(PROBLEMS)[2]


def test_means_over_what_all_methods_have_are_a_table_of_their_own(root):
    path = root / "results/results.json"
    results = json.loads(path.read_text())
    ours = results["rows"][1]
    ours |= {"pairs": 6, "common": 20.75, "common_n": 6}
    results["rows"].append({**ours, "method": "theirs", "n": 6, "common": 22.25})
    objects(path, results)
    text = read(root).text
    assert "Means over the images that all of them have: method PSNR (dB) ↑, n = 6 ours 20.75 theirs 22.25" in text
    assert text.count("p = 0.03 (6 pairs)") == 1  # theirs are all of its own


# --- the banner ---


def test_the_banner_says_which_networks_are_small_and_untrained(root):
    def banner():
        return read(root).text

    assert "The networks behind these images are small and had not been trained before" in banner()
    for name in ("scorer", "guided", "prior"):
        objects(root / f"checkpoints/{name}/tiny.json", {"kind": "sd15", "seed": 0, "trained": True})
    assert "had not been trained (restorer) before the few steps" in banner()
    (root / "checkpoints/restorer/tiny.json").unlink()
    assert "The scorer, tuned generator and portrait prior behind these images are small, made for" in banner()
    for name in ("scorer", "guided", "prior"):
        (root / f"checkpoints/{name}/tiny.json").unlink()
    assert "small" not in banner().partition("1. ")[0]


# --- sizes ---


def test_large_images_are_embedded_smaller(root):
    """Noise hardly compresses: three photographs of 900 x 900 pixels, three times each, would pass the limit."""
    faces = [{"score": 0.5, "box": [100, 100, 800, 800], "confidence": 1.0}]
    for name in "abc":
        picture(root / f"photographs/{name}.jpg", (900, 900))
        picture(root / f"restored/{name}.png", (900, 900), seed=1)
        rows(root / "photographs/scores.jsonl", {"file": f"{name}.jpg", "faces": faces})
    page = read(root)
    assert (root.parent / "report.html").stat().st_size <= MAX_BYTES
    size = decoded(next(image["src"] for image in page.all("img") if image["alt"] == "a.jpg: 1 face")).size
    assert size == (630, 630)


def test_only_some_of_many_pairs_are_shown(root):
    for index in range(20):
        rows(root / "data/pairs/manifest.jsonl", pair("one", 0.01 + index / 100))
    page = read(root)
    assert f"Pairs: {PAIRS} of 22, from the smallest face to the largest" in page.text
    assert len([i for i in page.all("img") if i["alt"].endswith(", face")]) == 3 * PAIRS


# --- the parts, by hand ---


def test_spread_keeps_both_ends():
    """Of 0..9 four items: 0, 3, 6, 9."""
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


def test_reasons_are_told_apart_by_words_not_by_numbers():
    assert reason_kind("pepper 0.1016 (pepper noise: at most 0.004)") == "pepper noise"
    assert reason_kind("no face of at least 16 pixels found") == reason_kind("no face of at least 20 pixels found")
    assert reason_kind("photos/a.jpg cannot be read") == reason_kind("b.png cannot be read")


def test_a_face_window_is_a_square_inside_the_image():
    """A box of 20 x 10 gives a side of 1.6 x 20 = 32: around (50, 45) it starts at (34, 29), at the border at 0."""
    assert face_window([40, 40, 60, 50], (100, 80)) == (34, 29, 66, 61)
    assert face_window([0, 0, 20, 10], (100, 80)) == (0, 0, 32, 32)
    assert face_window([0, 0, 90, 80], (100, 80)) == (5, 0, 85, 80)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1, 6, [1, 2, 3, 4, 5, 6]),
        (0.3, 0.9, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low, high, expected):
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-9, 3e8])
def test_ticks_of_a_single_value_enclose_it(value):
    made = ticks(value, value)
    assert made[0] < value < made[-1]


def test_tick_texts_leave_the_power_of_ten_to_the_axis():
    assert tick_texts([0.0, 0.0005, 0.001]) == (["0.0", "0.5", "1.0"], " (×10⁻³)")
    assert tick_texts([0, 50, 100]) == (["0", "50", "100"], "")
    assert tick_texts([0, 2e6]) == (["0", "2"], " (×10⁶)")


def test_histogram_counts_by_hand():
    """Edges 0, 1, 2, 3: the last edge belongs to the last bin."""
    assert bin_counts([0, 0.5, 1, 2.9, 3], [0, 1, 2, 3]) == [2, 1, 2]


def test_a_running_mean_of_a_line_is_the_line_away_from_its_ends():
    line = [(float(x), 2.0 * x) for x in range(100)]
    smooth = running_mean(line)
    np.testing.assert_allclose(smooth[4:-4], line[4:-4])  # 100 // 24 = 4 points to each side


def test_long_curves_are_drawn_as_means_of_equal_stretches():
    """600 points in 300 stretches: means of (0, 1), (2, 3), ... placed at the stretch's end."""
    thin = thinned([(float(x), float(x)) for x in range(600)])
    assert len(thin) == 300
    assert thin[0] == (1.0, 0.5) and thin[-1] == (599.0, 598.5)


def test_points_keep_the_last_row_of_a_step():
    made = points([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 1, "loss": 3}, {"step": 3, "loss": None}], "loss")
    assert made == [(1, 3)]


def test_numbers_and_durations_are_readable():
    assert [format_number(v) for v in (197184, 0.5, 22.3141, -0.000581)] == ["197,184", "0.5", "22.31", "-0.000581"]
    assert [duration(v) for v in (7.24, 72.4, 59.96, 7500)] == ["7.2 s", "1 min 12 s", "1 min 0 s", "2 h 5 min"]


def test_only_whole_path_names_are_made_relative():
    """The folder `a` is not the end of `data`."""
    run = Run(Path("a"))
    assert run.plain("data/pairs and a/b.png") == "data/pairs and b.png"
    command = ["/opt/env/bin/faceprior", "score", str(Path("a").absolute() / "photographs")]
    assert command_text(run, command) == "faceprior score photographs"


# --- the command ---


def test_the_command_writes_beside_the_run(root, capsys):
    main([str(root)])
    assert capsys.readouterr().out.strip() == str(root / REPORT_FILE)
    assert Page(root / REPORT_FILE).balanced
    main([str(root), "--output", str(root / "deeper/page.html")])
    assert (root / "deeper/page.html").is_file()
    assert not list(root.rglob("*.tmp"))


def test_folders_that_stages_wrote_elsewhere_are_reported(root, tmp_path, capsys):
    """Each is known by the settings in it, takes the place of the default one, and is named by its own path."""
    elsewhere = tmp_path / "runs/mine"
    make_training(elsewhere, trained_parameters=4321, pairs=2)
    make_samples(elsewhere, "before", "after", prompt="another prompt", seed=0)
    (elsewhere / "config.yaml").write_text("04_guidance_tune:\n  rank: 77\n")
    with open(elsewhere / "samples.jsonl", "a") as file:
        file.write("torn")
    assert "4,321" not in read(root).text
    main([str(root), str(elsewhere), "--output", str(tmp_path / "page.html")])
    page = Page(tmp_path / "page.html")
    assert all(text in page.text for text in ("4,321", "another prompt", "rank: 77", f"{elsewhere}/samples.jsonl:2"))
    assert "better by 1.5" not in page.text and "50% before training" in page.text  # the other stages' are the root's

    (tmp_path / "again").mkdir()
    (tmp_path / "again/config.yaml").write_text("04_guidance_tune: {}\n")
    capsys.readouterr()
    for folders, message in (
        (["again", "runs/mine"], "are of one stage: give one of them"),
        (["runs"], "no stage wrote"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main([str(root), *(str(tmp_path / folder) for folder in folders)])
        assert message in capsys.readouterr().err


def test_the_report_imports_no_torch():
    program = (
        "import sys, faceprior.report; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_that_gets_weights_is_whole_on_the_page_of_an_evaluation(tmp_path):
    """Some need several addresses; half a command is none."""
    command = f"not measured: `curl -o {'x' * 900} {'y' * 600}`"
    words = {"protocol": "generation", "method": "base", "measure": "asp", "header": "ASP", "title": "ASP"}
    row = {**words, "spec": ".2f", "better": "higher", "note": command, "value": None, "n": 0}
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row]}))
    (part,) = evaluation.describe(Run(tmp_path), ".")["parts"]
    assert part.missing == [f"ASP: {command}"]

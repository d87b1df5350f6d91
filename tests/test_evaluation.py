"""The evaluation: methods, items, rows, figures and tables, and stage 7 on results of other programs."""

import csv
import io
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
import pytest
from conftest import load_stage
from html_page import Page
from PIL import Image

from faceprior import tiny
from faceprior.degrade import DegradationConfig
from faceprior.evaluation import generation, rows
from faceprior.evaluation.figures import common_means, figure, interval, set_figure
from faceprior.evaluation.items import (
    Prompt,
    degraded_faces,
    faces_of_test_set,
    prompts_of,
)
from faceprior.evaluation.items import (
    test_set_folders as folders_of_test_set,
)
from faceprior.evaluation.making import make_images
from faceprior.evaluation.measures import (
    Measure,
    MeasureSettings,
    SetValue,
    find_measure,
    measures_of,
    named_weights,
)
from faceprior.evaluation.measuring import Measuring
from faceprior.evaluation.methods import marked, match_by_stem, parse_methods, stems_of
from faceprior.evaluation.restoration import restorers_of
from faceprior.evaluation.results import result_row, set_notes, weights_notes
from faceprior.evaluation.rows import EvaluationRows, require_weights, save_weights
from faceprior.evaluation.tables import csv_text, latex, latex_rows, markdown, published_rows, tables_of
from faceprior.jsonl import read_rows
from faceprior.metrics import MetricUnavailable

NEUTRAL = DegradationConfig()
STEM = "{:08d}"


def flat(path: Path, level: int, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level, level, level)).save(path)
    return path


def evaluate(output: Path | str, **values) -> dict:
    stage = load_stage("07_eval")
    stage.main(stage.Config(output=str(output), device="cpu", **values))
    return json.loads((Path(output) / "results.json").read_text())


def numbers(results: dict, key: str) -> dict:
    return {row["method"]: row for row in results["rows"] if row["measure"] == key}


# --- methods ---


def test_a_method_is_a_name_a_source_and_options():
    (ours, gfpgan, bare, base) = parse_methods(
        ["ours=checkpoints/lora,base=my/model", "GFP GAN=out/a=b/", "results/codeformer/", "input"],
        ["base"],
        "restorers",
    )
    assert (ours.name, ours.source, ours.options) == ("ours", "checkpoints/lora", {"base": "my/model"})
    assert ours.text == "checkpoints/lora,base=my/model"
    assert (gfpgan.name, gfpgan.source, gfpgan.folder) == ("GFP GAN", "out/a=b/", "GFP_GAN")
    assert (bare.name, bare.kind, base.kind) == ("codeformer", "model", "input")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["a=x", "A=y"], "two methods of the name A"),
        (["漢" * 100 + "=x"], "which becomes that of a folder"),
        (["a b=x", "a_b=y"], "two methods of the name a_b"),
        (["reference=x"], "the name `reference`"),
        (["input=x"], "has x under the name input, which stands for what is restored"),
        (["..=x"], "has the name '..', which becomes that of a folder"),
        (["a\nb=x"], "characters that can be printed"),
        (["a" * 300 + "=x"], "at most 100 characters"),
        (["a="], "has to hold NAME=SOURCE but has 'a='"),
        (["a=x,steps=3"], "has the option 'steps' in 'a=x,steps=3': the options are base"),
    ],
)
def test_a_wrong_method_is_refused(texts, reason):
    with pytest.raises(ValueError, match=reason):
        parse_methods(texts, ["base"], "restorers")


def test_a_bare_path_may_hold_an_equals_sign(tmp_path):
    (tmp_path / "v=1").mkdir()
    (bare,) = parse_methods([f"{tmp_path}/v=1"], [], "restorers")
    assert (bare.name, bare.source) == ("v=1", f"{tmp_path}/v=1")


def test_a_folder_that_is_still_empty_is_missing(tmp_path):
    """As one that does not exist: its program did not run yet, and the others have their rows."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    for made in (restorers_of([f"e={tmp_path}/empty"]), generation.generators_of([f"e={tmp_path}/empty"], "", "", "")):
        assert made[0].kind == "images" and made[0].missing == f"no images in {tmp_path}/empty"
    with pytest.raises(ValueError, match="bad.safetensors is damaged, or no .safetensors file"):
        generation.generators_of([f"x={tmp_path}/bad.safetensors"], "tiny", "", "auto")


def test_results_are_found_by_the_names_that_programs_give():
    names = ["1.png", "2_00.png", "2_01.png", "3_0.png", "4_out.jpg", "a_00.png", "a_00_00.png", "5_other.png"]
    found = match_by_stem(map(Path, names), ["1", "2", "3", "4", "a_00", "5", "6"])
    assert {name: file.name for name, file in found.items()} == {
        "1": "1.png", "2": "2_00.png", "3": "3_0.png", "4": "4_out.jpg", "a_00": "a_00.png",
    }  # fmt: skip


def test_a_result_belongs_to_one_face():
    """`f_1` is the result of the face f_1, not the first one of f; equal names are told apart by folder and suffix."""
    files = [Path("r", name) for name in ("f_1.png", "x/1.png", "y/1_00.png", "d.png", "d.jpg")]
    names = [PurePath(name) for name in ("f.png", "f_1.png", "x/1.png", "y/1.png", "d.png", "d.jpg")]
    assert stems_of(names) == ["f", "f_1", "x/1", "y/1", "d.png", "d.jpg"]
    found = match_by_stem(files, stems_of(names), "r")
    assert {stem: file.relative_to("r").as_posix() for stem, file in found.items()} == {
        "f_1": "f_1.png", "x/1": "x/1.png", "y/1": "y/1_00.png", "d.png": "d.png", "d.jpg": "d.jpg",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a=tiny,resolution=abc", "a=tiny,resolution=-8", "a=tiny,resolution=9000"])
def test_a_wrong_side_is_refused_before_anything_is_loaded(text):
    with pytest.raises(ValueError, match=r"the option resolution has to be in \[0, 2048\]"):
        generation.generators_of([text], "tiny", "", "auto")


@pytest.mark.parametrize("option", ["fidelity=7", "recipe=none", "steps=0"])
def test_a_wrong_option_of_a_restorer_is_refused(option):
    with pytest.raises(ValueError, match="has to be"):
        restorers_of([f"a=tiny,{option}"])


def test_kinds_of_generators(tmp_path, tiny_models):
    """A pipeline, a folder of images, a LoRA file with its base, and what stage 4 left, which knows its own base."""
    from safetensors.torch import save_file
    from torch import zeros

    flat(tmp_path / "pictures/0.png", 9)
    save_file({"unet.to_q.lora_A.weight": zeros(1, 2)}, tmp_path / "lora.safetensors")
    (tmp_path / "guided").mkdir()
    save_file({"unet.to_q.lora_A.weight": zeros(1, 2)}, tmp_path / "guided/pytorch_lora_weights.safetensors")
    (tmp_path / "guided/config.yaml").write_text("04_guidance_tune: {base: my/base, vae: my/vae}")
    sources = [tiny_models / "sd15", tmp_path / "pictures", tmp_path / "lora.safetensors", tmp_path / "guided"]
    texts = ["base", *map(str, sources), f"b={tmp_path}/guided,base=other"]
    methods = generation.generators_of(texts, "tiny", "", "auto")
    assert [method.kind for method in methods] == ["model", "model", "images", "model", "model", "model"]
    assert [method.options.get("base") for method in methods] == [None, None, None, "tiny", "my/base", "other"]
    assert methods[4].options["vae"] == "my/vae"
    assert generation.base_notes(methods, "tiny") == [
        "guided: tuned from my/base, which is not in this table",
        "b: tuned from my/base, but drawn with other",
    ]
    assert "no model" in methods[4].missing or "my/base" in methods[4].missing  # found out before anything is loaded
    (lost,) = generation.generators_of(["a=./none"], "tiny", "", "auto")
    assert lost.missing == "no tuned model in ./none: `python stages/04_guidance_tune.py` makes one"


# --- items ---


def test_faces_of_one_file_name_are_kept_apart(tmp_path):
    """In natural order, by the name of the file where it is unique; files that cannot be read are named."""
    for name in ("a/1.png", "b/1.png", "10.png", "2.png"):
        flat(tmp_path / name, 100)
    (tmp_path / "torn.png").write_bytes(b"")
    found = degraded_faces(str(tmp_path), 9, 64, NEUTRAL, 0)
    assert [face.id.rsplit("_", 1)[0] for face in found.faces] == ["2", "10", "a_1", "b_1"]
    assert [face.stem for face in found.faces] == ["2", "10", "a/1", "b/1"]
    assert [name for name, _ in found.problems] == ["torn.png"]
    degraded, clean = found.faces[0].load()
    assert degraded.size == clean.size == (64, 64)


def test_the_layouts_of_test_sets(tmp_path):
    """CelebA-Test has both, by the same names; LFW-Test has no reference; what lacks its own is named, and left out."""
    for number in (1, 2, 3):
        flat(tmp_path / "celeba/LQ" / f"{number}.png", 90)
    for number in (1, 3):
        flat(tmp_path / "celeba/GT" / f"{number}.jpg", 100)
    assert folders_of_test_set(str(tmp_path / "celeba")) == (str(tmp_path / "celeba/LQ"), str(tmp_path / "celeba/GT"))
    found = faces_of_test_set(*folders_of_test_set(str(tmp_path / "celeba")), 9)
    assert [face.id for face in found.faces] == ["1", "3"] and found.has_reference
    assert [(Path(name).name, reason[:22]) for name, reason in found.problems] == [("2.png", "no image of this name ")]
    alone = faces_of_test_set(*folders_of_test_set(str(tmp_path / "celeba/LQ")), 9)
    assert len(alone.faces) == 3 and alone.faces[0].load()[1] is None and not alone.has_reference
    flat(tmp_path / "others/x.png", 0)
    with pytest.raises(ValueError, match="no image in .*others has the name of one in .*LQ"):
        faces_of_test_set(str(tmp_path / "celeba/LQ"), str(tmp_path / "others"), 9)


def test_general_prompts_and_those_of_people_with_their_seeds(tmp_path):
    general, people = tmp_path / "general.txt", tmp_path / "people.txt"
    general.write_text("a boat\na tree\na cup")
    people.write_text("a man\na woman")
    both = prompts_of(str(general), str(people), (2, 2), seed=10, images_per_prompt=2)
    assert [prompt.id for prompt in both][:4] == [f"general_0000{i}_{copy}" for i in (0, 1) for copy in (0, 1)]
    assert [prompt.seed for prompt in both] == [10, 11, 12, 13] * 2
    assert {prompt.text for prompt in both if prompt.prompt_set == "people"} == {"a man", "a woman"}
    assert [prompt.id for prompt in prompts_of("", str(people), (8, 2), 0)] == ["00000", "00001"]


def test_finished_images_belong_to_prompts_by_name_or_number():
    prompts = [Prompt(f"{i:05d}", str(i), i) for i in range(3)]
    by_name = generation.match_images([Path("00002.png"), Path("00000_0.png")], prompts)
    assert {item: file.name for item, file in by_name.items()} == {"00000": "00000_0.png", "00002": "00002.png"}
    counted = generation.match_images([Path(f"{i}.png") for i in (3, 1, 2)], prompts)
    assert {item: file.name for item, file in counted.items()} == {f"{i:05d}": f"{i + 1}.png" for i in range(3)}
    assert generation.match_images([Path("cat.png"), Path("dog.png")], prompts) == {}


# --- figures ---


def test_the_interval_agrees_with_the_normal_one_on_many_values():
    """400 normal values: mean +- 1.96 s / sqrt(n), to a tenth of its width."""
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert interval(values) == (low, high)
    assert interval([2.0, 2.0]) == (2, 2) and interval([1.0]) is None


def test_a_figure_by_hand():
    """Differences 1, 1, 4 to the first method: mean 2, s = sqrt(3), t = 2 / (sqrt(3) / sqrt(3)) = 2, p = 0.184."""
    measure = replace(find_measure("psnr", "restoration"), is_infinite=False)
    found = figure(
        measure, {"a": 2.0, "b": 4.0, "c": 9.0, "d": None, "e": 1.0}, {"a": 1.0, "b": 3.0, "c": 5.0, "e": None}
    )
    assert (found["value"], found["median"], found["n"], found["pairs"]) == (4, 3, 4, 3)
    assert found["difference"] == 2 and found["p_value"] == pytest.approx(0.1835, abs=1e-4)
    assert (found["worst"], found["best"]) == (["e", "a", "b", "c"], ["c", "b", "a", "e"])
    assert found["note"].startswith("1 of 5 images without a value")
    assert figure(replace(measure, better="lower"), {"a": 1.0, "b": 2.0})["worst"] == ["b", "a"]


def test_means_over_what_all_have_by_hand():
    """Of a, b, c and b, c, d all have b and c: means 3 and 6. Of the same items there is nothing to add."""
    found = common_means({"one": {"a": 9.0, "b": 2.0, "c": 4.0}, "other": {"b": 5.0, "c": 7.0, "d": 0.0}})
    assert found == {"one": {"common": 3, "common_n": 2}, "other": {"common": 6, "common_n": 2}}
    assert common_means({"one": {"a": 1.0}, "other": {"a": 2.0}}) == {} == common_means({})
    assert common_means({"one": {"a": 1.0}, "other": {"b": 2.0}}) == {}  # none that both have


def test_a_fraction_has_an_interval_that_knows_how_few_there_are():
    """8 of 8 images with a face are not surely all: Wilson's lower end is 8 / (8 + 1.96^2) = 67.6%."""
    found = figure(find_measure("faces", "generation"), dict.fromkeys("abcdefgh", 1.0))
    assert (found["value"], found["high"]) == (1, 1) and found["low"] == pytest.approx(0.6756, abs=1e-4)


def set_row(key: str, value: float, influence: tuple[float, ...], **values) -> dict:
    items = dict(zip("abcd", influence, strict=True))
    return {"key": key, "value": value, "n": 4, "references": 5000, "influence": items, **values}


def test_a_small_set_warns_and_names_its_reference():
    few = set_figure(set_row("fid", 3.0, (1, -1, 1, -1)), "FFHQ")
    assert few["note"].startswith("reference: FFHQ (n = 5000), which") and "fewer than 2048 images" in few["note"]
    assert "KID" in few["note"] and set_figure(None, "FFHQ")["note"].startswith("not measured: ")
    note = set_figure(set_row("kid", 3.0, (0, 0, 0, 0), std=0.25), "FFHQ")["note"]
    assert "biases" not in note and note.endswith("standard deviation over subsets 0.25")


def test_a_set_has_an_interval_and_a_paired_test_by_hand():
    """Influences +-1 of 4 images: s = 2 / sqrt(3), error 1 / sqrt(3), t(3) = 3.182: half width 1.837.

    Those of the first method twice as much: differences -+1, the same error, t = -2 sqrt(3), p = 0.0405.
    """
    own, first = set_row("fid", 1.5, (1, -1, 1, -1)), set_row("fid", 3.5, (2, -2, 2, -2))
    found = set_figure(own, "FFHQ", first)
    assert (found["low"], found["high"]) == pytest.approx((0, 1.5 + 1.8374), abs=1e-3)  # FID is never negative
    assert (found["difference"], found["pairs"]) == (-2, 4)
    assert (found["diff_low"], found["diff_high"]) == pytest.approx((-3.8374, -0.1626), abs=1e-3)
    assert found["p_value"] == pytest.approx(0.0405, abs=1e-4)
    del first["influence"]["d"]
    assert "difference" not in set_figure(own, "FFHQ", first)  # other images


# --- rows and measures ---


def brightness(reason: Path) -> Measure:
    """The mean level of an image, whose weights are a file that may be missing."""

    def load(settings: MeasureSettings):
        if not reason.exists():
            raise MetricUnavailable(f"it needs {reason}")
        return lambda sample: float(np.asarray(sample.image).mean())

    return Measure("level", "level", load)


def test_a_measure_whose_weights_come_later_is_taken_then_and_only_there(tmp_path):
    """Until then another one stands in for it, if the models are tiny, and only then."""
    file = EvaluationRows(tmp_path / "rows.jsonl")
    for item, level in {"a": 10, "b": 30}.items():
        flat(tmp_path / f"{item}.png", level)
        file.add("restoration", "ours", item, image=f"{item}.png")
    weights, calls = tmp_path / "weights", []
    measure = brightness(weights)
    tiny_one = Measure(
        "level_tiny", "tiny level", lambda settings: lambda sample: calls.append(1) or 5.0, stands_in_for="level"
    )
    (method,) = parse_methods(["ours=x"], [], "restorers")

    def run(are_tiny: bool) -> Measuring:
        settings = MeasureSettings(are_tiny=are_tiny)
        made = Measuring(
            "restoration", [measure, tiny_one], settings, EvaluationRows(tmp_path / "rows.jsonl"), tmp_path
        )
        made.run([method])
        return made

    real = run(False)
    assert real.reasons == {"level": f"it needs {weights}"} and not calls
    assert [m.key for m in real.taken()] == ["level"]
    small = run(True)
    assert [m.key for m in small.taken()] == ["level", "level_tiny"] and len(calls) == 2
    weights.touch()
    last = run(True)
    assert not last.reasons and [m.key for m in last.taken()] == ["level"] and len(calls) == 2
    assert {item: row["level"] for item, row in last.rows.of("restoration", "ours").items()} == {"a": 10, "b": 30}


def test_a_measure_is_taken_on_its_own_prompts(tmp_path):
    """Face Score on the prompts of people, CLIP-Score on the general ones (Face Score, 6.1); on all of a single set."""
    file = EvaluationRows(tmp_path / "rows.jsonl")
    for item, prompt_set in {"a": "general", "b": "people"}.items():
        file.add("generation", "base", item, image="x.png", prompt="x", prompt_set=prompt_set)
    file.add("generation", "one", "c", image="x.png", prompt="x", prompt_set="")
    measuring = Measuring("generation", [], MeasureSettings(), file, tmp_path)
    general = Measure("clip", "CLIP-Score", None, needs=("prompt",), prompt_set="general")
    assert list(measuring.samples(general, "base")) == ["a"]
    assert list(measuring.samples(find_measure("face_score", "generation"), "base")) == ["b"]
    assert list(measuring.samples(general, "one")) == ["c"]


def test_a_name_with_another_source_is_refused(tmp_path):
    file = EvaluationRows(tmp_path / "rows.jsonl")
    file.add("restoration", "ours", "a", source="old", image="a.png")
    with pytest.raises(FileExistsError, match="has rows of ours = old, which is new now"):
        file.require_sources("restoration", parse_methods(["ours=new"], [], "restorers"))


def test_a_name_with_other_weights_is_refused(tmp_path):
    """A model that was trained again in its folder; a copy of it is the same, and rows of before know no weights."""
    for folder in ("model/unet", "model/resume"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.safetensors").write_bytes(bytes(5_000_000))
    texts = [f"ours={tmp_path}/model", f"LoRA={tmp_path}/model,base={tmp_path}/model"]
    ours, lora = marked(parse_methods(texts, ["base"], ""), "sd15")
    assert len(ours.weights) == 8 and lora.weights == 2 * ours.weights
    file = EvaluationRows(tmp_path / "rows.jsonl")
    file.add("restoration", "ours", "a", source=ours.text, image="a.png", weights=ours.weights)
    file.add("restoration", "LoRA", "a", source=lora.text, image="a.png")
    (tmp_path / "model/resume/x.safetensors").write_bytes(b"later")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "copy").rename(tmp_path / "model")
    file.require_sources("restoration", marked([ours, lora], "sd15"))
    with open(tmp_path / "model/unet/x.safetensors", "r+b") as weights:
        weights.seek(3_000_000)
        weights.write(bytes([1] * 10_000))  # a tensor of a 500th of the file
    with pytest.raises(FileExistsError, match="has rows of ours, but .*/model holds other weights now: give it ano"):
        file.require_sources("restoration", marked([ours], "sd15"))
    file.require_sources("restoration", marked([lora], "sd15"))
    shutil.rmtree(tmp_path / "model")
    file.require_sources("restoration", marked([ours], "sd15"))  # gone: nothing says that it was another


def test_what_measured_is_known_by_its_weights(tmp_path):
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer/x.safetensors").write_bytes(b"1")
    first = named_weights(f"{tmp_path}/scorer", {"clip": "no/clip"}, "mtcnn")
    assert first["clip"] == "no/clip" and first["hps"] == "those of the cache" and first["detector"] == "mtcnn"
    EvaluationRows(tmp_path / "rows.jsonl").add("generation", "base", "a", face_score=1.0)
    save_weights(tmp_path, first)
    require_weights(tmp_path, first)
    (tmp_path / "scorer/x.safetensors").write_bytes(b"2")
    with pytest.raises(FileExistsError, match="has face_score by .*scorer .*, but scorer is .*scorer .* now"):
        require_weights(tmp_path, named_weights(f"{tmp_path}/scorer", {}, "mtcnn"))
    shutil.rmtree(tmp_path / "scorer")
    gone = named_weights(f"{tmp_path}/scorer", {}, "mtcnn")
    require_weights(tmp_path, gone)
    save_weights(tmp_path, gone)
    assert json.loads((tmp_path / "weights.json").read_text())["scorer"] == first["scorer"]
    (tmp_path / "weights.json").write_text("[]")
    with pytest.raises(ValueError, match="weights.json is damaged"):
        require_weights(tmp_path, gone)


def test_a_batch_that_fails_is_made_one_by_one():
    import torch

    items = [Prompt(str(i), "", i) for i in range(5)]
    saved, sizes = {}, []

    def make(batch):
        sizes.append(len(batch))
        if any(item.seed == 3 for item in batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [item.seed for item in batch]

    def save(item, image, seconds):
        assert seconds >= 0
        saved[item.id] = image

    failed = make_images(make, items, save, torch.device("cpu"), batch_size=2)
    assert saved == {"0": 0, "1": 1, "2": 2, "4": 4} and [name for name, _ in failed] == ["3"]
    assert sizes == [2, 2, 2, 1, 1, 1]  # the first once more: it is not timed


# --- tables ---


def test_tables_in_all_formats():
    words = {"protocol": "restoration", "better": "lower", "unit": "", "spec": ".2f", "low": 1.0, "high": 2.0}
    words |= {"median": 1.5, "n": 4, "note": "", "measure": "psnr", "title": "PSNR", "header": "PSNR ↓"}
    results = {
        "rows": [
            {**words, "method": "ours_100%", "value": 1.5},
            {**words, "method": "other", "value": None, "n": 0},
            {**words, "method": "input", "value": 1.0},
            {**words, "method": "worse", "value": 1.75},
        ],
        "published": {
            "protocol": "restoration",
            "rows": [{"method": "paper", "values": {"psnr": 25.5, "musiq": 7.25}}],
        },
        "notes": {"restoration": ["a note"]},
    }
    (table,) = tables_of(results)
    assert "| paper (published) | 25.50 | 7.25 |" in markdown(table) and "- a note" in markdown(table)
    assert "- published rows; comparable where the test set," in markdown(table)
    read = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert [(row["method"], row["source"], row["psnr"], row["psnr_low"], row["psnr_n"]) for row in read] == [
        ("ours_100%", "measured", "1.5", "1.0", "4"), ("other", "measured", "", "1.0", "0"),
        ("input", "measured", "1.0", "1.0", "4"), ("worse", "measured", "1.75", "1.0", "4"),
        ("paper", "published", "25.5", "", ""),
    ]  # fmt: skip
    lines = latex_rows(table).splitlines()
    assert lines[0] == r"Method & PSNR $\downarrow$ & musiq \\"
    assert lines[2] == r"ours\_100\% & \textbf{1.50} & - \\"  # the lowest, but for the input's
    assert latex(r"a\b~^{x}") == r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}\{x\}"
    with pytest.raises(ValueError, match="`published` has to be one of .*authface_table1.* but is 'table9'"):
        published_rows("table9")


def test_what_says_nothing_is_left_out_of_a_table():
    """The best of equal ones, and an arrow on a share of answers."""
    share = Measure("same", "same", None, "", spec=".1%")
    assert share.header == "same" and replace(share, better="lower").header == "same ↓"
    faces = find_measure("faces", "generation")
    made = [result_row("generation", name, faces, {"value": 1.0, "n": 4}) for name in ("a", "b")]
    made += [result_row("generation", name, share, {"value": x, "n": 4}) for name, x in (("a", 0.5), ("b", 0.25))]
    (table,) = tables_of({"rows": made})
    assert not table.best
    made[1]["value"] = 0.5
    (table,) = tables_of({"rows": [*made, result_row("generation", "reference", faces, {"value": 1.0, "n": 4})]})
    assert [line.method for line in table.lines] == ["a", "b", "reference"] and table.best == {("a", "faces")}


def test_a_table_says_what_measured(tmp_path):
    file = EvaluationRows(tmp_path / "rows.jsonl")
    file.add("generation", "base", "a", image="a.png", faces=1, face_score=2.0)
    measuring = Measuring("generation", measures_of("generation"), MeasureSettings(), file, tmp_path)
    notes = weights_notes(measuring, {"clip": "x", "scorer": "tiny (1f2e)", "detector": "mtcnn"})
    assert notes == ["Face Score by tiny (1f2e)", "faces by mtcnn"]


def test_numbers_of_sets_of_other_images_do_not_compare(tmp_path):
    measuring = Measuring(
        "generation", measures_of("generation"), MeasureSettings(), EvaluationRows(tmp_path / "r.jsonl"), tmp_path
    )
    key, title = next((measure.key, measure.title) for measure in measuring.taken() if measure.of == "set")
    methods = parse_methods(["a=x", "b=y"], [], "generators")
    for name, images in (("a", "pq"), ("b", "pqr")):
        measuring.sets["generation", name, key] = {"influence": dict.fromkeys(images, 0.0)}
    assert set_notes(measuring, methods) == [
        f"{title} is not of the same images (a 2, b 3): its numbers do not compare"
    ]
    measuring.sets["generation", "b", key]["influence"].pop("r")
    assert set_notes(measuring, methods) == []


# --- the stage on results of other programs ---


@pytest.fixture
def foreign(tmp_path) -> dict:
    """Three flat faces of known levels: input 10 below the reference, GFPGAN 5 above, of 80 pixels and without one."""
    for i in range(3):
        flat(tmp_path / "set/gt" / f"{STEM.format(i)}.png", 100 + i)
        flat(tmp_path / "set/lq" / f"{STEM.format(i)}.png", 90 + i)
        if i < 2:
            flat(tmp_path / "gfpgan/restored_faces" / f"{STEM.format(i)}_00.png", 105 + i, 80)
        flat(tmp_path / "same" / f"{STEM.format(i)}.png", 100 + i)
    restorers = ("input", f"GFPGAN={tmp_path}/gfpgan", f"same={tmp_path}/same")
    values = {"protocols": ("restoration",), "restorers": restorers, "lq": str(tmp_path / "set"), "scorer": ""}
    return {**values, "detector": "mtcnn"}


def decibels(difference: int) -> float:
    return 10 * math.log10(255**2 / difference**2)


def test_results_of_other_programs_stand_beside_the_input(foreign, tmp_path, capsys):
    """Levels that differ by d give a PSNR of 10 log10(255^2 / d^2); what is missing or was resized is named."""
    results = evaluate(tmp_path / "out", **foreign, published="authface_table1_celeba")
    psnr = numbers(results, "psnr")
    assert (psnr["input"]["value"], psnr["GFPGAN"]["value"]) == pytest.approx((decibels(10), decibels(5)))
    assert (psnr["same"]["value"], psnr["same"]["n"], psnr["same"]["is_infinite"]) == (None, 3, True)
    assert psnr["GFPGAN"]["n"] == psnr["GFPGAN"]["pairs"] == 2
    assert psnr["GFPGAN"]["difference"] == pytest.approx(decibels(5) - decibels(10))
    assert psnr["input"]["common_n"] == psnr["GFPGAN"]["common_n"] == 2 and "common" not in psnr["same"]
    assert psnr["GFPGAN"]["common"] == psnr["GFPGAN"]["value"]
    assert "images that all of them have" in (tmp_path / "out/table.md").read_text()
    assert [row["value"] for row in numbers(results, "ssim").values()][2] == pytest.approx(1)
    assert numbers(results, "fid")["same"]["note"].startswith("not measured: FID and KID need the Inception weights")
    assert not numbers(results, "fid_tiny")  # none of these is a tiny model
    notes = " ".join(results["notes"]["restoration"])
    assert f"GFPGAN: 1 of 3 missing: {STEM.format(2)}" in notes
    assert "GFPGAN: 2 resized to the size of the reference from 80x80 (Lanczos)" in notes
    printed = capsys.readouterr().out
    assert "| AuthFace (published) | 25.57 |" in printed and "| same | infinite |" in printed
    page = Page(tmp_path / "out/report.html")
    assert page.balanced and "GFPGAN" in page.text and "AuthFace" in page.text
    assert all(image["src"].startswith("data:") for image in page.all("img")) and len(page.all("input")) == 2 * 2


def test_restorers_beside_the_input_and_a_folder(foreign, tmp_path):
    """Two of one model, with settings of their own, which alone are timed. FID of a set with itself is 0."""
    added = (*foreign["restorers"], "ours=tiny,steps=2", "faithful=tiny,steps=2,fidelity=0.9")
    results = evaluate(tmp_path / "out", **foreign | {"restorers": ("LQ=input", *added), "num_faces": 2})
    assert list(numbers(results, "psnr")) == ["LQ", "input", "GFPGAN", "same", "ours", "faithful"]
    assert numbers(results, "psnr")["LQ"]["value"] == numbers(results, "psnr")["input"]["value"]
    assert list(numbers(results, "seconds")) == ["ours", "faithful"]
    assert numbers(results, "fid_tiny")["same"]["value"] == pytest.approx(0, abs=1e-3)
    psnr = numbers(results, "psnr")
    assert psnr["ours"]["value"] != psnr["faithful"]["value"] and psnr["ours"]["n"] == 2
    before = (tmp_path / "out/restoration/images/ours").stat().st_mtime_ns
    less = evaluate(tmp_path / "out", **foreign | {"restorers": ("input", "ours=tiny,steps=2"), "num_faces": 2})
    assert list(numbers(less, "psnr")) == ["input", "ours"]
    assert (tmp_path / "out/restoration/images/ours").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="has rows of ours = tiny,steps=2, which is tiny,fidelity=0.5 now"):
        evaluate(tmp_path / "out", **foreign | {"restorers": ("ours=tiny,fidelity=0.5",), "num_faces": 2})


def test_a_killed_evaluation_resumes_with_the_same_numbers(foreign, tmp_path, monkeypatch):
    """Killed after any line, with half of the next one on the disk."""
    whole = evaluate(tmp_path / "whole", **foreign)
    lines = sum(1 for _ in (tmp_path / "whole/rows.jsonl").open())
    append, left = rows.append_row, []

    def killed(path, row):
        if not left:
            with open(path, "ab") as file:
                file.write(b'{"protocol": "resto')
            raise KeyboardInterrupt
        left.pop()
        append(path, row)

    monkeypatch.setattr(rows, "append_row", killed)
    for budget in (1, 4, 7, 5, 100):
        left[:] = [None] * budget
        try:
            broken = evaluate(tmp_path / "broken", **foreign)
        except KeyboardInterrupt:
            assert budget < 100
    assert broken["rows"] == whole["rows"]
    found, problems = read_rows(tmp_path / "broken/rows.jsonl")
    assert len(found) == lines and not problems


def test_a_face_that_is_gone_does_not_count_and_comes_back_with_its_numbers(foreign, tmp_path):
    """In the numbers and on the page; its row stays, so that nothing is measured twice."""
    output = tmp_path / "out"
    before = numbers(evaluate(output, **foreign), "psnr")
    gone = Path(foreign["lq"], "lq", f"{STEM.format(0)}.png")
    gone.rename(tmp_path / gone.name)
    results = evaluate(output, **foreign)
    less = numbers(results, "psnr")
    assert {name: row["n"] - less[name]["n"] for name, row in before.items()} == {name: 1 for name in before}
    assert gone.stem not in results["items"]["restoration"]
    assert gone.stem not in Page(output / "report.html").text
    (tmp_path / gone.name).rename(gone)
    rows = (output / "rows.jsonl").read_bytes()
    assert numbers(evaluate(output, **foreign), "psnr") == before and (output / "rows.jsonl").read_bytes() == rows


@pytest.mark.parametrize("file", ["set/lq/00000001.png", "set/gt/00000001.png", "same/00000001.png"])
def test_a_file_that_changed_under_its_name_is_refused(foreign, tmp_path, file):
    """Else its row would keep the number of the old one beside those of the new."""
    evaluate(tmp_path / "out", **foreign)
    old = (tmp_path / file).read_bytes()
    flat(tmp_path / file, 7)
    with pytest.raises(FileExistsError, match="the row 00000001 of (input|same) is of a file that has changed: put it"):
        evaluate(tmp_path / "out", **foreign)
    (tmp_path / file).write_bytes(old)
    evaluate(tmp_path / "out", **foreign)


def test_prompts_that_changed_in_their_file_are_refused(tmp_path):
    """Edited, removed, inserted, or in another order; prompts that follow, twice or not, are drawn, and fewer count."""
    file, lines = tmp_path / "prompts.txt", ["a man", "a woman", "a boy"]
    values = {
        "protocols": ("generation",),
        "scorer": "",
        "sample_steps": 1,
        "detector": "mtcnn",
        "measures": ("faces",),
    }
    values |= {"prompts": str(file), "generators": ("base",), "generation_resolution": 64}
    for changed, n in ((lines, 3), ([*lines, "a girl", "a man"], 5), (lines[:2], 2)):
        file.write_text("\n".join(changed))
        assert numbers(evaluate(tmp_path / "out", **values), "faces")["base"]["n"] == n
    for changed in (["a man", "an old woman"], ["a woman", "a boy"], ["a dog", *lines], lines[::-1]):
        file.write_text("\n".join(changed))
        with pytest.raises(FileExistsError, match="the row 0000. of base is of the prompt 'a .*', which is '.*' now"):
            evaluate(tmp_path / "out", **values)


def test_a_finished_image_is_copied(tmp_path):
    """Who edits the copy in place does not edit the input, and the other way round."""
    image = flat(tmp_path / "real/cat.png", 20)
    rows_of = EvaluationRows(tmp_path / "rows.jsonl")
    (method,) = generation.generators_of([f"real={tmp_path}/real"], "tiny", "", "auto")
    generation._add_images(rows_of, method, [], tmp_path / "out")
    (row,) = rows_of.of("generation", "real").values()
    assert (tmp_path / "out" / row["image"]).read_bytes() == image.read_bytes() and image.stat().st_nlink == 1


def test_without_references_only_what_needs_none_is_measured(foreign, tmp_path):
    alone = {**foreign, "lq": str(tmp_path / "set/lq"), "restorers": ("input", f"same={tmp_path}/same")}
    results = evaluate(tmp_path / "out", **alone)
    assert "psnr" not in {row["measure"] for row in results["rows"]}
    note = numbers(results, "fid")["input"]["note"]
    assert note == "not measured: it compares with a set of real images: name its folder as `reference`"
    later = evaluate(tmp_path / "out", **alone, reference=str(tmp_path / "set/gt"))
    assert numbers(later, "fid")["input"]["note"].startswith("not measured: FID and KID need the Inception weights")


def test_a_method_that_is_not_there_stands_in_the_table_beside_those_that_are(foreign, tmp_path):
    """Its cells say what makes it; a folder of the wrong layout shows when it is loaded, and the rest is measured."""
    (tmp_path / "half/unet").mkdir(parents=True)
    added = (*foreign["restorers"], "later=./not/yet", f"half={tmp_path}/half")
    psnr = numbers(evaluate(tmp_path / "out", **foreign | {"restorers": added}), "psnr")
    assert psnr["later"]["note"].startswith(
        "not measured: no restorer in ./not/yet: `python stages/06_train_restorer.py`"
    )
    assert psnr["half"]["note"].startswith(f"not measured: no restorer in {tmp_path}/half")
    assert psnr["same"]["n"] == 3


def test_a_folder_without_a_face_of_the_set_is_refused(foreign, tmp_path):
    flat(tmp_path / "wrong/cat.png", 1)
    with pytest.raises(ValueError, match=r"no image in .*wrong has the name of a face, such as 00000000.png"):
        evaluate(tmp_path / "out", **foreign | {"restorers": (f"a={tmp_path}/wrong",)})
    with pytest.raises(ValueError, match="`gt` needs `lq`"):
        evaluate(tmp_path / "out", **foreign | {"lq": "", "gt": "x"})
    with pytest.raises(FileNotFoundError, match="no restorer in ./a/b: `python stages/06_train_restorer.py` makes one"):
        evaluate(tmp_path / "out", **foreign | {"restorers": ("input", "ours=./a/b")})
    with pytest.raises(ValueError, match="has alignment, which needs `benchmark`"):
        evaluate(tmp_path / "out", protocols=("alignment",))
    with pytest.raises(ValueError, match="`protocols` has to hold some of restoration, generation"):
        evaluate(tmp_path / "out", protocols=("everything",))


def test_generators_and_finished_images_in_one_table(tmp_path):
    """The same noise for both of one model gives the same image; images of no prompt are scored on their own."""
    flat(tmp_path / "real/cat.png", 20)
    flat(tmp_path / "real/dog.png", 40)
    values = {"protocols": ("generation",), "scorer": "", "num_prompts": 2, "sample_steps": 2, "detector": "mtcnn"}
    generators = ("base", "again=tiny", f"real={tmp_path}/real")
    notes = ["real: 2 finished images, of which none belongs to a prompt of this run by name"]
    results = evaluate(tmp_path / "out", **values, generators=generators, reference=str(tmp_path / "real"))
    faces = numbers(results, "faces")
    assert faces["real"]["value"] == 0 and faces["real"]["n"] == 2 and "difference" not in faces["real"]
    assert faces["again"]["difference"] == 0 and results["notes"]["generation"][1:2] == notes
    pictures = tmp_path / "out/generation/images"
    assert (pictures / "base/00001.png").read_bytes() == (pictures / "again/00001.png").read_bytes()
    assert numbers(results, "fid_tiny")["real"]["value"] == pytest.approx(0, abs=1e-3)
    assert f"reference: {tmp_path}/real (n = 2)" in numbers(results, "fid_tiny")["real"]["note"]
    negative = evaluate(tmp_path / "other", **values, generators=("base",), negative_prompt="ugly", published="")
    assert "negative prompt 'ugly'" in negative["notes"]["generation"][0]
    other = tmp_path / "other/generation/images/base/00001.png"
    assert other.read_bytes() != (pictures / "base/00001.png").read_bytes()


def test_alignment_is_a_table_of_metrics(simulated_benchmark, tmp_path):
    """One annotator ranks as the blur is. Six pairs, less those with a face too blurred; what is missing is named."""
    scores = {"sharp": 3, "soft": 2, "smudged": 1}
    lines = [f"{i:04d},{model},{score if i < 3 else ''}" for i in (1, 2, 3) for model, score in scores.items()]
    (simulated_benchmark / "rankings").mkdir(exist_ok=True)
    (simulated_benchmark / "rankings/anna.csv").write_text("\n".join(["id,model,score", *lines]))
    scorer = tiny.resolve("tiny", "scorer")
    results = evaluate(
        tmp_path / "out", protocols=("alignment",), benchmark=str(simulated_benchmark), scorer=scorer, detector="mtcnn"
    )
    accuracy = numbers(results, "accuracy")
    assert 0 <= accuracy["FS"]["value"] <= 1 and 2 <= accuracy["FS"]["n"] <= 6
    assert accuracy["IR"]["value"] is None and accuracy["IR"]["note"].startswith("not measured: ")
    assert (tmp_path / "out/alignment/tables.md").is_file()


def test_answers_of_people_about_the_results_are_a_table(foreign, tmp_path):
    """Ours is preferred by one of two answers, and nobody finds both alike: shares 1/2, 0, 1/2."""
    pytest.importorskip("faceprior.human_eval.preferences")
    evaluate(tmp_path / "out", **foreign)
    answers = tmp_path / "out/restoration/preferences/anna.csv"
    answers.parent.mkdir()
    lines = [f"{STEM.format(0)},GFPGAN,input,input,GFPGAN", f"{STEM.format(1)},GFPGAN,input,GFPGAN,input"]
    answers.write_text("\n".join(["id,first,second,left,preferred", *lines]))
    results = evaluate(tmp_path / "out", **foreign | {"protocols": ("restoration", "ab")})
    shares = [numbers(results, key)["GFPGAN against input"]["value"] for key in ("first", "same", "second")]
    assert shares == [0.5, 0, 0.5]
    assert "GFPGAN against input" in Page(tmp_path / "out/report.html").text


# --- what must not be lost, and what must not stop a run ---


@pytest.fixture
def faces(tmp_path, monkeypatch) -> dict:
    """Three faces with references and results, and the settings of a restoration of them."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        for folder, level in (("lq", 90), ("gt", 100), ("m", 95)):
            flat(Path(folder, f"{number}.png"), level + number)
    return {"protocols": ("restoration",), "measures": ("psnr",), "lq": "lq", "gt": "gt", "num_faces": 0, "scorer": ""}


def test_one_broken_file_is_named_and_left_out(faces, capsys):
    """A result, then a reference; copied again, the same command takes it in."""
    Path("m/1.png").write_bytes(b"torn")
    results = evaluate("out", restorers=("input", "m=m"), **faces)
    assert {name: row["n"] for name, row in numbers(results, "psnr").items()} == {"input": 3, "m": 2}
    assert "m/1.png" in capsys.readouterr().out and not Path("out/done.json").exists()
    flat(Path("m/1.png"), 96)
    results = evaluate("out", restorers=("input", "m=m"), **faces)
    assert numbers(results, "psnr")["m"]["n"] == 3 and Path("out/done.json").exists()

    Path("gt/2.png").write_bytes(b"torn")
    results = evaluate("other", restorers=("input", "m=m"), **faces)
    assert {name: row["n"] for name, row in numbers(results, "psnr").items()} == {"input": 2, "m": 2}
    assert "gt/2.png" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["restorers", "lq", "gt", "reference"])
def test_inputs_in_the_output_folder_are_refused(faces, key):
    """They would be replaced by results of the same names, or deleted by --overwrite."""
    evaluate("out", restorers=("input",), **faces)
    mine = Path(shutil.copytree("m", "out/restoration/images/m"))
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    value = ("input", f"m={mine}") if key == "restorers" else str(mine)
    with pytest.raises(ValueError, match="lies in the output folder out, where files are replaced"):
        evaluate("out", overwrite=True, **{"restorers": ("input",), **faces, key: value})
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before


def test_an_output_folder_inside_the_inputs_is_not_among_them(faces):
    for _ in range(2):
        results = evaluate("m/out", restorers=("input", "m=m"), **faces)
    assert numbers(results, "psnr")["m"]["value"] == pytest.approx(20 * math.log10(255 / 5))
    assert numbers(results, "psnr")["m"]["n"] == 3


def test_what_people_said_is_not_deleted(faces):
    evaluate("out", restorers=("input", "m=m"), **faces)
    answers = Path("out/restoration/preferences/ann.csv")
    answers.parent.mkdir()
    answers.write_text("id,first,second,left,preferred\n")
    with pytest.raises(FileExistsError, match="holds what people said about the images: move it"):
        evaluate("out", restorers=("input", "m=m"), overwrite=True, **faces)
    assert answers.is_file()
    faces["protocols"] = ("restoration", "ab")  # nobody has answered yet: the other numbers come nevertheless
    results = evaluate("out", restorers=("input", "m=m"), **faces)
    assert "holds no answer" in numbers(results, "same")["no answers"]["note"]
    assert numbers(results, "psnr")["m"]["n"] == 3


def test_names_that_are_no_text_or_markup(faces):
    """File names may be any bytes; what looks like HTML, Markdown or LaTeX is escaped."""
    name = os.fsdecode(b"caf\xe9\n<script>.png")
    for folder in ("lq", "gt"):
        Path(folder, "0.png").rename(Path(folder, name))
    method = "a|<script>_&%#"
    evaluate("out", restorers=("input", f"{method}=m"), **faces)
    table = Path("out/table.md").read_text()
    assert r"a\|\<script>_&%#" in table and r"1 of 3 missing: caf\udce9 \<script>" in table
    assert r"a|<script>\_\&\%\#" in Path("out/restoration.tex").read_text()
    assert "<script>_" not in Path("out/report.html").read_text()
    rows = list(csv.DictReader(io.StringIO(Path("out/restoration.csv").read_text())))
    assert [row["method"] for row in rows] == ["input", method]


def test_what_is_no_number_is_named_and_not_kept(tmp_path):
    image = flat(tmp_path / "images/0.png", 90)
    found = EvaluationRows(tmp_path / "rows.jsonl")
    found.add("restoration", "m", "0", image=str(image.relative_to(tmp_path)))
    nan = Measure("nan", "NaN", lambda settings: lambda sample: math.nan, protocols=("restoration",))
    of_set = replace(nan, key="set", of="set", load=lambda settings: lambda *_, **__: SetValue(math.inf, np.zeros(2)))
    found.add("restoration", "m", "1", image=str(image.relative_to(tmp_path)))
    options = (MeasureSettings(), found, tmp_path, str(tmp_path / "images"))
    alone = Measuring("restoration", [of_set], *options)
    alone.run(parse_methods(["m=x"], [], "restorers"))
    assert alone.reasons == {"set": f"it compares with a set of images, but {tmp_path}/images holds one"}
    flat(tmp_path / "images/1.png", 80)
    measuring = Measuring("restoration", [nan, of_set], *options)
    measuring.run(parse_methods(["m=x"], [], "restorers"))
    reasons = [("m 0", "nan is nan, which is no number"), ("m 1", "nan is nan, which is no number")]
    assert measuring.failed == [*reasons, ("m", "set is inf, which is no number")]
    assert "nan" not in found.of("restoration", "m")["0"] and not measuring.sets


def test_numbers_by_other_weights_and_rows_of_another_version_are_refused(tmp_path):
    """Weights that come later are taken; others than those that measured are not mixed in silently."""
    path = tmp_path / "rows.jsonl"
    EvaluationRows(path).add("generation", "m", "0", clip_score=0.3)
    save_weights(tmp_path, {"clip": "a"})
    require_weights(tmp_path, {"hps": "b", "clip": "a"})
    require_weights(tmp_path, {})
    with pytest.raises(FileExistsError, match="has clip_score by a, but clip is b now"):
        require_weights(tmp_path, {"clip": "b"})
    path.write_text('{"part": "generation", "model": "base", "id": "0"}\n')
    with pytest.raises(FileExistsError, match="rows of another version of stage 7"):
        EvaluationRows(path)

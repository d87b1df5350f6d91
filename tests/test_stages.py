"""The seven stages end to end: in order, again to resume, killed in the middle, and with bad input."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import STAGES, linked_copy, load_stage
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.config import parse_config
from faceprior.detect import area_bin, box_mask
from faceprior.inpaint import Candidate, strength_of
from faceprior.jsonl import append_row, read_rows
from faceprior.lora import adapters_of
from faceprior.pairs import FacePair, gather_pairs
from faceprior.procedural import draw_folder, draw_portrait

NAMES = sorted(path.stem for path in STAGES.glob("0*.py"))
PAIRS, SCORER, PORTRAITS, GUIDANCE, PRIOR, RESTORER, EVAL = NAMES


def settings(tiny_models: Path) -> dict[str, dict]:
    """Return the smallest settings of every stage that still do all of its work."""
    sd15, sdxl, scorer = (str(tiny_models / kind) for kind in ("sd15", "sdxl", "scorer"))
    pictures = {"num_drawn": 6, "num_scenes": 1, "max_resolution": 256, "min_face_size": 10}  # a scene of three faces
    untrained = {"drop_not_found": False}  # such a VAE leaves no face
    tuning = {"steps": 3, "batch_size": 2, "num_samples": 2, "sample_steps": 3}
    tuning |= {"warmup_steps": 1, "schedule": "cosine"}
    return {
        PAIRS: {**pictures, **untrained, "base": sd15, "batch_size": 2, "steps": 20},
        SCORER: {"init": scorer, "vae": sd15, "steps": 3, "batch_size": 4, "eval_every": 2, "save_every": 2},
        PORTRAITS: {"num_drawn": 10},
        GUIDANCE: {**tuning, "base": sd15, "save_every": 1},
        PRIOR: {**tuning, "base": sdxl, "save_every": 2},
        RESTORER: {**tuning, "init": "", "save_every": 2},
        EVAL: {"base": sd15, "num_prompts": 2, "num_faces": 2, "sample_steps": 3},
    }


def run(name: str, **values) -> None:
    stage = load_stage(name)
    stage.main(stage.Config(**values))


def snapshot(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp")  # a kill's remains
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(path: Path) -> list[dict]:
    found, problems = read_rows(path)
    assert not problems
    return found


@contextlib.contextmanager
def chdir(folder: Path):
    """contextlib.chdir, which Python 3.10 does not have."""
    old = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(old)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_models) -> Iterator[Path]:
    """The folder that the seven stages leave when they run in order, which no test changes."""
    folder = tmp_path_factory.mktemp("chain")
    with chdir(folder):
        for name, values in settings(tiny_models).items():
            run(name, **values)
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


@pytest.mark.parametrize("model", ["guided", "prior", "restorer"])
def test_the_learning_rate_warms_up_and_falls(chain, model):
    """One step of warm-up at 1/2, then the cosine of two steps: 1 and 1/2 of 1e-4."""
    rates = [row["learning_rate"] for row in rows(chain / f"checkpoints/{model}/metrics.jsonl")]
    assert rates == pytest.approx([0.5e-4, 1e-4, 0.5e-4])


@pytest.fixture
def workplace(chain, tmp_path, monkeypatch) -> Path:
    """A copy of the chain's folder to work in, as the current directory."""
    monkeypatch.chdir(linked_copy(chain, tmp_path / "work"))
    return tmp_path / "work"


def test_stages_are_the_seven():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07"]


def test_pairs_keep_the_photograph_outside_of_the_mask(chain):
    pairs = rows(chain / "data/pairs/manifest.jsonl")
    assert [pair["photograph"][:5] for pair in pairs] == ["portr"] * 6 + ["scene"] * 3
    for pair in pairs:
        good, bad, mask = (np.asarray(Image.open(chain / "data/pairs" / pair[k])) for k in ("good", "bad", "mask"))
        photograph = np.asarray(Image.open(chain / "data/pairs/drawn" / pair["photograph"]))
        assert (photograph[mask == 0] == good[mask == 0]).all()
        assert (photograph[mask == 0] == bad[mask == 0]).all()
        assert (good[mask > 0] != bad[mask > 0]).any()
        if pair["photograph"].startswith("scene"):  # a small face: in a crop around it, with the crop's strengths
            (x0, y0, x1, y1), box = pair["crop"], pair["box"]
            assert (x1 - x0, y1 - y0) == (128, 128) and x0 <= box[0] < box[2] <= x1 and y0 <= box[1] < box[3] <= y1
            assert pair["strength"] == (0.2, 0.2, 0.3, 0.4)[area_bin(pair["area_ratio"])]
        else:
            assert pair["crop"] is None and pair["strength"] == strength_of(pair["area_ratio"])
        assert pair["round_trip"] and (good[mask > 0] != photograph[mask > 0]).any()
    assert {pair["strength"] for pair in pairs} >= {0.2, 0.4}


def test_without_the_round_trip_the_good_side_is_the_photograph(chain, tmp_path, tiny_models):
    """The bad side is the same either way; two portraits are enough."""
    values = settings(tiny_models)[PAIRS] | {"num_drawn": 2, "num_scenes": 0, "round_trip": False}
    run(PAIRS, **values, output=str(tmp_path / "pairs"))
    with_trip = {pair["id"]: pair for pair in rows(chain / "data/pairs/manifest.jsonl")}
    for pair in rows(tmp_path / "pairs/manifest.jsonl"):
        assert not pair["round_trip"] and pair["good"] != with_trip[pair["id"]]["good"]
        good = (tmp_path / "pairs" / pair["good"]).read_bytes()
        assert good == (chain / "data/pairs" / pair["good"]).read_bytes()  # what the round trip started from
        bad = (tmp_path / "pairs" / pair["bad"]).read_bytes()
        assert bad == (chain / "data/pairs" / with_trip[pair["id"]]["bad"]).read_bytes()


def test_batches_of_pairs_hold_fewer_large_images():
    """8 faces at 128 x 128: 8 of 160 x 112 pixels, 2 of 256 x 256, 1 of 512 x 512; strengths are never mixed."""
    stage = load_stage(PAIRS)
    sizes = {"a": (160, 112), "b": (256, 256), "c": (512, 512)}
    face = {"landmarks": None, "confidence": 1.0}
    photographs = [
        {
            "photograph": f"{name}{i}", "good": "", "prompt": "", "size": size,
            "faces": [face | {"box": [0, 0, s, s]} for s in (10, 70)] + [{"filter": "blurry"}],
        }
        for name, size in sizes.items()
        for i in range(9)
    ]  # fmt: skip

    def batches(config):
        maker = stage.PairMaker(config, Path("out"), None, 16, {}, {}, {})
        with tqdm(total=0, disable=True) as bar:
            plans = maker.plan_faces(photographs, bar)
            yield from stage.in_groups(plans, lambda plan: (plan.strength, plan.view_size), maker.batch_size)

    whole = list(batches(stage.Config(padded_crop=False)))
    assert all(len({(plan.strength, plan.view_size) for plan in batch}) == 1 for batch in whole)
    for name, counts in {"a": [8, 1] * 2, "b": [2, 2, 2, 2, 1] * 2, "c": [1] * 18}.items():
        own = [len(batch) for batch in whole if batch[0].photograph[0] == name]
        assert sorted(own) == sorted(counts)
    crops = list(batches(stage.Config()))  # of one size: 27 faces at .2, 18 at .3, 9 at .4
    assert sorted(map(len, crops)) == [1, 2, 3] + [8] * 6


@pytest.mark.parametrize("preset", sorted((STAGES / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_take_50_steps_and_the_strengths_of_the_paper(preset):
    """3, 5, 10 and 20 of them."""
    stage = load_stage(PAIRS)
    config = parse_config(stage.Config, ["--config", str(preset)])
    assert [int(strength * config.steps) for strength in config.strengths] == [3, 5, 10, 20]
    assert config.min_sharpness > 0 and config.max_hash_distance >= 0


def few_steps(tiny_models) -> dict:
    """Return settings with which a face is inpainted in one step."""
    values = {"base": str(tiny_models / "sd15"), "steps": 5, "batch_size": 2, "drop_not_found": False}
    return values | {"strengths": (0.2,) * 4, "crop_strengths": (0.2,) * 4}


def results(folder: str) -> dict[str, str]:
    return {name: digest for name, digest in snapshot(Path(folder)).items() if name != "config.yaml"}


def test_pairs_from_shards_named_by_shard_and_member(tmp_path, monkeypatch, tiny_models, capsys):
    """Captions from both kinds of sidecars; broken images and captions and a torn end are reported and skipped."""
    monkeypatch.chdir(tmp_path)
    portraits = draw_folder(Path("drawn"), range(3), 128)
    pictures = [path.read_bytes() for path in portraits]
    members = [
        {"a.png": pictures[0], "a.txt": b"a man", "b.png": pictures[0][:999], "c.png": pictures[2], "c.json": b"{"},
        {"a.png": pictures[1], "a.json": b'{"caption": "a woman"}', "d.png": pictures[2]},
    ]
    for number, files in enumerate(members):
        with tarfile.open(f"{number:03d}.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    os.truncate("001.tar", os.path.getsize("001.tar") // 10240 * 10240 - 10240 + 1)
    run(PAIRS, **few_steps(tiny_models), images="{000..001}.tar", output="out")
    pairs = {row["photograph"]: row for row in rows(Path("out/manifest.jsonl"))}
    assert {name: row["prompt"] for name, row in pairs.items()} == {
        "000.tar/a.png": "a man",
        "001.tar/a.png": "a woman",
    }
    assert len({row["id"] for row in pairs.values()}) == 2
    rejected = {row["id"]: row for row in rows(Path("out/rejected.jsonl"))}
    torn = next(name for name in rejected if name.startswith("001.tar at byte "))
    assert rejected.keys() == {"000.tar/b.png", "000.tar/c.png", torn}
    for name, reason in (("000.tar/b.png", "truncated"), ("000.tar/c.png", "is not JSON"), (torn, "d.png is cut off")):
        assert reason in rejected[name]["reason"] and rejected[name]["filter"] == "unreadable"
    printed = capsys.readouterr().out
    for name, row in rejected.items():
        assert f"  {name}: {row['reason']}" in printed
    assert gather_pairs("out")[1] == []


def test_every_filter_counts_what_it_rejects(tmp_path, monkeypatch, tiny_models, capsys):
    """One photograph for each filter of the first two rounds, two for the last; then pairs that are all alike."""
    monkeypatch.chdir(tmp_path)
    for path in draw_folder(Path("p"), range(3), 128):
        path.with_suffix(".txt").unlink()
    whole = Image.open("p/portrait_00000.png")
    whole.resize((200, 200)).save("p/portrait_00000_copy.jpg", quality=70)
    Image.open("p/portrait_00001.png").filter(ImageFilter.GaussianBlur(2.5)).save("p/portrait_00001.png")
    whole.resize((63, 63)).save("p/tiny.png")
    Image.new("RGB", (128, 128), "gray").save("p/nobody.png")
    Path("p/text.png").write_text("no picture")
    run(PAIRS, **few_steps(tiny_models), images="p", output="out", num_workers=0)
    rejected = {row["photograph"]: row["filter"] for row in rows(Path("out/rejected.jsonl"))}
    assert rejected == {
        "nobody.png": "no_face", "portrait_00000_copy.jpg": "near_duplicate", "portrait_00001.png": "blurry",
        "text.png": "unreadable", "tiny.png": "small_photograph",
    }  # fmt: skip
    assert [row["prompt"] for row in rows(Path("out/manifest.jsonl"))] == ["A face."] * 2
    assert not list(Path("out/good").glob("portrait_00001*")) and not list(Path("out/good").glob("*copy*"))
    report = json.loads(Path("out/report.json").read_text())
    assert {row["of"]: row["in"] for row in report["rounds"]} == {"photographs": 7, "faces": 3, "pairs": 2}
    counts = {name: n for row in report["rounds"] for name, n in row["rejected"].items()}
    assert {name for name, n in counts.items() if n == 1} == set(rejected.values()) and sum(counts.values()) == 5
    assert report["pairs"] == 2 and sum(row["pairs"] for row in report["bins"]) == 2
    printed = capsys.readouterr().out
    assert "7 photographs, rejected: 1 unreadable, 1 small_photograph, 1 no_face, 1 near_duplicate" in printed
    assert "3 faces, rejected: 0 too_small, 0 low_confidence, 1 blurry" in printed

    strict = {"max_hash_distance": -1, "min_sharpness": 0.0, "min_side": 1, "num_workers": 0}
    for name, value in {
        "min_face_size": 80, "min_confidence": 1.0, "min_difference": 255.0, "drop_not_found": True, "drop_lost": True,
    }.items():  # fmt: skip
        run(PAIRS, **few_steps(tiny_models) | strict | {"images": "p", "output": name, name: value})
        report = json.loads(Path(f"{name}/report.json").read_text())
        counts = {key: n for row in report["rounds"] for key, n in row["rejected"].items()}
        filtered = {
            "min_face_size": "too_small", "min_confidence": "low_confidence", "min_difference": "indistinguishable",
            "drop_not_found": "face_not_found", "drop_lost": "face_lost",
        }[name]  # fmt: skip
        assert counts[filtered] >= 3 and report["pairs"] + counts[filtered] in (4, 5), (name, counts)


def test_a_pair_that_changed_outside_of_its_mask_is_rejected(chain, tiny_models):
    """As it would be if the bad face were not pasted back: one grey level in one corner is enough."""
    stage = load_stage(PAIRS)
    config, output = stage.Config(**settings(tiny_models)[PAIRS]), chain / "data/pairs"
    row = rows(output / "photographs.jsonl")[0]
    plan = stage.plan_face(row, 0, 0, 128)
    good = Image.open(output / row["good"])
    mask = box_mask(good.size, plan.face.box)
    bad = Image.composite(ImageOps.invert(good), good, mask)
    bad.putpixel((0, 0), tuple(value + 1 for value in good.getpixel((0, 0))))
    maker = stage.PairMaker(config, output, None, 16, {}, {}, {})
    verdict = maker.judge_pair(Candidate(plan, good, good, bad, mask))
    assert verdict["filter"] == "changed_outside" and "changed by 1 of 255" in verdict["reason"]
    assert verdict["id"] == plan.id and verdict["photograph"] == row["photograph"]


def test_neither_order_nor_threads_change_the_pairs(chain, tmp_path, monkeypatch, tiny_models):
    """Files alike, byte for byte, whatever the order of the list and the number of threads."""
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in sorted((chain / "data/pairs/drawn").glob("*.png"))[-4:]]  # three portraits, a scene
    for name, listed, num_workers in (("a", paths, 2), ("b", paths[::-1], 0), ("c", paths[2:] + paths[:2], 5)):
        Path(f"{name}.txt").write_text("\n".join(listed))
        values = few_steps(tiny_models) | {"min_face_size": 10, "max_resolution": 256, "num_workers": num_workers}
        run(PAIRS, **values, images=f"{name}.txt", output=name)
    assert len(rows(Path("a/manifest.jsonl"))) == 6
    assert results("a") == results("b") == results("c")


def test_photographs_that_come_in_later(tmp_path, monkeypatch, tiny_models):
    """The pairs that were made stay, even if a copy with an earlier name comes in; an error in a thread surfaces."""
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("p"), [5], 128)
    values = few_steps(tiny_models) | {"images": "p", "output": "out"}
    run(PAIRS, **values)
    before = snapshot(Path("out"))
    shutil.copy("p/portrait_00005.png", "p/a_copy.png")
    draw_folder(Path("p"), [6], 128)
    Path("out/mask").rename("mask")
    Path("out/mask").write_text("in the way")
    with pytest.raises(OSError, match="out/mask"):
        run(PAIRS, **values)
    Path("out/mask").unlink()
    Path("mask").rename("out/mask")
    run(PAIRS, **values)
    after = snapshot(Path("out"))
    changed = {name for name in before if before[name] != after[name]}
    assert {Path(name).suffix for name in changed} <= {".jsonl", ".json"}
    assert [row["photograph"] for row in rows(Path("out/manifest.jsonl"))] == [
        "portrait_00005.png",
        "portrait_00006.png",
    ]
    (rejected,) = rows(Path("out/rejected.jsonl"))
    assert rejected["photograph"] == "a_copy.png" and "differ from portrait_00005.png" in rejected["reason"]


def test_a_run_among_its_photographs_resumes_as_they_change(tmp_path, monkeypatch, tiny_models, capsys):
    """Its own images are none of them; a fixed file is read; a copy stays rejected when its original is gone."""
    monkeypatch.chdir(tmp_path)
    first, second = draw_folder(Path("p"), [5, 6], 128)
    shutil.copy(first, "p/z_copy.png")
    whole = second.read_bytes()
    second.write_bytes(whole[:999])
    values = few_steps(tiny_models) | {"images": "p", "output": "p/a"}
    run(PAIRS, **values)
    capsys.readouterr()
    run(PAIRS, **values)
    assert "p/a is complete: 1 pairs" in capsys.readouterr().out
    second.write_bytes(whole)
    run(PAIRS, **values)
    assert [row["photograph"] for row in rows(Path("p/a/manifest.jsonl"))] == [first.name, second.name]
    assert [row["id"] for row in rows(Path("p/a/rejected.jsonl"))] == ["z_copy.png"]
    first.unlink()
    Path("p/a/manifest.jsonl").unlink()  # as if it had been killed before its pairs
    Path("p/a/done.json").unlink()
    run(PAIRS, **values)
    assert [row["photograph"] for row in rows(Path("p/a/manifest.jsonl"))] == [second.name]


@pytest.mark.parametrize("limits", [(0.1, 0.01, 0.005, 1.0), (0.005, 0.01, 0.1, 0.5)])
def test_area_limits_that_fit_no_face_are_refused(tmp_path, limits):
    with pytest.raises(ValueError, match="`area_limits` have to rise and to end with 1"):
        run(PAIRS, area_limits=limits, output=str(tmp_path / "pairs"))


def test_a_resolution_that_the_base_cannot_crop_to_is_refused(tmp_path, tiny_models):
    with pytest.raises(ValueError, match="`resolution` has to be a multiple of 16 for this base but is 130"):
        run(PAIRS, **few_steps(tiny_models), resolution=130, output=str(tmp_path / "pairs"))
    assert not (tmp_path / "pairs/drawn").exists()


def test_a_largest_resolution_below_the_resolution_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`max_resolution` has to be 0, or `resolution` \(128\) at least, but is 127"):
        run(PAIRS, max_resolution=127, output=str(tmp_path / "pairs"))
    assert not (tmp_path / "pairs").exists()


def test_both_sides_of_a_pair_are_augmented_alike():
    """Equal sides stay equal; over many draws crops are flipped, left alone, or mildly degraded, and never else."""
    stage = load_stage(SCORER)
    crop = draw_portrait(1, 128).image[20:100, 30:90]
    flipped, kinds = crop[:, ::-1].astype(int), Counter()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sample = stage.degrade_alike({"good": crop, "bad": crop.copy()}, rng)
        assert (sample["good"] == sample["bad"]).all() and sample["good"].shape == crop.shape
        assert rng.random() == stage_rng_after(stage, seed, crop)  # as many numbers whatever the pixels
        straight, turned = (np.abs(sample["good"] - side).mean() for side in (crop.astype(int), flipped))
        assert min(straight, turned) < 8  # grey levels
        kinds[turned < straight, min(straight, turned) == 0] += 1
    assert len(kinds) == 4 and min(kinds.values()) >= 5


def stage_rng_after(stage, seed: int, crop: np.ndarray) -> float:
    rng = np.random.default_rng(seed)
    stage.degrade_alike({"good": crop, "bad": 255 - crop}, rng)
    return rng.random()


def test_augmentation_acts_in_training_only(chain):
    """Without it the crops are what the scorer itself cuts out; with it they differ, by the stream's generator."""
    from faceprior import FaceScorer

    stage, scorer = load_stage(SCORER), FaceScorer.from_pretrained(chain / "checkpoints/scorer")
    pair = rows(chain / "data/pairs/manifest.jsonl")[0]
    paths = {side: str(chain / "data/pairs" / pair[side]) for side in ("good", "bad", "mask")}
    sample = stage.FaceCrops([FacePair(**pair | paths)])[0]
    plain = stage.to_pixel_values(scorer, False, sample)
    assert torch.equal(plain["good"], scorer.preprocess(paths["good"], [pair["box"]])[0])
    first, again, other = (stage.to_pixel_values(scorer, True, sample, np.random.default_rng(s)) for s in (1, 1, 3))
    assert torch.equal(first["bad"], again["bad"]) and not torch.equal(first["bad"], other["bad"])


def test_accuracy_by_area():
    """Ratios at the limits belong to the lower bin; of the last bin's three pairs two are right."""
    stage = load_stage(SCORER)
    pairs = [SimpleNamespace(area_ratio=ratio) for ratio in (0.005, 0.1, 0.2, 0.5, 1.0)]
    result = stage.accuracy_by_area(pairs, [True, False, True, True, False])
    assert [row["up_to"] for row in result] == [0.005, 0.01, 0.1, 1.0]
    assert [(row["pairs"], row["accuracy"]) for row in result] == [(1, 1), (0, None), (1, 0), (3, pytest.approx(2 / 3))]


def test_accuracy_by_area_is_that_of_the_kept_scores(chain):
    scores = rows(chain / "checkpoints/scorer/scores.jsonl")
    done = json.loads((chain / "checkpoints/scorer/done.json").read_text())
    assert sum(row["pairs"] for row in done["accuracy_by_area"]) == len(scores)
    right = sum(row["pairs"] * (row["accuracy"] or 0) for row in done["accuracy_by_area"])
    assert right == pytest.approx(sum(row["good"] > row["bad"] for row in scores))


def test_plain_fine_tuning_trains_the_same_parameters(workplace, tiny_models):
    """The baseline: another log than the guidance loss, from two folders of pairs."""
    shutil.copytree("data/pairs", "more")
    values = settings(tiny_models)[GUIDANCE] | {"num_samples": 0, "objective": "denoising", "output": "plain"}
    run(GUIDANCE, **values, pairs="data/pairs,more")
    assert json.loads(Path("plain/done.json").read_text())["pairs"] == 18
    losses = [[row["loss"] for row in rows(Path(f) / "metrics.jsonl")] for f in ("plain", "checkpoints/guided")]
    assert losses[0] != losses[1]
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_models / "sd15" / name), load_file(f"plain/{name}")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".attn1." in key for key in changed)


def test_diffusion_dpo_on_the_pairs(workplace, tiny_models):
    """The first loss of untouched weights is ln 2, whatever beta is."""
    values = settings(tiny_models)[GUIDANCE] | {"num_samples": 0, "steps": 2, "output": "dpo"}
    run(GUIDANCE, **values, objective="dpo", dpo_beta=5000.0)
    losses = [row["loss"] for row in rows(Path("dpo/metrics.jsonl"))]
    assert losses[0] == pytest.approx(np.log(2)) and losses[1] != losses[0]


@pytest.mark.parametrize("objective", ["reward", pytest.param("guidance_reward", marks=pytest.mark.slow)])
def test_the_face_score_as_a_reward(workplace, tiny_models, objective):
    """On the shipped base, whose samples have faces; the log says what the reward does not see."""
    values = settings(tiny_models)[GUIDANCE] | {"num_samples": 0, "steps": 1, "base": "tiny", "train": "lora"}
    values |= {"reward_steps": 6, "reward_last": 2, "reward_weight": 0.5, "reward_watch": 1, "detector": "mtcnn"}
    run(GUIDANCE, **values, objective=objective, output="rewarded")
    (row,) = rows(Path("rewarded/metrics.jsonl"))
    assert row["found"] == 1
    guidance = row["guidance_loss"] if objective == "guidance_reward" else 0
    assert row["loss"] == pytest.approx(guidance - 0.5 * row["face_score"], rel=1e-4)
    assert row["drift"] > 0 and row["hacking"] == 0 and row["score_change"] != 0
    lora = load_file("rewarded/pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in lora.items() if "up" in key or "lora_B" in key)


def test_the_dino_distance_gives_another_loss(workplace, tiny_models):
    """From the same weights, pairs and noise as the l2 distance; 1 - cos lies in [0, 2]."""
    from faceprior.features import FeatureNetwork

    FeatureNetwork.from_tags({"sex": ("woman", "man")}, hidden_size=16, layers=1, heads=2).save_pretrained("features")
    values = settings(tiny_models)[GUIDANCE] | {"num_samples": 0, "steps": 1, "output": "dino"}
    run(GUIDANCE, **values, distance="dino", feature_network="features")
    losses = [rows(Path(folder) / "metrics.jsonl")[0]["loss"] for folder in ("dino", "checkpoints/guided")]
    assert losses[0] != losses[1] and 0 < losses[0] < 2


def test_scorer_is_loadable_and_its_scores_are_kept(chain):
    from faceprior import FaceScorer

    scorer = FaceScorer.from_pretrained(chain / "checkpoints/scorer")
    pairs = {pair["id"]: pair for pair in rows(chain / "data/pairs/manifest.jsonl")}
    for row in rows(chain / "checkpoints/scorer/scores.jsonl"):
        pair = pairs[row["id"]]
        for side in ("good", "bad"):
            image = Image.open(chain / "data/pairs" / pair[side])
            with torch.no_grad():
                reward = scorer(scorer.preprocess(image, [pair["box"]])).item()
            assert reward == pytest.approx(row[side], abs=1e-5)


def test_the_report_and_the_reference_are_those_of_the_kept_weights(chain):
    """Recomputed from the scores on disk; every score of a good face is a percentile of its own set."""
    from faceprior import FaceScorer

    folder = chain / "checkpoints/scorer"
    scores, report = rows(folder / "scores.jsonl"), json.loads((folder / "report.json").read_text())
    right = [row["good"] > row["bad"] for row in scores]
    assert (report["pairs"], report["accuracy"]["share"]) == (len(scores), np.mean(right))
    assert [row["n"] for row in report["shortcuts"]] == [len(scores)] * 4
    assert report["shortcuts"][0]["share"] == np.mean(right)  # the saved weights score as they did
    assert report["shortcuts"][1]["note"] == "VAE: sd15; in these pairs it had been through one before"
    reference = FaceScorer.from_pretrained(folder).reference
    assert (reference.name, reference.n) == ("held-out pairs of pairs", len(scores))
    assert sorted(row["good"] for row in scores)[0] == reference.good[0]
    assert max(row["bad"] for row in scores) == reference.bad[100]


def test_a_missing_vae_is_an_error_before_the_training(workplace, tiny_models):
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        run(SCORER, **{**settings(tiny_models)[SCORER], "vae": "./nowhere"}, output="refused")
    assert not Path("refused/metrics.jsonl").exists()


def test_a_scorer_of_a_version_with_cache_prefix_resumes(workplace, tiny_models):
    """A saved setting that the stage no longer has is ignored, whatever its value."""
    saved, values = Path("old/config.yaml"), settings(tiny_models)[SCORER] | {"output": "old", "steps": 2, "vae": ""}
    stage = load_stage(SCORER)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stage.main(stage.Config(**values))
    settings_then = yaml.safe_load(saved.read_text())
    settings_then[SCORER]["cache_prefix"] = "memory"
    saved.write_text(yaml.safe_dump(settings_then))
    run(SCORER, **values)
    assert Path("old/done.json").is_file()


def test_spoiled_portraits_are_rejected_with_a_reason(chain):
    rejected = {Path(r["photograph"]).stem: r["reason"] for r in rows(chain / "data/portraits/rejected.jsonl")}
    assert "blurred" in rejected["portrait_00000_blur"]
    assert "noisy" in rejected["portrait_00004_noise"]
    assert "pepper" in rejected["portrait_00008_pepper"]
    accepted = rows(chain / "data/portraits/manifest.jsonl")
    assert len(accepted) + len(rejected) == 10
    for row in accepted:
        assert Image.open(chain / "data/portraits" / row["image"]).size == (128, 128)
        assert (chain / "data/portraits" / row["image"]).with_suffix(".txt").read_text().strip() == row["caption"]


@pytest.mark.parametrize("name", ["guided", "prior"])
def test_tuned_models_load_with_stock_diffusers_and_draw_the_sample(chain, name):
    from diffusers import DiffusionPipeline

    folder = chain / "checkpoints" / name
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    sample = rows(folder / "samples.jsonl")[0]
    assert (folder / sample["before"]).read_bytes() != (folder / sample["after"]).read_bytes()
    image = pipeline(
        sample["prompt"],
        height=128,
        width=128,
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(sample["seed"]),
    ).images[0]
    difference = np.abs(np.asarray(image, int) - np.asarray(Image.open(folder / sample["after"]), int))
    assert difference.max() <= 1


def test_the_shipped_lora_draws_beside_a_run_on_the_tiny_base_only(tiny_models):
    """Of another base, of the same one with another VAE, and without samples there is none."""
    stage, device = load_stage(GUIDANCE), torch.device("cpu")
    assert adapters_of(stage.load_shipped(stage.Config(), device).unet)
    for change in ({"base": str(tiny_models / "sd15")}, {"vae": "a_vae"}, {"num_samples": 0}):
        assert stage.load_shipped(stage.Config(**change), device) is None


def test_guidance_changed_the_self_attention_only(chain, tiny_models):
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_models / "sd15" / name), load_file(chain / "checkpoints/guided" / name)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".attn1." in key for key in changed)


def test_restorer_is_loadable(chain):
    from faceprior import AuthFaceRestorer

    restorer = AuthFaceRestorer.from_pretrained(chain / "checkpoints/restorer")
    sample = rows(chain / "checkpoints/restorer/samples.jsonl")[0]
    images = {kind: Image.open(chain / "checkpoints/restorer" / file) for kind, file in sample.items()}
    again = restorer.restore_crops([images["degraded"]])[0]
    assert np.abs(np.asarray(again, int) - np.asarray(images["restored"], int)).max() <= 1


def test_evaluation_says_why_a_number_is_missing(chain):
    """Base and tuned model, degraded and restored faces are in the tables, and what has no weights here, too."""
    results = json.loads((chain / "results/results.json").read_text())["rows"]
    by_name = {(row["protocol"], row["method"], row["measure"]): row for row in results}
    assert by_name["restoration", "input", "psnr"]["n"] == 2
    assert {key[:2] for key in by_name} == {
        *(("generation", name) for name in ("base", "tuned")),
        *(("restoration", name) for name in ("input", "restorer", "reference")),
    }
    for row in results:
        assert row["value"] is not None or row["n"] == 0
        assert row["n"] or "not measured: " in row["note"] or "without a value" in row["note"]


def test_loras_in_half_precision(workplace, tiny_models):
    """The small GPU's way through stages 4 to 7: bfloat16, LoRAs, 8-bit Adam, gradient checkpointing."""
    small = {"mixed_precision": "bf16", "optimizer": "adamw8bit", "gradient_checkpointing": True, "num_samples": 1}
    chain = settings(tiny_models)
    run(GUIDANCE, **chain[GUIDANCE] | small, train="lora", rank=4, alpha=8, output="guided")
    assert {"pytorch_lora_weights.safetensors"} == {path.name for path in Path("guided").glob("*.safetensors")}
    run(PRIOR, **chain[PRIOR] | small, train="lora", rank=4, output="prior")
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_models / "sdxl" / name), load_file(f"prior/{name}")
    assert before.keys() == after.keys()  # fused: no LoRA keys are left
    changed = {key for key in before if not torch.equal(before[key].bfloat16(), after[key])}
    assert changed and all(".to_" in key and "attn" in key for key in changed)
    run(RESTORER, **chain[RESTORER] | small, prior="prior", output="restorer")
    values = chain[EVAL] | {"output": "half", "mixed_precision": "bf16", "num_prompts": 1, "num_faces": 1}
    values |= {"generators": ("base", "tuned=guided/"), "restorers": ("ours=restorer/",)}
    run(EVAL, **values)
    for made in ("guided", "prior", "restorer", "half"):
        assert all(np.isfinite(row.get("loss", 0)) for row in rows(Path(made) / "metrics.jsonl"))


def test_facial_loss_changes_the_restorer_by_its_gradient_only(workplace, tiny_models, capsys):
    """Without it the numbers are those of both lambdas at 0, bit for bit: its discriminators take part in nothing else.

    With it every part is logged, and a face without landmarks is trained with the noise loss only.
    """
    Image.new("RGB", (128, 128), "gray").save("data/portraits/images/nobody.png")
    values = settings(tiny_models)[RESTORER] | {"accumulation": 2, "steps": 2, "num_samples": 0, "device": "cpu"}
    kinds = {
        "none": {"facial_loss": "none"},
        "zero": {"lambda_d": 0.0, "lambda_s": 0.0},
        "time_aware": {},
        "constant": {"facial_loss": "constant"},
    }
    weights, logs = {}, {}
    for output, options in kinds.items():
        run(RESTORER, **values, **options, output=output)
        assert ("found in 1: nobody.png" in capsys.readouterr().out) == (output != "none")
        weights[output] = load_file(f"{output}/controlnet/diffusion_pytorch_model.safetensors")
        logs[output] = rows(Path(output) / "metrics.jsonl")

    def same(a, b):
        return all(torch.equal(weights[a][key], weights[b][key]) for key in weights[a])

    assert same("none", "zero")
    assert not same("none", "time_aware") and not same("none", "constant") and not same("time_aware", "constant")
    assert not Path("none/landmarks.jsonl").exists()
    missing = [row["image"] for row in rows(Path("zero/landmarks.jsonl")) if row["landmarks"] is None]
    assert missing == ["nobody.png"]
    for row, zero, none in zip(logs["time_aware"], logs["zero"], logs["none"], strict=True):
        assert row["loss"] == pytest.approx(row["noise"] + row["facial"], rel=1e-5)
        assert row["facial"] > 0 and row["adversarial"] > 0 and row["style"] > 0 and row["discriminator"] > 0
        assert zero["loss"] == none["loss"] and none.keys() == {"step", "loss", "learning_rate"}


def test_the_restorer_with_a_cache_a_measured_time_and_a_reward(workplace, tiny_models, monkeypatch):
    """With the cache, and stopped and trained further, the weights are those of one run without it, bit for bit.

    On the tiny base that ships: only in what a trained VAE decodes can a detector see faces.
    """
    from faceprior import confidence

    values = settings(tiny_models)[RESTORER] | {"prior": str(tiny.tiny_folder() / "sdxl"), "num_samples": 0}
    values |= {"schedule": "constant", "warmup_steps": 0, "flip_prob": 0.5, "time_m": "auto", "time_faces": 2}
    values |= {"reward_weight": 0.1, "reward_scorer": str(tiny_models / "scorer"), "reward_watch": 2}
    values |= {"reward_t_end": 1.0, "device": "cpu", "steps": 2}
    run(RESTORER, **values, output="whole")
    measured = json.loads(Path("whole/confidence.json").read_text())
    assert json.loads(Path("whole/done.json").read_text())["time_m"] == measured["m"]

    monkeypatch.setattr(confidence, "RESAMPLES", 200)
    parts = values | {"cache": "cache", "output": "parts"}
    run(RESTORER, **parts | {"steps": 1})
    files, curve = snapshot(Path("cache")), Path("parts/confidence.json").stat().st_mtime_ns
    assert len(files) == len(rows(Path("parts/landmarks.jsonl")))
    run(RESTORER, **parts)
    assert snapshot(Path("cache")) == files and Path("parts/confidence.json").stat().st_mtime_ns == curve
    name = "controlnet/diffusion_pytorch_model.safetensors"
    one, other = (load_file(f"{output}/{name}") for output in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)

    logs = [rows(Path(output) / "metrics.jsonl") for output in ("whole", "parts")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    for row in logs[0]:
        assert row["loss"] == pytest.approx(row["noise"] + row["facial"] + row["reward"], rel=1e-5)
        assert row["rewarded"] == 1 and 0 <= row["eyes_real"] <= 1 and 0 <= row["mouth_fake"] <= 1
    assert [("hacking" in row) for row in logs[0]] == [False, True]


def test_a_size_that_the_prior_cannot_make_is_named(workplace, tiny_models):
    values = settings(tiny_models)[RESTORER] | {"resolution": 66, "facial_loss": "none", "output": "odd"}
    with pytest.raises(ValueError, match="`resolution` has to be a multiple of 4 for this base but is 66"):
        run(RESTORER, **values)


def test_a_detector_that_sees_nothing_gives_no_time(workplace, tiny_models):
    """An untrained VAE decodes no faces: the curve lies below 0.5 from the start, which is said with its numbers."""
    values = settings(tiny_models)[RESTORER] | {"time_m": "auto", "time_faces": 2, "output": "auto"}
    with pytest.raises(ValueError, match=r"`time_m` is auto, but .*2 faces: without noise .* is 0.00.*Give a number"):
        run(RESTORER, **values)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_leaves_its_log_settings_and_mark(chain, name, tiny_models):
    stage = load_stage(name)
    output = chain / stage.Config(**settings(tiny_models)[name]).output
    assert rows(output / "metrics.jsonl")
    assert (output / "config.yaml").is_file()
    assert json.loads((output / "done.json").read_text())
    inputs = {SCORER: ["pairs", "init"], GUIDANCE: ["pairs", "base"], PRIOR: ["portraits", "base"]}
    inputs |= {RESTORER: ["images", "prior"]}
    assert list(json.loads((output / "done.json").read_text()).get("inputs", {})) == inputs.get(name, [])
    tiny_made = {SCORER, GUIDANCE, PRIOR, RESTORER}
    assert (output / "tiny.json").is_file() == (name in tiny_made)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_changes_nothing(workplace, name, tiny_models, capsys):
    stage = load_stage(name)
    config = stage.Config(**settings(tiny_models)[name])
    before = snapshot(Path(config.output))
    stage.main(config)
    assert snapshot(Path(config.output)) == before


@pytest.mark.parametrize("name", NAMES)
def test_other_settings_are_refused_by_name(workplace, name, tiny_models):
    values = {**settings(tiny_models)[name], "seed": 7}
    with pytest.raises(FileExistsError, match=r"seed \(0 there, 7 now\)"):
        run(name, **values)


@pytest.mark.parametrize(
    ("name", "data"), [(SCORER, "pairs"), (GUIDANCE, "pairs"), (PRIOR, "portraits"), (RESTORER, "images")]
)
def test_a_finished_run_is_not_complete_for_other_data(workplace, name, data, tiny_models):
    folder = Path("data/pairs" if data == "pairs" else "data/portraits")
    if name == RESTORER:
        next(folder.glob("images/*.png")).unlink()
    else:
        lines = (folder / "manifest.jsonl").read_text().splitlines()
        (folder / "manifest.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(FileExistsError, match=rf"began with other input, {data}: \d+ samples \(\w+\) then, \d+ sample"):
        run(name, **settings(tiny_models)[name])


@pytest.mark.parametrize(
    ("name", "missing", "command"),
    [
        (SCORER, "data/pairs", "01_make_pairs.py"),
        (GUIDANCE, "data/pairs", "01_make_pairs.py"),
        (PRIOR, "data/portraits", "03_curate_portraits.py"),
        (RESTORER, "data/portraits", "03_curate_portraits.py"),
        (RESTORER, "checkpoints/prior", "05_prior_tune.py"),
    ],
)
def test_a_missing_input_names_the_command_that_makes_it(workplace, name, missing, command, tiny_models):
    shutil.rmtree(missing)
    with pytest.raises(FileNotFoundError, match=command):
        run(name, **{**settings(tiny_models)[name], "output": "elsewhere"})
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("key", "stage", "measured"),
    [
        ("scorer", "02_train_scorer", {("tuned", "faces"), ("restorer", "psnr")}),
        ("restorer", "06_train_restorer", {("tuned", "faces"), ("input", "psnr"), ("input", "face_score")}),
    ],
)
def test_the_evaluation_measures_what_is_there(workplace, key, stage, measured, tiny_models, capsys):
    """What needs the missing model is listed with the command; once it is made, the same command measures the rest."""
    folder, values = Path("checkpoints", key), settings(tiny_models)[EVAL] | {"output": "out"}
    folder.rename("elsewhere")
    run(EVAL, **values)
    results = {(row["method"], row["measure"]): row for row in json.loads(Path("out/results.json").read_text())["rows"]}
    assert all("not measured: " not in results[name]["note"] for name in measured)
    lacking = [row for row in results.values() if f"`python stages/{stage}.py` makes one" in row["note"]]
    assert len(lacking) >= 4 and all(row["value"] is None for row in lacking)
    assert f"not measured: no {key} in {folder}: " in capsys.readouterr().out
    if key == "restorer":
        with pytest.raises(FileNotFoundError, match=f"no .* in typo/in/it: `python stages/{stage}.py` makes one"):
            run(EVAL, **values | {"restorers": ("ours=typo/in/it",), "output": "refused"})

    Path("elsewhere").rename(folder)
    run(EVAL, **values)
    assert rows_by_id("out") == rows_by_id("results")
    assert json.loads(Path("out/done.json").read_text()) == json.loads(Path("results/done.json").read_text())


def rows_by_id(folder: str) -> dict:
    found = rows(Path(folder, "rows.jsonl"))
    assert len(found) == len({(row["protocol"], row["method"], row["id"]) for row in found})
    return {
        (row["protocol"], row["method"], row["id"]): {k: row[k] for k in sorted(row) if k != "seconds"} for row in found
    }


def test_an_evaluation_without_any_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing to measure: no scorer .*02_train.*04_guid.*06_train"):
        run(EVAL)


def test_one_failed_face_is_named_and_tried_again(workplace, tiny_models, capsys, monkeypatch):
    """The others are measured; a bug would end the stage."""
    from faceprior import AuthFaceRestorer

    original, calls = AuthFaceRestorer.restore_crops, []

    def fail_once(self, crops, **options):
        calls.append(crops)
        if len(calls) == 3:  # the first is not counted, nor kept
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, crops, **options)

    values = settings(tiny_models)[EVAL] | {"protocols": ("restoration",), "num_faces": 3, "output": "out"}
    monkeypatch.setattr(AuthFaceRestorer, "restore_crops", fail_once)
    run(EVAL, **values)
    printed = capsys.readouterr().out
    assert "out of memory: CUDA out of memory." in printed and "1 could not be measured" in printed
    assert "restorer: 1 of 3 missing" in printed
    restored = [row for row in rows(Path("out/rows.jsonl")) if row["method"] == "restorer"]
    assert len(restored) == 2 and not Path("out/done.json").exists()
    run(EVAL, **values)
    again = [row for row in rows(Path("out/rows.jsonl")) if row["method"] == "restorer"]
    assert len(again) == 3 and [row for row in again if row in restored] == restored
    assert Path("out/done.json").exists() and len(calls) == 6


@pytest.mark.parametrize("name", [PAIRS, PORTRAITS])
def test_one_bad_file_is_reported_and_the_rest_is_done(workplace, name, tiny_models, capsys):
    photographs = Path("photographs")
    draw_folder(photographs, range(2), 256)
    whole = (photographs / "portrait_00000.png").read_bytes()
    (photographs / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "text.jpg").write_text("no picture")
    Image.new("RGB", (256, 256), "gray").save(photographs / "nobody.png")
    values = {**settings(tiny_models)[name], "images": "photographs", "output": "out"}
    run(name, **(values if name == PAIRS else {**values, "min_face_size": 48}))
    printed = capsys.readouterr().out
    for line in ("truncated.png", "text.jpg", "nobody.png", "no face found"):
        assert line in printed
    assert len(rows(Path("out/manifest.jsonl"))) == 2


@pytest.mark.parametrize("name", [SCORER, GUIDANCE])
def test_pairs_whose_files_are_spoilt_are_reported_and_left_out(workplace, name, tiny_models, capsys):
    """A torn picture, one that is empty, and a box that lies outside of its picture."""
    manifest = Path("data/pairs/manifest.jsonl")
    pairs = rows(manifest)
    torn, empty = Path("data/pairs", pairs[0]["good"]), Path("data/pairs", pairs[1]["bad"])
    torn.write_bytes(torn.read_bytes()[:-200])
    empty.write_bytes(b"")
    pairs[2]["box"] = [5000, 5000, 5100, 5100]
    manifest.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run(name, **{**settings(tiny_models)[name], "output": "out"})
    printed = capsys.readouterr().out
    assert "3 pairs skipped" in printed and torn.name in printed and f"{empty.name} is empty" in printed


def test_a_scorer_that_was_killed_while_it_kept_its_best(chain, tmp_path, tiny_models):
    """Whatever the disk holds then, weights, scores and report belong together in the end."""
    values = {**settings(tiny_models)[SCORER], "pairs": str(chain / "data/pairs"), "steps": 6, "save_every": 1}
    values |= {"eval_every": 1, "gradient_checkpointing": True}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(SCORER, **values, output=str(whole))
    stage = load_stage(SCORER)
    replace, calls = os.replace, []

    def killed(source, target):
        if Path(source).parent.name == "new":
            calls.append(source)
            if len(calls) == 4:  # the second time, between two files
                raise KeyboardInterrupt
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.main(stage.Config(**values, output=str(broken)))
    assert not (broken / "done.json").exists()
    run(SCORER, **values, output=str(broken))
    files = [snapshot(folder) for folder in (whole, broken)]
    assert {k: v for k, v in files[0].items() if k != "config.yaml"} == {
        k: v for k, v in files[1].items() if k != "config.yaml"
    }


@pytest.mark.parametrize("name", [PAIRS, PORTRAITS])
def test_an_empty_folder_is_an_error(workplace, name, tiny_models):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        run(name, **{**settings(tiny_models)[name], "images": "empty", "output": "out"})


def test_torn_and_escaping_rows_are_left_out(workplace, tiny_models, capsys):
    manifest = Path("data/pairs/manifest.jsonl")
    lines = manifest.read_text().splitlines()
    escaping = json.loads(lines[1]) | {"good": "../../outside.png"}
    missing = json.loads(lines[2]) | {"bad": "bad/not_there.png"}
    manifest.write_text("\n".join([lines[0][:40], json.dumps(escaping), json.dumps(missing), *lines[3:]]))
    run(GUIDANCE, **{**settings(tiny_models)[GUIDANCE], "output": "out"})
    printed = capsys.readouterr().out
    assert "3 pairs skipped" in printed
    for reason in ("manifest.jsonl:1: torn", "leads out of", "not_there.png is missing"):
        assert reason in printed


@pytest.mark.parametrize("name", [PAIRS, GUIDANCE, PRIOR])
def test_a_missing_base_model_is_not_blamed_on_the_network(workplace, name, tiny_models):
    with pytest.raises(FileNotFoundError, match="no base model at ./models/mine: the path does not exist"):
        run(name, **{**settings(tiny_models)[name], "base": "./models/mine", "output": "out"})


@pytest.mark.parametrize("name", [PAIRS, SCORER, GUIDANCE, PRIOR, RESTORER, EVAL])
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(workplace, name, tiny_models):
    with pytest.raises(ValueError, match="`device` is cuda but this machine has no CUDA"):
        run(name, **{**settings(tiny_models)[name], "device": "cuda", "output": "out"})


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keys_and_values_out_of_range_are_named(name, capsys):
    messages = {"--sed=1": "unknown key `sed`", "--seed=-1": "`seed` has to be in [0, inf) but is -1"}
    for argument, message in messages.items():
        with pytest.raises(SystemExit) as stop:
            parse_config(load_stage(name).Config, [argument])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [SCORER, PRIOR, RESTORER])
def test_a_run_is_a_function_of_its_settings(workplace, name, tiny_models):
    """Two runs from nothing leave the same files, so a run that is killed before its first checkpoint loses nothing."""
    config = load_stage(name).Config(**settings(tiny_models)[name])
    first = snapshot(Path(config.output))
    shutil.rmtree(config.output)
    load_stage(name).main(config)
    assert snapshot(Path(config.output)) == first


def start(name: str, values: dict, folder: Path, *launcher: str) -> subprocess.Popen:
    """Start a stage in a process of its own, in `folder`."""
    switches = {True: "--{}", False: "--no-{}"}
    options = [
        switches[value].format(key) if isinstance(value, bool) else f"--{key}={value}" for key, value in values.items()
    ]
    command = [*(launcher or [sys.executable]), str(STAGES / f"{name}.py"), *options]
    environment = os.environ | {"TQDM_DISABLE": "1"}  # on a slow machine bars would fill the pipe, which nobody empties
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


# Runs a stage, which gets a signal as soon as a row of a file is on the disk: its arguments are both, and the command.
SIGNALLED = """
import os, runpy, sys
from pathlib import Path
from faceprior import jsonl

_, place, number, *sys.argv = sys.argv
append_row = jsonl.append_row

def append_and_signal(path, row):
    append_row(path, row)
    if Path(path) == Path(place):
        os.kill(os.getpid(), int(number))

jsonl.append_row = append_and_signal
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at(place: str, number: int, name: str, values: dict, folder: Path) -> int:
    """Run a stage in a process of its own until a row of `place` is written, then send the signal; its exit code."""
    process = start(name, values, folder, sys.executable, "-c", SIGNALLED, place, str(int(number)))
    printed, _ = process.communicate()
    assert process.returncode, printed
    return process.returncode


def test_sigkill_while_pairs_are_made(tmp_path, monkeypatch, tiny_models):
    """Killed after the first pair, the same command ends with the files of the uninterrupted run."""
    values = settings(tiny_models)[PAIRS] | {"num_drawn": 3, "num_scenes": 0}
    assert kill_at("data/pairs/manifest.jsonl", signal.SIGKILL, PAIRS, values, tmp_path) == -9
    killed = tmp_path / "data/pairs"
    assert len(rows(killed / "manifest.jsonl")) == 1
    monkeypatch.chdir(tmp_path)
    run(PAIRS, **values)
    resumed = killed.rename(tmp_path / "resumed")
    run(PAIRS, **values)
    assert snapshot(resumed) == snapshot(killed) and len(rows(killed / "manifest.jsonl")) == 3


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_killed_while_training(chain, tmp_path, tiny_models, number, code):
    """Killed after its first step, the same command ends with the weights, log and samples of the uninterrupted run."""
    shutil.copytree(chain / "data", tmp_path / "data")
    output = tmp_path / "checkpoints/guided"
    assert (
        kill_at("checkpoints/guided/metrics.jsonl", number, GUIDANCE, settings(tiny_models)[GUIDANCE], tmp_path) == code
    )
    assert len(rows(output / "metrics.jsonl")) == 1 and not (output / "done.json").exists()
    with chdir(tmp_path):
        run(GUIDANCE, **settings(tiny_models)[GUIDANCE])
    assert snapshot(output) == snapshot(chain / "checkpoints/guided")


class Killed(Exception):
    """Stands for whatever ends a process."""


def test_killed_between_two_steps_of_the_restorer(chain, workplace, tiny_models, monkeypatch):
    """Killed after its checkpoint, the same command goes on with the discriminators too and leaves the same files."""
    output, values = Path("checkpoints/restorer"), settings(tiny_models)[RESTORER]
    shutil.rmtree(output)

    def killed(path, row):
        append_row(path, row)
        if row["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("faceprior.training.run.append_row", killed)
        run(RESTORER, **values)
    kept = load_file(output / "resume/parameters.safetensors")
    assert {key.split(".")[0] for key in kept} == {"controlnet", "discriminators"}
    assert len(rows(output / "metrics.jsonl")) == 3 and not (output / "done.json").exists()
    run(RESTORER, **values)
    assert snapshot(output) == snapshot(chain / "checkpoints/restorer")


def test_the_restorer_goes_on_from_a_controlnet(tmp_path):
    """`init` takes a restorer's ControlNet as it is; empty, the paper's start, it is the prior's encoder."""
    stage = load_stage(RESTORER)
    restorer = tiny.tiny_restorer(seed=1)
    torch.nn.init.ones_(restorer.pipeline.controlnet.controlnet_mid_block.weight)
    restorer.save_pretrained(tmp_path)
    prior = tiny.tiny_sdxl()
    begun = stage.make_controlnet(stage.Config(init=str(tmp_path)), prior)
    assert all(
        torch.equal(a, b) for a, b in zip(begun.parameters(), restorer.pipeline.controlnet.parameters(), strict=True)
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in begun.parameters())
    copied = stage.make_controlnet(stage.Config(init=""), prior)
    assert torch.equal(copied.conv_in.weight, prior.unet.conv_in.weight)
    assert copied.controlnet_mid_block.weight.abs().max() == 0
    prior.unet.register_to_config(block_out_channels=(32, 64, 96))
    with pytest.raises(ValueError, match="does not fit the prior"):
        stage.make_controlnet(stage.Config(init=str(tmp_path)), prior)


@pytest.mark.parametrize(
    ("name", "folder"), [(GUIDANCE, "guided"), pytest.param(RESTORER, "restorer", marks=pytest.mark.slow)]
)
def test_two_processes_take_the_same_steps_as_one(chain, tmp_path, tiny_models, name, folder):
    """Two processes with one sample each see what one process with two sees, so the losses agree.

    Stage 4's are killed after a step: one process resumes them with the same samples a step, and with no others. They
    share the validation images, of which no row is lost.
    """
    shutil.copytree(chain / "data", tmp_path / "data")
    linked_copy(chain / "checkpoints/prior", tmp_path / "checkpoints/prior")
    values = {**settings(tiny_models)[name], "batch_size": 1, "device": "cpu"}
    if name == GUIDANCE:
        values |= {"validate_every": 1, "num_validation": 3, "scorer": "none"}
    # accelerate starts several processes on a CPU by itself only through MPI; with --multi_gpu torchrun starts them
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    process = start(name, values, tmp_path, *launch, "--mixed_precision", "no", "--dynamo_backend", "no")
    if name == GUIDANCE:
        output = tmp_path / "checkpoints/guided"
        while not (output / "resume/state.json").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        with chdir(tmp_path):
            with pytest.raises(
                FileExistsError, match="holds a run with 2 samples a step, but `batch_size` 1 x .* is 1"
            ):
                run(name, **values)
            run(name, **values | {"batch_size": 2})
        images = rows(output / "validation.jsonl")
        assert [(row["step"], row["seed"] % 2**20) for row in images] == [(s, i) for s in range(4) for i in range(3)]
        assert all((output / row["image"]).is_file() for row in images)
    else:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        assert printed.count("trained for 3 steps") == 1  # by the main process alone
    one, two = (rows(root / f"checkpoints/{folder}/metrics.jsonl") for root in (chain, tmp_path))
    assert [row["step"] for row in two] == [1, 2, 3]
    for key in one[0]:
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], rtol=1e-4, err_msg=key)


@pytest.fixture
def judged(tiny_models) -> dict:
    """The settings of a short tuning of the shipped tiny model, in whose images the detector finds faces."""
    values = settings(tiny_models)[GUIDANCE] | {"base": "tiny", "scorer": "tiny", "sample_steps": 5, "num_samples": 1}
    return values | {"validate_every": 1, "num_validation": 1, "keep_best": True, "output": "judged"}


def test_killed_between_a_validation_and_its_checkpoint(workplace, judged, capsys):
    """The same command ends with the files of the uninterrupted run: weights, average, best, log, images, verdict."""
    judged |= {"ema_decay": 0.5, "save_every": 2}
    stage = load_stage(GUIDANCE)
    run(GUIDANCE, **judged)
    *_, last = capsys.readouterr().out.splitlines()
    done = json.loads(Path("judged/done.json").read_text())
    assert last == f"Face Score, tuned against untuned: {done['verdict']['text']}"
    assert (done["verdict"]["n"], done["verdict"]["outcome"]) == (1, "too few") and done["best_step"] in (1, 2, 3)
    log = rows(Path("judged/metrics.jsonl"))
    assert [row["step"] for row in log] == [0, 1, 2, 3] and all("validation_score" in row for row in log)

    step = stage.Validation.step

    def killed(self):
        step(self)
        if self.run.step + 1 == 3:
            raise KeyboardInterrupt

    cut = judged | {"output": "cut"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage.Validation, "step", killed)
        run(GUIDANCE, **cut)
    assert not Path("cut/done.json").exists() and rows(Path("cut/validation.jsonl"))[-1]["step"] == 3
    run(GUIDANCE, **cut)
    files = [{k: v for k, v in snapshot(Path(f)).items() if k != "config.yaml"} for f in ("judged", "cut")]
    assert files[0] == files[1]


def test_patience_ends_a_tuning_that_goes_on_with_more_of_it(workplace, judged, capsys):
    """With a learning rate that moves nothing no validation beats the first: the end after two, then two more."""
    judged |= {"learning_rate": 1e-30, "schedule": "constant", "warmup_steps": 0, "steps": 6, "num_samples": 0}
    run(GUIDANCE, **judged, patience=1)
    assert "tuned for 2 of 6 steps, ended early, weights of step 1" in capsys.readouterr().out
    done = json.loads(Path("judged/done.json").read_text())
    assert (done["steps"], done["stopped_early"], done["best_step"]) == (2, True, 1)
    run(GUIDANCE, **judged, patience=1)
    assert "judged is complete" in capsys.readouterr().out
    run(GUIDANCE, **judged, patience=3)
    assert [row["step"] for row in rows(Path("judged/metrics.jsonl"))] == [0, 1, 2, 3, 4]
    run(GUIDANCE, **judged | {"steps": 7}, patience=3)
    assert [row["step"] for row in rows(Path("judged/metrics.jsonl"))] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_scorer_that_judges(workplace, judged, capsys):
    """`auto` takes what is here and of the base's kind; a name that does not exist is an error before the training."""
    stage = load_stage(GUIDANCE)
    base, real = tiny.resolve("tiny", "sd15"), "some/base"
    assert stage.load_scorer("auto", base).config._name_or_path == "checkpoints/scorer"  # made from a tiny one
    assert stage.load_scorer("auto", real) is None and stage.load_scorer("none", base) is None
    Path("checkpoints/scorer/tiny.json").unlink()
    assert stage.load_scorer("auto", real).config._name_or_path == "checkpoints/scorer"
    assert stage.load_scorer("auto", base).config._name_or_path == tiny.resolve("tiny", "scorer")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(GUIDANCE, **judged | {"scorer": "./nowhere"})
    assert not Path("judged/metrics.jsonl").exists()
    with pytest.raises(ValueError, match="`keep_best` goes by the Face Score of validations"):
        run(GUIDANCE, **judged | {"scorer": "none"})


def test_a_loss_that_is_not_finite_names_the_pair(workplace, tiny_models, monkeypatch):
    """And leaves the last good checkpoint, which the message names too."""
    stage = load_stage(GUIDANCE)
    values = settings(tiny_models)[GUIDANCE] | {"output": "spoilt", "batch_size": 1}
    ids, original = [], stage.GuidanceTuner.encode_pairs

    def spoil(self, batch):
        ids.extend(batch["id"])
        good, bad, mask = original(self, batch)
        return good * (float("nan") if len(ids) == 3 else 1), bad, mask

    monkeypatch.setattr(stage.GuidanceTuner, "encode_pairs", spoil)
    with pytest.raises(ValueError) as error:
        run(GUIDANCE, **values)
    where = f"at step 3, in samples {ids[2]}; the last good checkpoint is spoilt/resume, of step 2"
    assert str(error.value).startswith(f"`loss` became nan {where}. Start over with a lower `learning_rate`")
    assert ids[2] in {pair["id"] for pair in rows(Path("data/pairs/manifest.jsonl"))}


def test_a_tuned_model_is_sampled_and_tuned_further(workplace, tiny_models):
    """More steps of a finished run, and other samples: the files are those of one run of that length."""
    values = settings(tiny_models)[PRIOR] | {"schedule": "constant", "steps": 1, "num_samples": 1}
    longer = values | {"steps": 2, "sample_steps": 2, "sampler": "ddim"}
    run(PRIOR, **values, output="parts")
    run(PRIOR, **longer, output="parts")
    run(PRIOR, **longer, output="whole")
    files = [{k: v for k, v in snapshot(Path(f)).items() if k != "config.yaml"} for f in ("parts", "whole")]
    assert files[0] == files[1]
    run(PRIOR, **longer | {"sampler": "base"}, output="parts")  # the same weights, other samples
    weights, sample = "unet/diffusion_pytorch_model.safetensors", "samples/000_after.png"
    sampled = snapshot(Path("parts"))
    assert sampled[weights] == files[0][weights] and sampled[sample] != files[0][sample] and "done.json" in sampled


def test_weight_decay_reaches_the_optimizer(workplace, tiny_models):
    values = settings(tiny_models)[GUIDANCE] | {"steps": 1, "num_samples": 0, "warmup_steps": 0}
    for decay in (0.0, 0.5):
        run(GUIDANCE, **values, weight_decay=decay, output=f"decay{decay}")
    name = "unet/diffusion_pytorch_model.safetensors"
    base, plain, decayed = (load_file(Path(f) / name) for f in (tiny_models / "sd15", "decay0.0", "decay0.5"))
    key = next(key for key in base if key.endswith("attn1.to_q.weight"))
    torch.testing.assert_close(decayed[key], plain[key] - 1e-4 * 0.5 * base[key])  # AdamW: w - lr decay w, decoupled


def test_stage_configs_hold_scalars_only():
    for name in NAMES:
        for field in dataclasses.fields(load_stage(name).Config):
            assert isinstance(field.default, bool | int | float | str | tuple | None), (name, field.name)

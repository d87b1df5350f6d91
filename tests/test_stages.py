"""The seven stages end to end: in order, again to resume, killed in the middle, and with bad input."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STAGES, load_stage
from PIL import Image
from safetensors.torch import load_file

from faceprior.config import parse_config
from faceprior.manifest import read_rows

NAMES = sorted(path.stem for path in STAGES.glob("0*.py"))
PAIRS, SCORER, PORTRAITS, GUIDANCE, PRIOR, RESTORER, EVAL = NAMES


def settings(tiny_models: Path) -> dict[str, dict]:
    """Return the smallest settings of every stage that still do all of its work."""
    sd15, sdxl, scorer = (str(tiny_models / kind) for kind in ("sd15", "sdxl", "scorer"))
    return {
        PAIRS: {"num_drawn": 6, "base": sd15, "batch_size": 2},
        SCORER: {"init": scorer, "steps": 3, "batch_size": 4, "eval_every": 2, "save_every": 2},
        PORTRAITS: {"num_drawn": 10},
        GUIDANCE: {"base": sd15, "steps": 3, "batch_size": 2, "save_every": 1, "num_samples": 2, "sample_steps": 3},
        PRIOR: {"base": sdxl, "steps": 3, "batch_size": 2, "save_every": 2, "num_samples": 2, "sample_steps": 3},
        RESTORER: {"steps": 3, "batch_size": 2, "save_every": 2, "num_samples": 2, "sample_steps": 3},
        EVAL: {"base": sd15, "num_prompts": 2, "num_faces": 2, "sample_steps": 3},
    }


def run(name: str, **values) -> None:
    stage = load_stage(name)
    stage.main(stage.Config(**values))


def snapshot(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
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
def chain(tmp_path_factory, tiny_models) -> Path:
    """The folder that the seven stages leave when they run in order."""
    folder = tmp_path_factory.mktemp("chain")
    with chdir(folder):
        for name, values in settings(tiny_models).items():
            run(name, **values)
    return folder


@pytest.fixture
def workplace(chain, tmp_path, monkeypatch) -> Path:
    """A copy of the chain's folder to work in, as the current directory."""
    shutil.copytree(chain, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_stages_are_the_seven():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07"]


def test_pairs_keep_the_photograph_outside_of_the_mask(chain):
    pairs = rows(chain / "data/pairs/manifest.jsonl")
    assert len(pairs) == 6
    for pair in pairs:
        good, bad, mask = (np.asarray(Image.open(chain / "data/pairs" / pair[k])) for k in ("good", "bad", "mask"))
        assert (good[mask == 0] == bad[mask == 0]).all()
        assert (good[mask > 0] != bad[mask > 0]).any()
        assert pair["strength"] == (0.4 if pair["area_ratio"] > 0.1 else 0.2)


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


def test_spoilt_portraits_are_rejected_with_a_reason(chain):
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
        guidance_scale=7.5 if name == "guided" else 5.0,
        generator=torch.Generator().manual_seed(sample["seed"]),
    ).images[0]
    difference = np.abs(np.asarray(image, int) - np.asarray(Image.open(folder / sample["after"]), int))
    assert difference.max() <= 1


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
    results = json.loads((chain / "results/results.json").read_text())["rows"]
    by_name = {row["metric"]: row for row in results}
    assert by_name["PSNR (dB), degraded"]["n"] == 2
    for row in results:
        assert row["value"] is not None or row["note"].startswith("not measured: ")


def test_loras_in_half_precision(workplace, tiny_models):
    """The small GPU's way through stages 4 to 7: bfloat16, LoRAs, 8-bit Adam, gradient checkpointing."""
    small = {"mixed_precision": "bf16", "optimizer": "adamw8bit", "gradient_checkpointing": True}
    chain = settings(tiny_models)
    run(GUIDANCE, **chain[GUIDANCE], **small, train="lora", rank=4, alpha=8, output="guided")
    assert {"pytorch_lora_weights.safetensors"} == {path.name for path in Path("guided").glob("*.safetensors")}
    run(PRIOR, **chain[PRIOR], **small, train="lora", rank=4, output="prior")
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_models / "sdxl" / name), load_file(f"prior/{name}")
    assert before.keys() == after.keys()  # fused: no LoRA keys are left
    changed = {key for key in before if not torch.equal(before[key].bfloat16(), after[key])}
    assert changed and all(".to_" in key and "attn" in key for key in changed)
    run(RESTORER, **chain[RESTORER], **small, prior="prior", output="restorer")
    values = chain[EVAL] | {"guided": "guided", "restorer": "restorer", "output": "half", "mixed_precision": "bf16"}
    run(EVAL, **values)
    for made in ("guided", "prior", "restorer", "half"):
        assert all(np.isfinite(row.get("loss", 0)) for row in rows(Path(made) / "metrics.jsonl"))


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_leaves_its_log_settings_and_mark(chain, name, tiny_models):
    stage = load_stage(name)
    output = chain / stage.Config(**settings(tiny_models)[name]).output
    assert rows(output / "metrics.jsonl")
    assert (output / "config.yaml").is_file()
    assert json.loads((output / "done.json").read_text())
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
    ("name", "missing", "command"),
    [
        (SCORER, "data/pairs", "01_make_pairs.py"),
        (GUIDANCE, "data/pairs", "01_make_pairs.py"),
        (PRIOR, "data/portraits", "03_curate_portraits.py"),
        (RESTORER, "data/portraits", "03_curate_portraits.py"),
        (RESTORER, "checkpoints/prior", "05_prior_tune.py"),
        (EVAL, "checkpoints/scorer", "02_train_scorer.py"),
        (EVAL, "checkpoints/guided", "04_guidance_tune.py"),
        (EVAL, "checkpoints/restorer", "06_train_restorer.py"),
    ],
)
def test_a_missing_input_names_the_command_that_makes_it(workplace, name, missing, command, tiny_models):
    shutil.rmtree(missing)
    with pytest.raises(FileNotFoundError, match=command):
        run(name, **{**settings(tiny_models)[name], "output": "elsewhere"})
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize("name", [PAIRS, PORTRAITS])
def test_one_bad_file_is_reported_and_the_rest_is_done(workplace, name, tiny_models, capsys):
    photographs = Path("photographs")
    photographs.mkdir()
    for path in sorted(Path("data/pairs/drawn").glob("*"))[:4]:
        shutil.copy(path, photographs)
    whole = (photographs / "portrait_00000.png").read_bytes()
    (photographs / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "text.jpg").write_text("no picture")
    Image.new("RGB", (256, 256), "gray").save(photographs / "nobody.png")
    values = {**settings(tiny_models)[name], "images": "photographs", "output": "out"}
    run(name, **(values if name == PAIRS else {**values, "min_face_size": 48}))
    printed = capsys.readouterr().out
    for line in ("truncated.png", "text.jpg", "nobody.png: no face"):
        assert line in printed
    assert len(rows(Path("out/manifest.jsonl"))) == 2


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
    assert "3 pairs left out" in printed
    for reason in ("manifest.jsonl:1: torn", "leads out of", "not_there.png is missing"):
        assert reason in printed


@pytest.mark.parametrize("name", [PAIRS, GUIDANCE, PRIOR])
def test_a_missing_base_model_is_not_blamed_on_the_network(workplace, name, tiny_models):
    with pytest.raises(FileNotFoundError, match="no base model at ./models/mine: it is neither"):
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
    options = [f"--{key}={value}" for key, value in values.items()]
    command = [*(launcher or [sys.executable]), str(STAGES / f"{name}.py"), *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(process: subprocess.Popen, condition, number: int) -> None:
    """Send a signal as soon as `condition` holds."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the stage never came that far"
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate()


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_sigkill_while_pairs_are_made(chain, tmp_path, tiny_models):
    """Killed after the first pair, the same command ends with the files of the uninterrupted run."""
    process = start(PAIRS, settings(tiny_models)[PAIRS], tmp_path)
    kill_when(process, lambda: count_lines(tmp_path / "data/pairs/manifest.jsonl") >= 1, signal.SIGKILL)
    assert count_lines(tmp_path / "data/pairs/manifest.jsonl") < 6
    finished = start(PAIRS, settings(tiny_models)[PAIRS], tmp_path)
    assert finished.communicate()[0] and finished.returncode == 0
    assert snapshot(tmp_path / "data/pairs") == snapshot(chain / "data/pairs")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_while_training(chain, tmp_path, tiny_models, number, code):
    """Killed after its first step, the same command ends with the weights, log and samples of the uninterrupted run."""
    shutil.copytree(chain / "data", tmp_path / "data")
    process = start(GUIDANCE, settings(tiny_models)[GUIDANCE], tmp_path)
    output = tmp_path / "checkpoints/guided"
    kill_when(process, lambda: count_lines(output / "metrics.jsonl") >= 1, number)
    assert process.returncode == code
    assert not (output / "done.json").exists()
    finished = start(GUIDANCE, settings(tiny_models)[GUIDANCE], tmp_path)
    assert finished.communicate()[0] and finished.returncode == 0
    assert snapshot(output) == snapshot(chain / "checkpoints/guided")


def test_two_processes_take_the_same_steps_as_one(chain, tmp_path, tiny_models):
    """Two processes with one pair each see what one process with two pairs sees, so the losses agree."""
    shutil.copytree(chain / "data", tmp_path / "data")
    values = {**settings(tiny_models)[GUIDANCE], "batch_size": 1, "device": "cpu"}
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
    process = start(GUIDANCE, values, tmp_path, *launch, "--mixed_precision", "no", "--dynamo_backend", "no")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    one, two = (rows(folder / "checkpoints/guided/metrics.jsonl") for folder in (chain, tmp_path))
    assert [row["step"] for row in two] == [1, 2, 3]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-4)


def test_stage_configs_hold_scalars_only():
    for name in NAMES:
        for field in dataclasses.fields(load_stage(name).Config):
            assert isinstance(field.default, bool | int | float | str | tuple), (name, field.name)

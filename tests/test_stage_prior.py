"""Stage 5: the cache, the average, min-SNR and validations, over kills; the forms of the prior."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_stage
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from faceprior import cache, validation
from faceprior.bases import load_pipeline
from faceprior.diffusion import sample_images
from faceprior.jsonl import read_rows
from faceprior.lora import LORA_FORMATS, load_lora
from faceprior.models import quiet_libraries

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def stage():
    quiet_libraries()
    return load_stage("05_prior_tune")


@pytest.fixture(scope="module")
def values(tmp_path_factory, tiny_models) -> dict:
    """The smallest settings of a LoRA with all that stage 5 can do beside it, on a few drawn portraits."""
    folder = tmp_path_factory.mktemp("drawn") / "portraits"
    curation = load_stage("03_curate_portraits")
    curation.main(curation.Config(num_drawn=4, output=str(folder)))
    values = {"portraits": str(folder), "base": str(tiny_models / "sdxl"), "train": "lora", "rank": 2, "device": "cpu"}
    values |= {"steps": 4, "batch_size": 2, "save_every": 1, "learning_rate": 0.02, "prompt_drop": 0.5}
    values |= {"ema_decay": 0.9, "ema_device": "cpu", "min_snr_gamma": 5.0}
    values |= {"validate_every": 2, "num_validation": 2, "num_samples": 1, "sample_steps": 2, "resolution": 64}
    return values


def run(stage, values, **others) -> Path:
    stage.main(stage.Config(**{**values, **others}))
    return Path(others["output"])


def files(folder: Path) -> dict[str, str]:
    """Return digests of all files but the settings, which name the folder itself."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.yaml"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def whole(stage, values, tmp_path_factory) -> Path:
    """The uninterrupted run, with a cache."""
    folder = tmp_path_factory.mktemp("runs")
    return run(stage, values, cache=str(folder / "cache"), output=str(folder / "whole"))


# ---- the run


class Killed(Exception):
    """Stands for whatever ends a process."""


def breaks_at(function, call):
    """Return the function, which is broken off at one of its calls."""
    calls = iter(range(1, 1000))

    def broken(*args, **options):
        if next(calls) == call:
            raise Killed
        return function(*args, **options)

    return broken


def test_killed_anywhere_it_ends_with_the_files_of_a_run_that_is_not(stage, values, whole, tmp_path, monkeypatch):
    """As the cache is filled, in the first images, a step, a validation, the samples, and as the prior is saved."""
    places = [
        (cache, "save", 6),  # of 4 prompts and 3 portraits
        (validation, "sample_images", 2),
        (stage, "compute_loss", 2),
        (validation, "sample_images", 1),  # in the validation after step 2
        (stage, "compute_loss", 2),
        (validation, "sample_images", 4),  # in the samples, after the last validation
        (stage, "fuse_lora", 1),
    ]
    options = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "parts")}
    reached = []
    for module, name, call in places:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, breaks_at(getattr(module, name), call))
            run(stage, values, **options)
        state = tmp_path / "parts/resume/state.json"
        reached.append(json.loads(state.read_text())["step"] if state.is_file() else 0)
    assert reached == [0, 0, 1, 1, 2, 4, 4]
    assert files(run(stage, values, **options)) == files(whole)


def test_a_run_does_not_go_on_with_other_portraits_or_another_base(stage, values, tmp_path, monkeypatch):
    """Both under the same path; those that were there before are resumed, wherever they come back from."""
    portraits = Path(shutil.copytree(values["portraits"], tmp_path / "portraits"))
    base = Path(shutil.copytree(values["base"], tmp_path / "base"))
    options = {"portraits": str(portraits), "base": str(base), "validate_every": 0, "num_samples": 0}
    options |= {"output": str(tmp_path / "run")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "compute_loss", breaks_at(stage.compute_loss, 3))
        run(stage, values, **options)

    first, second = sorted((portraits / "images").glob("*.png"))[:2]
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(FileExistsError, match=r"portraits: 3 samples \(\w+\) then, 3 samples \(\w+\) now"):
        run(stage, values, **options)
    first.write_bytes(whole)
    with pytest.raises(FileExistsError, match=r"settings: tags \(both there, none now\)"):  # not: other portraits
        run(stage, values, **options, tags="none")

    tensors = load_file(base / UNET)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, base / UNET, {"format": "pt"})
    with pytest.raises(FileExistsError, match=r"base: \d+ tensors \(\w+\) then"):
        run(stage, values, **options)
    save_file(tensors, base / UNET, {"format": "pt"})
    assert json.loads((run(stage, values, **options) / "done.json").read_text())["steps"] == 4


def test_the_cache_has_each_portrait_each_caption_and_the_dropped_one(stage, values, whole, tmp_path):
    """The second run encodes nothing; another choice of tags has other prompts and the same latents."""
    options = {"cache": str(tmp_path / "cache"), "steps": 1, "num_samples": 0, "validate_every": 0, "ema_decay": 0.0}
    run(stage, values, **options, output=str(tmp_path / "one"))
    portraits, _ = read_rows(Path(values["portraits"], "manifest.jsonl"))
    made = sorted((tmp_path / "cache").rglob("*.safetensors"))
    tensors = [load_file(path) for path in made]
    moments = [entry for entry in tensors if entry.keys() == {"latent_mean", "latent_std"}]
    dropped = [entry for entry in tensors if "dropped_prompt_embeds" in entry]
    assert len(moments) == len(portraits) and len(dropped) == 1
    assert len(made) == len(portraits) + len({row["caption"] for row in portraits}) + 1
    run(stage, values, **options, tags="none", output=str(tmp_path / "none"))
    assert len(sorted((tmp_path / "cache").rglob("*.safetensors"))) == len(made) + 1  # the empty caption's


def test_the_average_is_what_is_validated_and_saved(stage, values, whole, tmp_path):
    """The sheet has a row for the untuned model and one per validation; without the average the prior is another."""
    rows, _ = read_rows(whole / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4]
    sheet = np.asarray(Image.open(whole / "validation.png"))
    assert sheet.shape == (3 * 64, validation.MARGIN + 2 * 64, 3)
    last = np.asarray(Image.open(whole / rows[-1]["image"]))
    assert (sheet[128:, -64:] == last).all() and (sheet[:64, -64:] != last).any()

    # the image of the last step is the saved prior's, which is fused in float32
    pipeline = load_pipeline(str(whole))
    image = sample_images(pipeline, [rows[-1]["prompt"]], [rows[-1]["seed"]], 64, 2, 2.5)[0]
    assert np.abs(np.asarray(image, int) - last).max() <= 1

    # the training itself is the same without cache, average and validations
    plain = run(stage, values, ema_decay=0.0, validate_every=0, num_samples=0, output=str(tmp_path / "plain"))
    losses = [[row["loss"] for row in read_rows(folder / "metrics.jsonl")[0]] for folder in (plain, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, other = (load_file(folder / UNET) for folder in (plain, whole))
    assert max((one[key] - other[key]).abs().max() for key in one) > 0.01


def test_min_snr_lowers_the_loss_of_every_step(stage, values, whole, tmp_path):
    """Its weight of the noise's error is 1 at most, and below it at the timesteps of little noise."""
    plain = run(stage, values, min_snr_gamma=0.0, validate_every=0, num_samples=0, steps=1, output=str(tmp_path / "a"))
    low = run(stage, values, min_snr_gamma=0.01, validate_every=0, num_samples=0, steps=1, output=str(tmp_path / "b"))
    first = [read_rows(folder / "metrics.jsonl")[0][0]["loss"] for folder in (plain, low)]
    assert 0 < first[1] < first[0]


def test_a_full_run_draws_its_first_samples_with_the_weights_of_the_base(stage, values, tmp_path):
    """The training's own weights are back afterwards: the last validation is the saved prior's."""
    options = {"train": "full", "steps": 2, "num_validation": 1, "learning_rate": 1e-3, "mixed_precision": "bf16"}
    output = run(stage, values, **options, output=str(tmp_path / "full"))
    (row,), _ = read_rows(output / "samples.jsonl")
    dtype = torch.bfloat16
    drawn = {"before": load_pipeline(values["base"], dtype), "after": load_pipeline(str(output), dtype)}
    images = {}
    for side, pipeline in drawn.items():
        images[side] = np.asarray(sample_images(pipeline, [row["prompt"]], [row["seed"]], 64, 2, 2.5)[0], int)
        sampled = np.asarray(Image.open(output / row[side]), int)
        assert np.abs(images[side] - sampled).mean() < 2  # there under autocast, here in bfloat16
    assert np.abs(images["before"] - images["after"]).mean() > 4


# ---- the forms of the prior


def test_a_finished_run_writes_its_prior_in_every_form(stage, values, tmp_path):
    """The base with either LoRA predicts what the folder and the single file do; what was written before goes."""
    values = values | {"steps": 1, "validate_every": 0, "num_samples": 0}
    output = run(stage, values, single_file="fp32", output=str(tmp_path / "prior"))
    first = load_file(output / UNET)
    tuned = {"folder": load_pipeline(str(output)), "file": load_pipeline(str(output / stage.SINGLE_FILE))}
    for kind, name in LORA_FORMATS.items():
        run(stage, values, export="lora", lora_format=kind, output=str(output))
        kept = {path.name for path in output.iterdir()}
        assert name in kept and not kept & {"model_index.json", "unet", "vae", stage.SINGLE_FILE}
        assert len(kept & set(LORA_FORMATS.values())) == 1
        with safe_open(output / name, "pt") as opened:
            assert len(list(opened.keys())) < 200
        tuned[kind] = load_pipeline(values["base"])
        load_lora(tuned[kind], output / name)
    images = {
        kind: np.asarray(sample_images(pipeline, ["a face"], [0], 64, 2, 2.5)[0], int)
        for kind, pipeline in {**tuned, "base": load_pipeline(values["base"])}.items()
    }
    for kind in ("file", *LORA_FORMATS):
        assert np.abs(images[kind] - images["folder"]).max() <= 1, kind
    assert np.abs(images["base"] - images["folder"]).max() > 8

    restorer = load_stage("06_train_restorer")
    config = {"images": str(Path(values["portraits"], "images")), "facial_loss": "none", "init": "", "steps": 1}
    with pytest.raises(ValueError, match=f"{output} holds a LoRA alone, .* with `--export folder`"):
        restorer.main(restorer.Config(**config, prior=str(output), output=str(tmp_path / "restorer")))
    again = load_file(run(stage, values, output=str(output)) / UNET)
    assert all(torch.equal(again[key], first[key]) for key in first) and not (output / stage.SINGLE_FILE).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "full", "export": "lora"}, "`export` is lora, but `train` is full"),
        ({"export": "lora", "single_file": "fp16"}, "`single_file` is a whole checkpoint, but `export` is lora"),
        ({"train": "full", "quantization": "nf4"}, "quantized weights cannot be trained"),
        ({"resolution": 66}, "`resolution` has to be a multiple of 4 for this base but is 66"),
    ],
)
def test_what_could_not_be_written_or_drawn_is_refused_at_once(stage, values, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(stage, values, **options, output=str(tmp_path / "refused"))

"""AuthFaceRestorer: the folders that it reads and writes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_restorer import small_restorer

from faceprior import tiny
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.restorer import NEGATIVE_PROMPT, PROMPT, AuthFaceRestorer, RestorerSettings

FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def restorer():
    return small_restorer()


@pytest.fixture(scope="module")
def folder(restorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("restorer")
    restorer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def crops():
    return [Image.fromarray(draw_portrait(seed, 64).image) for seed in (1, 2, 3)]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


# ------------------------------------------------------------------------------------------------ files


def test_saving_and_loading(restorer, folder, crops):
    loaded = AuthFaceRestorer.from_pretrained(folder)
    assert loaded.settings == restorer.settings
    images = [r.restore_crops(crops[:1], **FAST)[0] for r in (restorer, loaded)]
    assert difference(*images).max() <= 1  # the place of weights in memory decides how sums round


def write_official_layout(folder, target):
    """As it is published: no index, one key more and one less in the ControlNet's config, CLIP's vocab.json."""
    shutil.copytree(folder, target)
    for name in ("model_index.json", "restorer_config.json"):
        (target / name).unlink()
    path = target / "controlnet/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "mid_block_type"}
    path.write_text(json.dumps({**config, "use_pre_img_encoder": False}))
    for name in ("tokenizer", "tokenizer_2"):
        model = json.loads((target / name / "tokenizer.json").read_text())["model"]
        (target / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (target / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (target / name / "tokenizer.json").unlink()


def test_the_official_layout(restorer, folder, tmp_path, crops):
    write_official_layout(folder, tmp_path / "official")
    loaded = AuthFaceRestorer.from_pretrained(str(tmp_path / "official"))
    assert loaded.settings == RestorerSettings()  # the official code's
    assert (loaded.settings.num_inference_steps, loaded.settings.guidance_scale, loaded.settings.seed) == (50, 8.0, 123)
    options = {"resolution": 64, "guidance_scale": 3.0, "prompt": "a man", "negative_prompt": "bad face", **FAST}
    images = [r.restore_crops(crops[:1], **options)[0] for r in (restorer, loaded)]
    assert difference(*images).max() <= 1


def test_the_official_prompts():
    """As published, with the spaces that are missing there."""
    assert PROMPT.startswith("hyper-realistic portrait, face close-up,") and PROMPT.endswith("without deformations")
    assert (
        "R camera,hyper detailed photo - realistic" in PROMPT
        and "ultra HD,extreme meticulous detailing, skin" in PROMPT
    )
    assert "sketch,cartoon, CG Style" in NEGATIVE_PROMPT and NEGATIVE_PROMPT.endswith(
        "hands/fingers, ugly, easy negative"
    )
    assert "  " not in PROMPT + NEGATIVE_PROMPT


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("controlnet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder_2", "config.json"),
        ("tokenizer", "tokenizer.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
def test_a_missing_part_is_named(folder, tmp_path, part, file):
    """Also where only its main file is missing: a tokenizer without words would load silently."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / part / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {part} in .*copy: there is no .*{part}/{file}"):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    with pytest.raises(FileNotFoundError, match=f"no {part} in "):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no restorer at .*06_train_restorer.py"):
        AuthFaceRestorer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"resolution": 64, "stepz": 3}', "unknown keys: stepz; it knows resolution, num_inference_steps"),
        ('{"steps": "50"}', "`num_inference_steps` has to be"),
        ('{"seed": true}', "`seed` has to be"),
        ('{"start": "lq"}', "`start` has to be one of noise, degraded"),
        ('{"resolution": 64', "line 1 column 18"),
        ("[1, 2]", "sequence"),
    ],
)
def test_bad_settings_are_named(folder, tmp_path, text, reason):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/restorer_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"restorer_config.json does not hold a restorer's settings: .*{reason}"):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")


def test_settings_may_be_given_in_part(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/restorer_config.json").write_text('{"resolution": 64, "guidance_scale": 2}')
    loaded = AuthFaceRestorer.from_pretrained(tmp_path / "copy")
    assert loaded.settings == RestorerSettings(resolution=64, guidance_scale=2)


def test_parts_in_bfloat16_beside_a_vae_in_float32(restorer, folder, crops):
    loaded = AuthFaceRestorer.from_pretrained(folder, torch.bfloat16)
    assert {loaded.pipeline.unet.dtype, loaded.pipeline.controlnet.dtype} == {torch.bfloat16}
    assert loaded.pipeline.vae.dtype == torch.float32
    options = {"guidance_scale": 2.0, "prompt": "a man", "color_fix": "none", "start": "degraded", **FAST}
    images = [r.restore_crops(crops[:1], **options)[0] for r in (restorer, loaded)]
    assert difference(*images).mean() < 3


def test_a_prior_of_another_type():
    prior = tiny.tiny_sd15()
    with pytest.raises(ValueError, match="SDXL type, with two text encoders, but is a StableDiffusionPipeline"):
        AuthFaceRestorer.from_prior(prior, tiny.tiny_controlnet(prior.unet))

"""The command line, called as a user calls it (in-process where nothing is launched)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from faceprior.cli import main
from faceprior.images import save_image
from faceprior.procedural import draw_portrait
from faceprior.restorer import AuthFaceRestorer, RestorerSettings
from faceprior.tiny import tiny_controlnet, tiny_sdxl


@pytest.fixture(scope="module")
def restorer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("restorer")
    prior = tiny_sdxl()
    settings = RestorerSettings(resolution=128, steps=2, guidance_scale=1.0, prompt="", negative_prompt="")
    AuthFaceRestorer.from_prior(prior, tiny_controlnet(prior.unet), settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def archive(tmp_path) -> Path:
    """A folder with a photograph, two drawings in a sub-folder, a landscape, and two bad files."""
    save_image(skimage.data.astronaut(), tmp_path / "archive/astronaut.png")
    save_image(draw_portrait(3).image, tmp_path / "archive/album/one.jpg")
    save_image(draw_portrait(4).image, tmp_path / "archive/album/one.png")
    save_image(skimage.data.coffee(), tmp_path / "archive/coffee.png")
    (tmp_path / "archive/torn.png").write_bytes((tmp_path / "archive/coffee.png").read_bytes()[:5000])
    (tmp_path / "archive/text.jpg").write_text("no picture")
    return tmp_path / "archive"


def test_score_prints_one_json_object_a_picture(archive, tiny_models, capsys):
    assert main(["score", str(archive), "--checkpoint", str(tiny_models / "scorer"), "--json"]) == 1
    out, err = capsys.readouterr()
    found = {Path(row["file"]).relative_to(archive).as_posix(): row for row in map(json.loads, out.splitlines())}
    assert len(found) == 6
    assert set(found["torn.png"]) == set(found["text.jpg"]) == {"file", "error"}
    assert found["coffee.png"]["faces"] == []
    (face,) = found["astronaut.png"]["faces"]
    assert 170 < face["box"][0] < face["box"][2] < 290 and face["confidence"] > 0.9
    assert np.isfinite(face["score"])
    assert "2 of 6 pictures failed" in err and "UNTRAINED" in err


def test_score_for_people(archive, tiny_models, capsys):
    assert main(["score", str(archive / "*.png"), "--checkpoint", str(tiny_models / "scorer")]) == 1
    out = capsys.readouterr().out
    assert f"{archive}/coffee.png: no face" in out
    assert f"{archive}/torn.png: error" in out


def test_restore_keeps_the_tree_the_size_and_the_background(archive, tmp_path, restorer, capsys):
    output = tmp_path / "restored"
    assert main(["restore", str(archive), "-o", str(output), "--checkpoint", restorer, "--compare"]) == 1
    out, err = capsys.readouterr()
    names = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
    whole = {"astronaut.png", "coffee.png", "album/one.jpg.png", "album/one.png.png"}
    assert whole <= names and "astronaut_compare.png" in names and len(names) == 8
    before, after = (np.asarray(Image.open(f / "astronaut.png").convert("RGB")) for f in (archive, output))
    assert before.shape == after.shape
    changed = (before != after).any(axis=2)
    assert changed.any() and not changed[:, :100].any() and not changed[400:].any()
    assert (np.asarray(Image.open(output / "coffee.png")) == skimage.data.coffee()).all()
    assert "coffee.png: no face found, copied as it is" in out
    assert "2 of 6 pictures failed" in err


def test_offline_without_a_checkpoint_the_id_is_named(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    picture = str(archive / "coffee.png")
    for command, name in (
        (["score", picture], "OPPOer/FaceScore"),
        (["restore", picture, "-o", str(tmp_path / "out")], "Ethanliang99/AuthFace"),
    ):
        assert main(command) == 2
        assert name in capsys.readouterr().err


def test_missing_pictures_and_checkpoints_end_with_one_line(tmp_path, capsys):
    assert main(["score", str(tmp_path / "nothing.png")]) == 2
    assert "nothing.png" in capsys.readouterr().err
    save_image(skimage.data.coffee(), tmp_path / "coffee.png")
    assert main(["score", str(tmp_path / "coffee.png"), "--checkpoint", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "faceprior"], [str(Path(sys.executable).parent / "faceprior")]]
)
def test_help_and_version(command):
    run = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "score" in run.stdout and "restore" in run.stdout
    run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("faceprior 0.")

"""The command line, called as a user calls it (in-process where nothing is launched)."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter

from faceprior import detect
from faceprior.cli import main, make_parser
from faceprior.cli import restore as restore_command
from faceprior.cli.drawing import COLOR
from faceprior.cli.outputs import RestoreRecord, plan_outputs
from faceprior.cli.results import ImageScores
from faceprior.cli.score_file import ScoreFile
from faceprior.images import load_image, save_image
from faceprior.models import DEFAULT_PROMPT
from faceprior.procedural import draw_portrait
from faceprior.restorer import AuthFaceRestorer, RestorerSettings
from faceprior.scorer import FaceScorer, ScoreReference
from faceprior.tiny import tiny_controlnet, tiny_sdxl


@pytest.fixture(scope="module")
def restorer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("restorer")
    prior = tiny_sdxl()
    settings = RestorerSettings(
        resolution=128, num_inference_steps=2, guidance_scale=1.0, prompt="", negative_prompt=""
    )
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
    (tmp_path / "archive/text.jpg").write_text("no image")
    return tmp_path / "archive"


@pytest.fixture(scope="module")
def scorer(tiny_models, tmp_path_factory) -> str:
    """The tiny scorer with a larger head, so that its scores differ in the digits that are printed."""
    model = FaceScorer.from_pretrained(tiny_models / "scorer")
    with torch.no_grad():
        for name, parameter in model.mlp.named_parameters():
            parameter.mul_(15 if name.endswith("weight") else 1)
    folder = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def score(scorer, capsys):
    """Run `faceprior score`; give (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = main(["score", *map(str, arguments), "--checkpoint", scorer, "--detector", "mtcnn"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def portraits(tmp_path_factory) -> Path:
    """Two folders of a model each: a/ with three faces, b/ with a face and a landscape of the same names."""
    root = tmp_path_factory.mktemp("portraits")
    for name, seed in (("a/1.png", 0), ("a/2.png", 1), ("a/10.png", 2), ("b/1.png", 3)):
        save_image(draw_portrait(seed, 160).image, root / name)
    save_image(skimage.data.coffee()[:160, :160], root / "b/2.png")
    return root


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def read_csv(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_score_prints_one_json_object_an_image(archive, tiny_models, capsys):
    assert main(["score", str(archive), "--checkpoint", str(tiny_models / "scorer"), "--json"]) == 1
    out, err = capsys.readouterr()
    found = {Path(row["file"]).relative_to(archive).as_posix(): row for row in map(json.loads, out.splitlines())}
    assert len(found) == 6
    assert set(found["torn.png"]) == set(found["text.jpg"]) == {"file", "error"}
    assert found["coffee.png"]["faces"] == []
    (face,) = found["astronaut.png"]["faces"]
    assert set(face) == {"score", "percentile", "box", "confidence"} and face["percentile"] is None
    assert 170 < face["box"][0] < face["box"][2] < 290 and face["confidence"] > 0.9
    assert np.isfinite(face["score"])
    assert "2 of 6 images failed" in err and "UNTRAINED" in err


def test_score_for_people(archive, score):
    code, out, err = score(archive / "*.png")
    assert code == 1
    head, astronaut, coffee, torn = out.splitlines()
    assert head.split() == ["score", "percentile", "confidence", "x0", "y0", "x1", "y1", "file"]
    assert coffee.split() == ["no", "face", f"{archive}/coffee.png"]
    assert torn.split() == ["error", f"{archive}/torn.png"]
    assert astronaut.endswith(f"{archive}/astronaut.png") and len(astronaut.split()) == 8
    assert astronaut.split()[1] == "-"  # this scorer came without a reference set
    assert f"{archive}/torn.png is truncated" in err and "1 of 3 images failed" in err


def test_the_scores_are_those_of_the_sdk_whatever_the_batch(portraits, scorer, score):
    """Batches of 2 go across the images; the sums in another order differ in the last digits only."""
    found = rows_of(score(portraits, "--json", "--batch-size", 2)[1])
    model = FaceScorer.from_pretrained(scorer)
    for row in found:
        expected = [face.to_dict() for face in model.score(row["file"], detector="mtcnn")]
        assert [face["box"] for face in row["faces"]] == [face["box"] for face in expected]
        for face, wanted in zip(row["faces"], expected, strict=True):
            assert face["score"] == pytest.approx(wanted["score"], rel=1e-4)
    names = [Path(row["file"]).relative_to(portraits).as_posix() for row in found]
    assert names == ["a/1.png", "a/2.png", "a/10.png", "b/1.png", "b/2.png"]


def test_sort_and_min_score(portraits, score):
    rows = rows_of(score(portraits, "--json")[1])
    scores = sorted((face["score"] for row in rows for face in row["faces"]), reverse=True)
    limit = (scores[1] + scores[2]) / 2
    ranked = rows_of(score(portraits, "--json", "--sort", "--min-score", limit)[1])
    assert [face["score"] for row in ranked for face in row["faces"]] == pytest.approx(scores[:2])
    assert [len(row["faces"]) for row in ranked] == [1, 1, 0, 0, 0]
    _, table, err = score(portraits, "--sort", f"--min-score={limit}")
    first = [line.split()[0] for line in table.splitlines()[1:]]
    assert first == [f"{scores[0]:.4f}", f"{scores[1]:.4f}", "below", "below", "no"]
    assert " 4 " in err.splitlines()[-1]  # the summary holds the faces below the limit, too


def test_the_summary_of_each_folder(portraits, score):
    code, out, err = score(portraits / "a", portraits / "b", "--json")
    head, *lines = err.splitlines()[-3:]
    assert code == 0 and head.split() == ["folder", "images", "no", "face", "faces", "mean", "median"]
    scores = [face["score"] for row in rows_of(out)[:3] for face in row["faces"]]
    middle = [f"{np.mean(scores):.4f}", f"{np.median(scores):.4f}"]
    assert lines[0].split() == [str(portraits / "a"), "3", "0.0%", "3", *middle]
    assert lines[1].split()[:4] == [str(portraits / "b"), "2", "50.0%", "1"]


def test_csv_holds_a_row_per_face_and_per_image_without(archive, tmp_path, score):
    table = tmp_path / "deep/scores.csv"
    found = {row["file"]: row for row in rows_of(score(archive, "--json", "--csv", table)[1])}
    rows = read_csv(table)
    assert list(rows[0]) == [
        "file", "face", "faces", "score", "percentile", "confidence", "x0", "y0", "x1", "y1", "error"
    ]  # fmt: skip
    assert {row["file"] for row in rows} == set(found)
    for row in rows:
        expected = found[row["file"]]
        assert row["error"] == expected.get("error", "")
        if row["face"]:
            face = expected["faces"][int(row["face"]) - 1]
            assert [float(row[edge]) for edge in ("x0", "y0", "x1", "y1")] == face["box"]
            assert float(row["score"]) == face["score"] and float(row["confidence"]) == face["confidence"]
        else:
            assert row["faces"] == ("" if row["error"] else "0") and row["score"] == ""


def test_percentiles_of_a_scorer_with_a_reference(portraits, tmp_path, scorer, capsys):
    """In JSON, CSV and table, read back from the CSV; a file of another reference is refused."""
    model = FaceScorer.from_pretrained(scorer)
    model.reference = ScoreReference.from_scores("drawn", [-1e6, 1e6], [-1e6, -1e6])  # a straight line through 50%
    model.save_pretrained(tmp_path / "model")
    table = tmp_path / "scores.csv"
    command = ["score", str(portraits / "a"), "--checkpoint", str(tmp_path / "model"), "--detector", "mtcnn"]
    outputs = []
    for options in (["--json", "--csv", str(table)], ["--json", "--csv", str(table)], []):
        assert main([*command, *options]) == 0
        outputs.append(capsys.readouterr().out)
    faces = [face for row in rows_of(outputs[0]) for face in row["faces"]]
    assert faces and outputs[1] == outputs[0]
    for face in faces:
        assert face["percentile"] == pytest.approx(50 + face["score"] / 2e4, abs=1e-6)
    assert [float(row["percentile"]) for row in read_csv(table)] == [face["percentile"] for face in faces]
    assert [float(line.split()[1]) for line in outputs[2].splitlines()[1:]] == [
        pytest.approx(face["percentile"], abs=0.06) for face in faces
    ]
    ScoreReference.from_scores("others", [0.0], [0.0]).save(tmp_path / "model")
    assert main([*command, "--csv", str(table)]) == 2
    assert "reference was 'drawn (n = 2)' and is 'others (n = 1)'" in capsys.readouterr().err


def test_csv_resumes_where_it_was_cut(portraits, tmp_path, score):
    """Cut anywhere behind its head, the file is whole again afterwards, and what it held is not scored again."""
    table = tmp_path / "scores.csv"
    _, whole, _ = score(portraits, "--json", "--csv", table)
    text = table.read_text()
    lines = text.splitlines(keepends=True)
    for cut in (len(lines[0]), len(lines[0]) + 20, len("".join(lines[:3])) - 1, len("".join(lines[:3]))):
        table.write_text(text[:cut])
        code, again, _ = score(portraits, "--json", "--csv", table)
        assert code == 0
        for row, expected in zip(rows_of(again), rows_of(whole), strict=True):
            assert row["file"] == expected["file"]
            assert [face["score"] for face in row["faces"]] == pytest.approx(
                [face["score"] for face in expected["faces"]], rel=1e-4
            )
        assert [row["file"] for row in read_csv(table)] == [row["file"] for row in rows_of(whole)]
    rows = read_csv(table)
    table.write_text(table.read_text().replace(rows[0]["score"], "7.25"))
    _, again, err = score(portraits, "--json", "--csv", table)
    assert rows_of(again)[0]["faces"][0]["score"] == 7.25
    assert "5 of 5 images were scored before" in err
    _, anew, _ = score(portraits, "--json", "--csv", table, "--overwrite")
    assert rows_of(anew)[0]["faces"][0]["score"] == pytest.approx(float(rows[0]["score"]), rel=1e-4)


def test_an_image_that_failed_or_lacks_a_row_is_tried_again(tmp_path, score):
    folder, table = tmp_path / "in", tmp_path / "scores.csv"
    two = np.concatenate([draw_portrait(0, 160).image, draw_portrait(1, 160).image], axis=1)
    save_image(two, folder / "two.png")
    (folder / "late.png").write_bytes(b"not yet copied")
    assert score(folder, "--csv", table)[0] == 1
    text = table.read_text()
    assert [row["face"] for row in read_csv(table)] == ["", "1", "2"]
    table.write_text("".join(text.splitlines(keepends=True)[:-1]))  # a power cut between the two rows
    save_image(draw_portrait(2, 160).image, folder / "late.png")
    code, _, err = score(folder, "--csv", table)
    assert code == 0 and "2 that failed or are incomplete are tried again" in err
    assert [(Path(row["file"]).name, row["face"]) for row in read_csv(table)] == [
        ("late.png", "1"),
        ("two.png", "1"),
        ("two.png", "2"),
    ]


def test_csv_of_other_settings_or_hands_is_refused(portraits, tmp_path, scorer, score):
    table = tmp_path / "scores.csv"
    image = portraits / "b/1.png"
    assert score(image, "--csv", table)[0] == 0
    code, out, err = score(image, "--csv", table, "--min-confidence", 0.8, "--min-face-size", 30)
    assert code == 2 and not out
    assert "min_confidence was 0.9 and is 0.8; min_face_size was 20 and is 30)" in err and "--overwrite" in err
    _, _, err = score(image, "--csv", table, "--dtype", "bfloat16")
    assert "(dtype was 'float32' and is 'bfloat16')" in err
    original = table.read_text()
    for text, reason in (
        ("name,score\nx,1\n", "has the columns"),
        (original.replace(",1,1,", ",1,one,"), "did not write"),
        (original.replace("\n", ",9\n"), "has the columns"),
    ):
        table.write_text(text)
        code, _, err = score(image, "--csv", table)
        assert code == 2 and reason in err and table.read_text() == text
    (tmp_path / "scores.csv.json").unlink()
    assert "scores.csv.json, which holds its settings, does not" in score(image, "--csv", table)[2]
    assert score(image, "--csv", table, "--overwrite")[0] == 0
    assert table.read_text().count("\n") == 2


def test_csv_notices_that_the_folder_holds_other_weights(portraits, tmp_path, scorer, capsys):
    model = FaceScorer.from_pretrained(scorer)
    model.save_pretrained(tmp_path / "model")
    command = ["score", str(portraits / "b"), "--checkpoint", str(tmp_path / "model"), "--csv", str(tmp_path / "s.csv")]
    assert main(command) == 0
    with torch.no_grad():
        model.mlp[0].bias.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    assert main(command) == 2
    assert "other settings (weights was" in capsys.readouterr().err


def test_csv_of_another_folder_s_relative_names_is_refused(portraits, tmp_path, score, monkeypatch):
    """a/1.png and b/1.png are both called 1.png from inside; names from the root are the same from anywhere."""
    table = tmp_path / "s.csv"
    monkeypatch.chdir(portraits / "a")
    assert score(".", "--csv", table)[0] == 0
    assert "3 of 3 images were scored before" in score(".", "--csv", table)[2]
    assert score(portraits / "a", "--csv", tmp_path / "whole.csv")[0] == 0
    monkeypatch.chdir(portraits / "b")
    code, out, err = score(".", "--csv", table)
    assert code == 2 and not out and f"(directory was '{portraits / 'a'}' and is '{portraits / 'b'}')" in err
    assert "3 of 3 images were scored before" in score(portraits / "a", "--csv", tmp_path / "whole.csv")[2]


@pytest.mark.parametrize("overwrite", [False, True])
def test_csv_that_was_killed_while_it_was_begun(tmp_path, monkeypatch, overwrite):
    """Killed before each of its files is in place: the same command goes on, with no row of other settings."""
    for step in range(2):
        path, steps = tmp_path / f"{step}.csv", iter(range(2))
        if overwrite:
            ScoreFile(path, {"dtype": "float32"}).append(ImageScores("1.png"))

        def replace(*names, original=os.replace, steps=steps, step=step):
            if next(steps) == step:
                raise KeyboardInterrupt
            original(*names)

        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr("os.replace", replace)
            ScoreFile(path, {"dtype": "bfloat16"}, overwrite)
        assert ScoreFile(path, {"dtype": "bfloat16"}).rows == {}


def test_csv_that_was_saved_in_another_encoding_is_named(portraits, tmp_path, score):
    table = tmp_path / "s.csv"
    shutil.copy(portraits / "b/1.png", tmp_path / "café.png")
    assert score(tmp_path / "café.png", "--csv", table)[0] == 0
    text = table.read_text(encoding="utf-8")
    table.write_text(text, encoding="latin-1")
    code, out, err = score(tmp_path / "café.png", "--csv", table)
    assert code == 2 and not out and f"{table} is not in UTF-8" in err and "start over with --overwrite" in err
    table.write_text(text, encoding="utf-8-sig")
    assert "1 of 1 images were scored before" in score(tmp_path / "café.png", "--csv", table)[2]


def test_a_scored_image_that_is_gone_keeps_its_scores(portraits, tmp_path, score, monkeypatch):
    """It fails while it is not there; once it is back, what it was scored with counts again."""
    image, table = tmp_path / "1.png", tmp_path / "s.csv"
    shutil.copy(portraits / "a/1.png", image)
    monkeypatch.chdir(tmp_path)

    def listed():
        names = f"./1.png\n{portraits / 'b/1.png'}\n"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(names.encode())))
        return score("-", "--csv", table)

    assert listed()[0] == 0
    text = table.read_text()
    image.unlink()
    for _ in range(2):
        code, _, err = listed()
        assert code == 1 and "no file or folder at 1.png" in err and table.read_text() == text
    shutil.copy(portraits / "a/1.png", image)
    code, _, err = listed()
    assert code == 0 and "2 of 2 images were scored before" in err and table.read_text() == text


def test_ctrl_c_keeps_what_is_done(portraits, tmp_path, score, monkeypatch):
    """The signal comes once three images are on record, the last one perhaps before it counts as done."""
    table = tmp_path / "scores.csv"
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / f"in/{number}.png").write_bytes((portraits / "a/1.png").read_bytes())
    append, calls = ScoreFile.append, iter(range(1, 31))

    def append_and_interrupt(file, result) -> None:
        append(file, result)
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = ["--csv", table, "--batch-size", 1, "--json", "--sort"]
    with monkeypatch.context() as interrupted:
        interrupted.setattr(ScoreFile, "append", append_and_interrupt)
        code, out, err = score(tmp_path / "in", *options)
    done = len(rows_of(out))
    assert code == 130 and len(read_csv(table)) == 3 and done in (2, 3)
    assert f"{done} of 30 images done" in err
    for image in sorted((tmp_path / "in").iterdir())[20:]:
        image.unlink()
    code, out, err = score(tmp_path / "in", *options)
    assert code == 0 and len(rows_of(out)) == 20 and "images were scored before" in err


BAD = {
    "empty.png": (b"", "is empty"),
    "text.jpg": (b"no image", "not an image that Pillow can read"),
    "bomb.png": (None, "beyond Pillow's own limit"),
    "torn.png": (None, "is truncated"),
    "torn.jpg": (None, "is truncated"),
    "gone.png": ("nowhere.png", "is a link that leads nowhere"),
    "loop.png": ("loop.png", "is a link that leads nowhere"),
}


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_files_are_named_and_the_rest_is_scored(portraits, tmp_path, score):
    folder = tmp_path / "in"
    (folder / "nothing").mkdir(parents=True)
    whole = (portraits / "a/1.png").read_bytes()
    jpeg = io.BytesIO()
    Image.open(portraits / "a/1.png").save(jpeg, "JPEG")
    made = {"bomb.png": png_header(60_000, 60_000), "torn.png": whole[: len(whole) // 2]}
    made["torn.jpg"] = jpeg.getvalue()[: len(jpeg.getvalue()) // 2]
    for name, (data, _) in BAD.items():
        if isinstance(data, str):
            (folder / name).symlink_to(data)
        else:
            (folder / name).write_bytes(made[name] if data is None else data)
    (folder / "folder.png").mkdir()  # not an image, and nothing in it
    os.mkfifo(folder / "pipe.png")  # nobody writes to it: who reads it waits for ever
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("RGB", (2000, 1)).save(folder / "line.png")
    (folder / "good.png").write_bytes(whole)
    table = tmp_path / "scores.csv"
    code, out, err = score(folder, "--json", "--csv", table, "--draw", tmp_path / "drawn")
    found = {Path(row["file"]).name: row for row in rows_of(out)}
    assert code == 1 and len(found) == 10
    for name, (_, reason) in BAD.items():
        assert reason in found[name]["error"] and reason in err
    assert found["one.png"]["faces"] == found["line.png"]["faces"] == []
    assert len(found["good.png"]["faces"]) == 1
    assert "7 of 10 images failed" in err
    assert {path.name for path in (tmp_path / "drawn").glob("*.png")} == {"one.png", "line.png", "good.png"}
    code, _, err = score(folder / "nothing", folder / "bo[mb")
    assert code == 2 and "no images in" in err and "bo[mb" in err


def test_every_kind_of_image_gives_the_same_face(tmp_path, score):
    image = Image.fromarray(draw_portrait(9, 200).image)
    image.save(tmp_path / "plain.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.quantize(256).save(tmp_path / "palette.gif")
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by a quarter clockwise
    image.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    for mode in ("RGBA", "P", "L", "LA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    code, out, _ = score(tmp_path, "--json", "--draw", tmp_path / "drawn")
    rows = rows_of(out)
    assert code == 0 and len(rows) == 9
    (expected,) = (face for row in rows if row["file"].endswith("plain.png") for face in row["faces"])
    for row in rows:
        (face,) = row["faces"]
        assert np.abs(np.subtract(face["box"], expected["box"])).max() < 8, row["file"]
        with Image.open(tmp_path / "drawn" / Path(row["file"]).with_suffix(".png").name) as drawn:
            assert (drawn.mode, drawn.size) == ("RGB", (200, 200))  # the turned one upright


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(portraits, tmp_path, score):
    for name in ("in/open.png", "in/locked.png", "in/secret/hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((portraits / "a/1.png").read_bytes())
    (tmp_path / "in/locked.png").chmod(0)
    (tmp_path / "in/secret").chmod(0)
    code, out, err = score(tmp_path / "in", "--json")
    (tmp_path / "in/secret").chmod(0o700)
    assert code == 1 and [Path(row["file"]).name for row in rows_of(out)] == ["locked.png", "open.png"]
    assert "Permission denied" in rows_of(out)[0]["error"] and "1 of 2 images failed" in err
    assert f"skipped: [Errno 13] Permission denied: '{tmp_path / 'in/secret'}'" in err


def test_names_that_are_no_text(portraits, tmp_path, score):
    """A Latin-1 name and one with a line break and a colour code: one line each, and known again by their names."""
    names = [os.fsdecode(b"in/caf\xe9.png"), "in/two\nlines \x1b[31m.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        try:
            (tmp_path / name).write_bytes((portraits / "a/1.png").read_bytes())
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    table = tmp_path / "s.csv"
    options = ["--csv", table, "--draw", tmp_path / "drawn", "--copy-best", 2, tmp_path / "best"]
    code, out, _ = score(tmp_path / "in", *options)
    assert code == 0 and len(out.splitlines()) == 3
    assert r"caf\udce9.png" in out and r"two\nlines \x1b[31m.png" in out
    assert len(read_csv(table)) == 2
    assert "2 of 2 images were scored before" in score(tmp_path / "in", *options)[2]
    assert (tmp_path / "drawn" / Path(names[0]).name).is_file()
    assert rows_of(score(tmp_path / names[0], "--json")[1])[0]["file"] == str(tmp_path / names[0])


def test_a_hundred_faces(tmp_path, scorer, score):
    """Ten by ten portraits in one image and a single one behind it, in batches that straddle the two."""
    tiles = [draw_portrait(seed, 96).image for seed in (0, 1, 2)]
    grid = np.concatenate([np.concatenate([tiles[(r + c) % 3] for c in range(10)], axis=1) for r in range(10)])
    save_image(grid, tmp_path / "in/grid.png")
    save_image(draw_portrait(0, 160).image, tmp_path / "in/one.png")
    options = ["--json", "--batch-size", 16, "--min-confidence", 0.6, "--min-face-size", 24]
    code, out, _ = score(tmp_path / "in", *options, "--draw", tmp_path / "drawn")
    crowd, one = rows_of(out)
    assert code == 0 and len(one["faces"]) == 1 and len(crowd["faces"]) == 100
    expected = FaceScorer.from_pretrained(scorer).score(grid, faces=[face["box"] for face in crowd["faces"]])
    scores = [face["score"] for face in crowd["faces"]]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([face.score for face in expected], abs=1e-5 * scores[0])
    assert Image.open(tmp_path / "drawn/grid.png").size == (960, 960)


def test_a_list_on_stdin_with_a_path_that_is_not_there(portraits, tmp_path, score, monkeypatch):
    names = [portraits / "b/1.png", tmp_path / "gone.png", portraits / "a/2.png", portraits / "b/1.png"]
    text = "\r\n".join(map(str, names)) + "\n\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, err = score("-", "--json")
    assert code == 1 and [row["file"] for row in rows_of(out)] == [str(name) for name in names[:3]]
    assert "no file or folder at" in rows_of(out)[1]["error"] and "1 of 3 images failed" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    code, _, err = score("-")
    assert code == 2 and "no paths on stdin" in err


def test_drawings_keep_the_tree_and_are_not_scored(tmp_path, portraits, score):
    shutil.copytree(portraits, tmp_path / "in")
    drawn = tmp_path / "in/drawn"
    code, out, _ = score(tmp_path / "in/a", tmp_path / "in/b", "--json", "--draw", drawn)
    assert code == 0
    tree = sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.png"))
    assert tree == ["a/1.png", "a/10.png", "a/2.png", "b/1.png", "b/2.png"]
    before, after = (np.asarray(Image.open(folder / "a/1.png")) for folder in (tmp_path / "in", drawn))
    ((face,), name) = rows_of(out)[0]["faces"], rows_of(out)[0]["file"]
    x0, y0, x1, y1 = map(round, face["box"])
    assert name.endswith("a/1.png") and (after[y0 + 5 : y1 - 5, x0] == COLOR).all()
    assert (after[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3] == before[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]).all()
    assert (after[:, : x0 - 1] == before[:, : x0 - 1]).all() and (after[y1 + 2 :] == before[y1 + 2 :]).all()
    for images in (tmp_path / "in", tmp_path / "in/**/*.png"):  # even without --draw
        _, out, err = score(images, "--json")
        assert len(rows_of(out)) == 5 and "5 images skipped" in err
    assert len(rows_of(score(drawn / "a", "--json")[1])) == 3  # unless asked for by name


def test_output_folders_that_would_spoil_something_are_refused(tmp_path, portraits, score):
    shutil.copytree(portraits / "a", tmp_path / "in")
    for options in (["--draw", tmp_path / "in"], ["--copy-best", 1, tmp_path]):
        code, out, err = score(tmp_path / "in", *options)
        assert code == 2 and not out and "contains an image to score" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    code, _, err = score(tmp_path / "in", "--draw", tmp_path / "mine")
    assert code == 2 and "has to be new, empty, or from an earlier run" in err


def test_images_of_one_stem_are_drawn_apart(portraits, tmp_path, score):
    save_image(draw_portrait(1, 160).image, tmp_path / "1.png")
    save_image(draw_portrait(2, 160).image, tmp_path / "1.jpg")
    score(tmp_path / "1.png", tmp_path / "1.jpg", "--draw", tmp_path / "drawn")
    assert {path.name for path in (tmp_path / "drawn").glob("*.png")} == {"1.png.png", "1.jpg.png"}
    score(portraits / "a/1.png", portraits / "b/1.png", "--draw", tmp_path / "apart")
    assert len(list((tmp_path / "apart").rglob("1.png"))) == 2


def test_a_missing_drawing_is_made_from_the_file(portraits, tmp_path, score):
    options = ["--csv", tmp_path / "s.csv", "--draw", tmp_path / "drawn"]
    score(portraits / "a", *options)
    first = (tmp_path / "drawn/2.png").read_bytes()
    (tmp_path / "drawn/2.png").unlink()
    score(portraits / "a", *options)
    assert (tmp_path / "drawn/2.png").read_bytes() == first


def test_an_image_that_was_damaged_since_it_was_scored(portraits, tmp_path, score):
    """It is reported as not drawn, each time, and keeps its scores; the others are drawn."""
    folder, table = tmp_path / "in", tmp_path / "s.csv"
    shutil.copytree(portraits / "a", folder)
    score(folder, "--csv", table)
    text = table.read_text()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:1000])
    for _ in range(2):
        code, out, err = score(folder, "--json", "--csv", table, "--draw", tmp_path / "drawn")
        assert code == 1 and "1 of 3 images failed" in err
        first, *others = rows_of(out)
        assert first["error"].startswith(f"scored, but not drawn: {folder}/1.png is truncated")
        assert all(row["faces"] for row in others) and table.read_text() == text
        assert {path.name for path in (tmp_path / "drawn").glob("*.png")} == {"2.png", "10.png"}


def test_copy_best(portraits, tmp_path, score):
    rows = rows_of(score(portraits, "--json", "--copy-best", 2, tmp_path / "best")[1])
    ranked = sorted((row for row in rows if row["faces"]), key=lambda row: -row["faces"][0]["score"])
    copies = sorted((tmp_path / "best").glob("*.png"))
    assert [path.name for path in copies] == [f"{i}_{Path(row['file']).name}" for i, row in enumerate(ranked[:2], 1)]
    assert [path.read_bytes() for path in copies] == [Path(row["file"]).read_bytes() for row in ranked[:2]]
    limit = ranked[0]["faces"][0]["score"] - 1e-6
    _, _, err = score(portraits, "--copy-best", 10, tmp_path / "few", f"--min-score={limit}")
    assert [path.name[:3] for path in (tmp_path / "few").glob("*.png")] == ["01_"]
    assert "1 image copied" in err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--min-confidence", "1.5"], "--min-confidence: has to be a number in [0, 1] but is '1.5'"),
        (["--min-confidence", "nan"], "a number in [0, 1]"),
        (["--min-face-size", "0"], "--min-face-size: has to be a whole number, at least 1 but is '0'"),
        (["--batch-size", "2.5"], "--batch-size: has to be a whole number"),
        (["--min-score", "inf"], "--min-score: has to be a finite number but is 'inf'"),
        (["--copy-best", "0", "best"], "--copy-best: N has to be a whole number, at least 1 but is '0'"),
        (["--detector", "dlib"], "invalid choice"),
    ],
)
def test_options_out_of_range_name_the_rule(options, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["score", "x.png", *options])
    assert stop.value.code == 2 and rule in capsys.readouterr().err


def test_the_default_prompt_is_the_scorers():
    assert make_parser().parse_args(["score", "x.png"]).prompt == DEFAULT_PROMPT


def test_a_prompt_without_its_tokenizer_ends_before_the_first_image(portraits, score, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = score(portraits, "--prompt", "A happy face.")
    assert code == 2 and not out and "needs the tokenizer" in err


def test_restore_keeps_the_tree_the_size_and_the_background(archive, tmp_path, restorer, capsys):
    output = tmp_path / "restored"
    # a face sharper than this restorer's 64 pixels would be left alone
    blurred = load_image(archive / "astronaut.png").filter(ImageFilter.GaussianBlur(2))
    save_image(blurred, archive / "astronaut.png")
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
    assert "2 of 6 images failed" in err


@pytest.fixture
def restore(restorer, capsys):
    """Run `faceprior restore`; give (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = main(["restore", *map(str, arguments), "--checkpoint", restorer, "--detector", "mtcnn"])
        return code, *capsys.readouterr()

    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def landscape(brightness: int = 1, size: int = 48) -> np.ndarray:
    """An image without a face, which is restored in no time."""
    return skimage.data.coffee()[:size, :size] // brightness


KINDS = {"result": "{base}.png", "copy": "{base}{suffix}", "comparison": "{base}_compare.png"}


@pytest.mark.parametrize(
    ("names", "bases"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg.png"]),
        (["b.png", "b_compare.png"], ["b.png", "b_compare.png"]),
        (["b.png", "b_compare.jpg", "b_compare_compare.gif"], ["b.png", "b_compare.jpg", "b_compare_compare.gif"]),
        (["A.png", "a.png"], ["A.png", "a.png-2"]),
        (["a/1.png", "b/1.png"], ["a/1", "b/1"]),
        (["none", "none.png"], ["none-2", "none.png"]),
        (["x.png", "x.png/y.jpg"], ["x.png", "x.png/y"]),
    ],
)
def test_no_two_outputs_have_one_name(names, bases):
    """By every file system's count: without regard to case, and of files and folders."""
    planned = plan_outputs({name: Path(name) for name in names}, KINDS)
    files = [file.casefold() for outputs in planned.values() for file in set(outputs.values())]
    assert len(files) == len(set(files))
    folders = {parent.as_posix().casefold() for file in files for parent in Path(file).parents}
    assert not folders & set(files)
    if names != ["none", "none.png"] and names[0] != "x.png":
        assert [outputs["result"] for outputs in planned.values()] == [f"{base}.png" for base in bases]


def test_names_of_earlier_runs_stay():
    inner = {name: Path(name) for name in ("a.png", "a.jpg")}
    planned = plan_outputs(inner, KINDS, known={"a.jpg": "a"}, taken=["b.png"])
    assert planned["a.jpg"]["result"] == "a.png" and planned["a.png"]["result"] == "a.png.png"
    assert plan_outputs({"b.jpg": Path("b.jpg")}, KINDS, taken=["B.png"])["b.jpg"]["result"] == "b.jpg.png"


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_restore_never_overwrites_an_input(tmp_path, restore, link):
    save_image(landscape(), tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    if link == "symbolic":
        (tmp_path / "out/a.png").symlink_to(tmp_path / "in/a.png")
    else:
        os.link(tmp_path / "in/a.png", tmp_path / "out/a.png")
    before = tree(tmp_path)
    for images in (["in/a.png"], ["in/a.png", "--overwrite"], ["in", "--compare"]):
        code, out, err = restore(tmp_path / images[0], *images[1:], "-o", tmp_path / "out")
        assert code == 2 and not out and "would overwrite the input" in err and "give another place" in err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["in", "link"])
def test_restore_into_the_folder_of_the_input(tmp_path, restore, output):
    save_image(landscape(), tmp_path / "in/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = tree(tmp_path)
    for images in ("in", "in/a.png"):
        code, out, err = restore(tmp_path / images, "-o", tmp_path / output)
        assert code == 2 and not out and "would overwrite the input" in err and "give another place" in err
    assert tree(tmp_path) == before


def test_photographs_in_the_output_folder_are_restored(tmp_path, restore):
    """Only what the record of the folder lists is skipped."""
    save_image(landscape(1), tmp_path / "in/x.png")
    save_image(landscape(2), tmp_path / "in/y.png")
    save_image(landscape(3), tmp_path / "in/sub/z.png")
    photographs = tree(tmp_path / "in")
    code, out, err = restore(tmp_path / "in", "-o", tmp_path / "in/sub")
    assert code == 0 and out.count("copied as it is") == 3 and "skipped" not in err
    found = tree(tmp_path / "in")
    assert photographs.items() < found.items()
    for name, source in (("x.png", "x.png"), ("y.png", "y.png"), ("sub/z.png", "sub/z.png")):
        assert found[f"sub/{name}"] == photographs[source]
    code, out, err = restore(tmp_path / "in", "-o", tmp_path / "in/sub")
    assert code == 0 and out.count("finished before") == 3 and "3 images skipped, which faceprior itself wrote" in err
    assert tree(tmp_path / "in") == found


def test_restore_overwrites_no_file_that_it_did_not_write(tmp_path, restore):
    save_image(landscape(), tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"my own")
    for options in ([], ["--overwrite"]):
        code, _, err = restore(tmp_path / "in", "-o", tmp_path / "out", *options)
        assert code == 2 and "no run of `faceprior restore` wrote it: move it away" in err
    assert tree(tmp_path / "out") == {"a.png": b"my own"}
    code, _, err = restore(tmp_path / "in", "-o", tmp_path / "in/a.png")
    assert code == 2 and "is a file: give a folder" in err


def test_all_files_in_the_way_are_named_at_once(tmp_path, restore):
    for number in range(13):
        save_image(landscape(), tmp_path / f"in/{number}.png")
    (tmp_path / "out").mkdir()
    for count in (2, 12):
        for number in range(count):
            (tmp_path / f"out/{number}.png").write_bytes(b"my own")
        code, out, err = restore(tmp_path / "in", "-o", tmp_path / "out")
        listed = ", ".join(str(tmp_path / f"out/{number}.png") for number in range(min(count, 10)))
        more = " and 2 more" if count == 12 else ""
        assert code == 2 and not out
        assert f"{listed}{more} exist, and no run of `faceprior restore` wrote them: move them away" in err
        assert len(tree(tmp_path / "out")) == count


def test_restore_writes_every_result_and_comparison(tmp_path, restore):
    for number, name in enumerate(("a.jpg", "a.png", "b.png", "b_compare.png"), 1):
        save_image(landscape(number), tmp_path / "in" / name)
    save_image(landscape(5), tmp_path / "in/a.jpg.png")
    code, out, _ = restore(tmp_path / "in", "-o", tmp_path / "out", "--compare")
    assert code == 0 and len(list((tmp_path / "out").glob("*_compare.png"))) == 5
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 10
    targets = [line.split(" -> ")[1] for line in out.splitlines()]
    sources = [line.split(": ")[0] for line in out.splitlines()]
    assert [Path(target).read_bytes() for target in targets] == [Path(source).read_bytes() for source in sources]


def test_restore_again(tmp_path, restore):
    """Finished images are skipped while they and the settings are the same; outputs are no inputs."""
    save_image(draw_portrait(3, 160).image, tmp_path / "in/face.png")
    save_image(landscape(), tmp_path / "in/none.jpg")
    output = tmp_path / "in/restored"
    command = [tmp_path / "in", "-o", output]
    code, out, _ = restore(*command)
    assert code == 0 and "1 face restored" in out and "copied as it is" in out
    first = tree(output)
    assert {"face.png", "none.jpg"} < first.keys() and first["none.jpg"] == (tmp_path / "in/none.jpg").read_bytes()

    os.utime(tmp_path / "in/face.png", (1, 1))  # the same content
    code, out, err = restore(*command)
    assert code == 0 and out.count("finished before") == 2 and "2 images skipped, which faceprior itself wrote" in err
    assert tree(output) == first

    code, out, _ = restore(*command, "--compare")  # which were not written yet
    assert "finished before" not in out and (output / "face_compare.png").is_file()
    assert (output / "face.png").read_bytes() == first["face.png"]
    assert restore(*command, "--seed", 9)[1].count("finished before") == 0
    assert (output / "face.png").read_bytes() != first["face.png"]
    assert "finished before" not in restore(*command, "--quantization", "nf4")[1]
    assert (output / "face.png").read_bytes() != first["face.png"]
    assert restore(*command, "--seed", 9)[1].count("finished before") == 0

    save_image(landscape(2), tmp_path / "in/none.jpg")
    code, out, _ = restore(*command, "--seed", 9)
    assert out.count("finished before") == 1 and "none.jpg: no face" in out
    assert "finished before" not in restore(*command, "--seed", 9, "--overwrite")[1]

    files = [path for path in (tmp_path / "in").rglob("*.png")]  # as a shell expands **/*.png
    code, _, err = restore(*files, "-o", output, "--seed", 9)
    assert code == 0 and err.count("1 image skipped, which faceprior itself wrote") == 1  # comparisons were removed
    code, _, err = restore(output / "face.png", "-o", output)
    assert code == 2 and "no images besides those that faceprior itself wrote" in err


def test_a_name_that_is_too_long_fails_before_the_work(tmp_path, restore, monkeypatch):
    """Its bytes count; the other images are restored, and it is, too, where its names are short enough."""
    long = "é" * 120 + ".jpg"  # 244 bytes; its comparison has 252
    save_image(landscape(), tmp_path / "in/a.jpg")
    shutil.copy(tmp_path / "in/a.jpg", tmp_path / "in" / long)
    shutil.copy(tmp_path / "in/a.jpg", tmp_path / "in" / f"{'x' * 251}.jpg")
    read, original = [], restore_command.read_source
    with monkeypatch.context() as counted:
        counted.setattr(restore_command, "read_source", lambda file: read.append(file) or original(file))
        code, out, err = restore(tmp_path / "in", "-o", tmp_path / "out", "--compare")
    assert code == 1 and len(read) == 2 and "a.jpg: no face found" in out and "1 of 3 images failed" in err
    assert f"{'x' * 251}.jpg: the name of its comparison would have 263 bytes" in err
    assert "rename the image, or restore it without --compare" in err
    code, out, err = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 0 and len(list((tmp_path / "out").glob("[!.]*.jpg"))) == 3


def test_no_stale_output_stays(tmp_path, restore):
    """An image that loses its face, and gets it back; then it is restored without a comparison."""
    image, output = tmp_path / "in/x.png", tmp_path / "out"
    command = [tmp_path / "in", "-o", output, "--compare"]
    face, scene = draw_portrait(3, 160).image, landscape()

    def run(pixels: np.ndarray, *arguments) -> set[str]:
        save_image(pixels, image)
        image.replace(tmp_path / "in/x.jpg")  # a PNG file, whose copy has another name than its result
        assert restore(*arguments)[0] == 0
        return {path.name for path in output.glob("[!.]*")}

    assert run(face, *command) == {"x.png", "x_compare.png"}
    assert run(scene, *command) == {"x.jpg", "x_compare.png"}
    (output / "x.png").write_bytes(b"my own")  # which no longer is the result
    save_image(face, image)
    image.replace(tmp_path / "in/x.jpg")
    code, _, err = restore(*command)
    assert code == 2 and "x.png exists, and no run of `faceprior restore` wrote it" in err
    assert (output / "x.png").read_bytes() == b"my own"
    (output / "x.png").unlink()
    assert run(face, *command) == {"x.png", "x_compare.png"}
    assert run(face, *command[:-1]) == {"x.png", "x_compare.png"}  # which still holds
    assert run(scene, *command[:-1]) == {"x.jpg"}


def test_restored_images_of_several_runs_keep_apart(tmp_path, restore):
    for name in ("x", "y"):
        save_image(landscape(1 + (name == "y")), tmp_path / name / "1.png")
        assert restore(tmp_path / name, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/1.png").read_bytes() == (tmp_path / "x/1.png").read_bytes()
    assert (tmp_path / "out/1.png.png").read_bytes() == (tmp_path / "y/1.png").read_bytes()
    code, out, _ = restore(tmp_path / "x", tmp_path / "y", "-o", tmp_path / "out")
    assert code == 0 and out.count("finished before") == 2
    _, _, err = restore(tmp_path, "-o", tmp_path / "more")
    assert "2 images skipped" in err
    code, out, _ = restore(tmp_path / "out", "-o", tmp_path / "again")  # named itself, it is what is meant
    assert code == 0 and len(out.splitlines()) == 2


@pytest.mark.parametrize("call", ["finish", "_write"])
def test_a_killed_restore_resumes(tmp_path, restore, monkeypatch, call):
    """Killed after or amid the writing of the second image; its files are known again, and the first stays."""
    for number in (1, 2, 3):
        save_image(landscape(number), tmp_path / f"in/{number}.png")
    place = RestoreRecord if call == "finish" else restore_command
    original, calls = getattr(place, call), iter(range(9))

    def kill(*arguments):
        if next(calls) == 1:
            if call == "_write":
                original(*arguments)
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as killed:
        killed.setattr(place, call, kill)
        code, out, _ = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 130 and len(out.splitlines()) == 1 and (tmp_path / "out/2.png").exists()
    with open(tmp_path / "out/.faceprior-restored.jsonl", "a") as file:
        file.write('{"source": "../in/3.p')  # a torn row
    code, out, _ = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 0 and out.count("finished before") == 1 and out.count("copied") == 2


def test_a_damaged_record_is_named(tmp_path, restore):
    save_image(landscape(), tmp_path / "in/a.png")
    assert restore(tmp_path / "in", "-o", tmp_path / "out")[0] == 0
    record = tmp_path / "out/.faceprior-restored.jsonl"
    whole = record.read_text()
    for row in ("foreign\n", '{"source": 3}\n', '{"source": "x", "outputs": {}}\n'):
        record.write_text(row + whole)
        code, _, err = restore(tmp_path / "in", "-o", tmp_path / "out")
        assert code == 2 and "faceprior-restored.jsonl" in err and "--overwrite" in err
        assert restore(tmp_path / "in", "-o", tmp_path / "out", "--overwrite")[0] == 0


def test_what_a_file_holds_besides_rgb(tmp_path, restore):
    """Transparency, EXIF, resolution, profile and grey stay; 16 bits are named; pages and frames are refused."""
    portrait, folder = Image.fromarray(draw_portrait(3, 160).image), tmp_path / "in"
    folder.mkdir()
    cut = portrait.copy()
    alpha = Image.new("L", portrait.size, 255)
    alpha.paste(0, (0, 0, 160, 10))
    cut.putalpha(alpha)
    cut.save(folder / "cut.png")
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "1987:06:05 04:03:02"
    portrait.rotate(90).save(folder / "phone.jpg", exif=exif, dpi=(300, 300), quality=95, icc_profile=b"profile")
    grey = np.asarray(portrait.convert("L"))
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(landscape()[..., 0].astype(np.uint16) * 99).save(folder / "deep_scene.png")
    portrait.save(folder / "moving.gif", save_all=True, append_images=[portrait.rotate(5)])
    code, out, err = restore(folder, "-o", tmp_path / "out")
    assert code == 1 and "moving.gif holds 2 frames or pages" in err and "1 of 6 images failed" in err
    assert "deep.png: 1 face restored, not kept: 16 bits per channel" in out
    assert (tmp_path / "out/deep_scene.png").read_bytes() == (folder / "deep_scene.png").read_bytes()
    with Image.open(tmp_path / "out/cut.png") as result:
        before, after = np.asarray(cut), np.asarray(result)
    assert after.shape == before.shape and (after[..., 3] == before[..., 3]).all() and (after[:10] == before[:10]).all()
    assert (after != before).any()
    with Image.open(tmp_path / "out/phone.png") as result:
        assert dict(result.getexif()) == {0x0112: 1, 0x0132: "1987:06:05 04:03:02"}
        assert round(result.info["dpi"][0]) == 300 and result.info["icc_profile"] == b"profile"
    for name in ("grey", "deep"):
        assert Image.open(tmp_path / f"out/{name}.png").mode == "L"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), MemoryError(), torch.OutOfMemoryError("CUDA"), KeyError(3)]
)
def test_one_image_that_fails_does_not_end_the_batch(tmp_path, restore, monkeypatch, error):
    for number in (1, 2, 3):
        save_image(landscape(number), tmp_path / f"in/{number}.png")
    original = detect.MTCNNDetector._detect

    def fail(detector, rgb, min_face_size):
        if rgb.max() == landscape(2).max():
            raise error
        return original(detector, rgb, min_face_size)

    monkeypatch.setattr(detect.MTCNNDetector, "_detect", fail)
    code, out, err = restore(tmp_path / "in", tmp_path / "gone.png", "-o", tmp_path / "out")
    assert code == 1 and out.count("copied as it is") == 2 and "2.png: error" in out
    assert f"{tmp_path}/in/2.png: " in err and "no file or folder at" in err and "2 of 4 images failed" in err
    if "Memory" in type(error).__name__:
        assert "out of memory: use `--dtype bfloat16`, `--quantization nf4`, `--device cpu`" in err


def test_one_batch_that_fails_does_not_end_the_scoring(portraits, score, monkeypatch):
    """Its halves are tried, down to the face that fails alone."""
    original = FaceScorer.forward

    def forward(scorer, pixel_values, *arguments):
        if len(pixel_values) > 1 or abs(float(pixel_values.mean()) - bad) < 1e-4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(scorer, pixel_values, *arguments)

    means = []
    monkeypatch.setattr(FaceScorer, "forward", lambda s, p, *a: means.append(float(p[0].mean())) or original(s, p, *a))
    whole = rows_of(score(portraits / "a", "--json", "--batch-size", 1)[1])
    bad = means[1]
    monkeypatch.setattr(FaceScorer, "forward", forward)
    code, out, err = score(portraits / "a", "--json")
    first, second, third = rows_of(out)
    assert code == 1 and "2.png: out of memory" in second["error"] and "1 of 3 images failed" in err
    for row, expected in ((first, whole[0]), (third, whole[2])):
        assert row["faces"][0]["score"] == pytest.approx(expected["faces"][0]["score"], rel=1e-4)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_the_console_cannot_show(tmp_path, restorer, encoding):
    names = ["a.png", "祖母 100% [1].png", os.fsdecode(b"caf\xe9.png"), "z.png"]
    for name in names:
        try:
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_bytes(save_image(landscape(), tmp_path / "one.png").read_bytes())
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "in/末.png").write_bytes(b"torn")
    command = ["restore", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--checkpoint", restorer]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = main(command)
    out, err = (stream.detach().getvalue().decode(encoding) for stream in streams if stream.flush() is None)
    assert code == 1 and out.count("copied as it is") == 4 and "1 of 5 images failed" in err
    assert ("祖母" if encoding == "utf-8" else r"\u7956\u6bcd 100% [1].png") in out and r"caf\udce9.png" in out
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 4


def test_score_never_overwrites_an_input(tmp_path, portraits, score):
    shutil.copytree(portraits / "b", tmp_path / "in")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn/.faceprior-output").touch()
    (tmp_path / "drawn/1.png").symlink_to(tmp_path / "in/1.png")
    before = tree(tmp_path)
    for options in (
        ["--draw", tmp_path / "drawn"],
        ["--copy-best", 1, tmp_path / "drawn"],
        ["--csv", tmp_path / "in/1.png", "--overwrite"],
    ):
        code, out, err = score(tmp_path / "in", *options)
        assert code == 2 and not out and "would overwrite the input" in err
        assert tree(tmp_path) == before


def test_drawings_and_copies_of_one_name(tmp_path, portraits, score):
    for name in ("a.jpg", "a.png", "b.png", "b_compare.png", "1_a.png"):
        image = Image.open(portraits / "a/1.png")
        image.save(tmp_path / name)
    shutil.copy(tmp_path / "a.png", tmp_path / "a.jpg.png")
    files = sorted(tmp_path.glob("*.*"))
    assert score(*files, "--draw", tmp_path / "drawn")[0] == 0
    assert len(list((tmp_path / "drawn").glob("[!.]*"))) == 6
    code, out, err = score(*files, "--draw", tmp_path / "both", "--copy-best", 3, tmp_path / "both")
    assert code == 2 and not out and "--draw and --copy-best would both write" in err


def test_only_the_first_frame_is_scored_and_that_is_said(tmp_path, portraits, score):
    image = Image.open(portraits / "a/1.png")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[image.rotate(9)])
    code, out, err = score(tmp_path / "moving.gif", "--json")
    assert code == 0 and rows_of(out)[0]["faces"]
    assert "moving.gif: only the first of 2 frames or pages is scored" in err


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"text"])
def test_damaged_weights_of_a_restorer_end_with_one_line(tmp_path, restorer, capsys, part, content):
    shutil.copytree(restorer, tmp_path / "copy")
    (tmp_path / "copy" / part).write_bytes(content)
    save_image(landscape(), tmp_path / "a.png")
    command = ["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "copy")]
    assert main(command) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match(r"faceprior: error: the \w+ in .* is damaged: .*: copy or download it again", last), last
    assert not (tmp_path / "out").exists()


def test_restore_keeps_folders_with_equal_names_apart(tmp_path, restorer):
    for album in ("a", "b"):
        save_image(skimage.data.coffee()[:64, :64] // (1 + (album == "b")), tmp_path / album / "one.png")
    command = ["restore", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out")]
    assert main([*command, "--checkpoint", restorer]) == 0
    for album in ("a", "b"):
        assert (tmp_path / "out" / album / "one.png").read_bytes() == (tmp_path / album / "one.png").read_bytes()


def test_offline_without_a_checkpoint_the_id_is_named(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    image = str(archive / "coffee.png")
    for command, name in (
        (["score", image], "OPPOer/FaceScore"),
        (["restore", image, "-o", str(tmp_path / "out")], "Ethanliang99/AuthFace"),
    ):
        assert main(command) == 2
        assert name in capsys.readouterr().err


def test_missing_images_and_checkpoints_end_with_one_line(tmp_path, capsys):
    assert main(["score", str(tmp_path / "nothing.png")]) == 2
    assert "nothing.png" in capsys.readouterr().err
    save_image(skimage.data.coffee(), tmp_path / "coffee.png")
    assert main(["score", str(tmp_path / "coffee.png"), "--checkpoint", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


class Code:
    def __reduce__(self):
        return os.mkdir, ("was_here",)


def write_code(path: Path) -> None:
    torch.save({"mlp.layers.0.weight": Code()}, path)


def write_truncated(path: Path) -> None:
    torch.save({"mlp.layers.0.weight": torch.zeros(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_another_model(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_code, f"is refused: only tensors are loaded .*it asks for {os.mkdir.__module__}.mkdir"),
        (write_truncated, r"\(2000 bytes\) is truncated"),
        (write_another_model, r"is not a checkpoint of this face scorer: missing .*; unexpected \(2\): weight, bias"),
    ],
)
def test_a_bad_checkpoint_ends_with_one_line(portraits, tmp_path, monkeypatch, capsys, write, reason):
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    write(Path("bad/FS_model.pt"))
    Path("bad/med_config.json").write_text('{"num_attention_heads": 4}')
    assert main(["score", str(portraits), "--checkpoint", "bad"]) == 2
    out, err = capsys.readouterr()
    assert not out and not Path("was_here").exists()
    assert re.fullmatch(rf"faceprior: error: bad/FS_model.pt {reason}.*\n", err), err


def test_a_folder_of_another_model_ends_with_one_line(portraits, tiny_models, capsys):
    assert main(["score", str(portraits), "--checkpoint", str(tiny_models / "sd15/unet")]) == 2
    out, err = capsys.readouterr()
    assert not out and "holds the configuration of UNet2DConditionModel, not of a FaceScorer" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "faceprior"], [str(Path(sys.executable).parent / "faceprior")]]
)
def test_help_and_version(command):
    run = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "score" in run.stdout and "restore" in run.stdout
    run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("faceprior 0.")

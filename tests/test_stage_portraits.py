"""Stage 3: names, captions, gates, and the review by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import load_stage
from PIL import Image

from faceprior.config import parse_config
from faceprior.jsonl import read_rows
from faceprior.metrics import MetricUnavailable
from faceprior.photos import safe_name
from faceprior.procedural import draw_folder


@pytest.fixture(scope="module")
def stage():
    return load_stage("03_curate_portraits")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_folder(folder, range(2), 256)
    return folder


@pytest.fixture
def photos(drawn, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(drawn, "photos/b"))


def curate(stage, **values) -> dict[str, list[dict]]:
    """Run the stage -> its rows, accepted and rejected."""
    stage.main(stage.Config(**{"images": "photos", "output": "out", "min_face_size": 48, **values}))
    files = {name: Path("out", f"{name}.jsonl") for name in ("manifest", "rejected")}
    return {name: read_rows(path)[0] if path.exists() else [] for name, path in files.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_that_is_added_later_adds_its_own_rows_only(stage, photos):
    """Names are relative to the folder that was named, and photographs of one file name stay apart."""
    first = curate(stage)["manifest"]
    assert {row["photograph"] for row in first} == {"b/portrait_00000.png", "b/portrait_00001.png"}
    shutil.copytree("photos/b", "photos/a")
    second = curate(stage, max_hash_distance=-1)["manifest"]
    assert len(second) == 4 and all(row in second for row in first)


def test_a_copy_is_dropped_whichever_name_it_has(stage, photos):
    """Added later, under a name that comes first; the row says of what it is a copy."""
    first = curate(stage)["manifest"]
    copy = Image.open(photos / "portrait_00001.png").resize((230, 230), Image.Resampling.LANCZOS)
    copy.save("photos/a.jpg", quality=80)
    rows = curate(stage)
    (dropped,) = rows["rejected"]
    assert rows["manifest"] == first and "near-duplicate" in dropped["faults"]
    assert dropped["duplicate_of"] == safe_name("b/portrait_00001.png") and dropped["quality"]["duplicate"] <= 4


def test_an_unreadable_photograph_is_tried_again(stage, photos):
    """A truncated file and a caption that is no text; copied again, both are judged like all others."""
    whole = (photos / "portrait_00000.png").read_bytes()
    (photos / "portrait_00000.png").write_bytes(whole[:-2000])
    (photos / "portrait_00001.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="none of 2 photographs passed"):
        curate(stage)
    (photos / "portrait_00000.png").write_bytes(whole)
    (photos / "portrait_00001.txt").write_text("a cafe")
    rows = curate(stage)
    assert len(rows["manifest"]) == 2 and not rows["rejected"]


def test_a_list_of_paths(stage, photos):
    Path("list.txt").write_text("photos/b/portrait_00001.png\nphotos/b/gone.png\n")
    rows = curate(stage, images="list.txt")
    assert [row["photograph"] for row in rows["manifest"]] == ["photos/b/portrait_00001.png"]
    assert [row["photograph"] for row in rows["rejected"]] == ["photos/b/gone.png"]


def test_a_turned_photograph_makes_the_same_portrait(stage, photos):
    Image.open(photos / "portrait_00001.png").transpose(Image.Transpose.ROTATE_90).save(photos / "portrait_00000.png")
    rows = curate(stage, captions="measured", max_hash_distance=-1)["manifest"]
    first, second = (Image.open(Path("out", row["image"])) for row in rows)
    difference = np.asarray(first, int) - np.asarray(second, int)  # places in a photograph are rounded to 1/32 pixel
    assert np.abs(difference).max() <= 8 and np.abs(difference).mean() < 0.05
    assert rows[0]["caption"] == rows[1]["caption"]


def test_captions_are_utf_8_without_a_mark_and_the_light_is_measured_where_they_do_not_say(stage, photos):
    (photos / "portrait_00000.txt").write_text("祖母, light brown hair", encoding="utf-16")
    (photos / "portrait_00001.txt").write_text("homme âgé, soft light", encoding="utf-8-sig")
    first, second = curate(stage)["manifest"]
    assert first["caption"].startswith("祖母, light brown hair, ") and " light, " in first["caption"]
    assert second["caption"] == "homme âgé, soft light"
    for row in (first, second):
        assert Path("out", row["image"]).with_suffix(".txt").read_bytes().decode() == row["caption"] + "\n"


def test_the_review_takes_effect_on_what_is_done(stage, photos, monkeypatch, capsys):
    """Rejected by hand, accepted again, and the other one: nothing is judged twice, and nothing is left behind."""
    whole, before = curate(stage), contents(Path("out"))
    ids = [row["id"] for row in whole["manifest"]]
    review = Path("review.txt")
    review.write_text(f"{ids[0]}\nnobody\n", encoding="utf-8-sig")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "judge", None)  # would fail if it was called
        rows = curate(stage, review="review.txt")
        assert [row["id"] for row in rows["manifest"]] == [ids[1]]
        assert [(row["id"], row["reason"]) for row in rows["rejected"]] == [(ids[0], "rejected by hand")]
        assert "nobody: no portrait has this id" in capsys.readouterr().out
        assert {path.stem for path in Path("out/images").iterdir()} == {ids[1]}
        rejected = contents(Path("out"))

        review.write_text(ids[1])
        assert [row["id"] for row in curate(stage, review="review.txt")["manifest"]] == [ids[0]]
        assert len(curate(stage)["manifest"]) == 1  # no review: all stay where they are
        review.write_text("")
        assert curate(stage, review="review.txt") == whole
        files = contents(Path("out"))
        assert {**files, "config.yaml": b""} == {**before, "config.yaml": b""}

    # the same review from the beginning leaves the same files
    shutil.rmtree("out")
    review.write_text(ids[0])
    curate(stage, review="review.txt")
    assert contents(Path("out")) == rejected


def test_a_row_that_was_rejected_by_hand_before_portraits_were_kept_is_judged_again(stage, photos):
    whole = curate(stage)
    row = whole["manifest"][0]
    old = {key: row[key] for key in ("id", "photograph", "quality")} | {"reason": "rejected by hand"}
    Path("out/manifest.jsonl").write_text(json.dumps(whole["manifest"][1]) + "\n")
    Path("out/rejected.jsonl").write_text(json.dumps(old) + "\n")
    Path("review.txt").write_text("")
    again = curate(stage, review="review.txt")
    again["manifest"][0]["quality"]["duplicate"] = row["quality"]["duplicate"]  # now the other one came before it
    assert again == whole


@pytest.mark.parametrize("step", ["save_thumbnail", "move_portrait"])
def test_killed_during_the_review(stage, photos, monkeypatch, step):
    curate(stage)
    identity = safe_name("b/portrait_00000.png")
    Path("review.txt").write_text(identity)
    with monkeypatch.context() as patch:
        work = getattr(stage, step)

        def killed(*args):
            work(*args)
            raise KeyboardInterrupt

        patch.setattr(stage, step, killed)
        with pytest.raises(KeyboardInterrupt):
            curate(stage, review="review.txt")
    rows = curate(stage, review="review.txt")
    assert [row["id"] for row in rows["rejected"]] == [identity] and len(rows["manifest"]) == 1
    assert [path.stem for path in Path("out/images").glob("*.png")] == [rows["manifest"][0]["id"]]


def test_only_what_is_wrong_with_a_photograph_rejects_it(stage, photos, monkeypatch):
    """A caption without text is; a fault of the code is not, and ends the stage."""
    (photos / "portrait_00000.txt").write_bytes("âgé".encode("latin-1"))
    (row,) = curate(stage)["rejected"]
    assert "portrait_00000.txt is not UTF-8" in row["reason"]
    monkeypatch.setattr(stage, "measure_photograph", lambda *args: int("a fault"))
    with pytest.raises(ValueError, match="a fault"):
        curate(stage, output="other")


def test_the_former_name_of_min_laplacian(stage, photos):
    assert parse_config(stage.Config, ["--min_sharpness", "7"]).min_laplacian == 7


def test_small_faces_are_found_where_they_are_asked_for(stage, photos):
    """A face of about 17 pixels, below the 20 that the detector searches for by itself."""
    image = Image.open(photos / "portrait_00000.png").resize((40, 40), Image.Resampling.LANCZOS)
    image.save(photos / "portrait_00000.png")
    curate(stage, min_face_size=8, min_confidence=0.5)
    (row,) = [row for row in read_rows("out/rejected.jsonl")[0] if "portrait_00000" in row["photograph"]]
    assert 8 <= row["quality"]["face_size"] < 20 and "small face" not in row["faults"]


def test_all_that_is_wrong_is_named_and_all_numbers_are_stored(stage, photos):
    """Small and dark; the numbers of what passes are the same as those of what does not."""
    dark = Image.open(photos / "portrait_00000.png").point(lambda value: value // 4)
    dark.resize((110, 110), Image.Resampling.LANCZOS).save(photos / "portrait_00000.png")
    rows = curate(stage)
    (kept,), (dropped,) = rows["manifest"], rows["rejected"]
    assert {"small face", "underexposed"} <= set(dropped["faults"]) and kept["quality"].keys() == dropped[
        "quality"
    ].keys()
    assert all(f"({fault}: " in dropped["reason"] for fault in dropped["faults"])
    assert json.loads(Path("out/balance.json").read_text())["portraits"] == 1


def test_other_limits_judge_by_the_stored_numbers(stage, photos, monkeypatch):
    """Stricter, and back: nothing is measured twice, but for what is accepted again; the files are as before."""
    whole, before = curate(stage), contents(Path("out"))
    limit = max(row["quality"]["texture"] for row in whole["manifest"]) + 1
    with monkeypatch.context() as patch:
        patch.setattr(stage, "measure_photograph", None)  # would fail if it was called
        with pytest.raises(ValueError, match="none of 2 photographs passed"):
            curate(stage, min_texture=limit)
        rejected = read_rows("out/rejected.jsonl")[0]
        assert [row["faults"] for row in rejected] == [["over-smooth"]] * 2
        assert all(f"over-smooth: at least {limit}" in row["reason"] for row in rejected)
        assert not list(Path("out/images").iterdir()) and all(Path("out", row["image"]).is_file() for row in rejected)
    assert curate(stage) == whole
    assert contents(Path("out")) == before


def test_a_copy_of_what_is_no_portrait_any_more_takes_its_place(stage, photos):
    """A darker copy has less noise: another limit rejects the portrait and not its copy."""
    Image.open(photos / "portrait_00000.png").point(lambda value: value * 0.9).save(photos / "portrait_00000_dark.png")
    other = {"min_laplacian": 2, "min_texture": 0.5}
    rows = curate(stage, **other)
    (copy,) = rows["rejected"]
    original = next(row for row in rows["manifest"] if row["id"] == copy["duplicate_of"])
    limit = (original["quality"]["noise"] + copy["quality"]["noise"]) / 2
    assert copy["quality"]["noise"] < limit < original["quality"]["noise"]
    now = curate(stage, max_noise=limit, **other)
    assert copy["id"] in [row["id"] for row in now["manifest"]]
    assert original["id"] in [row["id"] for row in now["rejected"]]


def test_settings_that_change_the_numbers_are_refused(stage, photos):
    curate(stage)
    with pytest.raises(FileExistsError, match="min_confidence"):
        curate(stage, min_confidence=0.95)


def test_a_learned_quality_without_its_weights_says_how_to_get_them(stage, photos):
    with pytest.raises(MetricUnavailable, match="musiq_koniq_ckpt"):
        curate(stage, quality_model="musiq", min_quality=60)


def test_a_learned_quality_is_a_gate_like_the_others(stage, photos, monkeypatch):
    monkeypatch.setattr(stage, "load_quality_model", lambda config: lambda image, measured: measured.values["noise"])
    values = [row["quality"]["model_quality"] for row in curate(stage)["manifest"]]
    (dropped,) = curate(stage, min_quality=sum(values) / 2)["rejected"]
    assert dropped["faults"] == ["low quality"] and dropped["quality"]["model_quality"] == min(values)

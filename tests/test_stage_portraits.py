"""Stage 3: names, captions, gates, and the review by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import load_stage
from PIL import Image
from tiny_vlm import save_tiny_vlm

from faceprior import annotation, sorting
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
    files = {name: Path(values.get("output", "out"), f"{name}.jsonl") for name in ("manifest", "rejected")}
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
    rows = curate(stage, captioners=("measured",), max_hash_distance=-1)["manifest"]
    first, second = (Image.open(Path("out", row["image"])) for row in rows)
    difference = np.asarray(first, int) - np.asarray(second, int)  # places in a photograph are rounded to 1/32 pixel
    assert np.abs(difference).max() <= 8 and np.abs(difference).mean() < 0.05
    assert rows[0]["caption"] == rows[1]["caption"]


def test_captions_are_utf_8_without_a_mark_and_the_light_is_measured_where_they_do_not_say(stage, photos):
    (photos / "portrait_00000.txt").write_text("祖母, light brown hair", encoding="utf-16")
    (photos / "portrait_00001.txt").write_text("homme âgé, soft light", encoding="utf-8-sig")
    first, second = curate(stage)["manifest"]
    assert first["caption"].startswith("祖母, light brown hair, light from the ")
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
    assert again["manifest"][0].pop("nearest") == whole["manifest"][1]["id"]
    assert again == whole


@pytest.mark.parametrize("step", ["save_thumbnail", "move_portrait"])
def test_killed_during_the_review(stage, photos, monkeypatch, step):
    curate(stage)
    identity = safe_name("b/portrait_00000.png")
    Path("review.txt").write_text(identity)
    with monkeypatch.context() as patch:
        work = getattr(sorting, step)

        def killed(*args):
            work(*args)
            raise KeyboardInterrupt

        patch.setattr(sorting, step, killed)
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


def test_who_is_missing_is_said(stage, photos, capsys):
    curate(stage)
    missing = json.loads(Path("out/balance.json").read_text())["missing"]
    said = capsys.readouterr().out
    assert missing and all(f"out/balance.json: {sentence}" in said for sentence in missing)


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
    limit = max(row["quality"]["smoothest"] for row in whole["manifest"]) + 1
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


def test_what_stays_rejected_says_so_by_the_limits_of_this_run(stage, photos):
    """The faults, values and limits in rejected.jsonl are those of a run from the beginning with the same limits."""
    Image.open(photos / "portrait_00000.png").point(lambda value: value // 4).save(photos / "portrait_00000.png")
    (first,) = curate(stage)["rejected"]
    limits = {"min_highlights": 90.0, "min_eyes": 0.0, "min_texture": 1.1, "max_yaw": 0.0}
    with pytest.raises(ValueError, match="none of 2 photographs passed"):
        curate(stage, **limits)
    now = next(row for row in read_rows("out/rejected.jsonl")[0] if row["id"] == first["id"])
    assert "turned away" in now["faults"] and "turned away" not in first["faults"]
    assert "underexposed: at least 90.0" in now["reason"] and "underexposed: at least 100.0" in first["reason"]
    with pytest.raises(ValueError, match="none of 2 photographs passed"):
        curate(stage, output="new", **limits)
    assert now == next(row for row in read_rows("new/rejected.jsonl")[0] if row["id"] == first["id"])


def test_a_portrait_that_is_not_rejected_by_hand_any_more_is_judged_by_the_limits_of_this_run(stage, photos):
    identity = safe_name("b/portrait_00000.png")
    Path("review.txt").write_text(identity)
    (row,) = curate(stage, review="review.txt")["rejected"]
    Path("review.txt").write_text("")
    rows = curate(stage, review="review.txt", min_texture=row["quality"]["smoothest"] + 0.01)["rejected"]
    assert "over-smooth" in next(r for r in rows if r["id"] == identity)["faults"]


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


# ------------------------------------------------------------------------------------ captions of three sources


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    return str(save_tiny_vlm(tmp_path_factory.mktemp("vlm")))


def with_answers(stage, monkeypatch, *answers) -> list:
    """Let the model of random weights answer as it does, and then say something; returns the sizes of its batches."""
    asked, answer = [], annotation.Captioner.answer

    def speak(self, images, *args):
        texts = answer(self, images, *args)
        assert len(texts) == len(images) and all(isinstance(text, str) for text in texts)
        asked.append(len(images))
        return [answers[(sum(asked) - len(images) + i) % len(answers)] for i in range(len(images))]

    monkeypatch.setattr(annotation.Captioner, "answer", speak)
    return asked


def test_tags_by_a_model_beside_the_photograph_and_measured(stage, photos, vlm, monkeypatch, capsys):
    (photos / "portrait_00000.txt").write_text("woman, smile")
    (photos / "portrait_00001.txt").unlink()
    asked = with_answers(
        stage, monkeypatch, "semantic: young woman\nphotographic: hard light, angry look", "I'm sorry."
    )
    options = {
        "captioners": ("sidecar", "vlm", "measured"),
        "vlm": vlm,
        "vlm_tokens": 4,
        "resolution": 256,
        "min_detail": 0,
    }
    first, second = curate(stage, **options)["manifest"]
    assert asked == [2]
    # the smile beside the photograph counts more than the model's expression, its light more than the measured
    assert first["semantic"] == ["woman", "young woman"]
    assert first["photographic"][:2] == ["smile", "hard light"]
    assert not {"front light", "light from the left", "light from the right"} & set(first["photographic"])
    assert {"sharp details", "textured skin"} <= set(first["photographic"])
    # an answer without tags is named, and the measured ones are left
    assert second["semantic"] == ["portrait photo"] and second["tags"]["vlm"] == {"semantic": [], "photographic": []}
    assert {"front light", "light from the left", "light from the right"} & set(second["photographic"])
    assert f"{second['id']}: no tags in the model's answer \"I'm sorry.\"" in capsys.readouterr().out
    for row in (first, second):
        assert row["caption"] == ", ".join(row["semantic"] + row["photographic"])
        assert Path("out", row["image"]).with_suffix(".txt").read_text() == row["caption"] + "\n"


def test_what_the_untrained_model_says_itself_is_cleaned(stage, photos, vlm):
    rows = curate(stage, captioners=("vlm",), vlm=vlm, vlm_tokens=3, quantization="8bit")["manifest"]
    (file,) = Path("out/answers").iterdir()
    answers = read_rows(file)[0]
    assert {row["id"] for row in answers} == {row["id"] for row in rows}
    assert all(row["semantic"] for row in rows)


def test_a_killed_run_asks_no_portrait_twice(stage, photos, vlm, monkeypatch):
    options = {"captioners": ("vlm", "measured"), "vlm": vlm, "vlm_tokens": 2, "batch_size": 1}
    asked = with_answers(stage, monkeypatch, "young woman", "old man")
    add, killed = stage.KeyedRows.add, []

    def kill(self, row):
        add(self, row)
        if "answer" in row and not killed:
            killed.append(row["id"])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage.KeyedRows, "add", kill)
        with pytest.raises(KeyboardInterrupt):
            curate(stage, **options)
    rows = curate(stage, **options)["manifest"]
    assert asked == [1, 1]
    assert sorted(row["semantic"] for row in rows) == [["old man"], ["young woman"]]
    files = contents(Path("out"))
    monkeypatch.setattr(annotation, "Captioner", None)  # would fail if it was loaded
    assert curate(stage, **options)["manifest"] == rows and contents(Path("out")) == files


def test_a_model_that_does_not_exist_is_named_before_anything_is_judged(stage, photos, monkeypatch):
    monkeypatch.setattr(stage, "judge", None)  # would fail if it was called
    with pytest.raises(FileNotFoundError, match="no vision-language model at ./nowhere"):
        curate(stage, captioners=("vlm",), vlm="./nowhere")


def test_the_former_setting_of_captions_is_named(stage, capsys):
    with pytest.raises(SystemExit):
        parse_config(stage.Config, ["--captions", "both"])
    assert "`captioners` has to be one of sidecar, vlm, measured but is 'both'" in capsys.readouterr().err
    assert parse_config(stage.Config, ["--captions", "sidecar"]).captioners == ("sidecar",)


# ---------------------------------------------------------------------- other captioners, about what is there already


@pytest.fixture
def no_second_look(stage, monkeypatch):
    """Let no photograph be decoded or measured from now on."""

    def forbid():
        monkeypatch.setattr(stage, "measure_photograph", None)
        monkeypatch.setattr(stage.Photograph, "load", None)

    return forbid


def test_other_captioners_leave_what_they_would_have_from_the_beginning(stage, photos, no_second_look):
    """Measured, with captions beside, and back: twice the same, and without a look at a photograph."""
    both = ("sidecar", "measured")
    whole = curate(stage, output="whole", captioners=both)
    whole_files = {name: data for name, data in contents(Path("whole")).items() if name != "config.yaml"}
    first = curate(stage, captioners=("measured",))["manifest"]
    no_second_look()
    for _ in range(2):
        assert stage.main(stage.Config("photos", output="out", min_face_size=48, captioners=both)) is None
        files = contents(Path("out"))
        assert {name: files[name] for name in whole_files} == whole_files
    assert read_rows("out/manifest.jsonl")[0] == whole["manifest"]
    back = curate(stage, captioners=("measured",))["manifest"]
    assert [row["caption"] for row in back] == [row["caption"] for row in first]
    for row in back:
        assert Path("out", row["image"]).with_suffix(".txt").read_text() == row["caption"] + "\n"


def test_other_captioners_after_a_kill(stage, photos, no_second_look, monkeypatch):
    whole = curate(stage, output="whole", captioners=("sidecar", "measured"))
    curate(stage, captioners=("sidecar",))
    monkeypatch.setattr(annotation, "TOGETHER", 1)
    no_second_look()
    with monkeypatch.context() as patch:
        measure, seen = annotation.measure_tags, []

        def killed(*args):
            seen.append(args)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return measure(*args)

        patch.setattr(annotation, "measure_tags", killed)
        with pytest.raises(KeyboardInterrupt):
            curate(stage, captioners=("sidecar", "measured"))
        assert curate(stage, captioners=("sidecar", "measured")) == whole
        assert len(seen) == 3  # one before the kill, and the other one


def test_answers_are_kept_for_each_model_and_question(stage, photos, vlm, no_second_look, monkeypatch):
    asked = with_answers(stage, monkeypatch, "young woman", "old man", "hard light", "soft focus")
    curate(stage)
    no_second_look()
    options = {"captioners": ("vlm", "measured"), "vlm": vlm, "vlm_tokens": 2}
    first = curate(stage, **options)["manifest"]
    assert [row["semantic"] for row in first] == [["young woman"], ["old man"]]
    other = curate(stage, **options, vlm_prompt="the light?")["manifest"]
    assert "hard light" in other[0]["photographic"] and asked == [2, 2]
    curate(stage, captioners=("measured",))
    monkeypatch.setattr(annotation, "Captioner", None)  # would fail if it was loaded
    assert curate(stage, **options)["manifest"] == first
    assert curate(stage, **options, vlm_prompt="the light?")["manifest"] == other


def test_portraits_without_a_caption_go_and_come_back_with_the_only_captioner(stage, photos, no_second_look):
    (photos / "portrait_00000.txt").unlink()
    whole = curate(stage, captioners=("sidecar", "measured"))
    no_second_look()
    rows = curate(stage, captioners=("sidecar",))
    (dropped,) = rows["rejected"]
    assert dropped["faults"] == ["no caption beside it"] and len(rows["manifest"]) == 1
    assert Path("out", dropped["image"]).is_file()
    assert curate(stage, captioners=("sidecar", "measured")) == whole


def test_a_caption_that_cannot_be_read_later_is_named_until_it_can(stage, photos, no_second_look, capsys):
    curate(stage, captioners=("measured",))
    no_second_look()
    (photos / "portrait_00000.txt").write_bytes("âgé".encode("latin-1"))
    rows = curate(stage, captioners=("sidecar",))
    assert [row["faults"] for row in rows["rejected"]] == [["no caption beside it"]]
    assert "portrait_00000.txt is not UTF-8" in capsys.readouterr().out
    (photos / "portrait_00000.txt").write_text("old man")
    assert [row["caption"] for row in curate(stage, captioners=("sidecar",))["manifest"]][0] == "old man"


def test_drawn_portraits_that_are_complete_are_captioned_otherwise(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"images": "", "num_drawn": 2, "resolution": 64}
    curate(stage, **options)
    curate(stage, **options)
    assert "out is complete" in capsys.readouterr().out
    rows = curate(stage, **options, captioners=("measured",))["manifest"]
    assert all(row["semantic"] == ["portrait photo"] for row in rows)


# ---------------------------------------------------------- photographs that come, go, or are others under their names


def test_a_photograph_that_was_replaced_is_judged_anew(stage, photos, drawn, vlm, monkeypatch):
    """The file of one is that of another person now: the same rows, images and answers as from the beginning."""
    asked = with_answers(stage, monkeypatch, "somebody")
    options = {"captioners": ("vlm",), "vlm": vlm, "vlm_tokens": 2, "max_hash_distance": -1}
    first = curate(stage, **options)["manifest"]
    shutil.copy(photos / "portrait_00001.png", photos / "portrait_00000.png")
    second = curate(stage, **options)["manifest"]
    assert second[1] == first[1] and second[0]["hash"] == first[1]["hash"] != first[0]["hash"]
    images = [np.asarray(Image.open(Path("out", row["image"]))) for row in second]
    np.testing.assert_array_equal(*images)
    assert asked == [2, 1]

    # and one that is no portrait: nothing is left of it but the thumbnail
    Image.new("RGB", (200, 200), "gray").save(photos / "portrait_00000.png")
    rows = curate(stage, **options)
    assert [row["faults"] for row in rows["rejected"]] == [["no face found"]] and rows["manifest"] == [first[1]]
    assert {path.stem for path in Path("out/images").iterdir()} == {first[1]["id"]}


def test_the_portrait_of_a_photograph_that_was_replaced_stays_if_it_was_retouched(stage, photos, capsys):
    row = curate(stage, export_retouch="away")["manifest"][0]
    Image.open(Path("away", row["id"] + ".png")).point(lambda level: level // 2).save(f"away/{row['id']}.png")
    before = curate(stage, import_retouch="away")["manifest"]
    shutil.copy(photos / "portrait_00001.png", photos / "portrait_00000.png")
    assert curate(stage)["manifest"] == before
    assert "replaced after its portrait was retouched" in capsys.readouterr().out


def test_the_portrait_of_a_photograph_that_is_gone_stays_and_is_named(stage, photos, capsys):
    rows = curate(stage)
    (photos / "portrait_00000.png").unlink()
    assert curate(stage) == rows
    assert "b/portrait_00000.png: no longer in photos: its portrait" in capsys.readouterr().out


def test_an_image_without_a_row_of_a_killed_run_is_not_left(stage, photos, monkeypatch):
    """Killed between the image and its row, and judged by other limits then."""
    with monkeypatch.context() as patch:
        patch.setattr(stage.KeyedRows, "add", lambda *args: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            curate(stage)
    assert len(list(Path("out/images").iterdir())) == 2  # image and caption
    with pytest.raises(ValueError, match="none of 2 photographs"):
        curate(stage, min_side=280)
    assert not list(Path("out/images").iterdir())


def test_contact_sheets_show_the_portraits_of_this_run_only(stage, photos):
    rows = curate(stage)["manifest"]
    for shown in (rows, rows[:1], []):
        stage.write_sheets(Path("out"), shown, columns=1, rows=1, side=16)
        assert sorted(path.stem for path in Path("out/sheets").iterdir()) == [f"{i:03d}" for i in range(len(shown))]


def test_a_larger_hash_distance_names_the_portrait_that_another_is_a_copy_of(stage, photos, no_second_look):
    """As many bits as two people differ by: the later one is dropped as the copy of the first, and comes back."""
    whole = curate(stage)
    first, second = whole["manifest"]
    assert second["nearest"] == first["id"] and "nearest" not in first
    no_second_look()
    rows = curate(stage, max_hash_distance=second["quality"]["duplicate"])
    (dropped,) = rows["rejected"]
    assert rows["manifest"] == [first] and dropped["duplicate_of"] == first["id"] and dropped["id"] == second["id"]
    assert curate(stage) == whole


# ---------------------------------------------------------------------------------- the way to a retoucher and back


def test_portraits_come_back_from_a_retoucher(stage, photos, capsys):
    first, second = curate(stage, export_retouch="retouch")["manifest"]
    assert {row["id"] for row in read_rows(Path("retouch/portraits.jsonl"))[0]} == {first["id"], second["id"]}
    original = Path("retouch/originals", first["id"] + ".png")
    assert original.read_bytes() == Path("photos", first["photograph"]).read_bytes()
    crop, sent = Path("out", first["image"]), Path("retouch", first["id"] + ".png")
    before = crop.read_bytes()
    assert sent.read_bytes() == before

    # one is retouched and enlarged, one is cropped to another shape, one is nobody's
    Image.new("RGB", (300, 300), (200, 160, 140)).save(sent)
    Image.open(Path("out", second["image"])).crop((0, 0, 100, 128)).save(Path("retouch", second["id"] + ".png"))
    Image.new("RGB", (8, 8)).save("retouch/nobody.png")
    rows = curate(stage, import_retouch="retouch")["manifest"]
    out = capsys.readouterr().out
    assert "1 portraits replaced" in out
    assert "nobody.png: no accepted portrait has this id" in out and "100 x 128 pixels: a portrait is square" in out
    assert Image.open(crop).size == (128, 128) and Image.open(crop).getpixel((64, 64)) == (200, 160, 140)
    assert Path("out/originals", first["id"] + ".png").read_bytes() == before
    assert rows[0]["retouched"] and "retouched" not in rows[1]

    # the same import again changes nothing, and an export overwrites no file of the retoucher's
    files, theirs = contents(Path("out")), contents(Path("retouch"))
    assert curate(stage, import_retouch="retouch")["manifest"] == rows
    curate(stage, export_retouch="retouch")
    assert {**contents(Path("out")), "config.yaml": b""} == {**files, "config.yaml": b""}
    assert {**contents(Path("retouch")), "portraits.jsonl": b""} == {**theirs, "portraits.jsonl": b""}


def test_an_import_that_was_killed_before_the_row_is_completed(stage, photos, monkeypatch):
    (row, _) = curate(stage, export_retouch="retouch")["manifest"]
    Image.new("RGB", (128, 128), (200, 160, 140)).save(Path("retouch", row["id"] + ".png"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "annotate", lambda *args: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            curate(stage, import_retouch="retouch")
    after = curate(stage, import_retouch="retouch")["manifest"][0]
    assert after["retouched"] and Path("out/originals", row["id"] + ".png").is_file()


def test_a_folder_of_retouched_portraits_that_does_not_exist(stage, photos):
    with pytest.raises(FileNotFoundError, match="no folder nowhere with retouched portraits"):
        curate(stage, import_retouch="nowhere")


# --- limits, copies, reviews and retouching together, and runs that were killed ---


def test_a_portrait_whose_place_a_copy_took_stays_out(stage, photos):
    """The copy is a portrait while its original is too small; with both large enough there is still one of them."""
    original, copy = safe_name("b/portrait_00001.png"), safe_name("z.png")
    curate(stage)
    Image.open(photos / "portrait_00001.png").resize((300, 300), Image.Resampling.LANCZOS).save("photos/z.png")
    assert {row["id"] for row in curate(stage)["rejected"]} == {copy}
    assert {row["id"] for row in curate(stage, min_side=280)["manifest"]} == {copy}
    for _ in range(2):
        rows = curate(stage)
        (dropped,) = rows["rejected"]
        assert dropped["id"] == original and dropped["duplicate_of"] == copy and Path("out", dropped["image"]).is_file()
        assert len(rows["manifest"]) == 2
    with pytest.raises(ValueError, match="none of 3 photographs"):
        curate(stage, min_side=301)
    rows = curate(stage)
    assert len(rows["manifest"]) == 2 and len(rows["rejected"]) == 1


@pytest.mark.parametrize("place", ["moved", "noted"])
def test_a_run_that_was_killed_while_it_moved_portraits(stage, photos, place):
    """By the same limits or by those before: images stand where their rows say."""
    first = curate(stage)
    files = contents(Path("out/images"))
    row = first["manifest"][0]
    Path("out/rejected").mkdir()
    for suffix in (".png", ".txt"):
        Path("out", row["image"]).with_suffix(suffix).replace(Path("out/rejected", row["id"] + suffix))
    if place == "noted":
        moved = {**row, "image": f"rejected/{row['id']}.png", "thumbnail": "", "faults": ["x"], "reason": "x"}
        Path("out/rejected.jsonl").write_text(json.dumps({**moved, "thumbnail": f"rejected/{row['id']}.jpg"}) + "\n")
    Path("out/done.json").unlink()
    assert curate(stage) == first and contents(Path("out/images")) == files


def test_a_portrait_that_a_person_takes_back_has_to_pass_the_limits(stage, photos):
    first = curate(stage)["manifest"]
    Path("out/review.jsonl").write_text(json.dumps({"id": first[0]["id"], "decision": "reject"}) + "\n")
    assert len(curate(stage)["rejected"]) == 1
    Path("out/review.jsonl").write_text("")
    with pytest.raises(ValueError, match="none of 2 photographs"):
        curate(stage, min_side=280)
    assert curate(stage)["manifest"] == first


def test_retouching_and_tags_survive_limits(stage, photos):
    """Of two files the one that was not exported counts, at every run; the original is kept."""
    row = curate(stage, export_retouch="away")["manifest"][0]
    image = Path("out", row["image"])
    exported = image.read_bytes()
    Image.open(image).point(lambda level: level // 2).save(f"away/{row['id']}.tif")
    retouched = curate(stage, import_retouch="away")["manifest"]
    pixels = np.asarray(Image.open(image))
    assert retouched[0]["retouched"] and not np.array_equal(pixels, np.asarray(Image.open(f"away/{row['id']}.png")))
    assert curate(stage, import_retouch="away", export_retouch="away")["manifest"] == retouched
    with pytest.raises(ValueError, match="none of 2 photographs"):
        curate(stage, min_side=280)
    assert curate(stage)["manifest"] == retouched and np.array_equal(np.asarray(Image.open(image)), pixels)
    assert Path("out/originals", image.name).read_bytes() == exported


@pytest.mark.parametrize("folder", ["out", "out/images", "out/mine", "photos/../out"])
@pytest.mark.parametrize("key", ["export_retouch", "import_retouch"])
def test_retouching_inside_the_output_is_refused(stage, photos, key, folder):
    with pytest.raises(ValueError, match=f"`{key}` {folder} lies in the output folder out"):
        curate(stage, **{key: folder})


def test_a_list_of_somebody_else_is_not_replaced(stage, photos):
    Path("away").mkdir()
    Path("away/portraits.jsonl").write_text('{"name": "mine"}\n')
    with pytest.raises(FileExistsError, match="is no list of an export and would be replaced"):
        curate(stage, export_retouch="away")
    assert Path("away/portraits.jsonl").read_text() == '{"name": "mine"}\n'


@pytest.mark.parametrize("key", ["quality", "tags", "turn"])
def test_rows_of_another_version_are_refused(stage, photos, key):
    rows = curate(stage)["manifest"]
    lines = [json.dumps({name: value for name, value in row.items() if name != key}) for row in rows]
    Path("out/manifest.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(FileExistsError, match=f"is of another version: .* has no `{key}`"):
        curate(stage)

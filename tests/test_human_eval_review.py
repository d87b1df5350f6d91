"""The review of portraits: decisions on the disk, what stage 3 makes of them, and the page in Chromium."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import load_stage
from local_page import Desk, served
from PIL import Image

from faceprior.human_eval.__main__ import main
from faceprior.human_eval.review import KEEP, REJECT, Progress, Review, _act, _open, _portrait, read_review
from faceprior.images import save_image
from faceprior.jsonl import append_row, read_rows, rewrite_rows
from faceprior.procedural import draw_folder


def write_portraits(folder: Path, count: int) -> list[str]:
    """A folder as stage 3 leaves it; noise grows with the number. Returns the ids."""
    rows = []
    for number in range(count):
        identity = f"portrait_{number:05d}"
        row = {"id": identity, "photograph": f"{identity}.png", "image": f"images/{identity}.png"}
        row |= {"caption": "a man, *soft* light | <b>bold</b>", "confidence": 0.99, "face_size": 300.0}
        rows.append(row | {"quality": {"noise": number / 2, "texture": 3.5}})
    rewrite_rows(folder / "manifest.jsonl", rows)
    return [row["id"] for row in rows]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four portraits."""
    for number, identity in enumerate(write_portraits(tmp_path / "portraits", 4)):
        save_image(Image.new("RGB", (96, 96), (60 * number, 90, 120)), tmp_path / f"portraits/images/{identity}.png")
    return tmp_path / "portraits"


def names(*numbers: int) -> list[str]:
    return [f"portrait_{number:05d}" for number in numbers]


# --- decisions


def test_every_decision_is_on_the_disk_and_can_be_taken_back(folder):
    review = Review(folder)
    first, second, third, fourth = review.portraits.rows
    assert review.progress() == Progress(0, 0, 4) and review.current() == first and review.undo() is None
    review.decide(first, KEEP, "not written")
    review.decide(second, REJECT, " retouched\nskin ")
    review.decide(third, REJECT)
    assert read_rows(folder / "review.jsonl")[0] == [
        {"id": first, "decision": "keep"},
        {"id": second, "decision": "reject", "reason": "retouched skin"},
        {"id": third, "decision": "reject"},
    ]
    assert read_review(folder / "review.jsonl") == {second: "retouched skin", third: ""}
    again = Review(folder)
    assert again.progress() == Progress(3, 2, 4) and again.current() == fourth
    again.decide(second, KEEP)  # the last decision about a portrait counts, and taken back the one before
    assert read_review(folder / "review.jsonl") == {third: ""}
    assert again.undo() == second and read_review(folder / "review.jsonl") == {second: "retouched skin", third: ""}
    assert again.undo() == third and again.current() == third


def test_neighbours_end_at_the_ends(folder):
    review = Review(folder)
    first, second, *_, last = review.portraits.rows
    assert review.neighbour(first, -1) == first and review.neighbour(first, 1) == second
    assert review.neighbour(last, 1) == last == review.neighbour(None, -1)


def test_an_extra_key_decides_nothing_that_was_not_looked_at(folder):
    """The second key was pressed before the page showed the second portrait; going back, decisions can be changed."""
    name, shown, *_ = _open(folder)
    _act(folder, KEEP, name, shown, "")
    after = _act(folder, REJECT, name, shown, "")
    assert after[:3] == [names(1)[0], "", "1 of 4 reviewed, 0 rejected"] and read_review(folder / "review.jsonl") == {}
    before = _act(folder, "before", after[0], after[1], "")
    assert before[:2] == [name, KEEP] and "kept" in before[3]
    _act(folder, REJECT, *before[:2], "a doll")
    assert read_review(folder / "review.jsonl") == {name: "a doll"}
    for identity in names(1, 2, 3):
        done = _act(folder, KEEP, identity, "", "")
    assert done[0] == "" and "All portraits are reviewed" in done[3]
    assert _act(folder, KEEP, *done[:2], "")[2] == done[2]  # nothing is left to decide


def test_what_is_shown_beside_a_portrait(folder):
    """Noise is .5 of 0, .5, 1 and 1.5: one portrait of four is below. Marks of Markdown are shown as they are."""
    review = Review(folder)
    *_, details = _portrait(review, names(1)[0])
    assert "| noise | 0.5 | 25% |" in details and "| texture | 3.5 | 0% |" in details
    assert r"**caption** a man, \*soft\* light \| \<b\>bold\</b\>" in details and "images/" not in details
    (folder / review.portraits.rows[names(0)[0]]["image"]).unlink()
    assert "is missing" in _portrait(review, names(0)[0])[3]


def test_ten_thousand_portraits_are_read_once(tmp_path, monkeypatch):
    """Not again for every key, but when the manifest has changed; no image is opened."""
    write_portraits(tmp_path, 10_000)
    review = Review(tmp_path)
    assert review.progress().total == 10_000 and Review(tmp_path).portraits is review.portraits
    append_row(tmp_path / "manifest.jsonl", {**review.portraits.rows[names(0)[0]], "id": "z"})
    assert Review(tmp_path).progress().total == 10_001


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "decision": "drop"}', "`decision` has to be keep or reject but is 'drop'"),
        ('{"decision": "keep"}', "the row has no `id`"),
        ('{"id": "a", "decision": "reject", "reason": 3}', "`reason` has to be str"),
        ('{"id": "a", "deci', "torn or foreign row"),
    ],
)
def test_a_review_that_breaks_a_rule(tmp_path, line, message):
    (tmp_path / "review.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=f"review.jsonl.*{message}.*fix or remove the line"):
        read_review(tmp_path / "review.jsonl")


def test_the_command_names_what_is_missing(tmp_path, folder, capsys, monkeypatch):
    assert main(["review", str(tmp_path)]) == 2
    assert "stages/03_curate_portraits.py` makes them" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["review", str(folder)]) == 2
    assert 'pip install "faceprior[pages]"' in capsys.readouterr().err


# --- stage 3 applies them


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """Two drawn photographs and the portraits that stage 3 made of them."""
    folder = tmp_path_factory.mktemp("curated")
    draw_folder(folder / "photos", range(2), 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        curate()
    return folder


def curate(**values) -> dict[str, list[dict]]:
    """Run stage 3 in the current folder -> its rows, accepted and rejected."""
    stage = load_stage("03_curate_portraits")
    stage.main(stage.Config(images="photos", output="portraits", min_face_size=48, **values))
    files = {name: Path("portraits", f"{name}.jsonl") for name in ("manifest", "rejected")}
    return {name: read_rows(path)[0] if path.exists() else [] for name, path in files.items()}


@pytest.fixture
def work(curated, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shutil.copytree(curated, tmp_path / "work"))
    return Path("portraits")


def test_the_stage_finds_the_decisions_of_the_page(work):
    """Rejected with a reason, for another reason, kept again; the page shows the portrait wherever it is."""
    output = work
    first, second = Review(output).portraits.rows
    Review(output).decide(first, REJECT, "over-smooth")
    Review(output).decide(second, KEEP)
    rows = curate(overwrite=True)  # the portraits are made again, the decisions stay
    assert [row["id"] for row in rows["manifest"]] == [second]
    assert [row["reason"] for row in rows["rejected"]] == ["rejected by hand: over-smooth"]
    assert Path(output, rows["rejected"][0]["image"]).parent.name == "rejected"

    review = Review(output)
    assert review.progress() == Progress(2, 1, 2) and (output / review.portraits.rows[first]["image"]).is_file()
    review.decide(first, REJECT, "a doll")
    assert [row["reason"] for row in curate()["rejected"]] == ["rejected by hand: a doll"]
    review.decide(first, KEEP)
    rows = curate()
    assert [row["id"] for row in rows["manifest"]] == [first, second] and not rows["rejected"]
    assert Path(output, "images", f"{first}.png").is_file() and "reason" not in rows["manifest"][0]


def test_a_list_goes_before_the_page_and_is_where_the_page_begins(work, capsys):
    """What --review FILE rejected is decided on the page; it goes before the page's file, and can be that file."""
    output, list_file = work, Path("list.txt")
    first, second = Review(output).portraits.rows
    list_file.write_text(first)
    assert [row["id"] for row in curate(review=str(list_file))["manifest"]] == [second]
    review = Review(output)
    assert review.progress() == Progress(1, 1, 2) and review.current() == second
    review.decide(second, KEEP)
    assert read_review(output / "review.jsonl") == {first: ""}
    assert "is complete" not in capsys.readouterr().out
    list_file.write_text(second)
    assert [row["id"] for row in curate(review=str(list_file))["manifest"]] == [first]
    assert [row["id"] for row in curate(review=str(output / "review.jsonl"))["manifest"]] == [second]


# --- in Chromium


@pytest.mark.browser
def test_a_person_reviews_on_the_page(folder, browser):
    """Keys and mouse, a reason, undo, looking back, killed and resumed, and a phone."""
    with served("review", folder) as (process, address):
        desk = Desk(browser, address)
        desk.wait("0 of 4 reviewed")
        desk.wait("portrait_00000, not decided")
        desk.page.wait_for_function("document.querySelector('.picture img').naturalWidth === 96")
        assert "<b>bold</b>" in desk.page.inner_text("#details")
        desk.press("k", "portrait_00001, not decided")
        desk.press("c")
        desk.page.wait_for_function("document.activeElement.closest('#reason') !== null")
        desk.page.keyboard.type("rkz: retouched")  # keys of the page, typed
        desk.page.keyboard.press("Enter")
        desk.wait("portrait_00002, not decided")
        desk.wait("2 of 4 reviewed, 1 rejected")
        assert read_review(folder / "review.jsonl") == {names(1)[0]: "rkz: retouched"}
        desk.press("r", "3 of 4 reviewed, 2 rejected")
        desk.press("Backspace", "2 of 4 reviewed, 1 rejected")
        desk.wait("portrait_00002, not decided")
        desk.press("ArrowLeft", "portrait_00001, rejected")
        assert desk.page.input_value("#reason input, #reason textarea") == "rkz: retouched"
        desk.press("ArrowRight", "portrait_00002, not decided")
        assert desk.page.input_value("#reason input, #reason textarea") == ""
        desk.assert_local(process)
        desk.close()
    with served("review", folder) as (_, address):
        phone = Desk(browser, address, 390, 844)
        phone.wait("2 of 4 reviewed, 1 rejected")
        phone.assert_narrow_enough()
        phone.click("r")
        phone.wait("portrait_00003, not decided")
        phone.click("k")
        phone.wait("All portraits are reviewed")
        phone.close()
    assert read_review(folder / "review.jsonl") == {names(1)[0]: "rkz: retouched", names(2)[0]: ""}


def test_a_review_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        read_review(path)

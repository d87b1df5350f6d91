"""Two methods side by side: what people's files may hold, the table of known votes, and the page in Chromium.

All people here are simulated.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from local_page import Desk, served
from PIL import Image

from faceprior.human_eval.__main__ import main
from faceprior.human_eval.agreement import crossed_estimate
from faceprior.human_eval.compare import Comparing, _act, _question
from faceprior.human_eval.files import (
    PREFERENCE_COLUMNS,
    SAME,
    BenchmarkError,
    read_answers,
    read_comparison,
    read_preferences,
)
from faceprior.human_eval.preferences import (
    PUBLISHED,
    preference_estimates,
    preferences,
    sign_test,
    to_markdown,
    write_preferences,
)
from faceprior.images import save_image

COLOURS = {"ours": "red", "first": "green", "second": "blue"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two faces by three methods, each method an image of one colour; suffixes differ."""
    for method, colour in COLOURS.items():
        for name in ("f1.png", "f2.jpg" if method == "first" else "f2.png"):
            save_image(Image.new("RGB", (24, 24), colour), tmp_path / "faces" / "images" / method / name)
    return tmp_path / "faces"


def write_answers(folder: Path, rater: str, votes: dict[str, str], second: str = "first") -> None:
    """votes: face -> preferred, on rows that compare `ours` with `second`."""
    path = folder / "preferences" / f"{rater}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = [(face, "ours", second, "ours", preferred) for face, preferred in votes.items()]
        csv.writer(file).writerows([PREFERENCE_COLUMNS, *rows])


# --- the table


def test_the_table_of_votes_that_were_counted_by_hand(tmp_path):
    """Two people, four faces, one answer missing: of 7, ours 4, same 1, other 2.

    Faces: f1 2 : 0, f2 1 : 1 (a tie), f3 1 : 0 and a same, f4 0 : 1; won 2, lost 1: p = 2 (1/2)^3 (1 + 3) = 1.
    People: one 3 : 0 (p of ours), other 1 : 2; won 1, lost 1: p = 1.
    """
    write_answers(tmp_path, "one", {"f1": "ours", "f2": "ours", "f3": "ours"})
    write_answers(tmp_path, "two", {"f1": "ours", "f2": "first", "f3": SAME, "f4": "first"})
    (row,) = preferences(tmp_path)
    assert (row.first, row.second, row.people, row.faces) == ("ours", "first", 2, 4)
    shares = (row.first_preferred, row.same, row.second_preferred)
    assert [share.value for share in shares] == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    assert all(share.n == 7 and 0 <= share.low <= share.value <= share.high <= 1 for share in shares)
    assert (row.over_faces.won, row.over_faces.lost, row.over_faces.p_value) == (2, 1, 1)
    assert (row.over_people.won, row.over_people.lost, row.over_people.p_value) == (1, 1, 1)

    text = to_markdown([row])
    assert "| first | 57.14% |" in text and "| 2 | 4 | 7 | 2 : 1, p = 1 | 1 : 1, p = 1 |" in text
    assert "| CodeFormer | 75.25% | 1.25% | 23.50% |" in text
    assert all(sum(shares) == pytest.approx(1) for shares in PUBLISHED.values())

    write_preferences(tmp_path)
    saved = json.loads((tmp_path / "preferences.json").read_text())
    assert saved["measured"][0]["first_preferred"]["value"] == pytest.approx(4 / 7)
    assert (tmp_path / "preferences.md").read_text() == text

    estimates = preference_estimates(tmp_path)["ours", "first"]
    assert [estimates[key].value for key in ("ours", SAME, "first")] == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    assert "sign test over faces 2 : 1, p = 1" in estimates["ours"].to_row()["note"]


def test_the_sign_test_by_hand():
    """5 won, none lost, zeros left out: p = 2 / 2^5."""
    test = sign_test([1, 2, 3, 1, 1, 0, 0])
    assert (test.won, test.lost) == (5, 0) and test.p_value == pytest.approx(2 / 32)
    assert sign_test([0, 0]).p_value is None


def test_the_interval_is_for_other_people_and_other_faces():
    """Where every person has one opinion of all faces, 400 answers say no more than 20 people do.

    14 of 20 people prefer it: the standard error over people is sqrt(.7 * .3 / 20) = .102, so the 95% interval is about
    .5 to .9; that of 400 separate answers would be .655 to .745.
    """
    opinions = np.repeat(np.arange(20)[:, None] < 14, 20, axis=1).astype(float)
    for answers in (opinions, opinions.T):
        estimate = crossed_estimate(answers)
        assert estimate.value == pytest.approx(0.7) and estimate.n == 400
        assert estimate.low == pytest.approx(0.7 - 1.96 * 0.102, abs=0.03)
        assert estimate.high == pytest.approx(0.7 + 1.96 * 0.102, abs=0.03)
    assert crossed_estimate(opinions) == crossed_estimate(opinions)  # no seed but its own


def test_the_interval_covers_the_true_share_as_often_as_it_says():
    """20 people and 20 faces with effects of their own, 60 studies of a known share: 57 of 60 expected; 51 at least."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        leaning = rng.normal(0, 0.5, (20, 1)) + rng.normal(0, 0.5, (1, 20)) + rng.normal(0, 1, (20, 20))
        estimate = crossed_estimate((leaning > 0).astype(float), resamples=300)  # the true share is 1/2
        covered += estimate.low <= 0.5 <= estimate.high
    assert covered >= 51


def test_answers_that_are_all_alike_still_have_an_interval(tmp_path):
    """Wilson's for no more trials than faces: of 4 in 4, the lower end is 4 / (4 + 1.96^2) = .510."""
    for rater in "abcdef":
        write_answers(tmp_path, rater, dict.fromkeys(("f1", "f2", "f3", "f4"), "ours"))
    (row,) = preferences(tmp_path)
    assert row.first_preferred.value == 1 and row.first_preferred.low == pytest.approx(4 / (4 + 1.96**2), abs=1e-3)
    assert row.same.value == 0 and row.same.high == pytest.approx(1.96**2 / (4 + 1.96**2), abs=1e-3)
    assert "Wilson's interval for 4 trials" in row.same.note


def test_a_single_person_a_single_face_and_a_single_answer(tmp_path):
    write_answers(tmp_path, "one", {"f1": "ours", "f2": "first", "f3": "ours"})
    (row,) = preferences(tmp_path)
    assert "for other images only" in row.first_preferred.note and row.first_preferred.low < 2 / 3
    write_answers(tmp_path, "one", {"f1": "ours"})
    (row,) = preferences(tmp_path)
    assert row.first_preferred.low is None and "no interval from one answer" in row.first_preferred.note


def test_the_command_makes_the_table(tmp_path, capsys):
    assert main(["preferences", str(tmp_path)]) == 2
    assert "human_eval compare" in capsys.readouterr().err
    write_answers(tmp_path, "one", {"f1": "ours", "f2": "first"})
    write_answers(tmp_path, "two", {"f1": "second"}, second="second")
    assert main(["preferences", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "## ours against other methods" in capsys.readouterr().out
    assert [row["second"] for row in json.loads((tmp_path / "out/preferences.json").read_text())["measured"]] == [
        "first",
        "second",
    ]


# --- the folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("f1,ours,ours,ours,ours", "a row names a face and two methods"),
        (",ours,first,ours,ours", "a row names a face and two methods"),
        ("f1,ours,first,second,ours", "`left` has to be ours or first"),
        ("f1,ours,first,ours,neither", "`preferred` one of them or same, but they are 'ours' and 'neither'"),
        ("f1,ours,first,ours,same\nf1,first,ours,ours,ours", "the same question is answered in line 2: remove one"),
        ("f1,ours,first,ours", r"a row has to have 5 cells"),
    ],
)
def test_answers_that_break_a_rule(tmp_path, row, message):
    path = tmp_path / "rater.csv"
    path.write_text(",".join(PREFERENCE_COLUMNS) + "\n" + row + "\n")
    with pytest.raises(BenchmarkError, match=message):
        read_answers(path)


def test_pairs_have_one_order(folder):
    write_answers(folder, "one", {"f1": "ours"})
    assert read_preferences(folder, ("ours", "first", "second"))["one"][0].preferred == "ours"
    with pytest.raises(BenchmarkError, match="first is compared with ours, and ours with first: swap"):
        read_preferences(folder, ("first", "ours"))


def test_what_is_compared(folder, capsys):
    assert read_comparison(folder).methods == ("first", "ours", "second")
    assert read_comparison(folder, ("ours", "first")).images["first"]["f2"].name == "f2.jpg"
    for methods in (("ours",), ("ours", "ours"), ("ours", "late")):
        with pytest.raises(BenchmarkError, match=r"two or more of first, ours, second, .* with --methods"):
            read_comparison(folder, methods)
    (folder / "images" / "second" / "f2.png").unlink()
    assert main(["compare", str(folder)]) == 2
    assert "second: no image f2.*, which another method has" in capsys.readouterr().err
    assert main(["compare", str(folder / "images")]) == 2
    assert "images/METHOD/NAME.png" in capsys.readouterr().err


# --- one person's answers


def test_every_answer_is_on_the_disk_with_its_side(folder):
    comparing = Comparing(read_comparison(folder, ("ours", "first", "second")), " one ")
    assert len(comparing.questions) == 4 and comparing.current() == 0
    comparing.undo()  # nothing to take back
    shown = [comparing.shown(number) for number in range(4)]
    for number, side in enumerate(("A", "B", SAME, "A")):
        comparing.answer(number, side)
    answers = read_answers(folder / "preferences" / "one.csv")
    assert [answer.left for answer in answers] == [left for left, _ in shown]
    assert [answer.preferred for answer in answers] == [shown[0][0], shown[1][1], SAME, shown[3][0]]
    assert {(answer.id, answer.second) for answer in answers} == {
        (f, s) for f in ("f1", "f2") for s in ("first", "second")
    }
    assert comparing.current() is None
    comparing.undo()
    again = Comparing(read_comparison(folder, ("ours", "first", "second")), "one")
    assert again.current() == 3 and again.answered() == 3 and again.shown(3) == shown[3]
    assert len(preferences(folder)) == 2


def test_sides_and_order_are_at_random(folder):
    """`ours` is on the left in half of 400 questions, within five standard deviations (50); orders differ."""
    comparison = read_comparison(folder, ("ours", "first", "second"))
    people = [Comparing(comparison, f"simulated {i}") for i in range(100)]
    left = sum(person.shown(number)[0] == "ours" for person in people for number in range(4))
    assert abs(left - 200) < 50
    assert len({tuple(person.questions) for person in people}) > 10


def test_the_page_shows_the_images_on_their_sides_and_an_extra_key_does_nothing(folder):
    comparison = read_comparison(folder, ("ours", "first", "second"))
    comparing = Comparing(comparison, "one")
    number, _, progress, *images = _question(comparing)
    assert [image.getpixel((0, 0)) for image in images] == [
        Image.new("RGB", (1, 1), COLOURS[method]).getpixel((0, 0)) for method in comparing.shown(0)
    ]
    assert progress == "0 of 4 compared"
    after = _act(comparison, "A", "one", number)
    assert after[0] == "1" and _act(comparison, "B", "one", number)[2] == after[2] == "1 of 4 compared"
    for image in (folder / "images" / "ours").iterdir():
        image.write_bytes(b"no image")
    assert "Cannot be read: image" in _question(comparing)[1]


def test_without_gradio_the_commands_say_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["compare", str(folder)]) == 2
    assert 'pip install "faceprior[pages]"' in capsys.readouterr().err


# --- in Chromium


@pytest.mark.browser
def test_people_compare_on_the_page(folder, browser):
    """Keys and mouse, undo, magnified, killed and resumed, a second person on a phone; no method's name is told."""
    methods = ("--methods", "ours", "first", "second")
    comparing = Comparing(read_comparison(folder, methods[1:]), "simulated one")
    with served("compare", folder, *methods) as (process, address):
        desk = Desk(browser, address)
        desk.enter("../evil", "cannot be the name of a file")
        desk.enter("simulated one", "0 of 4 compared")
        assert not {"ours", "second"} & set(desk.page.content().replace('"', " ").replace("/", " ").split())
        box = desk.page.locator("#picture-A").bounding_box()
        desk.press("z")
        desk.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
        desk.page.wait_for_function("document.body.classList.contains('magnified')")
        style = "[...document.querySelectorAll('.picture img')].map(i => getComputedStyle(i)).map(s => s.{})"
        assert desk.page.evaluate(style.format("imageRendering")) == ["pixelated"] * 2
        places = desk.page.evaluate(style.format("transformOrigin"))  # the same place of both
        assert places[0] == places[1] and abs(float(places[0].split("px")[0]) / box["width"] - 0.25) < 0.02
        desk.press("z 1", "1 of 4 compared")
        desk.click("=")
        desk.wait("2 of 4 compared")
        desk.press("Backspace", "1 of 4 compared")
        desk.press("2", "2 of 4 compared")
        desk.assert_local(process)
        desk.close()
    answers = read_answers(folder / "preferences" / "simulated one.csv")
    assert [answer.preferred for answer in answers] == [comparing.shown(0)[0], comparing.shown(1)[1]]
    with served("compare", folder, *methods) as (_, address):
        desk, phone = Desk(browser, address), Desk(browser, address, 390, 844)
        desk.enter("simulated one", "2 of 4 compared")
        phone.enter("simulated two", "0 of 4 compared")
        phone.assert_narrow_enough()
        phone.click("=")
        phone.wait("1 of 4 compared")
        desk.press("1", "3 of 4 compared")
        desk.press("=", "All are compared")
        assert len(read_answers(folder / "preferences" / "simulated one.csv")) == 4
        desk.close()
        phone.close()

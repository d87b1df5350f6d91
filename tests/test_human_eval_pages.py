"""The ranking page: what a key does, what is on the disk after every answer, and the page itself in Chromium.

All annotators here are simulated.
"""

import csv
import re
import shutil
import sys

import numpy as np
import pytest
from local_page import Desk, served

from faceprior.human_eval.__main__ import main
from faceprior.human_eval.files import BenchmarkError, read_benchmark, read_ranking
from faceprior.human_eval.rank import Progress, Ranking, _triplet, is_whole, order_scores, press, take_back
from faceprior.human_eval.tables import tables


@pytest.mark.parametrize(
    ("keys", "order", "scores"),
    [
        ("213", "2>1>3", [2, 3, 1]),
        ("2=13", "2=1>3", [3, 3, 1]),
        ("31=2", "3>1=2", [2, 2, 3]),
        ("1=2=3", "1=2=3", [3, 3, 3]),
        ("==22==133", "2=1>3", [3, 3, 1]),  # a place again, = again, or = at the beginning do nothing
    ],
)
def test_keys_make_an_order_and_an_order_scores(keys, order, scores):
    """A score is 3 minus the number of better images; every key can be taken back."""
    so_far = [""]
    for key in keys:
        so_far.append(press(so_far[-1], key))
    assert so_far[-1] == order and order_scores(order) == scores
    assert [is_whole(part) for part in so_far].index(True) == so_far.index(order)
    for before, after in zip(so_far, so_far[1:], strict=False):
        assert before == after or take_back(after) == before
    assert take_back("") == ""


def test_every_answer_is_on_the_disk_and_can_be_taken_back(simulated_benchmark):
    ranking = Ranking(read_benchmark(simulated_benchmark), "simulated one")
    assert ranking.progress() == Progress(0, 0, 3) and ranking.current() == "0001"
    ranking.undo()  # nothing to take back
    ranking.answer("0001", [3, 1, 2])
    ranking.answer("0002", None)
    path = simulated_benchmark / "rankings" / "simulated one.csv"
    best, worst, middle = ranking.shown("0001")
    with open(path, newline="") as file:
        rows = {(row["id"], row["model"]): row["score"] for row in csv.DictReader(file)}
    assert [rows["0001", model] for model in (best, middle, worst)] == ["3", "2", "1"]
    assert [rows["0002", model] for model in ranking.models] == ["", "", ""]
    again = Ranking(read_benchmark(simulated_benchmark), "simulated one")
    assert again.progress() == Progress(2, 1, 3) and again.current() == "0003"
    again.undo()
    assert ranking.current() == "0002" and ranking.progress() == Progress(1, 0, 3)
    ranking.answer("0002", [3, 3, 1])
    ranking.answer("0003", [3, 3, 3])
    assert ranking.current() is None
    read_ranking(path, read_benchmark(simulated_benchmark))  # complete
    assert tables(simulated_benchmark).annotators == ("simulated one",)


def test_the_order_of_the_images_tells_nothing(simulated_benchmark):
    """Each of 3! orders comes about as often: 600 draws of probability 1/6, within five standard deviations (46)."""
    ranking = Ranking(read_benchmark(simulated_benchmark), "simulated")
    orders = [tuple(ranking.shown(f"{i:04d}")) for i in range(600)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6 and max(abs(count - 100) for count in counts) < 46
    assert ranking.shown("0001") == Ranking(read_benchmark(simulated_benchmark), "simulated").shown("0001")
    others = [Ranking(read_benchmark(simulated_benchmark), f"simulated {i}").shown("0001") for i in range(12)]
    assert len({tuple(order) for order in others}) > 1


def test_the_images_stand_in_their_order(simulated_benchmark):
    """The blurred ones have a smaller deviation: sharp > soft > smudged."""
    ranking = Ranking(read_benchmark(simulated_benchmark), "simulated")
    deviations = [np.asarray(picture, float).std() for picture in ranking.images("0001")]
    order = sorted(zip(deviations, ranking.shown("0001"), strict=True), reverse=True)
    assert [model for _, model in order] == ["sharp", "soft", "smudged"]


def test_an_image_that_cannot_be_read_leaves_its_place_empty(simulated_benchmark, caplog):
    """The triplet is shown, again and again, and can be ranked; the page tells the place, the log the file, once."""
    (simulated_benchmark / "images" / "soft" / "0001.png").write_bytes(b"no picture")
    benchmark = read_benchmark(simulated_benchmark)
    for _ in range(2):
        ranking = Ranking(benchmark, "simulated")
        place = ranking.shown("0001").index("soft")
        name, _, _, prompt, _, *pictures = _triplet(ranking)
        assert name == "0001" and [picture is None for picture in pictures] == [i == place for i in range(3)]
        note = f"Cannot be read: image {place + 1}. Rank it last, or discard the triplet."  # no model
        assert prompt == f"### {benchmark.prompts['0001']}\n\n{note}"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "soft/0001.png is not" in caplog.text
    ranking.answer("0001", [1 if i == place else 3 for i in range(3)])
    name, _, _, prompt, _, *pictures = _triplet(ranking)
    assert name == "0002" and "Cannot be read" not in prompt and None not in pictures


@pytest.mark.parametrize("name", ["", ".hidden", "../evil", "a/b", "a\\b", "a\nb"])
def test_a_name_that_is_no_file_s_name_is_refused(simulated_benchmark, name):
    with pytest.raises(BenchmarkError, match=r"the name .* cannot be the name of a file"):
        Ranking(read_benchmark(simulated_benchmark), name)


def test_three_of_more_models(simulated_benchmark):
    shutil.copytree(simulated_benchmark / "images" / "soft", simulated_benchmark / "images" / "more")
    with pytest.raises(BenchmarkError, match=r"these are more, sharp, smudged, soft: name three of .* with --models"):
        Ranking(read_benchmark(simulated_benchmark), "simulated")
    with pytest.raises(BenchmarkError, match="these are nothing, sharp, soft"):
        Ranking(read_benchmark(simulated_benchmark), "simulated", ("sharp", "soft", "nothing"))
    chosen = ("sharp", "soft", "more")
    Ranking(read_benchmark(simulated_benchmark), "simulated", chosen).answer("0001", [1, 2, 3])
    assert set(Ranking(read_benchmark(simulated_benchmark), "simulated").models) == set(chosen)  # the file knows
    with pytest.raises(BenchmarkError, match="these are more, sharp, smudged, soft"):
        Ranking(read_benchmark(simulated_benchmark), "simulated", ("sharp", "soft", "smudged"))
    (simulated_benchmark / "images" / "more" / "0003.png").unlink()
    with pytest.raises(BenchmarkError, match="no image of more for the prompt '0003': add .*more/0003.png"):
        Ranking(read_benchmark(simulated_benchmark), "simulated")


def test_the_command_names_what_is_wrong(simulated_benchmark, tmp_path, capsys):
    assert main(["rank", str(tmp_path / "nothing")]) == 2
    assert "no prompts.jsonl or prompts.csv in" in capsys.readouterr().err
    assert main(["rank", str(simulated_benchmark), "--models", "sharp", "soft", "late"]) == 2
    assert "name three of" in capsys.readouterr().err


def test_without_gradio_the_command_says_how_to_get_it(simulated_benchmark, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("faceprior.human_eval.pages.launch", lambda *args: pytest.fail("there is no page"))
    assert main(["rank", str(simulated_benchmark)]) == 2
    assert 'pip install "faceprior[pages]"' in capsys.readouterr().err


# --- in Chromium


def scores_on_disk(folder, name):
    return read_ranking(folder / "rankings" / f"{name}.csv", read_benchmark(folder), complete=False)


@pytest.mark.browser
def test_people_rank_on_the_page(simulated_benchmark, browser):
    """Keys and mouse, a tie, a discarded triplet, both kinds of undo; nothing leaves the machine."""
    with served("rank", simulated_benchmark) as (process, address):
        desk = Desk(browser, address)
        desk.enter("../evil", "cannot be the name of a file")
        desk.enter("simulated one", "0 of 3 ranked")
        assert "Look at the faces only" in desk.page.inner_text("body")
        prompts = read_benchmark(simulated_benchmark).prompts
        assert prompts["0001"] in desk.page.inner_text("#prompt")
        desk.press("2 = 1", order="2 = 1")
        desk.press("Backspace Backspace", order="2")
        desk.press("= 1 3", "1 of 3 ranked")
        first, second, third = Ranking(read_benchmark(simulated_benchmark), "simulated one").shown("0001")
        scores = scores_on_disk(simulated_benchmark, "simulated one")
        assert [scores["0001", model] for model in (first, second, third)] == [3, 3, 1]

        for place in (3, 1, 2):
            desk.click(place)
        desk.wait("2 of 3 ranked")
        desk.press("Backspace", "1 of 3 ranked")
        assert prompts["0002"] in desk.page.inner_text("#prompt")
        assert ("0002", "soft") not in scores_on_disk(simulated_benchmark, "simulated one")
        desk.press("3 2 1 1 2", "2 of 3 ranked")  # the keys too many do nothing to the next triplet
        desk.page.wait_for_timeout(500)
        assert prompts["0003"] in desk.page.inner_text("#prompt")
        assert not {"sharp", "soft", "smudged"} & set(re.findall(r"\w+", desk.page.content()))
        desk.press("0", "All triplets are ranked")
        desk.wait("3 of 3 ranked, 1 of them discarded")
        assert tables(simulated_benchmark).discarded == ("0003",)
        desk.assert_local(process)
        desk.close()


@pytest.mark.browser
def test_quick_keys_keep_their_order(simulated_benchmark, browser):
    """The first of the three keys of a triplet takes the longest way: without an order it would arrive last."""
    slow_first = """
        const direct = window.fetch;
        let sent = 0;
        window.fetch = async (address, options) => {
          if (String(address).includes("/queue/join") && sent++ % 3 === 1)  // the first event is the name
            await new Promise((done) => setTimeout(done, 700));
          return direct(address, options);
        };"""
    with served("rank", simulated_benchmark) as (_, address):
        desk = Desk(browser, address)
        desk.page.add_init_script(slow_first)
        desk.page.reload()
        desk.enter("simulated one", "0 of 3 ranked")
        desk.press("3 1 2", "1 of 3 ranked")
        places = Ranking(read_benchmark(simulated_benchmark), "simulated one").shown("0001")
        scores = scores_on_disk(simulated_benchmark, "simulated one")
        assert [scores["0001", model] for model in places] == [2, 1, 3]
        desk.close()


@pytest.mark.browser
def test_an_image_that_cannot_be_read_locks_nobody_out(simulated_benchmark, browser):
    (simulated_benchmark / "images" / "soft" / "0001.png").write_bytes(b"no picture")
    place = Ranking(read_benchmark(simulated_benchmark), "simulated one").shown("0001").index("soft") + 1
    with served("rank", simulated_benchmark) as (_, address):
        desk = Desk(browser, address)
        desk.enter("simulated one", f"Cannot be read: image {place}. Rank it last")
        shown = [desk.page.locator(f"#picture-{i} img").count() for i in (1, 2, 3)]
        assert [count == 0 for count in shown] == [i == place for i in (1, 2, 3)]
        others = [i for i in (1, 2, 3) if i != place]
        desk.press(f"{others[0]} {others[1]} {place}", "1 of 3 ranked")
        assert scores_on_disk(simulated_benchmark, "simulated one")["0001", "soft"] == 1
        desk.close()


@pytest.mark.browser
def test_a_killed_page_goes_on_and_people_do_not_meet(simulated_benchmark, browser):
    """Killed with two answers and half of a third; a second person begins at the beginning."""
    with served("rank", simulated_benchmark) as (_, address):
        desk = Desk(browser, address)
        desk.enter("simulated one", "0 of 3 ranked")
        desk.press("1 2 3", "1 of 3 ranked")
        desk.press("3 2 1", "2 of 3 ranked")
        desk.press("2", order="2")
        before = scores_on_disk(simulated_benchmark, "simulated one")
    desk.page.close()  # its console says that the server has gone
    with served("rank", simulated_benchmark) as (_, address):
        desk, other = Desk(browser, address), Desk(browser, address)
        desk.enter("simulated one", "2 of 3 ranked")
        other.enter("simulated two", "0 of 3 ranked")
        assert scores_on_disk(simulated_benchmark, "simulated one") == before
        other.press("1 2 3", "1 of 3 ranked")
        desk.press("1 2 3", "3 of 3 ranked")
        assert len(scores_on_disk(simulated_benchmark, "simulated one")) == 9
        assert len(scores_on_disk(simulated_benchmark, "simulated two")) == 3
        desk.close()
        other.close()

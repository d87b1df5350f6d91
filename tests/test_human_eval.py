"""Human evaluation: what a folder may hold, and the statistics on sets whose answers are known.

All annotators here are simulated, by hand or from a seed; no person ranked anything.
"""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from faceprior.cli import main as faceprior_command
from faceprior.human_eval.__main__ import main
from faceprior.human_eval.agreement import (
    agreement,
    bootstrap_interval,
    compare_pairs,
    majority_vote,
    mean_ranks,
    metric_accuracy,
    metric_statistics,
    model_mean,
    score_fractions,
    win_rates,
)
from faceprior.human_eval.files import BenchmarkError, read_benchmark, read_ranking, read_rankings, read_scores
from faceprior.human_eval.tables import (
    METRICS,
    PUBLISHED,
    PUBLISHED_RANKS,
    alignment_estimates,
    tables,
    to_markdown,
    write_tables,
)
from faceprior.images import save_image
from faceprior.procedural import draw_portrait

MODELS = ("A", "B", "C")
DISCARDED = (0, 0, 0)

# five simulated annotators on four triplets (and one that three of them discard); scores of A, B, C
VOTES = {
    "p1": [(3, 2, 1)] * 5,
    "p2": [(3, 2, 1), (3, 2, 1), (3, 2, 1), (2, 3, 1), (2, 3, 1)],
    "p3": [(3, 3, 1), (3, 3, 1), (1, 3, 2), (1, 3, 2), (2, 3, 1)],
    "p4": [DISCARDED, DISCARDED, DISCARDED, (3, 2, 1), (3, 2, 1)],
    "p5": [(3, 2, 2)] * 5,
}
LABELS = np.array([(3, 2, 1), (3, 2, 1), (2, 3, 1), (3, 2, 2)])  # of p1, p2, p3, p5
FS = {
    "p1": (4, 2, 2),
    "p2": (None, 1, 0),
    "p3": (4, 3, 0),
    "p4": (11, 2, None),
    "p5": (1, 2, 4),
}
KEPT_SCORES = np.array([FS[name] for name in ("p1", "p2", "p3", "p5")], dtype=float)


def votes_array() -> np.ndarray:
    return np.array(list(VOTES.values())).transpose(1, 0, 2)  # (annotators, triplets, models)


def write_csv(path: Path, *rows: tuple, header=("id", "model", "score")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def score_rows(scores: dict, models=MODELS) -> list[tuple]:
    return [
        (name, model, "" if value is None else value)
        for name, values in scores.items()
        for model, value in zip(models, values, strict=True)
    ]


def write_folder(folder: Path, prompts, models, votes: np.ndarray) -> Path:
    """votes: (annotators, prompts, models), 0 where discarded."""
    write_csv(folder / "prompts.csv", *((name, f"a face, {name}") for name in prompts), header=("id", "prompt"))
    for model, name in itertools.product(models, prompts):
        save_image(Image.new("RGB", (2, 2)), folder / "images" / model / f"{name}.png")
    for annotator, own in enumerate(votes, 1):
        ranking = {name: [v or None for v in scores.tolist()] for name, scores in zip(prompts, own, strict=True)}
        write_csv(folder / "rankings" / f"simulated_{annotator}.csv", *score_rows(ranking, models))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(tmp_path / "benchmark", VOTES, MODELS, votes_array())
    write_csv(tmp_path / "benchmark" / "scores" / "FS.csv", *score_rows(FS))
    return tmp_path / "benchmark"


# --- labels


def test_majority_vote_by_hand():
    """p1 and p5 are unanimous. p2: A has 3,3,3,2,2 -> 3, B has 2,2,2,3,3 -> 2, C has 1 five times.

    p3: A has 3,3,1,1,2: two labels twice, so the median of 1,1,2,3,3 = 2; B has 3 five times; C has 1,1,2,2,1 -> 1.
    p4 is discarded by three of five.
    """
    labels = majority_vote(votes_array())
    assert labels.tolist() == [*LABELS[:3].tolist(), [0, 0, 0], LABELS[3].tolist()]


def test_a_tie_among_five_votes_gives_the_middle_score():
    """All 243 votes of five; of those with a tie (2 + 2 + 1) there are 3 x 5! / (2! 2! 1!) = 90."""
    votes = np.array(list(itertools.product((1, 2, 3), repeat=5))).T[:, :, None]  # (5, 243, 1)
    labels = majority_vote(votes)[:, 0]
    counts = np.stack([(votes[..., 0] == label).sum(0) for label in (1, 2, 3)], 1)
    tied = counts.max(1) == 2
    assert tied.sum() == 90
    assert (labels[tied] == 2).all()
    assert (counts[~tied, labels[~tied] - 1] == counts[~tied].max(1)).all()


def test_four_votes_that_tie_give_the_lower_median_and_half_discards_discard():
    """3,3,1,1 sorted is 1,1,3,3, whose lower middle is 1; two of four discards are half, so the triplet goes."""
    votes = np.array([[[3], [0]], [[3], [0]], [[1], [3]], [[1], [3]]])
    assert majority_vote(votes).tolist() == [[1], [0]]


def test_agreement_by_hand():
    """Votes for the label: p1 5,5,5; p2 3,3,5; p3 2,5,3; p5 5,5,5: eight of twelve are more than three."""
    assert agreement(votes_array()) == pytest.approx(8 / 12)


def test_an_annotator_who_discards_a_kept_triplet_agrees_with_nobody():
    """Three equal votes and two discards: kept, but three of five are not more than three."""
    votes = np.array([[[3, 2, 1]]] * 3 + [[[0, 0, 0]]] * 2)
    assert majority_vote(votes).tolist() == [[3, 2, 1]]
    assert agreement(votes) == 0


def test_table_1_by_hand():
    """A has the labels 3,3,2,3, B 2,2,3,2 and C 1,1,1,2."""
    a, b, c = score_fractions(LABELS, MODELS)
    assert (a.model, a.score_1, a.score_2, a.score_3, a.average) == ("A", 0, 0.25, 0.75, 2.75)
    assert (b.score_1, b.score_2, b.score_3, b.average) == (0, 0.75, 0.25, 2.25)
    assert (c.score_1, c.score_2, c.score_3, c.average) == (0.75, 0.25, 0, 1.25)


def test_win_rates_by_hand():
    """A beats B in three of four; A beats C in all; B beats C in three and ties in p5: 3.5 of 4."""
    expected = [[0.5, 0.75, 1], [0.25, 0.5, 0.875], [0, 0.125, 0.5]]
    assert win_rates(LABELS).tolist() == expected


# --- metrics against labels


def test_pairs_by_hand():
    """p1: right, right, tie of the metric = 2.5 of 3. p2: A has no score, so two are left out; B over C is right.

    p3: A over B is wrong, two are right. p5: both wrong; B and C tie for people, so they are no pair.
    """
    counts = compare_pairs(LABELS, KEPT_SCORES)
    assert counts.points.tolist() == [2.5, 1, 2, 0]
    assert counts.pairs.tolist() == [3, 1, 3, 2]
    assert counts.left_out.tolist() == [0, 2, 0, 0]
    row = metric_accuracy("FS", LABELS, KEPT_SCORES)
    assert (row.accuracy, row.pairs, row.left_out) == (5.5 / 9, 9, 2)
    assert 0 <= row.low < 5.5 / 9 < row.high <= 1


def test_a_metric_that_says_nothing_has_half_and_one_without_scores_has_none():
    constant = metric_accuracy("constant", LABELS, np.ones((4, 3)))
    assert (constant.accuracy, constant.low, constant.high) == (0.5, 0.5, 0.5)
    empty = metric_accuracy("empty", LABELS, np.full((4, 3), np.nan))
    assert (empty.accuracy, empty.pairs, empty.left_out, empty.note) == (None, 0, 11, "no pair has two scores")
    ties = metric_accuracy("any", np.full((4, 3), 3), KEPT_SCORES)
    assert (ties.accuracy, ties.left_out, ties.note) == (None, 0, "people order no pair")
    single = metric_accuracy("any", LABELS[:1], KEPT_SCORES[:1])
    assert (single.accuracy, single.low) == (2.5 / 3, None) and "single" in single.note


def test_the_bootstrap_of_two_triplets():
    """One triplet all right and one all wrong: a resample gives 0, 1/2 or 1 with 1/4, 1/2, 1/4; a third has no pair."""
    points, pairs = np.array([3.0, 0, 0]), np.array([3, 3, 0])
    assert bootstrap_interval(points, pairs) == (0, 1)


def test_the_bootstrap_agrees_with_the_normal_interval_over_triplets():
    """400 triplets of three pairs, right or wrong together, half of them right: .5 +- 1.96 sqrt(.25 / 400).

    Over 1200 single pairs the half width would be .028, as if three pairs held three times as much information.
    """
    points, pairs = np.repeat([3.0, 0.0], 200), np.full(400, 3)
    low, high = bootstrap_interval(points, pairs, seed=1)
    half = 1.96 * math.sqrt(0.25 / 400)  # .049
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.005)
    assert bootstrap_interval(points, pairs, seed=1) == (low, high)
    assert bootstrap_interval(points, pairs, seed=2) != (low, high)


def test_pearson_by_hand():
    """Labels 3,2,1 and scores 4,2,1: deviations 1,0,-1 and 5/3,-1/3,-4/3; 3 / sqrt(2 x 42/9)."""
    row = metric_statistics("FS", np.array([[3, 2, 1]]), np.array([[4.0, 2.0, 1.0]]), MODELS)
    assert row.pearson == pytest.approx(3 / math.sqrt(28 / 3))


def test_table_4_by_hand():
    """The scores go from 0 to 4. A: 1, 1, 1/4; B: 1/2, 1/4, 3/4, 1/2; C: 1/2, 0, 0, 1.

    Means .75, .5, .375; variances (.0625 + .0625 + .25) / 3, .125 / 4 and (.015625 + 2 x .140625 + .390625) / 4.
    The correlation is compared with scipy's.
    """
    row = metric_statistics("FS", LABELS, KEPT_SCORES, MODELS)
    assert [spread.median for spread in row.models] == [1, 0.5, 0.25]
    assert [spread.std**2 for spread in row.models] == pytest.approx([0.125, 0.03125, 0.171875])
    there = ~np.isnan(KEPT_SCORES)
    assert row.pearson == pytest.approx(stats.pearsonr(LABELS[there], KEPT_SCORES[there]).statistic)


def test_table_4_has_intervals_over_triplets():
    """400 triplets with r = 1 / sqrt(2): Fisher's interval tanh(artanh r +- 1.96 / sqrt(n - 3)), a tenth apart."""
    generator = np.random.default_rng(0)
    labels = np.array([generator.permutation(3) + 1 for _ in range(400)])
    scores = labels + generator.normal(0, math.sqrt(2 / 3), labels.shape)  # labels have the variance 2 / 3
    row = metric_statistics("FS", labels, scores, MODELS)
    half = 1.96 / math.sqrt(1197)
    expected = [math.tanh(math.atanh(row.pearson) + sign * half) for sign in (-1, 1)]
    assert row.images == 1200 and row.pearson == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert row.interval == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]) + 0.005)
    (spread, *_) = row.models
    assert spread.images == 400 and spread.median_interval[0] < spread.median < spread.median_interval[1]
    assert spread.std_interval[0] < spread.std < spread.std_interval[1]
    assert metric_statistics("FS", labels[:1], scores[:1], MODELS).interval is None


def test_correlations_that_do_not_exist_say_why():
    flat = metric_statistics("flat", LABELS, np.ones((4, 3)), MODELS)
    assert flat.pearson is None and flat.note == "all images have one score"
    empty = metric_statistics("empty", LABELS, np.full((4, 3), np.nan), MODELS)
    assert empty.note == "no image has a score" and empty.models[0].median is None
    tied = metric_statistics("FS", np.full((4, 3), 3), KEPT_SCORES, MODELS)
    assert tied.pearson is None and tied.models[0].median == 1
    no_a = np.where(np.arange(3) == 0, np.nan, KEPT_SCORES)
    assert metric_statistics("FS", LABELS, no_a, MODELS).models[0].median is None


def test_mean_of_a_model_without_scores():
    row = model_mean("FS", "A", [None, None])
    assert (row.mean, row.images, row.without, row.note) == (None, 0, 2, "no image has a score")


# --- the whole folder


def test_tables_of_the_hand_made_folder(folder):
    """Table 3 is over all images, also of the discarded p4: A (4 + 4 + 11 + 1) / 4, B 10 / 5, C (2 + 0 + 0 + 4) / 4."""
    result = tables(folder)
    assert result.models == MODELS and len(result.annotators) == 5
    assert (result.triplets, result.discarded, result.human_ties) == (4, ("p4",), 1)
    assert result.agreement == pytest.approx(8 / 12)
    assert result.table_1 == score_fractions(LABELS, MODELS)
    assert result.win_rates[0] == (0.5, 0.75, 1)
    assert {row.metric: row for row in result.table_2}["FS"] == metric_accuracy("FS", LABELS, KEPT_SCORES)
    assert {row.metric: row for row in result.table_4}["FS"] == metric_statistics("FS", LABELS, KEPT_SCORES, MODELS)
    means = [(row.model, row.mean, row.images, row.without) for row in result.table_3 if row.metric == "FS"]
    assert means == [("A", 5, 4, 1), ("B", 2, 5, 0), ("C", 1.5, 4, 1)]


def test_a_metric_without_a_file_is_named_with_what_makes_it(folder):
    write_csv(folder / "scores" / "our metric.csv", *score_rows(FS))
    result = tables(folder)
    assert result.missing == ("IR", "ASP", "FQA", "LocalIR", "HPS", "LocalHPS", "HPSv2", "topiq_nr-face")
    assert [row.metric for row in result.table_2] == [*METRICS, "our metric"]
    for rows in (result.table_2, result.table_3, result.table_4):
        assert all(row.note.startswith(f"{METRICS[row.metric]}: no ") for row in rows if row.metric in result.missing)
    result = tables(folder, reasons={"IR": "it needs coffee"})
    note = {row.metric: row.note for row in result.table_2}["IR"]
    assert note == f"{METRICS['IR']}: no {folder / 'scores' / 'IR'}.csv or .jsonl, and it needs coffee"


def test_written_tables_hold_ours_and_the_papers(folder, tmp_path, capsys):
    assert main(["tables", str(folder), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert "agreement (labels that more than three fifths of the annotators gave): 66.67% (the paper: 93.30%)" in text
    assert "| A | 0.00 | 25.00 | 75.00 | 2.7500 | measured |" in text
    assert "| SD1.5 | 76.20 | 18.65 | 5.15 | 1.2895 | paper |" in text
    assert "| FS | 61.11 |" in text and "| FS | 80.31 | - | - | - | paper |  |" in text
    assert "| HPS | - | - | - | - | missing | HPS v1 on the whole image and its prompt: no " in text
    assert "| HPS | - | - | - | - | missing | see Table 2 |" in text
    assert "| FS | A | 5 | 4 | 1 | measured |" in text and "| FS | DALL-E 3 | 3.45 | - | - | paper |" in text
    content = json.loads((tmp_path / "out" / "tables.json").read_text(encoding="utf-8"))
    assert content["measured"]["discarded"] == ["p4"]
    assert content["paper"]["table_4"][2]["pearson"] == 0.6759
    again = write_tables(folder)
    assert again == tables(folder) and (folder / "tables.md").is_file()
    assert again.table_1 == tables(folder, seed=1).table_1


def test_names_cannot_break_a_table(tmp_path):
    folder = write_folder(tmp_path / "b", ["p"], ("A|B", "C, D", "E"), np.array([[[3, 2, 1]]]))
    result = tables(folder)
    assert result.agreement is None
    text = to_markdown(result)
    assert "not defined for one annotator" in text and r"| A\|B | 0.00 | 0.00 | 100.00 |" in text


def test_the_published_rows_are_of_one_mind():
    """Average = 1 s1 + 2 s2 + 3 s3, and each score is given once a triplet, so that its column adds up to 100%."""
    for row in PUBLISHED.table_1:
        assert row.score_1 + row.score_2 + row.score_3 == pytest.approx(1)
        assert row.score_1 + 2 * row.score_2 + 3 * row.score_3 == pytest.approx(row.average, abs=1e-4)
    for column in ("score_1", "score_2", "score_3"):
        assert sum(getattr(row, column) for row in PUBLISHED.table_1) == pytest.approx(1, abs=2e-4)
    assert [row.metric for row in PUBLISHED.table_2] == ["Random guess", *list(METRICS)[:7]]


def simulate(rng: np.random.Generator, qualities, noise: float, triplets: int):
    """Simulated annotators: each sees the faces' quality with noise of its own. Returns quality and votes."""
    quality = rng.normal(qualities, 1.0, (triplets, 3))
    seen = quality + rng.normal(0, noise, (5, triplets, 3))
    return quality, seen.argsort(-1).argsort(-1) + 1


def test_simulated_annotators(tmp_path):
    """Noiseless ones agree with quality wholly; with noise, quality beats a random metric, whose interval holds 1/2."""
    rng = np.random.default_rng(0)
    quality, votes = simulate(rng, (0.0, 1.0, 1.5), 0.0, 80)
    assert agreement(votes) == 1
    assert metric_accuracy("quality", majority_vote(votes), quality).accuracy == 1

    quality, votes = simulate(rng, (0.0, 1.0, 1.5), 0.5, 80)
    prompts = [f"{i:03d}" for i in range(80)]
    folder = write_folder(tmp_path / "simulated", prompts, MODELS, votes)
    for metric, values in (("quality", quality), ("random", rng.normal(size=quality.shape))):
        write_csv(folder / "scores" / f"{metric}.csv", *score_rows(dict(zip(prompts, values.tolist(), strict=True))))
    result = tables(folder)
    accuracy = {row.metric: row for row in result.table_2}
    assert accuracy["random"].low < 0.5 < accuracy["random"].high < accuracy["quality"].low
    assert accuracy["quality"].pairs == 240 - result.human_ties
    averages = [row.average for row in result.table_1]
    assert averages == sorted(averages)
    assert result.win_rates[2][0] > result.win_rates[1][0] > 0.5


# --- scores as `faceprior score --json` prints them


def test_what_faceprior_score_prints_is_a_metric_s_file(tmp_path, tiny_models, capsys):
    """Portraits that were drawn, an empty image, the tiny scorer, and annotators who were simulated."""
    prompts = ["p1", "p2"]
    folder = write_folder(tmp_path / "my benchmark", prompts, MODELS, np.array([[(3, 2, 1), (1, 2, 3)]] * 5))
    for seed, model in enumerate(MODELS):
        save_image(draw_portrait(20_000 + seed, 256).image, folder / "images" / model / "p1.png")
        save_image(Image.new("RGB", (64, 64)), folder / "images" / model / "p2.png")
    capsys.readouterr()
    command = ["score", "--json", str(folder / "images"), "--checkpoint", str(tiny_models / "scorer")]
    assert faceprior_command(command) == 0
    (folder / "scores").mkdir()
    (folder / "scores" / "FS.jsonl").write_text(capsys.readouterr().out)
    row = {row.metric: row for row in tables(folder).table_2}["FS"]
    assert (row.pairs, row.left_out) == (3, 3)


def test_the_largest_face_is_the_image_s(folder):
    (folder / "scores" / "FS.csv").unlink()
    faces = [{"score": 9, "box": [0, 0, 2, 2]}, {"score": 1, "box": [0, 0, 8, 8]}]
    rows = [
        {"file": f"anywhere/images/{model}/{name}.png", "faces": faces if model == "A" else []}
        for name, model in itertools.product(VOTES, MODELS)
    ]
    (folder / "scores" / "FS.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = read_scores(read_benchmark(folder))["FS"]
    assert (scores.values["p1", "A"], scores.values["p1", "B"]) == (1, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file": "A/p1.png", "error": "truncated"}', r"FS.jsonl:1: A/p1.png could not be scored \(truncated\)"),
        ('{"file": "A/p9.png", "faces": []}', r"FS.jsonl:1: no image .*A/p9"),
        ('{"file": "A/p1.png"}', r"FS.jsonl:1: the row has no `faces`"),
        ('{"faces": []}', r"FS.jsonl:1: the row has no `file`"),
        ('{"file": "A/p1.png", "faces": [{"box": [1, 2, 3]}]}', r"FS.jsonl:1: a face has to have a `box`"),
        ('{"file": "A/p1.png", "faces": []}', r"no row for the image 'p2' of A"),
        ('{"file": ', r"FS.jsonl:1: torn or foreign row"),
    ],
)
def test_printed_scores_that_break_a_rule(folder, row, message):
    (folder / "scores" / "FS.csv").unlink()
    (folder / "scores" / "FS.jsonl").write_text(row + "\n")
    with pytest.raises(BenchmarkError, match=message):
        read_scores(read_benchmark(folder))


# --- files that break a rule


def test_prompts_come_as_csv_or_json_lines(folder):
    from_csv = read_benchmark(folder).prompts
    lines = [json.dumps({"id": name, "prompt": prompt}) for name, prompt in from_csv.items()]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    with pytest.raises(BenchmarkError, match="both exist: keep one"):
        read_benchmark(folder)
    (folder / "prompts.csv").unlink()
    assert read_benchmark(folder).prompts == from_csv
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no prompts.jsonl or prompts.csv in "):
        read_benchmark(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("prompts.csv", "id,prompt\np1,a\np1,b\n", r"prompts.csv:3: the id 'p1' is in line 2 already"),
        ("prompts.csv", "id,prompt\n../p,a\n", r"prompts.csv:2: the id '../p' cannot be the name of an image"),
        ("prompts.csv", "id,prompt\n", r"prompts.csv holds no prompt"),
        ("prompts.csv", "id;prompt\np1;a\n", r"prompts.csv:1: the first line has to name the columns id,prompt"),
        ("prompts.csv", "id,prompt\np1,a, b\n", r"prompts.csv:2: a row has to have 2 cells"),
        ("prompts.csv", "id,prompt\np1,a\n", r"images/A/p2.png: no prompt has the id 'p2'"),
        ("prompts.csv", b"id,prompt\np1,\xff\n", r"prompts.csv is no CSV file in UTF-8"),
        ("images/A/p1.jpg", b"", r"p1.png: p1.jpg is an image of this name already|p1.jpg: p1.png is"),
    ],
)
def test_a_folder_that_breaks_a_rule(folder, file, content, message):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BenchmarkError, match=message):
        read_benchmark(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("p1,A,3", "p9,A,3", r"simulated_1.csv:2: no image .*images/A/p9.\* found: add the image or remove"),
        ("p1,A,3", "p1,Z,3", r"simulated_1.csv:2: no image .*images/Z/p1"),
        ("p1,B,2", "p1,A,2", r"simulated_1.csv:3: the image 'p1' of A is in line 2 already: remove one"),
        ("p1,B,2\r\n", "", r"simulated_1.csv: no row for the image 'p1' of B: add it, leave"),
        ("p1,A,3\r\np1,B,2\r\np1,C,1\r\n", "", r"simulated_1.csv: no row for the image 'p1' of A"),
        ("p1,A,3", "p1,A,4", r"simulated_1.csv:2: `score` has to be 1, 2 or 3 but is '4'"),
        ("p1,A,3", "p1,A,2.5", r"simulated_1.csv:2: `score` has to be 1, 2 or 3 but is '2.5'"),
        ("p1,A,3", "p1,A", r"simulated_1.csv:2: a row has to have 3 cells"),
        ("p1,B,2", "p1,B,", r"simulated_1.csv:2: the triplet 'p1' is scored in part"),
        ("p1,B,2", "p1,B,1", r"simulated_1.csv:2: the scores 3,1,1 .* no ranking: .* written 3,2,2"),
        ("p1,A,3\r\np1,B,2", "p1,A,2\r\np1,B,2", r"the scores 2,2,1 of .*A, B, C.* is written 3,3,1"),
        ("id,model,score", "id,name,score", r"simulated_1.csv:1: the first line has to name the columns"),
        ("p1,A,3", 'p1,"A,3', r"simulated_1.csv is no CSV file in UTF-8"),
    ],
)
def test_a_ranking_that_breaks_a_rule(folder, old, new, message):
    path = folder / "rankings" / "simulated_1.csv"
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())
    with pytest.raises(BenchmarkError, match=message):
        read_rankings(read_benchmark(folder))


def test_annotators_rank_the_same_three_models(folder):
    for name in VOTES:
        save_image(Image.new("RGB", (2, 2)), folder / "images" / "D" / f"{name}.png")
    path = folder / "rankings" / "simulated_2.csv"
    text = path.read_text()
    path.write_text(text.replace(",C,", ",D,"))
    with pytest.raises(BenchmarkError, match=r"simulated_2.csv ranks A, B, D, but .*simulated_1.csv ranks A, B, C"):
        read_rankings(read_benchmark(folder))
    path.write_text(text + "p1,D,1\n")
    with pytest.raises(BenchmarkError, match=r"ranks 4 models \(A, B, C, D\), but a triplet has 3"):
        read_rankings(read_benchmark(folder))


def test_a_model_that_nobody_ranked_stands_in_table_3_alone(folder):
    save_image(Image.new("RGB", (2, 2)), folder / "images" / "Real" / "p1.png")
    with pytest.raises(BenchmarkError, match=r"FS.csv: no row for the image 'p1' of Real: measure it"):
        tables(folder)
    write_csv(folder / "scores" / "FS.csv", *score_rows(FS), ("p1", "Real", 3.5))
    result = tables(folder)
    assert [row.mean for row in result.table_3 if row.model == "Real"] == [3.5]
    assert result.models == MODELS


def test_a_ranking_that_is_being_written_can_be_read(folder):
    benchmark = read_benchmark(folder)
    path = write_csv(folder / "rankings" / "simulated_1.csv", ("p1", "A", 3), ("p1", "B", 3), ("p1", "C", 1))
    assert read_ranking(path, benchmark, complete=False) == {("p1", "A"): 3, ("p1", "B"): 3, ("p1", "C"): 1}
    with pytest.raises(BenchmarkError, match="no row for the image 'p2' of A"):
        read_ranking(path, benchmark)


@pytest.mark.parametrize("score", ["nan", "inf", "1,5", "good"])
def test_a_metric_s_score_has_to_be_a_number(folder, score):
    write_csv(folder / "scores" / "FS.csv", ("p1", "A", score))
    with pytest.raises(BenchmarkError, match=f"FS.csv:2: `score` has to be a finite number but is '{score}'"):
        read_scores(read_benchmark(folder))


def test_what_is_missing_or_foreign_is_named(folder, tmp_path, capsys):
    (folder / "scores" / "FS.jsonl").write_text("")
    with pytest.raises(BenchmarkError, match="FS.csv and FS.jsonl both exist"):
        tables(folder)
    (folder / "scores" / "FS.jsonl").unlink()
    (folder / "rankings" / "third.xlsx").write_text("")
    with pytest.raises(BenchmarkError, match="third.xlsx is no .csv file"):
        tables(folder)
    for path in (folder / "rankings").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no rankings in "):
        tables(folder)
    assert main(["tables", str(tmp_path / "nothing")]) == 2
    assert "error: no prompts.jsonl or prompts.csv in" in capsys.readouterr().err


def test_a_folder_whose_triplets_are_all_discarded(tmp_path):
    folder = write_folder(tmp_path / "b", ["p"], MODELS, np.zeros((5, 1, 3), int))
    with pytest.raises(BenchmarkError, match="every triplet was discarded"):
        tables(folder)


def test_images_are_needed(folder):
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(FileNotFoundError, match="a benchmark holds its images as images/MODEL/PROMPT_ID.png"):
        read_benchmark(folder)
    (folder / "images").mkdir()
    with pytest.raises(BenchmarkError, match="images holds no folder"):
        read_benchmark(folder)


# --- mean ranks


def test_mean_ranks_by_hand():
    """Two annotators, two triplets, one discarded by the second: ranks of A 1, 1.5, 3; B 2, 1.5, 1; C 3, 3, 2."""
    votes = np.array([[(3, 2, 1), (3, 3, 1)], [(1, 3, 2), DISCARDED]])
    rows = mean_ranks(votes, MODELS)
    assert [row.model for row in rows] == list(MODELS)
    assert [row.rank.value for row in rows] == pytest.approx([5.5 / 3, 4.5 / 3, 8 / 3])
    assert sum(row.rank.value for row in rows) == pytest.approx(6)
    assert all(row.rank.n == 3 and 1 <= row.rank.low <= row.rank.value <= row.rank.high <= 3 for row in rows)
    assert sum(row.rank.value for row in PUBLISHED_RANKS) == pytest.approx(6, abs=0.05)  # the paper's, rounded


def test_mean_ranks_stand_in_the_tables(tmp_path):
    folder = write_folder(tmp_path / "benchmark", VOTES, MODELS, votes_array())
    result = tables(folder)
    assert result.mean_ranks == mean_ranks(votes_array(), MODELS)
    text = to_markdown(result)
    assert "| SDXL | 2.53 |" in text and "| measured |" in text.split("Mean rank")[1]
    write_tables(folder)
    assert json.loads((folder / "tables.json").read_text())["paper"]["mean_ranks"][2]["rank"]["value"] == 1.33


def test_accuracies_as_estimates(tmp_path):
    """The rows of Table 2 under the names of metrics; a metric that is missing has the reason."""
    folder = write_folder(tmp_path / "benchmark", VOTES, MODELS, votes_array())
    write_csv(folder / "scores" / "FS.csv", *score_rows(FS))
    estimates = alignment_estimates(folder, reasons={"IR": "no weights"})
    row = next(row for row in tables(folder).table_2 if row.metric == "FS")
    fs = estimates["FS"]
    assert (fs.value, fs.low, fs.high, fs.n) == (row.accuracy, row.low, row.high, row.pairs)
    assert fs.note == f"{row.left_out} pairs without a score" and estimates["IR"].to_row()["note"].endswith(
        "no weights"
    )

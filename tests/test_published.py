"""The published rows: no number contradicts another, and every column is one that is measured."""

import json
from collections import defaultdict

import pytest

from faceprior.evaluation import tables
from faceprior.evaluation.measures import find_measure
from faceprior.evaluation.tables import published_rows


@pytest.fixture(scope="module")
def published():
    names = [f"face_score_table{number}" for number in range(1, 8)]
    sets = {1: ("celeba", "lfw", "webphoto", "wider"), 2: ("celeba", "webphoto"), 4: ("celeba", "webphoto")}
    names += [f"authface_table{n}_{s}" for n, of in sets.items() for s in of]
    return {name: published_rows(name) for name in [*names, *(f"authface_table{n}" for n in (3, 5, 6))]}


def test_every_table_has_its_source_and_columns_that_are_known(published):
    for name, table in published.items():
        number = name.partition("table")[2][0]
        assert table["source"].endswith(f"Table {number}") and ("2406.17100" in table["source"]) == (name[:4] == "face")
        for row in table["rows"]:
            assert row["values"], (name, row)
            for key in row["values"]:
                assert key in table.get("columns", {}) or find_measure(key, table["protocol"])
        assert len({row["method"] for row in table["rows"]}) == len(table["rows"])
    assert sum(len(row["values"]) for table in published.values() for row in table["rows"]) == 326


def test_numbers_lie_in_the_range_of_their_measure(published):
    fractions = {"ssim", "maniqa", "clipiqa", "lpips", "clip_score", "hps", "hpsv2", "accuracy", "pearson"}
    for table in published.values():
        for row in table["rows"]:
            for key, value in row["values"].items():
                if key in fractions or key.startswith(("median_", "std_")):
                    assert 0 < value < 1, (row, key)
                elif key in ("psnr", "musiq"):
                    assert 15 < value < 100, (row, key)


def test_shares_sum_to_one_and_the_average_is_that_of_the_shares(published):
    """76.20% of score 1, 18.65% of 2 and 5.15% of 3 are 1.2895 on average; one image of a triplet has each score."""
    rows = [row["values"] for row in published["face_score_table1"]["rows"]]
    for row in rows:
        assert sum(n * row[f"score_{n}"] for n in (1, 2, 3)) == pytest.approx(row["average"], abs=1e-4)
    for shares in [[row[f"score_{n}"] for n in (1, 2, 3)] for row in rows] + [
        [row[f"score_{n}"] for row in rows] for n in (1, 2, 3)
    ]:
        assert sum(shares) == pytest.approx(1, abs=2e-4)
    for row in published["authface_table5"]["rows"]:
        assert sum(row["values"].values()) == pytest.approx(1)
    ranks = [row["values"]["user_rank"] for row in published["authface_table3"]["rows"]]
    assert sum(ranks) == pytest.approx(1 + 2 + 3, abs=0.05)


def test_what_is_printed_twice_is_the_same(published):
    """RV5.1 with DINO stands in Tables 5, 6 and 7 of Face Score, AuthFace's own row in its Tables 1, 2 and 4."""
    same = defaultdict(list)
    for table, method in {
        ("face_score_table5", "RV5.1 DINO"),
        ("face_score_table6", "RV5.1 DINO"),
        ("face_score_table7", "T_end 500"),
    }:
        same["dino"].append((table, method))
    same["all"] = [("face_score_table6", "all timesteps"), ("face_score_table7", "T_end 1000")]
    for test_set in ("celeba", "webphoto"):
        same[test_set] = [
            (f"authface_table1_{test_set}", "AuthFace"),
            (f"authface_table2_{test_set}", "tuned, time-aware"),
            (f"authface_table4_{test_set}", "m -0.5, s 1"),
        ]
    for places in same.values():
        rows = [next(r["values"] for r in published[table]["rows"] if r["method"] == name) for table, name in places]
        shared = set.intersection(*map(set, rows))
        assert len(shared) >= 3
        assert all(row[key] == rows[0][key] for row in rows for key in shared)


def test_an_unknown_table_names_the_known_ones():
    with pytest.raises(ValueError, match=r"face_score_table5, .*authface_table6 but is 'table5'"):
        published_rows("table5")
    assert published_rows("") is None
    with open(tables.__file__.replace("tables.py", "published.json"), encoding="utf-8") as file:
        assert len(json.load(file)) == 18

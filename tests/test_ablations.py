"""The table of AuthFace's ablations on the tiny models."""

import numpy as np
import pytest

from checkpoints.tiny_models.ablations import MEASURES, NAMES, OURS, ROWS, TABLES, markdown, rows_of


@pytest.fixture
def values():
    """Each row is the paper's plus its place in NAMES, and a third of the faces have no landmarks."""
    base = np.linspace(1, 2, 30)
    noise = np.random.default_rng(0).normal(0, 0.01, (len(NAMES), 30))
    by_name = {name: base + noise[place] + place - NAMES.index(OURS) for place, name in enumerate(NAMES)}
    by_name["degraded"] = base
    lost = np.where(np.arange(30) % 3, 0, np.nan)
    return {
        name: {m.name: list(own + (lost if m.name == "landmark error" else 0)) for m in MEASURES}
        for name, own in by_name.items()
    }


def test_every_row_has_its_preset():
    assert all((ROWS / f"{name}.yaml").is_file() for name in NAMES)
    assert [len(rows) for rows in TABLES.values()] == [4, 4] and len(NAMES) == 7


def test_rows_compare_the_same_faces(values):
    """The difference from the paper's row is that of the places, to the noise, over the faces that both have."""
    for table in TABLES:
        for row in rows_of(table, values):
            if row["preset"] == "degraded":
                continue
            expected = NAMES.index(row["preset"]) - NAMES.index(OURS)
            for name, cell in row["measures"].items():
                n = 20 if name == "landmark error" else 30
                assert cell["mean"]["n"] == n
                if row["preset"] == OURS:
                    assert cell["against_ours"]["value"] is None
                else:
                    assert cell["against_ours"]["n"] == n
                    assert cell["against_ours"]["value"] == pytest.approx(expected, abs=0.02)


def test_the_page_marks_what_differs(values):
    settings = {"steps": 1, "num_train": 2, "num_faces": 30, "seed": 0}
    rows = [row for table in TABLES for row in rows_of(table, values)]
    page = markdown({"command": "made so", "machine": "here", "settings": settings, "rows": rows})
    assert page.count("**+") + page.count("**-") == 6 * 6  # six other rows, six measures; OURS and degraded mark none
    assert "n = 20" in page and all(f"## {table}" in page for table in TABLES)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in lines} == {len(MEASURES)}

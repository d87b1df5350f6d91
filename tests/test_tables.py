import math

import pytest

from faceprior.metrics import MetricUnavailable, fraction_interval, mean_interval, paired_test
from faceprior.tables import (
    Estimate,
    difference_estimate,
    fraction_estimate,
    interval_text,
    markdown_table,
    markdown_text,
    mean_estimate,
    measure,
    number_text,
    value_text,
)


def test_estimates_are_the_intervals_of_metrics():
    mean, half = mean_interval([1.0, 2.0, 4.0])
    assert mean_estimate([1.0, 2.0, 4.0]) == Estimate(mean, mean - half, mean + half, 3)
    assert fraction_estimate([True, False]) == Estimate(*fraction_interval([True, False]), 2)
    test = paired_test([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    found = difference_estimate([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert (found.value, found.n, found.p_value) == (2, 3, test.p_value)
    assert (found.low, found.high) == pytest.approx((2 - test.half_width, 2 + test.half_width))


def test_an_estimate_of_no_values_has_a_reason():
    for found in (mean_estimate([], reason="no face"), fraction_estimate([], reason="no face")):
        assert found.to_row() == {"value": None, "low": None, "high": None, "n": 0, "note": "not measured: no face"}
    assert difference_estimate([1.0], [2.0]).reason == "fewer than two values"


def test_a_row_holds_finite_numbers_and_one_note():
    """One value has an infinite interval, which is none in JSON."""
    assert mean_estimate([2.0]).to_row() == {"value": 2, "low": None, "high": None, "n": 1, "note": ""}
    assert Estimate(math.inf).to_row()["value"] is None
    assert Estimate(1.0, n=2, note="cropped", p_value=0.01234).to_row()["note"] == "cropped; paired t test, p = 0.0123"
    assert Estimate(note="cropped", reason="no face").to_row()["note"] == "not measured: no face; cropped"


@pytest.mark.parametrize("error", [MetricUnavailable, ImportError])
def test_what_is_missing_becomes_the_reason(error):
    def fails():
        raise error("no weights: `get them`")

    assert measure(fails) == Estimate(reason="no weights: `get them`")
    assert measure(lambda: Estimate(1.0)) == Estimate(1.0)


def test_texts_of_numbers():
    assert [number_text(0.12346), number_text(0.5, ".1%"), number_text(30.0, ".3g", "dB")] == [
        "0.1235",
        "50.0%",
        "30 dB",
    ]
    assert [number_text(None, ".1%"), interval_text(None, 1.0), interval_text(0.5, 1.0, ".0%")] == [
        "-",
        "-",
        "50% to 100%",
    ]


def test_no_cell_breaks_a_table():
    text = markdown_table(("a", "b"), [("x|y", "two\nlines"), ("", "1")])
    assert text == "| a | b |\n|---|---|\n| x\\|y | two lines |\n|  | 1 |\n"


def test_an_infinite_value_is_told_in_words():
    """JSON has no infinity: the row has no value, and a note from which tables read it."""
    row = Estimate(math.inf, n=3, note="all alike").to_row()
    assert row == {"value": None, "low": None, "high": None, "n": 3, "note": "infinite: all alike"}
    assert value_text(row["value"], row["note"]) == "infinite"
    assert value_text(None, "not measured: no weights") == "-" and value_text(0.5, "") == "0.5"


def test_no_html_begins_in_markdown():
    """Names are anybody's; comparisons stay as they are, and what is escaped already is not escaped again."""
    assert markdown_text("a\n<script> p < 0.01 \\<b> </b>") == "a \\<script> p < 0.01 \\<b> \\</b>"
    assert markdown_table(["<b>|"], []) == "| \\<b>\\| |\n|---|\n"

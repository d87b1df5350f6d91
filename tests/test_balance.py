"""Who is in the portraits: skin tones, ages, tags, and what is missing."""

import numpy as np
import pytest
from skimage.color import lab2rgb

from faceprior.balance import age_group, measure_balance, skin_tone, typology_angle


def patch(lightness, b):
    """(4, 4, 3) uint8 sRGB of one CIELAB colour."""
    return (lab2rgb(np.full((4, 4, 3), (lightness, 12.0, b))) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("lightness", "b", "band"),
    [
        (72, 12, "very light"), (68, 18, "light"), (62, 17, "intermediate"), (57, 20, "tan"), (47, 18, "brown"),
        (35, 15, "dark"),
    ],
)  # fmt: skip
def test_the_typology_angle_is_that_of_its_formula(lightness, b, band):
    """ITA = arctan((L - 50) / b) in degrees; scikit-image's CIELAB stands on the other side."""
    expected = np.degrees(np.arctan((lightness - 50) / b))
    assert typology_angle(patch(lightness, b)) == pytest.approx(expected, abs=2)
    assert skin_tone(expected) == band


def test_bands_begin_above_their_limits():
    """Del Bino and Bernerd: very light > 55 > light > 41 > intermediate > 28 > tan > 10 > brown > -30 > dark."""
    assert [skin_tone(a) for a in (55.1, 55, 41, 28, 10, -30, -90)] == [
        "very light", "light", "intermediate", "tan", "brown", "dark", "dark",
    ]  # fmt: skip


def test_the_angle_of_cool_skin_is_finite():
    assert np.isfinite(typology_angle(np.full((2, 2, 3), (120, 130, 200), np.uint8)))


@pytest.mark.parametrize(
    ("tags", "group"),
    [
        (["young woman"], "young"), (["middle-aged man", "glasses"], "middle-aged"), (["elderly man"], "elderly"),
        (["old woman"], "elderly"), (["old photo"], None), (["little girl"], "child"), (["67 years old"], "elderly"),
        (["a 9-year-old"], "child"), (["age 40"], "middle-aged"), (["woman", "long hair"], None), ([], None),
    ],
)  # fmt: skip
def test_the_age_that_tags_say(tags, group):
    assert age_group(tags) == group


def test_the_balance_of_rows():
    rows = [
        {"caption": "young woman, smiling", "quality": {"skin": 60.0}},
        {"semantic": ["young man"], "photographic": ["soft light", "soft light"], "quality": {"skin": 60.0}},
        {"semantic": ["portrait"], "photographic": [], "quality": {}, "caption": "not counted"},
    ]
    balance = measure_balance(rows)
    assert balance["portraits"] == 3 and balance["skin_tones"]["very light"] == 2
    assert balance["ages"] == {"child": 0, "young": 2, "middle-aged": 0, "elderly": 0, "unknown": 1}
    assert balance["tags"] == {"portrait": 1, "smiling": 1, "soft light": 1, "young man": 1, "young woman": 1}
    assert balance["missing"] == [
        "no portrait of the skin tone light, intermediate, tan, brown, dark",
        "no portrait of the age child, middle-aged, elderly",
        "age unknown: the tags of 1 of 3 portraits do not say it",
    ]


def test_rare_groups_are_named():
    """One of 41 portraits is below 5%, 40 of them are not."""
    rows = [{"caption": "young man", "quality": {"skin": 60.0}}] * 40
    rows.append({"caption": "elderly man", "quality": {"skin": -40.0}})
    missing = measure_balance(rows)["missing"]
    assert "few portraits, below 5%, of the skin tone dark (1)" in missing
    assert "few portraits, below 5%, of the age elderly (1)" in missing


def test_nobody_is_in_no_portraits():
    assert measure_balance([]) == {
        "portraits": 0,
        "skin_tones": dict.fromkeys(("very light", "light", "intermediate", "tan", "brown", "dark"), 0),
        "ages": dict.fromkeys(("child", "young", "middle-aged", "elderly", "unknown"), 0),
        "tags": {},
        "missing": [],
    }

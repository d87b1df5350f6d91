"""The two groups of tags, those of captions beside images, and which captions are about light."""

import json

import pytest
from PIL import Image

from faceprior.photos import CaptionError, find_photographs, parse_caption, parse_tags
from faceprior.tags import Tags, combine_tags, is_photographic, mentions_light, sort_tags, split_tags


@pytest.mark.parametrize(
    "caption",
    [
        "portrait photo, soft light", "hard light from the left, studio", "low-key lighting",
        "The light falls from above.", "backlit", "a woman in soft sunlight", "rim light", "golden hour",
        "Natural light. She smiles",
    ],
)  # fmt: skip
def test_captions_about_light(caption):
    assert mentions_light(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "light brown hair", "highlighted cheekbones", "light skin, slight smile", "a delighted man", "a lighthouse",
        "street lights bokeh background", "her hair is light", "light blue eyes, light beard", "traffic light",
        "lightly tanned",
    ],
)  # fmt: skip
def test_captions_that_only_have_light_in_them(caption):
    assert not mentions_light(caption)


# ------------------------------------------------------------------------------------------- the groups

PHOTOGRAPHIC = {
    "expression": "light smile|serious look|neutral expression|looking at the camera|eyes closed|parted lips|laughing",
    "skin": "visible pores|textured skin|freckles|fine lines|natural skin texture|wrinkles|smooth skin, no pores",
    "make-up": "red lipstick|natural makeup|no make-up|smoky eye shadow|black eyeliner|blush",
    "lighting": "soft light from the left|hard shadows|high-key|dark tones|rim light|golden hour|strong contrast",
    "lens": "85mm lens|f/1.8|shallow depth of field|bokeh background|blurred background|close-up|soft focus",
    "mood": "calm mood|dramatic atmosphere|melancholic|serene",
    "style": "cinematic style|black and white|studio portrait|fashion photography|film grain|8k|hyper-realistic",
}
SEMANTIC = (
    "portrait photo|young woman|light brown hair|long straight hair|short hairstyle|hair style|fair skin|dark skin|"
    "green eyes|beard|glasses|white shirt|blue dress|studio background|street lights|sharp jawline|man|pearl earrings|"
    "head scarf|head tilted|wrinkled shirt|flashlight|photograph of a man|stylish hat"
)


@pytest.mark.parametrize("topic", PHOTOGRAPHIC)
def test_photographic_tags(topic):
    assert [tag for tag in PHOTOGRAPHIC[topic].split("|") if not is_photographic(tag)] == []


def test_semantic_tags():
    assert [tag for tag in SEMANTIC.split("|") if is_photographic(tag)] == []


def test_tags_are_sorted_and_joined_again():
    tags = sort_tags(split_tags("soft light, young  woman,, smile , brown hair\n"))
    assert tags == Tags(("young woman", "brown hair"), ("soft light", "smile"))
    assert tags.prompt() == tags.prompt("both") == "young woman, brown hair, soft light, smile"
    assert (tags.prompt("semantic"), tags.prompt("none")) == ("young woman, brown hair", "")


def test_what_a_source_says_is_not_contradicted_by_later_ones():
    sources = (["young woman", "Smile", "soft light"], ["woman", "smile", "angry look", "hard light", "85mm lens"],
               ["light from the left", "dark tones", "blurred background", "textured skin"],
               ["deep depth of field", "smooth skin"])  # fmt: skip
    tags = combine_tags(map(sort_tags, sources))
    assert tags.semantic == ("young woman", "woman")
    assert tags.photographic == ("Smile", "soft light", "85mm lens", "blurred background", "textured skin")


def test_light_brown_hair_says_nothing_about_the_light():
    tags = combine_tags([sort_tags(["light brown hair"]), sort_tags(["soft light"])])
    assert tags == Tags(("light brown hair",), ("soft light",))


# ------------------------------------------------------------------------------------ captions beside images

TAGS = Tags(("young woman", "brown hair"), ("soft light",))


@pytest.mark.parametrize(
    "content",
    [
        "young woman, soft light, brown hair", ["young woman", "brown hair", "soft light"],
        {"caption": "young woman, brown hair, soft light"}, {"tags": ["young woman", "brown hair", "soft light"]},
        {"semantic": ["young woman", "brown hair"], "photographic": "soft light", "caption": "unused"},
    ],
)  # fmt: skip
def test_tags_in_json(content):
    data = json.dumps(content).encode()
    assert parse_tags(data, "a_qwen.json") == TAGS
    assert sorted(split_tags(parse_caption(data, "a.json"))) == sorted(split_tags(TAGS.prompt()))


def test_groups_that_are_named_count_more_than_the_vocabulary():
    named = {"semantic": ["soft light"], "photographic": ["brown hair"]}
    assert parse_tags(json.dumps(named).encode(), "a.json") == Tags(("soft light",), ("brown hair",))


@pytest.mark.parametrize("content", [3, {"text": "a"}, {"semantic": 3}, ["a", 3], {"caption": None}])
def test_json_without_tags(content):
    with pytest.raises(CaptionError, match="a.json has to contain a string, a list of strings, or an object"):
        parse_tags(json.dumps(content).encode(), "a.json")


def test_the_layout_of_the_released_portraits(tmp_path):
    """Folders woman and man, with NAME.png and NAME_qwen.json."""
    for folder in ("woman", "man"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0001.png")
        (tmp_path / folder / "0001_qwen.json").write_text(json.dumps(f"{folder}, soft light"))
    found = find_photographs(str(tmp_path))[0]
    assert [photograph.name for photograph in found] == ["man/0001.png", "woman/0001.png"]
    assert [photograph.tags() for photograph in found] == [Tags((name,), ("soft light",)) for name in ("man", "woman")]

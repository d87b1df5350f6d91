"""The two groups of tags, and which captions are about light."""

import pytest

from faceprior.tags import Tags, is_photographic, mentions_light, sort_tags, split_tags


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

"""Prompts from every kind of file, and which of them are chosen."""

import json

import pytest

from faceprior.prompts import LISTS, Prompt, mentions_person, read_prompt_rows, read_prompts


@pytest.fixture
def coco(tmp_path):
    """Captions as in captions_val2014.json: 40 images of two captions; every fourth shows no person."""
    annotations = []
    for image in range(40):
        subject = "a bench" if image % 4 == 0 else "a man"
        for number in (1, 0):  # not in the order of their ids
            text = f"{subject} in a park ,  picture {image}.\n" if number else f"picture {image} of a park"
            annotations.append({"image_id": 500 - image, "id": 2 * image + number, "caption": text})
    path = tmp_path / "captions_val2014.json"
    images = [{"id": 500 - image, "file_name": f"COCO_val2014_{500 - image:012d}.jpg"} for image in range(40)]
    path.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations}))
    return path


@pytest.fixture
def mjhq(tmp_path):
    """As MJHQ-30K's meta_data.json, with three categories of 7 prompts."""
    kinds = ("animals", "art", "people")
    content = {f"{i:02x}{kind}": {"category": kind, "prompt": f"{kind} {i}"} for i in range(7) for kind in kinds}
    path = tmp_path / "meta_data.json"
    path.write_text(json.dumps(content))
    return path


def test_a_text_file(tmp_path):
    """One a line, in any of the encodings of captions, without empty lines."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf a man \r\n\r\nportrait of Zo\xc3\xab\n")
    assert read_prompts(path) == ["a man", "portrait of Zo\u00eb"]
    assert read_prompts(path, 1) == ["a man"] and len(read_prompts(path, 9)) == 2
    assert read_prompts(path, people=True) == ["a man"]
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"prompts.txt holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"Zo\xeb")
    with pytest.raises(ValueError, match=r"prompts.txt is not UTF-8 .*save it as UTF-8"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*one prompt a line.*people, general"):
        read_prompts(tmp_path / "missing.txt")


def test_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "b", "prompt": " a man\\n in a suit"}\n\n{"id": "a", "prompt": "a dog", "category": "x"}\n')
    assert read_prompt_rows(path) == [Prompt("b", "a man in a suit"), Prompt("a", "a dog", "x")]
    for line, reason in {
        '{"id": "a", "prompt": "a cat"}': "the id 'a' is in an earlier line",
        '{"id": 1, "prompt": "a cat"}': r":5 has to be",
        '{"id": "1"': ":5 is not JSON",
    }.items():
        path.write_text('{"id": "a", "prompt": "a dog"}\n\n\n\n' + line)
        with pytest.raises(ValueError, match=reason):
            read_prompts(path)


def test_coco_gives_one_caption_of_each_image_with_a_person(coco):
    """The first caption by its id that mentions a person; 30 of the 40 images have one."""
    rows = read_prompt_rows(coco)
    assert len(rows) == 30 and len({row.id for row in rows}) == 30
    assert all("a man in a park , picture" in row.text and int(row.text.split()[-1][:-1]) % 4 for row in rows)
    assert len(read_prompt_rows(coco, people=False)) == 40
    assert read_prompt_rows(coco, people=False, seed=3)[0].text.endswith("of a park")


def test_the_seed_alone_chooses(coco):
    """The first 5 of 10 are those of 5, in whatever order the file has its captions; another seed has others."""
    ten = read_prompts(coco, 10, seed=1)
    assert read_prompts(coco, 5, seed=1) == ten[:5] and read_prompts(coco, 10, seed=2) != ten
    content = json.loads(coco.read_text())
    content["annotations"].reverse()
    coco.write_text(json.dumps(content))
    assert read_prompts(coco, 10, seed=1) == ten
    with pytest.raises(ValueError, match="31 prompts are wanted, but there are 30 images in .* that mention a person"):
        read_prompts(coco, 31)


def test_mjhq_gives_the_same_number_of_every_category(mjhq):
    rows = read_prompt_rows(mjhq, 15, seed=4)
    assert [row.category for row in rows] == ["animals", "art", "people"] * 5
    assert len({row.id for row in rows}) == 15 and read_prompt_rows(mjhq, 6, seed=4) == rows[:6]
    assert len(read_prompts(mjhq)) == 21
    with pytest.raises(ValueError, match="3 categories.*multiple of 3 but is 10"):
        read_prompts(mjhq, 10)
    with pytest.raises(ValueError, match="8 prompts are wanted, but there are 7 prompts in the category animals"):
        read_prompts(mjhq, 24)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"a": 1}', '{"annotations": [{"id": 1}]}', "{"])
def test_other_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_prompts(tmp_path / "a.json")


def test_the_lists_that_ship():
    """All of one mention a person, none of the other does; each ends within CLIP's 75 tokens."""
    people, general = map(read_prompts, LISTS)
    assert len(set(people)) == 100 and len(set(general)) == 50
    assert all(map(mentions_person, people)) and not any(map(mentions_person, general))
    assert max(len(prompt.split()) for prompt in people + general) < 25
    groups = [{"close-up"}, {"crowd", "choir", "dozen", "commuters", "passengers", "tourists", "queue"}]
    assert all(any(words & set(prompt.split()) for prompt in people) for words in groups)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's hand", True),
        ("Two babies on a rug", True),
        ("a group of men", True),
        ("a crowded street", False),
        ("a baby elephant", False),
        ("a man-made lake", False),
        ("a couple of dogs", False),
        ("a couple of kids", True),
        ("a DVD player", False),
        ("a bowl of ramen", False),
    ],
)
def test_what_mentions_a_person(text, expected):
    assert mentions_person(text) is expected


def test_categories_that_are_no_text_are_refused(tmp_path):
    """Of two kinds they could not even be sorted."""
    path = tmp_path / "meta_data.json"
    path.write_text('{"a": {"prompt": "x", "category": 1}, "b": {"prompt": "y", "category": "c"}}')
    with pytest.raises(ValueError, match="the category of a is 1, which is no text"):
        read_prompts(path)

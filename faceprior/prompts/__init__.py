"""Prompts to draw: the lists that ship, text and JSON lines, and the two files that Face Score evaluates on.

    read_prompts("people", 20)                            # the first 20 of the list that ships
    read_prompts("captions_val2017.json", 1000, seed=0)   # COCO: 1000 images with a person, one caption of each
    read_prompts("meta_data.json", 5000)                  # MJHQ-30K: 500 of each of its ten categories

The lists "people" (100 prompts: ages, skin tones, light, from close-ups to small faces in groups, in turns) and
"general" (50 prompts without a person) were written for this project and are under its licence, Apache-2.0. COCO's
captions are CC BY 4.0 (https://cocodataset.org/#download, "Train/Val annotations"); MJHQ-30K stands on
https://huggingface.co/datasets/playgroundai/MJHQ-30K, with terms of its own.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from faceprior.photos import decode_text

LISTS = ("people", "general")
_FOLDER = Path(__file__).parent

# Whole words that mean a person, in singular and plural: Face Score (4.2) says "related to human subjects" and no more.
# Left out is what captions use as often for something else: fan, pitcher, cook, guest, mother (of a calf), group.
_PERSONS = re.compile(
    r"\b(?:person|human|man|woman|boy|girl|child|kid|toddler|infant|teen|teenager|lady|gentleman|guy|bride|groom|couple"
    r"|grandfather|grandmother|father|son|daughter|brother|sister|friend|crowd|passenger|pedestrian|commuter|tourist"
    r"|spectator|player|skateboarder|skater|skier|snowboarder|surfer|swimmer|cyclist|biker|hiker|golfer|athlete|batter"
    r"|umpire|jockey|cowboy|dancer|singer|musician|guitarist|choir|waiter|waitress|barista|chef|baker|farmer|worker"
    r"|mechanic|firefighter|soldier|sailor|student|teacher|professor|doctor|nurse|photographer|painter|officer|vendor"
    r"|postman|policeman|fisherman|businessman|salesman|businesswoman|saleswoman|policewoman|monk)s?\b"
    r"|\b(?:\w*men|\w*women|people|children|ladies|babies|baby)\b"
)
_NO_PERSONS = re.compile(
    r"\bman[- ]?made\b|\b(?:wo)?men'?s (?:rest)?room|\bchildren's (?:book|toy)"
    r"|\b(?:specimen|abdomen|ramen|stamen|omen)\b"
    r"|\b(?:cd|dvd|record|music|media|mp3) players?\b|\bcouple of (?!men|women|people|kids|children|boys|girls)"
    r"|\bbab(?:y|ies) (?:\w+ )?(?:animal|bear|bird|calf|carrot|cat|cow|deer|dog|duck|elephant|giraffe|goat|horse|kitten"
    r"|lamb|monkey|pig|sheep|zebra)s?\b"
)


@dataclass(frozen=True)
class Prompt:
    """A prompt to draw. id: unique in its file; category: as "people" in MJHQ-30K, else empty."""

    id: str
    text: str
    category: str = ""


def read_prompts(source: str | Path, number: int = 0, seed: int = 0, people: bool | None = None) -> list[str]:
    """Return the prompts of a list that ships or of a file; see `read_prompt_rows`."""
    return [prompt.text for prompt in read_prompt_rows(source, number, seed, people)]


def read_prompt_rows(source: str | Path, number: int = 0, seed: int = 0, people: bool | None = None) -> list[Prompt]:
    """Return the prompts of a list that ships or of a file, which is one of these:

    - text, one prompt a line; or .jsonl, one `{"id", "prompt"}` a line: the first `number`
    - COCO's captions, as `captions_val2017.json` (the paper's; 2014 has the same layout): one caption of each image,
      `number` images in an order that `seed` alone decides
    - MJHQ-30K's `meta_data.json`: equally many prompts of each category, drawn by `seed`, as in Face Score (6.1)

    source: "people", "general", or a file. number: how many are wanted, 0: all. people: keep only those that
    `mentions_person`; None: for COCO's captions, as in Face Score (4.2), and not for the others.

    Raises FileNotFoundError without the file; ValueError if it is no such file, or holds fewer prompts than `number`
    where the choice is drawn (of a list in order all there are come).
    """
    path = Path(source)
    if str(source) in LISTS and not path.is_file():
        path = _FOLDER / f"{source}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"no prompt file {source}: it holds one prompt a line, or is COCO's captions .json, MJHQ-30K's"
            f" meta_data.json or .jsonl; or give one of the lists that ship: {', '.join(LISTS)}"
        )
    if number < 0:
        raise ValueError(f"`number` of prompts has to be 0 (all) or more but is {number}")

    # ---- All prompts of the file, of which the wanted ones are chosen
    text = _read(path)
    if path.suffix.lower() == ".json":
        content = _parse(text, str(path))
        if isinstance(content, dict) and "annotations" in content:
            return _of_coco(path, content["annotations"], number, seed, people is not False)
        return _of_categories(path, content, number, seed, bool(people))
    prompts = _in_json_lines(path, text) if path.suffix.lower() == ".jsonl" else _in_lines(text)
    prompts = [prompt for prompt in prompts if not people or mentions_person(prompt.text)]
    if not prompts:
        raise ValueError(f"{path} holds no prompt" + (" that mentions a person" if people else ""))
    return prompts[:number] if number else prompts


def mentions_person(text: str) -> bool:
    """Whether a prompt names a human subject, by whole words such as man, children, skier, crowd.

    "a baby elephant", "a man-made lake", "a couple of dogs" and "a DVD player" do not count. It goes by words alone: a
    caption that says "he" or shows a hand is missed.
    """
    return bool(_PERSONS.search(_NO_PERSONS.sub(" ", text.lower())))


# ---- the kinds of files


def _in_lines(text: str) -> list[Prompt]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [Prompt(f"{number:05d}", line) for number, line in enumerate(lines)]


def _in_json_lines(path: Path, text: str) -> list[Prompt]:
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        row = _parse(line, place)
        name, prompt = (row.get("id"), row.get("prompt")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{place} has to be {{"id": "0001", "prompt": "a man in a suit"}} but is {line[:80]}')
        if name in prompts:
            raise ValueError(f"{place}: the id {name!r} is in an earlier line already: remove one")
        prompts[name] = Prompt(name, " ".join(prompt.split()), str(row.get("category", "")))
    return list(prompts.values())


def _of_coco(path: Path, annotations: Any, number: int, seed: int, people: bool) -> list[Prompt]:
    """One caption of each image: the first by its id (that mentions a person)."""
    captions: dict[int, Prompt] = {}
    try:
        for row in sorted(annotations, key=lambda row: row["id"]):
            text = " ".join(row["caption"].split())
            if row["image_id"] not in captions and (not people or mentions_person(text)):
                captions[row["image_id"]] = Prompt(f"{row['image_id']:012d}", text)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} has to hold COCO's captions, `annotations` of id, image_id and caption ({error!r})"
        ) from error
    return _draw(sorted(captions.values(), key=lambda prompt: prompt.id), number, seed, f"images in {path}", people)


def _of_categories(path: Path, content: Any, number: int, seed: int, people: bool) -> list[Prompt]:
    """The same number of every category, the categories in turns: the first N of the result are of every kind."""
    found: dict[str, list[Prompt]] = {}
    try:
        for name, row in sorted(content.items()):
            prompt = Prompt(name, " ".join(row["prompt"].split()), row["category"])
            if not isinstance(prompt.category, str):
                raise TypeError(f"the category of {name} is {prompt.category!r}, which is no text")
            if not people or mentions_person(prompt.text):
                found.setdefault(prompt.category, []).append(prompt)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is neither COCO's captions (`annotations`) nor MJHQ-30K's meta_data.json (an object of"
            f" `category` and `prompt` for each image): {error!r}"
        ) from error
    if not found:
        raise ValueError(f"{path} holds no prompt" + (" that mentions a person" if people else ""))
    if number % len(found):
        raise ValueError(
            f"{path} has {len(found)} categories, of which equally many prompts are taken: `number` has to be a"
            f" multiple of {len(found)} but is {number}"
        )
    where = f"prompts in the category {{}} of {path}"
    drawn = [_draw(found[name], number // len(found), seed, where.format(name), people) for name in sorted(found)]
    return [prompts[i] for i in range(max(map(len, drawn))) for prompts in drawn if i < len(prompts)]


def _draw(prompts: Sequence[Prompt], number: int, seed: int, what: str, people: bool) -> list[Prompt]:
    """Return `number` of the prompts, all for 0, in an order by seed; the first 5 of 10 are those of 5."""
    which = " that mention a person" if people else ""
    if not prompts or len(prompts) < number:
        raise ValueError(f"{number or 'some'} prompts are wanted, but there are {len(prompts)} {what}{which}")
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[i] for i in (order[:number] if number else order)]


def _read(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error

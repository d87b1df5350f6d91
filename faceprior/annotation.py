"""Photography-guided annotation (AuthFace, arXiv 2410.09864, section 3.1): the tags of portraits, source by source.

Every source's tags stand in a portrait's row of the manifest, and are joined in the order of `captioners`: so other
captioners apply to what is stored, and ask only what no earlier run has asked.

`settings` are the settings of stage 3: `captioners`, `vlm`, `vlm_prompt`, `vlm_tokens`, `quantization`,
`mixed_precision`, `batch_size` and `device`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from faceprior.captioner import Captioner, clean_answer
from faceprior.config import DONE_FILE
from faceprior.files import atomic_write
from faceprior.images import load_image
from faceprior.jsonl import MANIFEST, KeyedRows, rewrite_rows
from faceprior.models import quiet_libraries, resolve_device, weight_dtype
from faceprior.photography import measured_tags
from faceprior.photos import UNREADABLE, Photograph, Problems, safe_name
from faceprior.tags import Tags, combine_tags

SOURCES = ("sidecar", "vlm", "measured")
VLM_SETTINGS = ("vlm", "vlm_prompt", "vlm_tokens", "quantization", "mixed_precision")  # what an answer depends on
ANSWERS = "answers"  # folder of the vision-language models' answers, as they gave them
TOGETHER = 100  # portraits whose new tags are stored at once: a killed run loses no more


def caption_settings(settings: Any) -> list[Any]:
    """Return what the captions depend on, as JSON has it."""
    captioners = list(settings.captioners)
    return [captioners, *(getattr(settings, key) for key in VLM_SETTINGS if "vlm" in captioners)]


def recaptioned(settings: Any, output: Path) -> bool:
    """Tell whether the run that is complete in the output folder captioned by other settings."""
    done = output / DONE_FILE
    return done.is_file() and json.loads(done.read_text()).get("captions") != caption_settings(settings)


def measure_tags(crop: Image.Image, turn: float) -> dict[str, list[str]]:
    """Return the tags of a portrait's pixels, as a row has them; turn: of the head, `head_turn`."""
    return Tags(photographic=tuple(measured_tags(crop, turn))).to_row()


def count_tags(tags: Tags) -> int:
    """Return the number of tags in both groups."""
    return len(tags.semantic + tags.photographic)


def add_tags(settings: Any, output: Path, rows: KeyedRows, sources: Iterable[Photograph]) -> Problems:
    """Add what captioners say that no earlier run asked, about the portraits among the rows; return what is unreadable.

    Read are only the files with captions and the portraits; the photographs are not.
    """
    photographs, problems, done = {safe_name(source.name): source for source in sources}, [], {}
    wanted = set(settings.captioners) - {"vlm"}
    waiting = [row for row in rows.values() if "image" in row and wanted - row["tags"].keys()]
    for row in tqdm(waiting, desc="tagging", unit="portrait", disable=not waiting):
        identity, tags, quality = row["id"], dict(row["tags"]), dict(row["quality"])
        if "sidecar" in wanted - tags.keys():
            try:
                if identity not in photographs:
                    raise FileNotFoundError("no longer among the photographs: no caption is read beside it")
                written = photographs[identity].tags() or Tags()
                tags["sidecar"] = written.to_row()
                quality["beside"] = count_tags(written)
            except UNREADABLE as error:  # tried again by the next run
                problems.append((row["photograph"], str(error)))
                quality["beside"] = 0
        if "measured" in wanted - tags.keys():
            tags["measured"] = measure_tags(load_image(output / row["image"]), row["turn"])
        done[identity] = {**row, "tags": tags, "quality": quality}
        if len(done) == TOGETHER:
            rows.replace(done.values())
            done = {}
    if done:
        rows.replace(done.values())
    return problems


def join_tags(settings: Any, found: dict[str, dict[str, list[str]]]) -> Tags:
    """Join the tags of the sources; those of the first ones count where they contradict each other."""
    tags = combine_tags(Tags.from_row(found[name]) for name in settings.captioners if name in found)
    return tags if tags.semantic else Tags(("portrait photo",), tags.photographic)


def write_caption(image: Path, tags: Tags) -> None:
    """Write the caption beside an image: its name with .txt."""
    with atomic_write(image.with_suffix(".txt"), "w") as file:
        file.write(tags.prompt() + "\n")


def read_answers(settings: Any, output: Path) -> KeyedRows:
    """Return the answers by id of the vision-language model: each model and question has a file of its own."""
    question = json.dumps([getattr(settings, key) for key in VLM_SETTINGS])
    name = re.sub(r"\W+", "_", Path(settings.vlm).name)[-50:]
    return KeyedRows(output / ANSWERS / f"{name}_{hashlib.sha256(question.encode()).hexdigest()[:8]}.jsonl")


def ask_model(settings: Any, output: Path, accepted: KeyedRows) -> KeyedRows:
    """Ask the vision-language model about the portraits that it has not seen; return its answers by id."""
    answers = read_answers(settings, output)
    waiting = [row for identity, row in accepted.items() if identity not in answers]
    if waiting:
        quiet_libraries()
        captioner = Captioner.from_pretrained(
            settings.vlm, weight_dtype(settings.mixed_precision), settings.quantization
        )
        captioner.to(resolve_device(settings.device))
    for start in tqdm(
        range(0, len(waiting), settings.batch_size), desc="captioning", unit="batch", disable=not waiting
    ):
        rows = waiting[start : start + settings.batch_size]
        images = [load_image(output / row["image"]) for row in rows]
        texts = captioner.answer(images, settings.vlm_prompt, settings.vlm_tokens)
        for row, text in zip(rows, texts, strict=True):
            answers.add({"id": row["id"], "answer": text})
    return answers


def annotate(settings: Any, output: Path, accepted: KeyedRows, answers: Mapping[str, dict]) -> Problems:
    """Join the tags of all sources in the rows and beside the images; return whose answers hold no tags."""
    problems = []
    for identity, row in accepted.items():
        if identity in answers:
            tags = clean_answer(answers[identity]["answer"])
            row["tags"]["vlm"] = tags.to_row()
            if not tags.prompt():
                problems.append((identity, f"no tags in the model's answer {answers[identity]['answer'][:80]!r}"))
        tags = join_tags(settings, row["tags"])
        if tags.prompt() != row["caption"]:
            write_caption(output / row["image"], tags)
        found = {name: row["tags"][name] for name in SOURCES if name in row["tags"]}
        accepted[identity] = {**row, **tags.to_row(), "caption": tags.prompt(), "tags": found}
    rewrite_rows(output / MANIFEST, accepted.values())
    return problems


def forget_answers(output: Path, identities: list[str]) -> None:
    """Remove what models answered about portraits that are made anew."""
    for answers in (output / ANSWERS).glob("*.jsonl"):
        KeyedRows(answers).remove(identities)

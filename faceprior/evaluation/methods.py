"""A method of an evaluation: `NAME=SOURCE` with options behind it, such as `ours=checkpoints/lora,base=my/model`.

SOURCE is a model (folder, file, hub id, `tiny`), the word `input` or `base`, or a folder of finished images. Without
`NAME=` the source's last part is the name.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from faceprior.models import looks_like_path

REFERENCE, INPUT, BASE = "reference", "input", "base"  # what a restorer should make; what it gets; the untuned model
RESTORER_OPTIONS = ("recipe", "fidelity", "steps")
GENERATOR_OPTIONS = ("base", "vae", "prediction_type", "resolution", "prompts")


@dataclass(frozen=True)
class Method:
    """A row of a table.

    text: SOURCE with its options, as it was given. kind: `input`, `reference`, `model`, or `images` for a folder of
    finished ones. missing: why it cannot be measured.
    """

    name: str
    source: str
    kind: Literal["input", "reference", "model", "images"] = "model"
    options: dict[str, str] = field(default_factory=dict)
    text: str = ""
    missing: str = ""

    @property
    def folder(self) -> str:
        """The name of the method's folder of images."""
        return re.sub(r"[^\w.-]+", "_", self.name)


def parse_methods(texts: Sequence[str], allowed: Sequence[str], key: str) -> list[Method]:
    """Read `NAME=SOURCE,OPTION=VALUE` texts; the kind is set by the protocols.

    allowed: the options. key: name of the setting, for errors. Raises ValueError for a text without a source, an
    unknown option, and for two methods of one name.
    """
    methods = [_parse(text, allowed, key) for text in texts]
    for attribute in ("name", "folder"):
        seen: set[str] = {REFERENCE}
        for method in methods:
            value = getattr(method, attribute)
            if value.lower() in seen:
                raise ValueError(f"`{key}` has two methods of the name {value}, or the name `{REFERENCE}`: rename one")
            seen.add(value.lower())
    return methods


def _parse(text: str, allowed: Sequence[str], key: str) -> Method:
    first, *options = re.split(r",(?=\w+=)", text)
    name, equals, source = first.partition("=")
    if not equals:
        name, source = Path(first.rstrip("/")).stem if looks_like_path(first) else first.rpartition("/")[2], first
    name, source = name.strip(), source.strip()
    if not name or not source:
        raise ValueError(f"`{key}` has to hold NAME=SOURCE but has {text!r}")
    values = dict(option.split("=", 1) for option in options)
    if unknown := [option for option in values if option not in allowed]:
        raise ValueError(f"`{key}` has the option {unknown[0]!r} in {text!r}: the options are {', '.join(allowed)}")
    kind = "input" if source == INPUT else "model"
    return Method(name, source, kind, values, ",".join([source, *options]))


def match_by_stem(files: Iterable[Path], ids: Iterable[str]) -> dict[str, Path]:
    """Return the file of every id that has one: of that stem, or with a suffix that other programs write.

    `0001.png`, `0001_00.png` (GFPGAN, CodeFormer), `0001_0.png` (SUPIR), `0001_out.png`, `0001_restored.png`; the stem
    itself comes first, then the lowest suffix: the first face of a photograph.
    """
    found: dict[str, Path] = {}
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        by_stem.setdefault(file.stem, []).append(file)
        if short := re.fullmatch(r"(.+?)[_-](\d{1,2}|out|restored|result|sr|hq)", file.stem, re.IGNORECASE):
            by_stem.setdefault(short.group(1), []).append(file)
    for name in ids:
        if candidates := by_stem.get(name):
            found[name] = min(candidates, key=lambda file: (file.stem != name, file.stem))
    return found

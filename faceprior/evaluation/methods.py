"""A method of an evaluation: `NAME=SOURCE` with options behind it, such as `ours=checkpoints/lora,base=my/model`.

SOURCE is a model (folder, file, hub id, `tiny`), the word `input` or `base`, or a folder of finished images. Without
`NAME=` the source's last part is the name.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal

from faceprior import tiny
from faceprior.files import content_mark
from faceprior.models import looks_like_path

REFERENCE, INPUT, BASE = "reference", "input", "base"  # what a restorer should make; what it gets; the untuned model
RESTORER_OPTIONS = ("recipe", "fidelity", "steps")
GENERATOR_OPTIONS = ("base", "vae", "prediction_type", "resolution", "prompts")
LONGEST_NAME, LONGEST_FOLDER = 100, 255  # characters; bytes, as file systems count


@dataclass(frozen=True)
class Method:
    """A row of a table.

    text: SOURCE with its options, as it was given. kind: `input`, `reference`, `model`, or `images` for a folder of
    finished ones. missing: why it cannot be measured. weights: the `content_mark` of a model on the disk, else empty.
    """

    name: str
    source: str
    kind: Literal["input", "reference", "model", "images"] = "model"
    options: dict[str, str] = field(default_factory=dict)
    text: str = ""
    missing: str = ""
    weights: str = ""

    @property
    def folder(self) -> str:
        """The name of the method's folder of images."""
        return re.sub(r"[^\w.-]+", "_", self.name)


def parse_methods(texts: Sequence[str], allowed: Sequence[str], key: str) -> list[Method]:
    """Read `NAME=SOURCE,OPTION=VALUE` texts; the kind is set by the protocols.

    allowed: the options. key: name of the setting, for errors. Raises ValueError for a text without a source, an
    unknown option, a name that no folder can have or that stands for something else, and for two methods of one name.
    """
    methods = [_parse(text, allowed, key) for text in texts]
    for method in methods:
        is_long = len(method.name) > LONGEST_NAME or len(os.fsencode(method.folder)) > LONGEST_FOLDER
        if not method.name.isprintable() or method.name.startswith(".") or is_long:
            raise ValueError(
                f"`{key}` has the name {method.name[:LONGEST_NAME]!r}, which becomes that of a folder: give one of at"
                f" most {LONGEST_NAME} characters that can be printed, not beginning with a dot, as NAME=SOURCE"
            )
        if method.name.lower() == INPUT and method.source != INPUT:
            raise ValueError(f"`{key}` has {method.source} under the name {INPUT}, which stands for what is restored")
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
    if not equals or os.path.exists(first):  # a path may hold an equals sign
        name, source = Path(first.rstrip("/")).stem if looks_like_path(first) else first.rpartition("/")[2], first
    name, source = name.strip(), source.strip()
    if not name or not source:
        raise ValueError(f"`{key}` has to hold NAME=SOURCE but has {text!r}")
    values = dict(option.split("=", 1) for option in options)
    if unknown := [option for option in values if option not in allowed]:
        raise ValueError(f"`{key}` has the option {unknown[0]!r} in {text!r}: the options are {', '.join(allowed)}")
    kind = "input" if source == INPUT else "model"
    return Method(name, source, kind, values, ",".join([source, *options]))


def marked(methods: Iterable[Method], kind: str) -> list[Method]:
    """Return the methods, those that are models with the mark of their weights; kind: of the tiny model, if it is."""
    return [
        replace(method, weights=_mark(method, kind)) if method.kind == "model" and not method.missing else method
        for method in methods
    ]


def _mark(method: Method, kind: str) -> str:
    """Join the marks of a model and of the base that its options name."""
    sources = (method.source, method.options.get("base", ""), method.options.get("vae", ""))
    return "".join(content_mark(tiny.resolve(source, kind)) for source in sources if source)


def stems_of(names: Sequence[PurePath]) -> list[str]:
    """Return what each of some relative paths is found by, see `match_by_stem`: its stem where no other one has it.

    Else the path without its suffix, as in `a/1.png` and `b/1.png`, or with it, as in `1.png` and `1.jpg`.
    """
    stems = [(name.stem, name.with_suffix("").as_posix(), name.as_posix()) for name in names]
    count = Counter(stem for own in stems for stem in {*own})
    return [next((stem for stem in own if count[stem] == 1), own[-1]) for own in stems]


def match_by_stem(files: Iterable[Path], ids: Iterable[str], root: str | Path = "") -> dict[str, Path]:
    """Return the file of every id that has one: of that stem, or with a suffix that other programs write.

    `0001.png`, `0001_00.png` (GFPGAN, CodeFormer), `0001_0.png` (SUPIR), `0001_out.png`, `0001_restored.png`; the stem
    itself comes first, then the lowest suffix: the first face of a photograph. A file whose stem is an id is that one's
    only. root: folder of the files; ids may hold folders below it, and suffixes, see `stems_of`.
    """
    ids = list(ids)
    names = set(ids)
    by_stem: dict[str, list[tuple[bool, int, str, Path]]] = {}
    for file in files:
        path = file.relative_to(root) if root and file.is_relative_to(root) else PurePath(file.name)
        whole = {path.stem, path.with_suffix("").as_posix(), path.as_posix()}
        short = () if whole & names else {found.group(1) for stem in whole if (found := _SUFFIXED.fullmatch(stem))}
        for stem in (*whole, *short):
            by_stem.setdefault(stem, []).append((stem not in whole, len(path.parts), path.stem, file))
    return {name: min(by_stem[name], key=lambda found: found[:3])[3] for name in ids if name in by_stem}


_SUFFIXED = re.compile(r"(.+?)[_-](\d{1,2}|out|restored|result|sr|hq)", re.IGNORECASE)

"""Photographs from a folder, a glob, a list of paths, or WebDataset shards, under names that stay the same.

A shard is an uncompressed .tar file in the WebDataset convention: members of one key, which is the path up to the first
dot of the file name, belong together (`0001.jpg`, `0001.txt`). Only its index is kept; each picture is read when it is
wanted, from any thread, so that their order is free. Python's own tarfile reads it: shards are local files here, and
the library webdataset, made for streams, would run `pipe:` commands and read from the beginning at every resume.
"""

import glob
import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from faceprior.images import common_folder, decode_image, find_images, load_image, natural_key


def pair_id(photograph: str, index: int) -> str:
    """Return the id of the pair of a photograph's face: a file name that is unique."""
    return f"{safe_name(photograph)}_{index}"


def safe_name(name: str) -> str:
    """Turn a relative path into a file name without folders or suffix that is still unique.

    It is of letters, digits, `-` and `_`, and short enough for file systems that allow 255 bytes.
    """
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).with_suffix("").as_posix())
    return f"{stem[-50:]}_{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def read_caption(image: str | Path) -> str | None:
    """Return the caption beside a picture, in one line with single spaces; None where there is none.

    It stands in `NAME.txt`, or in `NAME.json` or `NAME_qwen.json` as a text or under the key `caption`, looked for in
    this order. ValueError for a JSON file that holds no caption.
    """
    image = Path(image)
    names = (image.with_suffix(".txt"), image.with_suffix(".json"), image.with_name(f"{image.stem}_qwen.json"))
    path = next((path for path in names if os.path.isfile(path)), None)  # False, too, for a name that is too long
    return None if path is None else parse_caption(path.read_bytes(), str(path))


def parse_caption(data: bytes, name: str) -> str:
    """Return the caption in the bytes of a .txt file, or of a .json one that holds it as `read_caption` says.

    name: the file's, whose suffix counts and which the errors show.
    """
    if not name.lower().endswith(".json"):
        return " ".join(data.decode(errors="replace").split())
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    caption = value.get("caption") if isinstance(value, dict) else value
    if not isinstance(caption, str):
        raise ValueError(f"{name} has to hold a text, or an object with the key `caption`")
    return " ".join(caption.split())


MEMBER_SUFFIXES = ("jpg", "jpeg", "png", "webp")


CAPTION_SUFFIXES = ("txt", "json")  # the first one that is there counts


Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class Member:
    """A file in a shard: its name there, and where its bytes are."""

    name: str
    offset: int
    size: int

    def read(self, shard: Path) -> bytes:
        with open(shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Photograph:
    """A picture that is not read yet.

    name: unique, and the same whatever else is beside it: the path relative to the folder that was named, or
    `SHARD.tar/MEMBER`. path: of the picture, or of the shard that holds the members `picture` and `sidecar`.
    """

    name: str
    path: Path
    picture: Member | None = None
    sidecar: Member | None = None

    def load(self) -> Image.Image:
        """Return the picture as `load_image` does, with the same errors."""
        if self.picture is None:
            return load_image(self.path)
        return decode_image(self.picture.read(self.path), f"{self.path}/{self.picture.name}")

    def is_readable(self) -> bool:
        """Tell whether picture and caption can be read."""
        try:
            self.load(), self.caption()
        except (ValueError, OSError):
            return False
        return True

    def caption(self) -> str | None:
        """Return the caption beside it (NAME.txt, else NAME.json), None without one; ValueError for a wrong file."""
        if self.picture is None:
            return read_caption(self.path)
        if self.sidecar is None:
            return None
        return parse_caption(self.sidecar.read(self.path), f"{self.path}/{self.sidecar.name}")


def find_photographs(images: str, but: Sequence[Path] = ()) -> tuple[list[Photograph], Problems]:
    """Find the photographs that `images` names -> (photographs by name, problems as (shard's place, reason)).

    images: a folder (with its sub-folders), a glob, a picture, a .txt file with one path a line (relative ones from
    its folder), or .tar shards; braces are expanded: `{000..009}`, `{a,b}`. Pictures are not opened yet. but: folders
    whose pictures are passed over, such as those of the results.

    Raises FileNotFoundError for what is not there, ValueError where nothing is a photograph.
    """
    patterns = [images] if Path(images).expanduser().exists() else expand_braces(images)
    paths = [Path(pattern).expanduser() for pattern in patterns]
    if all(path.suffix == ".tar" for path in paths):
        found, problems = _in_shards(paths)
    elif [path.suffix for path in paths] == [".txt"]:
        found, problems = _in_list(paths[0]), []
    else:
        root = common_folder([_fixed_part(path) / "any" for path in paths])
        found = [Photograph(path.relative_to(root).as_posix(), path) for path in find_images(*paths)]
        problems = []
    made = [folder.resolve() for folder in but]
    kept = [item for item in found if not any(item.path.resolve().is_relative_to(folder) for folder in made)]
    if not kept:
        raise ValueError(f"no photographs in {images} besides the pictures that were made from some")
    return sorted(kept, key=lambda photograph: photograph.name), problems


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces of a shell: `{000..009}` counts, with the leading zeros of its start; `{a,b}` lists."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is None:
        words = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        words = listed.split(",")
    if not words:
        raise ValueError(f"`{match.group()}` in {pattern} counts downwards: write the lower number first")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + word + rest for word in words for rest in expand_braces(after)]


def _fixed_part(path: Path) -> Path:
    """Return the deepest folder that a path names without wildcards."""
    if path.is_dir():
        return path
    parents = [parent for parent in path.parents if not glob.has_magic(str(parent))]
    return parents[0]


def _in_list(path: Path) -> list[Photograph]:
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    listed = dict.fromkeys(path.parent / line.strip() for line in lines if line.strip())
    if not listed:
        raise ValueError(f"{path} lists no photograph: it holds one path a line")
    inside = [file.is_relative_to(path.parent) for file in listed]
    names = [(file.relative_to(path.parent) if kept else file) for file, kept in zip(listed, inside, strict=True)]
    return [Photograph(name.as_posix(), file) for name, file in zip(names, listed, strict=True)]


def _in_shards(paths: list[Path]) -> tuple[list[Photograph], Problems]:
    shards = [shard for path in paths for shard in _matching(path)]
    root = common_folder(shards)
    found, problems = [], []
    for shard in shards:
        photographs, wrong = read_shard(shard, shard.relative_to(root).as_posix())
        found, problems = found + photographs, problems + wrong
    if not found:
        reason = f"; the first problem: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"no member of {shards[0]} ... is a .jpg, .png or .webp picture{reason}")
    return found, problems


def _matching(path: Path) -> list[Path]:
    matches = [path] if path.is_file() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    found = [match for match in matches if match.is_file()]
    if not found:
        raise FileNotFoundError(f"no shard at {path}")
    return sorted(found, key=natural_key)


def read_shard(path: str | Path, name: str) -> tuple[list[Photograph], Problems]:
    """Index one shard that is called `name` -> (its photographs, problems as (place, reason)).

    A damaged header costs the member behind it, a torn end what would have followed.
    """
    path, problems = Path(path), []
    files: dict[tuple[str, str], Member] = {}  # by key and suffix
    for member in _members(path, name, problems):
        key, suffix = _key_and_suffix(member.name)
        if suffix not in MEMBER_SUFFIXES + CAPTION_SUFFIXES:
            continue
        if (key, suffix) in files:
            place = f"{name}/{member.name} at byte {member.offset}"
            problems.append((place, "a second member of this name: the first one is taken"))
            continue
        files[key, suffix] = member
    sidecars = {key: files[key, suffix] for suffix in CAPTION_SUFFIXES[::-1] for key, own in files if own == suffix}
    pictures = [(key, member) for (key, suffix), member in files.items() if suffix in MEMBER_SUFFIXES]
    return [Photograph(f"{name}/{file.name}", path, file, sidecars.get(key)) for key, file in pictures], problems


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split as WebDataset does: at the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _members(path: Path, name: str, problems: Problems) -> Iterator[Member]:
    """Yield the files of a shard; what lies between them and is neither a header nor empty becomes a problem."""
    end, size = 0, path.stat().st_size  # end: of the member before
    with open(path, "rb") as file:
        try:
            # ignore_zeros makes it search on behind a damaged header, where it would stop silently
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                for info in tar:
                    if info.offset != end and _is_damaged(path, end):
                        problems.append((f"{name} at byte {end}", "damaged header: its member is skipped"))
                    if not info.offset < info.offset_data <= info.offset_data + info.size <= size:
                        raise tarfile.ReadError(f"{info.name} is cut off")
                    end = tar.offset
                    if info.isreg() and not info.issparse():
                        yield Member(posixpath.normpath(info.name), info.offset_data, info.size)
        except (tarfile.TarError, ValueError, EOFError) as error:
            problems.append(
                (f"{name} at byte {end}", f"not a whole .tar file ({error}): nothing is read from there on")
            )
            return
    if _is_damaged(path, end):
        problems.append((f"{name} at byte {end}", "no .tar header (compressed or damaged): nothing follows it"))


def _is_damaged(path: Path, offset: int) -> bool:
    """Tell whether something else than the zeros of a shard's end stands where a header should."""
    with open(path, "rb") as file:
        file.seek(offset)
        return any(file.read(tarfile.BLOCKSIZE))

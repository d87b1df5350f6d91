"""Photographs from a folder, a glob, a list of paths, or WebDataset shards, under names that stay the same.

A shard is an uncompressed .tar file in the WebDataset convention: members with the same key, the path up to the
first dot of the file name, belong together (`0001.jpg`, `0001.txt`). Only its index is kept; each image is read when it
is needed, in any order and from any thread. Python's own tarfile reads it: shards are local files here, and the library
webdataset, made for streams, would run `pipe:` commands and read from the beginning at every resume.
"""

import codecs
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

from faceprior.files import IMAGE_SUFFIXES, SIDECARS, common_folder, find_images, natural_key, sparse_hash, utf8_text
from faceprior.images import ImageError, count_frames, decode_image, load_image
from faceprior.tags import GROUPS, Tags, sort_tags, split_tags

MEMBER_SUFFIXES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
CAPTION_SUFFIXES = ("txt", "json")  # the first one that exists counts

Problems = list[tuple[str, str]]


class CaptionError(ValueError):
    """A caption that cannot be read; the message names file and rule."""


# What is wrong with a photograph or its caption; other OSErrors, as a full disk, and other ValueErrors are not
UNREADABLE = (ImageError, CaptionError, FileNotFoundError, PermissionError)


@dataclass(frozen=True)
class Member:
    """A file in a shard: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int

    def read(self, shard: Path) -> bytes:
        with open(shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Photograph:
    """An image that is not read yet.

    name: unique, and independent of the other files: the path relative to the folder that was named, or
    `SHARD.tar/MEMBER`. path: path of the image, or of the shard that contains the members `image` and `sidecar`.
    """

    name: str
    path: Path
    image: Member | None = None
    sidecar: Member | None = None

    def load(self) -> Image.Image:
        """Return the image as `load_image` does, with the same errors; ImageError for a file of several frames, too."""
        if self.image is None:
            if (frames := count_frames(self.path)) > 1:
                raise ImageError(f"{self.path} holds {frames} frames or pages, a photograph is one: extract them")
            return load_image(self.path)
        return decode_image(self.image.read(self.path), f"{self.path}/{self.image.name}")

    def fingerprint(self) -> str:
        """Return 16 hex digits that another file under this name has different ones of; empty if it cannot be read.

        They are those of its size and of three blocks, from start, middle and end: a folder of photographs is compared
        without reading all of it. Compressed images differ everywhere behind a change.
        """
        part = {} if self.image is None else {"start": self.image.offset, "size": self.image.size}
        try:
            return sparse_hash(self.path, 3, 2**16, **part)[:16]
        except OSError:
            return ""

    def is_readable(self) -> bool:
        """Whether image and caption can be read."""
        try:
            self.load(), self.caption()
        except (ValueError, OSError):
            return False
        return True

    def caption(self) -> str | None:
        """Return the caption beside it (NAME.txt, else NAME.json), None without one; CaptionError for a wrong file."""
        found = self._sidecar()
        return None if found is None else parse_caption(*found)

    def tags(self) -> Tags | None:
        """Return the tags beside it, None without a caption; CaptionError for a wrong file. See `parse_tags`."""
        found = self._sidecar()
        return None if found is None else parse_tags(*found)

    def _sidecar(self) -> tuple[bytes, str] | None:
        """Return content and name of the file with the caption."""
        if self.image is None:
            path = find_sidecar(self.path)
            return None if path is None else (path.read_bytes(), str(path))
        return None if self.sidecar is None else (self.sidecar.read(self.path), f"{self.path}/{self.sidecar.name}")


def find_photographs(images: str, exclude: Sequence[Path] = ()) -> tuple[list[Photograph], Problems]:
    """Find the photographs that `images` names -> (photographs by name, problems as (place in a shard, reason)).

    images: a folder (with its sub-folders), a glob, an image, a .txt file with one path per line (relative to its
    folder), or .tar shards; braces are expanded: `{000..009}`, `{a,b}`. Images are not opened yet. exclude: folders
    whose images are skipped, such as the output folder.

    Raises FileNotFoundError for a path that does not exist, ValueError if there is no photograph.
    """
    patterns = [images] if Path(images).expanduser().exists() else expand_braces(images)
    paths = [Path(pattern).expanduser() for pattern in patterns]
    if all(path.suffix == ".tar" for path in paths):
        found, problems = _in_shards(paths)
    elif [path.suffix for path in paths] == [".txt"]:
        found, problems = _in_list(paths[0]), []
    else:
        root = common_folder([_fixed_part(path) / "any" for path in paths])
        found = [Photograph(utf8_text(path.relative_to(root).as_posix()), path) for path in find_images(*paths)]
        problems = []
    excluded = [folder.resolve() for folder in exclude]
    kept = [item for item in found if not any(item.path.resolve().is_relative_to(folder) for folder in excluded)]
    if not kept:
        raise ValueError(f"no photographs in {images} besides the images in {', '.join(map(str, exclude))}")
    return sorted(kept, key=lambda photograph: photograph.name), problems


def expand_braces(pattern: str) -> list[str]:
    """Expand braces like a shell: `{000..009}` counts, with as many digits as its start; `{a,b}` lists."""
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
    """Return the deepest folder of a path before its wildcards."""
    if path.is_dir():
        return path
    parents = [parent for parent in path.parents if not glob.has_magic(str(parent))]
    return parents[0]


def _in_list(path: Path) -> list[Photograph]:
    lines = decode_text(path.read_bytes(), "surrogateescape").split("\n")  # a path may be no text
    listed = dict.fromkeys(path.parent / line.strip() for line in lines if line.strip())
    if not listed:
        raise ValueError(f"{path} lists no photograph: it has to contain one path per line")
    inside = [file.is_relative_to(path.parent) for file in listed]
    names = [(file.relative_to(path.parent) if kept else file) for file, kept in zip(listed, inside, strict=True)]
    return [Photograph(utf8_text(name.as_posix()), file) for name, file in zip(names, listed, strict=True)]


# ---- shards


def _in_shards(paths: list[Path]) -> tuple[list[Photograph], Problems]:
    shards = [shard for path in paths for shard in _matching(path)]
    root = common_folder(shards)
    found, problems = [], []
    for shard in shards:
        photographs, wrong = read_shard(shard, shard.relative_to(root).as_posix())
        found, problems = found + photographs, problems + wrong
    if not found:
        reason = f"; the first problem: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"no member of {shards[0]} ... is an image{reason}")
    return found, problems


def _matching(path: Path) -> list[Path]:
    matches = [path] if path.is_file() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    found = [match for match in matches if match.is_file()]
    if not found:
        raise FileNotFoundError(f"no shard at {path}")
    return sorted(found, key=natural_key)


def read_shard(path: str | Path, name: str) -> tuple[list[Photograph], Problems]:
    """Index one shard that is called `name` -> (its photographs, problems as (place, reason)).

    After a damaged header its member is missing, after a truncated end all members that would follow.
    """
    path, problems = Path(path), []
    files: dict[tuple[str, str], Member] = {}  # by key and suffix
    for member in _members(path, name, problems):
        key, suffix = _key_and_suffix(member.name)
        if suffix not in MEMBER_SUFFIXES + CAPTION_SUFFIXES:
            continue
        if (key, suffix) in files:
            place = f"{name}/{member.name} at byte {member.offset}"
            problems.append((place, "a second member of this name: the first one is used"))
            continue
        files[key, suffix] = member
    sidecars = {key: files[key, suffix] for suffix in CAPTION_SUFFIXES[::-1] for key, own in files if own == suffix}
    images = [(key, member) for (key, suffix), member in files.items() if suffix in MEMBER_SUFFIXES]
    return [Photograph(f"{name}/{file.name}", path, file, sidecars.get(key)) for key, file in images], problems


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a name like WebDataset: at the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _members(path: Path, name: str, problems: Problems) -> Iterator[Member]:
    """Yield the files of a shard; between them, data that is neither a header nor zeros becomes a problem."""
    end, size = 0, path.stat().st_size  # end: of the previous member
    with open(path, "rb") as file:
        try:
            # with ignore_zeros it goes on after a damaged header, where it would stop silently
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
                (f"{name} at byte {end}", f"not a complete .tar file ({error}): nothing is read from there on")
            )
            return
    if _is_damaged(path, end):
        problems.append((f"{name} at byte {end}", "no .tar header (compressed or damaged): nothing follows it"))


def _is_damaged(path: Path, offset: int) -> bool:
    """Whether the place of a header has other data than the zeros at the end of a shard."""
    with open(path, "rb") as file:
        file.seek(offset)
        return any(file.read(tarfile.BLOCKSIZE))


# ---- captions


def find_sidecar(image: str | Path) -> Path | None:
    """Return the file with the caption of an image, None without one; of SIDECARS the first that exists."""
    image = Path(image)
    paths = (image.with_name(f"{image.stem}{end}") for end in SIDECARS)
    return next((path for path in paths if os.path.isfile(path)), None)  # also False for a name that is too long


def read_caption(image: str | Path) -> str | None:
    """Return the caption beside an image, in one line with single spaces; None if there is none.

    The first of these files counts: `NAME.txt`, `NAME.json`, `NAME_qwen.json` (as AuthFace's portraits have it); see
    `parse_caption`.
    """
    path = find_sidecar(image)
    return None if path is None else parse_caption(path.read_bytes(), str(path))


def parse_caption(data: bytes, name: str) -> str:
    """Return the caption in the content of a .txt or .json file.

    A JSON file contains a string, a list of tags, or an object with `semantic` and `photographic` (each a list of tags
    or a string), or with `tags` or `caption`. name: the name of the file: its suffix decides how it is read, and errors
    show it. CaptionError for a JSON file without a caption and for what is no text.
    """
    content = _parse_sidecar(data, name)
    return content.prompt() if isinstance(content, Tags) else content


def parse_tags(data: bytes, name: str) -> Tags:
    """Return the tags in the content of a .txt or .json file, as `parse_caption` reads it.

    They are in the groups that a JSON file names; else the vocabulary of `faceprior.tags` sorts them.
    """
    content = _parse_sidecar(data, name)
    return content if isinstance(content, Tags) else sort_tags(split_tags(content))


def _parse_sidecar(data: bytes, name: str) -> str | Tags:
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        raise CaptionError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    content = _caption_in_json(text, name) if name.lower().endswith(".json") else text
    caption = content.prompt() if isinstance(content, Tags) else content
    if "\0" in caption or any("\ud800" <= c <= "\udfff" for c in caption):
        raise CaptionError(f"{name} has characters that are no text in it (UTF-16 without a mark?): save it as UTF-8")
    return content if isinstance(content, Tags) else " ".join(caption.split())


def _caption_in_json(text: str, name: str) -> str | Tags:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"{name} is not JSON: {error}") from error
    wrong = CaptionError(
        f"{name} has to contain a string, a list of strings, or an object with the key `caption`, `tags`, or "
        f"{' and '.join(f'`{group}`' for group in GROUPS)}"
    )
    if isinstance(value, dict) and value.keys() & set(GROUPS):
        return Tags(*(tuple(split_tags(_joined(value.get(group, ""), wrong))) for group in GROUPS))
    if isinstance(value, dict):
        value = value.get("caption", value.get("tags"))
    return _joined(value, wrong)


def _joined(value: object, wrong: CaptionError) -> str:
    """Return a string, or a list of strings joined by commas."""
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in words):
        raise wrong
    return ", ".join(words)


_MARKS = {  # the longest first: that of UTF-16 begins the one of UTF-32
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode the content of a text file by its byte order mark (UTF-8, UTF-16 or UTF-32), without one as UTF-8.

    errors: as in `bytes.decode`. Raises UnicodeDecodeError, a ValueError.
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding, errors)


# ---- file names


def pair_id(photograph: str, index: int) -> str:
    """Return the id of the pair from a face of a photograph: a unique file name."""
    return f"{safe_name(photograph)}_{index}"


def safe_name(name: str) -> str:
    """Turn a relative path into a unique file name without folders and suffix.

    It consists of ASCII letters, digits, `-` and `_`, which every locale can write, and is short enough for file
    systems that allow 255 bytes.
    """
    stem = re.sub(r"[^0-9A-Za-z_-]", "_", Path(name).with_suffix("").as_posix())
    return f"{stem[-50:]}_{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"

"""The files that the commands write: their names, what they may not overwrite, and the record of restored images."""

import functools
import hashlib
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faceprior.files import common_folder, relative_stem, utf8_text
from faceprior.jsonl import append_row, read_rows, require_keys, resume_rows

# marks a folder of drawings or copies, so that it is skipped when a folder above it is read
OUTPUT_MARK = ".faceprior-output"
OUTPUT_TEXT = "`faceprior score` wrote the images here; faceprior skips them when it reads a folder above.\n"
# lists the images that `faceprior restore` wrote to the folder, which may hold others as well
RECORD_FILE = ".faceprior-restored.jsonl"

MAX_NAME_BYTES = 255  # of a file or folder, on most file systems

# What `faceprior restore` writes of a photograph or video: its result, or a copy of the file if no face of it was
# restored; and the comparison. With --only-faces it is the faces, of which the first stands for all in a plan: as names
# of two bases end in another number, or differ before it, no two faces have one name.
RESULT, COPY, COMPARISON, FACE = "result", "copy", "comparison", "face1"
PHOTOGRAPH_NAMES = {RESULT: "{base}{result}", COPY: "{base}{suffix}", COMPARISON: "{base}_compare{result}"}
FACE_NAME = "{base}_face{number}{result}"

SAME_FORMAT = "same"
FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_OWN_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")  # that `same` keeps


def result_suffix(image: str, output_format: str) -> str:
    """The suffix of an image's result; of formats that Pillow writes with losses of its own, `same` makes PNG."""
    if output_format != SAME_FORMAT:
        return FORMATS[output_format]
    suffix = Path(image).suffix
    return suffix if suffix.lower() in _OWN_SUFFIXES else ".png"


# ---- names


def common_tree(images: Iterable[str], roots: Iterable[str | Path]) -> dict[str, Path]:
    """Map each image to its path below the deepest folder that contains all `roots`."""
    base = os.path.commonpath([os.path.abspath(root) for root in roots])
    return {name: Path(os.path.relpath(os.path.abspath(name), base)) for name in images}


def own_trees(images: Sequence[str], folders: Iterable[Path]) -> dict[str, Path]:
    """Map each image to its path below the folder that it was given by, or to its bare name.

    If that gives two images one path, it is the path below the folder that contains all images.
    """
    folders = list(folders)
    inner = {name: relative_stem(name, *folders).with_name(Path(name).name) for name in images}
    if len(set(inner.values())) == len(inner):
        return inner
    return common_tree(images, [common_folder([Path(os.path.abspath(name)) for name in images])])


def plan_outputs(
    inner: Mapping[str, Path],
    kinds: Mapping[str, str],
    known: Mapping[str, str] | None = None,
    taken: Iterable[str] = (),
    results: Mapping[str, str] | None = None,
) -> dict[str, dict[str, str]]:
    """Name the outputs of all images, so that no two files have one name, on any file system.

    inner: {image: its path below the output folder}. kinds: {kind: pattern}, with `{base}`, the image's `{suffix}` and
    its `{result}`, the suffix in `results`, in it, such as `{base}_compare.png`. known: {image: base} of an earlier
    run, which an image keeps. taken: names that belong to other images.

    Returns {image: {kind: path below the output folder}}. The base is the image's path without its suffix; with it,
    `a.jpg`, where names would clash; and with a number, `a.jpg-2`, where they still would.
    """
    known = known or {}
    levels = dict.fromkeys(inner, 0)
    folders = {_key(parent) for path in inner.values() for parent in path.parents}
    taken = {_key(name) for name in taken} | folders

    def names(image: str) -> dict[str, str]:
        base = _base(inner[image], levels[image], known.get(image))
        suffixes = {"suffix": inner[image].suffix, "result": (results or {}).get(image, "")}
        return {kind: pattern.format(base=base, number=1, **suffixes) for kind, pattern in kinds.items()}

    while True:
        owners: dict[str, dict[str, None]] = {}
        for image in inner:
            for name in names(image).values():
                owners.setdefault(_key(name), {})[image] = None
        clashes = [(key in taken, list(group)) for key, group in owners.items() if key in taken or len(group) > 1]
        if not clashes:
            return {image: names(image) for image in inner}
        for image in {image for is_taken, group in clashes for image in _movers(group, is_taken, levels, known)}:
            levels[image] += 1


def require_short(image: str, outputs: Mapping[str, str]) -> None:
    """Raise ValueError if a file system does not take the name of an output of the image."""
    for kind, name in outputs.items():
        if (length := max(len(os.fsencode(part)) for part in Path(name).parts)) > MAX_NAME_BYTES:
            way_out = "rename the image" + (", or restore it without --compare" if kind == COMPARISON else "")
            raise ValueError(
                f"{image}: the name of its {kind} would have {length} bytes, more than the {MAX_NAME_BYTES} that a"
                f" file system takes: {way_out}"
            )


def _movers(group: list[str], is_taken: bool, levels: Mapping[str, int], known: Mapping[str, str]) -> list[str]:
    """Of the images with one name, those that get another: new ones before known ones, all before numbers."""
    if is_taken:
        return group
    free = [image for image in group if levels[image] > 0 or image not in known] or group
    short = [image for image in free if levels[image] == 0]
    return short or (free[1:] if len(free) == len(group) else free)


def _base(path: Path, level: int, known: str | None) -> str:
    if level == 0:
        return known or path.with_suffix("").as_posix()
    return path.as_posix() + (f"-{level}" if level > 1 else "")


def _key(name: str | Path) -> str:
    """The same for names that are one file on a file system that ignores case, or composes characters."""
    return unicodedata.normalize("NFC", utf8_text(Path(name).as_posix())).casefold()


# ---- what may not be overwritten


def open_output_folder(folder: Path, images: Iterable[str], option: str) -> None:
    """Create the folder for drawings or copies and mark it as such.

    Raises:
        ValueError: it contains images to score, or files that no earlier run wrote.
    """
    own = folder.resolve()
    inside = next((name for name in images if Path(os.path.realpath(name)).is_relative_to(own)), None)
    if inside is not None:
        raise ValueError(f"{option} {folder} contains an image to score ({inside}): give a separate folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file: give a folder")
    if folder.exists() and not (folder / OUTPUT_MARK).is_file() and any(folder.iterdir()):
        raise ValueError(f"{option} {folder} has to be new, empty, or from an earlier run: give another folder")
    require_no_inputs((path for path in folder.rglob("*") if path.is_file()), images, option)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTPUT_MARK).write_text(OUTPUT_TEXT, encoding="utf-8")


def require_no_inputs(targets: Iterable[Path], images: Iterable[str], option: str) -> None:
    """Raise ValueError if one of the files to write is one of the images, under any name (links, upper case)."""
    inputs = {_identity(image): image for image in images}
    inputs.pop(None, None)  # links that lead nowhere
    for target in targets:
        if (image := inputs.get(_identity(target))) is not None:
            link = "" if os.path.abspath(target) == os.path.abspath(image) else f" (as {target})"
            raise ValueError(f"{option} would overwrite the input {image}{link}: give another place")


def require_writable(folder: Path, option: str) -> None:
    """Make a folder; ValueError if no file can be written to it, which else shows when the first image is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: nothing can be written to {folder} ({error.strerror}): give another place"
        ) from error


def require_apart(drawings: Iterable[Path], images: Iterable[str], folder: Path) -> None:
    """Raise ValueError if a drawing may have the name of a copy, `folder`/RANK_NAME."""
    names = {_key(Path(image).name) for image in images}
    for drawing in drawings:
        rank, _, name = drawing.name.partition("_")
        if rank.isdecimal() and _key(name) in names and drawing.parent.resolve() == folder.resolve():
            raise ValueError(f"--draw and --copy-best would both write {drawing}: give two folders")


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# ---- the record of restored images


class RestoreRecord:
    """What `faceprior restore` wrote to a folder, in its RECORD_FILE.

    Before the outputs of an image are written, a row claims their names; afterwards a second row says from what file
    and by which settings they were made, and which older outputs of the image were removed. So a killed run knows its
    files again, and no other file is overwritten. The restored photographs of a folder and, with only_faces, the
    restored faces are recorded apart: neither replaces the others.
    """

    def __init__(self, folder: Path, overwrite: bool = False, only_faces: bool = False):
        """overwrite: nothing counts as finished, and rows that cannot be read are ignored."""
        self.folder, self.path, self.only_faces = folder, folder / RECORD_FILE, only_faces
        self._rows: dict[_Owner, dict[str, Any]] = {}
        self._owned: dict[str, tuple[_Owner, str]] = {}  # {key of an output: (what it was made from, its name)}
        exists = self.path.is_file()
        for row in (read_rows(self.path)[0] if overwrite else resume_rows(self.path)) if exists else ():
            try:
                _check_row(row)
            except ValueError as error:
                if overwrite:
                    continue
                raise ValueError(f"{self.path} is damaged ({error}): start over with --overwrite") from error
            self._remember({**row, "settings": None} if overwrite else row)

    def bases(self, images: Iterable[str]) -> dict[str, str]:
        """{image: base} of the images that earlier runs wrote."""
        rows = {image: self._rows.get(self._owner(image)) for image in images}
        return {image: _base_of(row, Path(image).suffix) for image, row in rows.items() if row}

    def taken(self, images: Iterable[str]) -> list[str]:
        """The outputs of other images than these."""
        own = {self._owner(image) for image in images}
        return [name for name, (owner, _) in self._owned.items() if owner not in own]

    def require_free(self, names: Iterable[str], image: str | None = None) -> None:
        """Raise ValueError that names the outputs that exist and that no earlier run wrote, or not of this image."""
        most = 10
        free = {key for key, (owner, _) in self._owned.items() if image is None or owner == self._owner(image)}
        # a link is not what a run wrote, and writing would go through it
        unowned = [n for n in dict.fromkeys(names) if _key(n) not in free or os.path.islink(self.folder / n)]
        found = [str(self.folder / name) for name in unowned if os.path.lexists(self.folder / name)]
        if found:
            more = f" and {len(found) - most} more" if len(found) > most else ""
            exist, them = ("exists", "it") if len(found) == 1 else ("exist", "them")
            of = "" if image is None else f" of {image}"
            raise ValueError(
                f"{', '.join(found[:most])}{more} {exist}, and no run of `faceprior restore`{of} wrote {them}: "
                f"move {them} away, or give another folder"
            )

    def finished(self, image: str, settings: str, kinds: Iterable[str] = ()) -> dict[str, Any] | None:
        """Return the row of an image that was restored by these settings and has not changed since, else None.

        kinds: the outputs that are needed.
        """
        row = self._rows.get(self._owner(image), {})
        outputs = row.get("outputs", {})
        if row.get("settings") != settings or not set(kinds) <= outputs.keys():
            return None
        if not all((self.folder / name).is_file() for name in outputs.values()):
            return None
        state = os.stat(image)
        same = row.get("size") == state.st_size
        same = same and (row.get("mtime_ns") == state.st_mtime_ns or row.get("sha256") == _hash(image))
        return row if same else None

    def claim(self, image: str, base: str, outputs: Mapping[str, str]) -> None:
        """Record that these files, whose names begin with `base`, are going to be written for an image."""
        row = self._row(image, base, outputs)
        if any(self._owned.get(_key(name), (None, ""))[0] != self._owner(image) for name in outputs.values()):
            append_row(self.path, row)
        self._remember(row)

    def finish(
        self, image: str, base: str, outputs: Mapping[str, str], settings: str, faces: Mapping[str, Any] | None = None
    ) -> None:
        """Remove the older outputs of an image that were not written again; record that the others are whole.

        faces: what was done with them, for the summary of a later run.
        """
        state = os.stat(image)
        row = self._row(image, base, outputs) | {"settings": settings}
        row |= {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": _hash(image)}
        row |= {"faces": dict(faces)} if faces else {}
        if stale := self._stale(self._owner(image), outputs):
            for name in stale:
                (self.folder / name).unlink(missing_ok=True)
            row["removed"] = stale
        append_row(self.path, row)
        self._remember(row)

    def _row(self, image: str, base: str, outputs: Mapping[str, str]) -> dict[str, Any]:
        row = {"source": self._source(image), "base": base, "outputs": dict(outputs)}
        return row | ({"only_faces": True} if self.only_faces else {})

    def _stale(self, owner: "_Owner", outputs: Mapping[str, str]) -> list[str]:
        """The files in the folder that earlier runs wrote for the image, without its `outputs`."""
        current = {_key(name) for name in outputs.values()}
        return [name for key, (other, name) in self._owned.items() if other == owner and key not in current]

    def _remember(self, row: dict[str, Any]) -> None:
        owner = (row["source"], bool(row.get("only_faces")))
        self._rows[owner] = row
        for key in map(_key, row.get("removed", ())):
            if self._owned.get(key, (None, ""))[0] == owner:
                del self._owned[key]
        self._owned.update({_key(name): (owner, name) for name in row["outputs"].values()})

    def _owner(self, image: str) -> "_Owner":
        return self._source(image), self.only_faces

    def _source(self, image: str) -> str:
        """The image relative to the folder, so that both may be moved together."""
        try:
            return utf8_text(Path(os.path.relpath(image, self.folder)).as_posix())
        except ValueError:  # on another drive
            return utf8_text(os.path.abspath(image))


def _check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError for a row that no run wrote, such as one that names a file outside of the folder."""
    row = {"removed": [], "base": "", "faces": {}, **row}
    require_keys(row, {"source": str, "outputs": dict, "removed": list, "base": str, "faces": dict})
    require_keys({"restored": 0, "left": [], **row["faces"]}, {"restored": int, "left": list})
    if not row["outputs"].keys() & {RESULT, COPY} and not row.get("only_faces"):
        raise ValueError("`outputs` names neither a result nor a copy")
    for name in (row["base"], *row["outputs"].values(), *row["removed"]):
        if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is no name of a file in the folder")


_Owner = tuple[str, bool]  # an image relative to the folder, and whether it is about its faces only


def _base_of(row: Mapping[str, Any], suffix: str) -> str:
    """The base of an image's outputs; rows of faceprior 0.1 do not hold it."""
    outputs = row["outputs"]
    if isinstance(row.get("base"), str):
        return row["base"]
    return os.path.splitext(outputs[RESULT])[0] if RESULT in outputs else outputs[COPY].removesuffix(suffix)


def _hash(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class RecordedFiles:
    """The images that `faceprior restore` wrote, by the records of their folders, each of which is read once."""

    def __init__(self) -> None:
        self._names = functools.cache(_recorded_names)

    def lists(self, path: Path, folders: Iterable[Path] | None = None) -> bool:
        """Whether one of `folders` (by default all above it) has a record with this image."""
        real = Path(os.path.realpath(path))
        above = real.parents if folders is None else [folder for folder in folders if real.is_relative_to(folder)]
        return any(_key(real.relative_to(folder)) in self._names(folder) for folder in above)


def _recorded_names(folder: Path) -> frozenset[str]:
    path = folder / RECORD_FILE
    rows = read_rows(path)[0] if path.is_file() else []
    names = set()
    for row in rows:
        if isinstance(row.get("removed"), list):
            names -= {_key(str(name)) for name in row["removed"]}
        if isinstance(row.get("outputs"), dict):
            names |= {_key(str(name)) for name in row["outputs"].values()}
    return frozenset(names)

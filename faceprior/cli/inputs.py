"""The images that a command is given: files, folders, globs and lists, without what faceprior itself wrote."""

import codecs
import functools
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faceprior.cli.outputs import OUTPUT_MARK, RecordedFiles
from faceprior.cli.results import say
from faceprior.files import find_images

SINGLE_IMAGES = "(single images)"  # the group of those that were not given by their folder


@dataclass(frozen=True)
class Inputs:
    """entries: {file: None, or why it cannot be found}, in order; groups: {folder given: its files}."""

    entries: dict[str, str | None]
    groups: dict[str, dict[str, None]]

    @property
    def files(self) -> list[str]:
        return [name for name, error in self.entries.items() if error is None]

    @property
    def folders(self) -> list[Path]:
        """The folders given."""
        return [Path(name).expanduser() for name in self.groups if name != SINGLE_IMAGES]

    @property
    def roots(self) -> list[Path]:
        """The folders given, and those of images given by themselves."""
        return self.folders + [Path(name).parent for name in self.groups.get(SINGLE_IMAGES, ())]


def find_inputs(
    images: list[str],
    output_folders: Sequence[Path] = (),
    record_folders: Sequence[Path] = (),
    videos: bool = False,
) -> Inputs:
    """Find the images, and the videos if they are wanted; one that does not exist does not stop the others.

    output_folders: those that the command alone writes to; no file in them is an input. record_folders: those that it
    writes to beside files of others; what their record lists is no input. ValueError if nothing is found.
    """
    entries, groups, first_names = {}, {}, {}
    for argument in _arguments(images):
        try:
            found = without_outputs(argument, find_images(argument, videos=videos), output_folders, record_folders)
        except (ValueError, OSError) as error:
            entries[str(Path(os.path.expanduser(argument)))] = str(error)  # the same name as where it is found
            continue
        names = [first_names.setdefault(os.path.realpath(path), str(path)) for path in found]
        for path, name in zip(found, names, strict=True):
            if os.path.abspath(path) != os.path.abspath(name):
                say(f"{path}: the same file as {name}, taken once")
        entries.update(dict.fromkeys(names))
        group = argument if Path(argument).expanduser().is_dir() else SINGLE_IMAGES
        groups.setdefault(group, {}).update(dict.fromkeys(names))
    inputs = Inputs(entries, groups)
    if not inputs.files:
        own = "no images besides those that faceprior itself wrote" if groups else "no paths on stdin"
        raise ValueError("\n".join(error for error in entries.values() if error) or own)
    return inputs


def _arguments(images: list[str]) -> Iterator[str]:
    """The arguments, with `-` replaced by the lines of stdin (read as bytes: a file name may not be valid text)."""
    for argument in images:
        if argument == "-":
            text = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
            lines = (line.rstrip(b"\r") for line in text.split(b"\n"))
            yield from (os.fsdecode(line) for line in lines if line.strip())
        else:
            yield argument


def without_outputs(
    argument: str, found: Sequence[Path], folders: Iterable[Path] = (), record_folders: Iterable[Path] = ()
) -> list[Path]:
    """Leave out what faceprior wrote among the images of an argument: drawings, copies and restored images.

    These are the images in `folders`, in folders with OUTPUT_MARK, and those that a record lists (`RecordedFiles`). A
    file that is named itself is kept unless it is recorded in one of `folders` or `record_folders`; all images of a
    folder that is `argument` itself are kept, if faceprior wrote all of them and it is none of `record_folders`.
    ValueError if nothing is left of a folder or glob.
    """
    root, own = Path(argument).expanduser(), {folder.resolve() for folder in folders}
    own_records = {folder.resolve() for folder in record_folders}
    if root.is_file():
        recorded = RecordedFiles()
        kept = [path for path in found if not recorded.lists(path, own | own_records)]
    else:
        kept = _without_outputs(_fixed_folder(root), found, own, own_records)
    if not kept and not root.is_file():
        raise ValueError(f"no images in {argument} besides those that faceprior itself wrote")
    if len(kept) < len(found):
        left_out = len(found) - len(kept)
        say(f"{argument}: {left_out} image{'s' * (left_out > 1)} skipped, which faceprior itself wrote")
    return kept


def _fixed_folder(root: Path) -> Path:
    """The folder that a glob searches; any other path itself."""
    while glob.has_magic(str(root)) and not root.is_dir():
        root = root.parent
    return root


def _without_outputs(root: Path, found: Sequence[Path], own: set[Path], own_records: set[Path]) -> list[Path]:
    @functools.cache
    def is_output(folder: Path) -> bool:
        if folder in (root, folder.parent):
            return False
        return folder.resolve() in own or (folder / OUTPUT_MARK).is_file() or is_output(folder.parent)

    recorded, real = RecordedFiles(), root.resolve()
    kept = [path for path in found if not is_output(path.parent) and not recorded.lists(path, own_records)]
    fresh = [path for path in kept if not recorded.lists(path)]
    if fresh:
        return fresh
    return [path for path in kept if recorded.lists(path, (real, *real.parents))]  # a folder of outputs, named itself

"""Files: which of them are images, names, contents, writing whole or not at all, folders that a process holds."""

import contextlib
import glob
import hashlib
import logging
import os
import re
import shutil
import struct
import time
import uuid
import warnings
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

logger = logging.getLogger(__name__)

# A file with such a suffix is an image, and an error if it cannot be read; of others, the content decides
IMAGE_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
# Pillow's formats that are looked for in every file; others only where the suffix is theirs, since what marks them in
# a file marks others, too. Films, plots and tables are no images, though Pillow has names for them.
_SNIFFED_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "SGI", "TIFF", "WEBP")
_OTHER_FORMATS = (None, "BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF")
# Of raw files, which are TIFF inside, Pillow reads a thumbnail only
_RAW_SUFFIXES = (".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
VIDEO_SUFFIXES = (".3gp", ".avi", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv")
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ")
SIDECARS = (".txt", ".json", "_qwen.json")  # ends of the names of captions: NAME.txt belongs to the image NAME.jpg

# What Pillow's decoders and its reader and writer of EXIF raise for damaged files
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    struct.error, zlib.error,
)  # fmt: skip


# ---- which files are images


def is_heif(file: IO[bytes]) -> bool:
    """Whether an open file begins as a HEIC photograph does; the file is rewound."""
    start = file.read(12)
    file.seek(0)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def is_video(path: str | Path) -> bool:
    """Whether a file begins as a video does: MP4, MOV and 3GP, Matroska and WebM, AVI; of others the suffix decides."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp":
        return start[8:12] not in (*_HEIF_BRANDS, *_AUDIO_BRANDS, b"avif", b"avis")
    if start[:4] == b"\x1aE\xdf\xa3" or (start[:4] == b"RIFF" and start[8:] == b"AVI "):
        return True
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def find_images(*paths: str | Path, recursive: bool = True, videos: bool = False) -> list[Path]:
    """Find the image files that `paths` name: files, folders and globs.

    The arguments keep their order; the files of a folder or a glob come in natural order ("img2" before "img10"). A
    file is listed once, however often it is named or linked to. In folders and globs, a file is an image if it has one
    of the IMAGE_SUFFIXES or, whatever its suffix, begins as an image does; HEIC is listed even where pillow-heif is
    missing, so that `load_image` names it. Hidden entries are skipped, as are captions beside an image (SIDECARS); the
    log counts and names hidden images, second names of a file, and other files that are skipped. A file that is named
    itself is listed whatever it is. Links that lead nowhere are listed, so that `load_image` names them. recursive:
    descend into sub-folders (links are followed, loops are safe). videos: list videos, too (see `is_video`).

    Raises FileNotFoundError for a path that does not exist, ValueError for a folder or glob without images.
    """
    if not paths:
        raise ValueError("`find_images` needs at least one file, folder or glob")
    found, skipped = {}, _Skipped()
    for path in paths:
        for file in _expand(path, recursive, videos, skipped):
            first = found.setdefault(os.path.realpath(file), file)
            if os.path.abspath(first) != os.path.abspath(file):
                skipped.twice.append(f"{file} is {first}")
    for text in skipped.texts():
        logger.info("%s", text)
    return list(found.values())


class _Skipped:
    """What a search found and did not list: files that are no images, hidden images, second names of a file."""

    def __init__(self) -> None:
        self.others: list[Path] = []
        self.hidden: list[Path] = []
        self.twice: list[str] = []

    def texts(self, most: int = 10) -> list[str]:
        kinds = (
            (self.others, "file", " that is no image", " that are no images"),
            (self.hidden, "hidden image", "", ""),
            (self.twice, "second name", " of a file that is listed once", " of files that are listed once"),
        )
        return [_skipped_text(list(map(str, names)), *words, most) for names, *words in kinds if names]


def _skipped_text(names: list[str], noun: str, one: str, several: str, most: int) -> str:
    number = f"1 {noun} skipped{one}" if len(names) == 1 else f"{len(names)} {noun}s skipped{several}"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{number}: {', '.join(map(printable, names[:most]))}{more}"


def _expand(path: str | Path, recursive: bool, videos: bool, skipped: _Skipped) -> list[Path]:
    """Return the images that one argument names; what else is found there is noted in `skipped`."""
    path, found = Path(path).expanduser(), _Skipped()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = list(_files_in(path, recursive, found.hidden))
    elif glob.has_magic(str(path)):
        files = _files_of_glob(path, recursive, found.hidden)
    else:
        raise FileNotFoundError(f"no file or folder at {path}")
    images, found.others = _images_among(sorted(files, key=natural_key), videos)
    if not images:
        text = "; ".join(found.texts(most=3))
        raise ValueError(f"no images in {path}{': ' * bool(text)}{text}")
    skipped.others += found.others
    skipped.hidden += found.hidden
    return images


def _files_of_glob(pattern: Path, recursive: bool, hidden: list[Path]) -> list[Path]:
    matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    if not matches:
        raise FileNotFoundError(f"nothing matches {pattern}")
    files = [match for match in matches if _is_visible_file(match)]
    if recursive:
        files += [file for match in matches if match.is_dir() for file in _files_in(match, recursive, hidden)]
    return list(dict.fromkeys(files))


def _files_in(folder: Path, recursive: bool, hidden: list[Path]) -> Iterator[Path]:
    """Yield the visible files; hidden images, and those in hidden folders, are appended to `hidden`."""
    seen = set()
    for root, folders, files in os.walk(folder, onerror=_warn_skipped, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for name in folders if recursive else []:
            if name.startswith("."):
                with contextlib.suppress(OSError):
                    hidden += _images_by_name(Path(root, name), os.listdir(Path(root, name)))
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        hidden += _images_by_name(Path(root), [name for name in files if name.startswith(".")])
        yield from (Path(root, name) for name in files if _is_visible_file(Path(root, name)))


def _images_by_name(folder: Path, names: list[str]) -> list[Path]:
    return [Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in IMAGE_SUFFIXES]


def _warn_skipped(error: OSError) -> None:
    logger.warning("skipped: %s", error)


def _is_visible_file(path: Path) -> bool:
    """A link that leads nowhere counts, too: its image is missing, and `load_image` says so."""
    return not path.name.startswith(".") and (path.is_file() or (path.is_symlink() and not path.exists()))


def _images_among(files: list[Path], videos: bool) -> tuple[list[Path], list[Path]]:
    """Split files into images (with videos, if they are wanted) and others, without the captions of the images."""
    images = {file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
    rest = _without_sidecars([file for file in files if file not in images], images)  # only these are opened
    images |= {file for file in rest if _begins_as_an_image(file) or (videos and _begins_as_a_video(file))}
    others = _without_sidecars([file for file in rest if file not in images], images)
    return [file for file in files if file in images], others


def _begins_as_a_video(path: Path) -> bool:
    try:
        return is_video(path)
    except OSError:
        return False


def _without_sidecars(files: list[Path], images: set[Path]) -> list[Path]:
    owners = {str(image.with_suffix("")) for image in images}
    return [
        file
        for file in files
        if not any(file.name.endswith(end) and str(file).removesuffix(end) in owners for end in SIDECARS)
    ]


def _begins_as_an_image(path: Path) -> bool:
    if path.suffix.lower() in _RAW_SUFFIXES:
        return False
    own = Image.registered_extensions().get(path.suffix.lower())
    formats = _SNIFFED_FORMATS if own in _OTHER_FORMATS else (*_SNIFFED_FORMATS, own)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image: `load_image` has its own limit
            if is_heif(file):
                return True
            with Image.open(file, formats=formats):
                return True
    except Image.DecompressionBombError:
        return True
    except DECODE_ERRORS:
        return False


# ---- names and their order


def natural_key(path: str | Path) -> list[Any]:
    """The sort key that puts "img2" before "img10", folder by folder."""
    parts = Path(path).parts
    return [[_number_or_text(piece) for piece in re.split(r"(\d+)", part)] + [(2, 0, part)] for part in parts]


def _number_or_text(piece: str) -> tuple[int, int, str]:
    return (0, int(piece), "") if piece.isdecimal() else (1, 0, piece.casefold())


def relative_stem(path: str | Path, *roots: str | Path) -> Path:
    """`path` without its suffix, relative to the deepest folder of `roots` that contains it, else the bare stem.

    For callers that mirror a folder tree: `out / relative_stem(file, "photos")` with a new suffix.
    """
    path = Path(path)
    holders = [Path(root) for root in roots if path.is_relative_to(root) and path != Path(root)]
    if not holders:
        return Path(path.stem)
    deepest = max(holders, key=lambda root: len(root.parts))
    return path.relative_to(deepest).with_suffix("")


def utf8_text(name: str) -> str:
    """A file name as UTF-8 text, the same in every locale: an ASCII one has lone surrogates for other characters."""
    return name.encode(errors="surrogateescape").decode(errors="surrogateescape")


def common_folder(paths: list[Path]) -> Path:
    """Return the deepest folder that contains all `paths`."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def printable(text: str, encoding: str | None = "utf-8") -> str:
    """Turn `text` into one line that any terminal and UTF-8 file takes: what cannot be shown becomes an escape.

    File names may contain line breaks, control codes, and bytes that are not valid text.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def size_text(size: float) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# ---- contents

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
_LORA = "pytorch_lora_weights.safetensors"


def content_mark(path: str | Path) -> str:
    """Return 8 hex digits by which other contents under the same name are known: of a file, or of a folder's weights.

    Cheap enough for every start: of each file the size and 512 evenly spaced blocks of 4 KiB are hashed, of one below
    2 MiB all. They hit every tensor above a 512th of the file, so that no training misses them. A copy has the same
    mark, whenever it was written. Of a pipeline's folder its parts count, of a LoRA's the file that diffusers loads:
    not what lies beside them, such as the same in another format. Empty where there is nothing.
    """
    path, digest = Path(path).expanduser(), hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix.lower() in WEIGHTS)
    files = [file for file in files if file.is_file() and "resume" not in file.relative_to(path).parts]
    if (path / "model_index.json").is_file():
        files = [file for file in files if (file.parent / "config.json").is_file() and file.parent != path]
    elif path / _LORA in files:
        files = [path / _LORA]
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {sparse_hash(file)}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:8] if files else ""


def sparse_hash(
    path: str | Path, blocks: int = 512, length: int = 4096, start: int = 0, size: int | None = None
) -> str:
    """Return the hash of a file's size and of evenly spaced `blocks` of `length` bytes, of all where that is less.

    start, size: of the part of the file that counts; None: to its end.
    """
    size = os.stat(path).st_size - start if size is None else size
    is_small, digest = size <= blocks * length, hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(1 if is_small else blocks):
            file.seek(start + ((size - length) * number // (blocks - 1) if number else 0))
            digest.update(file.read(size if is_small else length))
    return digest.hexdigest()


def stamp(path: str | Path) -> tuple[int, int]:
    """Return size and time of the last change, in nanoseconds, by which a file is known to be the same in one place."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


# ---- writing


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears whole or not at all.

    The data go to a temporary file in the same folder (created if missing), which replaces `path` at the end; on an
    error it is removed and an older `path` stays. mode: "wb", or "w" for UTF-8 text, in which bytes of file names that
    are no text stand as escapes, `\\udce9`, as JSON has them.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f'`mode` has to be "wb" or "w" but is {mode!r}')
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".faceprior-{uuid.uuid4().hex}.tmp")  # short, however long `path` is
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with open(temporary, mode.replace("w", "x"), **text) as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())  # a row that names the file must not outlive it in a power cut
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: str | Path, recursive: bool = False) -> None:
    """Delete what killed processes left of `atomic_write` in a folder; those that are alive have locked theirs."""
    for path in Path(folder).glob(f"{'**/' if recursive else ''}.faceprior-*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if _lock(file):
                path.unlink()


def _lock(file: IO[Any]) -> bool:
    """Lock a file for as long as it is open; False where another process has locked it, or locks are not known."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


_HELD: dict[tuple[int, int], int] = {}  # the folders that this process holds, by device and inode: their descriptors
_PATIENCE = 10  # seconds: the workers of a run that was killed hold its folder until they notice


def hold_folder(folder: str | Path, owner: Any) -> None:
    """Hold a folder for this process as long as `owner` lives; FileExistsError if another process holds it.

    The system ends a lock with its process, however that ends. Where there are no locks (Windows, some network file
    systems) nothing is held.
    """
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    state, end = os.fstat(descriptor), time.monotonic() + _PATIENCE
    key = state.st_dev, state.st_ino
    while key not in _HELD:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            os.close(descriptor)
            raise FileExistsError(
                f"another process is running in {folder}: wait until it has ended, or choose another `output`"
            ) from None
        except OSError:
            break
        _HELD[key] = descriptor
        weakref.finalize(owner, _release, key)
        return
    os.close(descriptor)


def _release(key: tuple[int, int]) -> None:
    os.close(_HELD.pop(key))


def copy_file(source: str | Path, path: str | Path) -> Path:
    """Copy a file byte for byte, whole or not at all; returns the new path."""
    with open(source, "rb") as original, atomic_write(path) as file:
        shutil.copyfileobj(original, file)
    return Path(path)

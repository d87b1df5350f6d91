"""Which errors are the user's business, and the one line that they end in; every other error is a bug.

An error is the user's where somebody wrote its message for a reader:

- every OSError: a file, a disk, a network (the hub's errors are OSErrors, too);
- memory that does not suffice, whatever raised it;
- an error of a model library's own class, such as SafetensorError;
- ValueError, RuntimeError and ImportError that a `raise` statement made, in faceprior, a stage or a model library;
- a package that is not installed.

What an operation raises by itself (a product of wrong shapes, `int("x")`), and TypeError, KeyError, AssertionError and
their like from anywhere, keep their traceback.
"""

import errno
import re
import traceback
from pathlib import Path

MODEL_LIBRARIES = {"accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "peft", "safetensors", "tokenizers"}
MODEL_LIBRARIES |= {"transformers", "httpx", "httpx2"}  # the last two: the hub's connection
MESSAGE_LENGTH = 400  # characters of a library's message; some go on for pages

_BUGS = (TypeError, LookupError, AttributeError, NameError, AssertionError, ArithmeticError, NotImplementedError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_TEXT = re.compile(rf"No space left|os error ({'|'.join(map(str, _DISK_FULL))})\b")
_NO_MEMORY_TEXT = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.I)


def explain(error: BaseException, folder: str | Path | None = None) -> str | None:
    """Return what an error says to the user, on one line; None for a bug.

    folder: of code beside faceprior whose `raise` statements count as ours, such as that of a stage.
    """
    if is_out_of_memory(error):
        return "out of memory: " + ". ".join(_one_line(error).split(". ")[:2])
    if isinstance(error, _BUGS) or not isinstance(error, Exception):
        return None
    if _is_ours(error, folder):
        return _original(str(error))
    if is_disk_full(error):
        return f"the disk is full ({_one_line(error)}): free space on it; the same command resumes"
    if isinstance(error, OSError):
        return _one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name and _root(error.name) != "faceprior":
        return f"the package {_root(error.name)} is not installed: `pip install {_root(error.name)}`"
    is_library_class = _root(type(error).__module__) in MODEL_LIBRARIES
    if is_library_class or (_is_general(error) and _raising_module(error) in MODEL_LIBRARIES):
        return f"{type(error).__name__}: {_one_line(error)}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the memory of the machine or of its GPU did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, OSError | RuntimeError) and bool(_NO_MEMORY_TEXT.search(str(error)))


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a disk, a quota or the largest size of a file was exceeded; SafetensorError says it in words."""
    return getattr(error, "errno", None) in _DISK_FULL or bool(_DISK_FULL_TEXT.search(str(error)))


def _is_ours(error: Exception, folder: str | Path | None) -> bool:
    """Tell whether faceprior or code in `folder` defined the class, or raised the error in a `raise` statement."""
    if _root(type(error).__module__) == "faceprior":
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not _is_general(error) or not (frames[-1].line or "").startswith("raise"):
        return False
    file = Path(frames[-1].filename).resolve()
    folders = [Path(__file__).resolve().parent, *([Path(folder).resolve()] if folder else [])]
    return any(file.is_relative_to(own) for own in folders)


def _is_general(error: Exception) -> bool:
    return isinstance(error, ValueError | RuntimeError | ImportError | OSError)


def _raising_module(error: Exception) -> str:
    """Return the package whose `raise` statement made the error; empty where an operation raised it by itself."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not (frames[-1].line or "").startswith("raise"):
        return ""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _root(frame.f_globals.get("__name__", ""))


def _root(module: str) -> str:
    return module.partition(".")[0]


def _one_line(error: BaseException) -> str:
    text = " ".join(_original(str(error)).split()) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"


def _original(message: str) -> str:
    """Return a message without the traceback that torch puts into it where a loading process raised the error."""
    return message.rstrip().splitlines()[-1].partition(": ")[2] if "\nOriginal Traceback" in message else message

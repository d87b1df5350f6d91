"""What the commands share: types of options, the options of both, and the model, device and dtype that they name."""

import argparse
import hashlib
import math
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from faceprior.models import first_line, quiet_libraries, resolve_device

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def _bounded(kind: type, rule: str, holds: Callable) -> Callable:
    """A type for argparse whose error names the rule."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"has to be {rule} but is {text!r}")
        return value

    return parse


number = _bounded(float, "a finite number", math.isfinite)
positive = _bounded(float, "a finite number, at least 0", lambda value: 0 <= value < math.inf)
fraction = _bounded(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)
count = _bounded(int, "a whole number, at least 1", lambda value: value >= 1)
percent = _bounded(int, "a whole number in [1, 100]", lambda value: 1 <= value <= 100)


def hyphenated(arguments: list[str]) -> list[str]:
    """Options are taken with underscores, too, as in the stages: --keep_better is --keep-better."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    fixed = []
    for word in options:
        name, equals, value = word.partition("=")
        fixed.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return fixed + arguments[len(options) :]


def add_detection_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that decide which faces are found."""
    parser.add_argument(
        "--detector",
        default="auto",
        choices=("auto", "retinaface", "mtcnn"),
        help="face detector; auto is RetinaFace if its weights are on the disk, else MTCNN (default: %(default)s)",
    )
    parser.add_argument(
        "--min-confidence",
        type=fraction,
        default=0.9,
        metavar="X",
        help="lowest detector confidence of a face, in [0, 1] (default: %(default)s)",
    )
    parser.add_argument(
        "--min-face-size",
        type=count,
        default=20,
        metavar="PIXELS",
        help="smallest shorter side of a face box in pixels (default: %(default)s)",
    )


def add_model_options(parser: argparse._ActionsContainer, checkpoint: str) -> None:
    """Add the options of the model. checkpoint: the default."""
    parser.add_argument(
        "--checkpoint",
        default=checkpoint,
        metavar="MODEL",
        help="folder or hub id of the model, or `tiny` for the small embedded one (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="device of the model: auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="data type of the model's weights (default: %(default)s)"
    )


def checkpoint_of(checkpoint: str, kind: str) -> str:
    """Return the folder or id of a checkpoint; a tiny one is announced on stderr."""
    from faceprior import tiny

    quiet_libraries()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image has its own limit
    folder = tiny.resolve(checkpoint, kind)
    about = tiny.info(folder)
    if about is not None:
        state = "trained" if about["trained"] else "UNTRAINED: its results mean nothing"
        print(f"{folder}: {tiny.NOTICE} ({state})", file=sys.stderr)
    return folder


def load_checkpoint(model_class: type, checkpoint: str, dtype: "torch.dtype", **options: Any) -> Any:
    """Load a model by its `from_pretrained`; an error of a library's own class becomes a ValueError of one line."""
    try:
        return model_class.from_pretrained(checkpoint, dtype=dtype, **options)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"the checkpoint {checkpoint} does not load ({kind}: {first_line(error)}): copy or download it again"
        ) from error


def fingerprint(*models: "torch.nn.Module | None") -> str:
    """Hash the first numbers of every tensor: a folder may hold other weights than last time. None is left out."""
    digest = hashlib.sha256()
    for model in filter(None, models):
        for name, tensor in sorted(model.state_dict().items()):
            # through bfloat16, so that the same weights give the same hash in every dtype
            digest.update(name.encode() + tensor.flatten()[:4096].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def dtype_of(options: argparse.Namespace) -> "torch.dtype":
    import torch

    return getattr(torch, options.dtype)


def device_of(options: argparse.Namespace) -> "torch.device":
    return resolve_device(options.device)

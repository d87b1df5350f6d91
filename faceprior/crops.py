"""The face crops of many pictures, read and searched in threads, ahead of the network that is to see them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import repeat
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from faceprior.background import in_background
from faceprior.blip_inputs import face_pixels
from faceprior.detect import Detector, Face, detect_faces, resolve_detector
from faceprior.images import load_image

MAX_THREADS = 8

Found = tuple[list[Face], Tensor]


def iter_faces(
    images: Iterable[Any],
    size: int,
    faces: Sequence[Sequence[Any]] | None = None,
    detector: str | Callable = "auto",
    min_confidence: float = 0.9,
    min_face_size: float = 20,
) -> Iterator[Found | Exception]:
    """The faces of each picture and their pixels, in the order of the pictures.

    As many threads as torch uses, at most MAX_THREADS, work at most two pictures each ahead. A function of one's
    own as the detector is called by one thread at a time.

    Args:
        images: what `load_image` takes.
        size: side of the crops in pixels.
        faces: what was found before, instead of a detector: for each picture its `Face`s or (x0, y0, x1, y1) boxes.
        detector, min_confidence, min_face_size: see `detect_faces`.

    Yields:
        (n faces, their pixels (n, 3, size, size) uint8; see `face_pixels`), or the exception that it failed with.

    Raises:
        ValueError: not as many lists of faces as pictures.
    """
    if faces is not None and len(faces) != len(images):
        raise ValueError(f"`faces` has to have one list per picture: {len(faces)} for {len(images)} pictures")
    if faces is None and isinstance(detector, str):
        detector = resolve_detector(detector)  # loaded once, and what is wrong with it is no picture's fault
    lock = nullcontext() if isinstance(detector, (str, Detector)) else threading.Lock()

    def find(image: Any, given: Sequence[Any] | None) -> Found | Exception:
        try:
            picture = load_image(image)
            if given is None:
                with lock:
                    own = detect_faces(picture, detector, min_confidence, min_face_size)
            else:
                own = [face if isinstance(face, Face) else Face(face, None, 1.0) for face in given]
            return own, face_pixels(picture, [face.box for face in own], size)
        except Exception as error:
            return error

    items = zip(images, repeat(None) if faces is None else faces, strict=False)
    threads = min(MAX_THREADS, torch.get_num_threads())
    yield from in_background(lambda item: find(*item), map(_opened, items), threads, ahead=2 * threads + 1)


def _opened(item: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same, read if it is a PIL image: one that stands in the list twice must not be read by two threads."""
    if isinstance(item[0], Image.Image):
        with suppress(Exception):  # `load_image` says what is wrong
            item[0].load()
    return item

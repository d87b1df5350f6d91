"""Pages in one file: the look, the slider and the tables that they share, and images embedded as data URIs.

A page needs nothing but itself: no network, no other file. `environment` makes templates that escape what they are
given; templates/macros.html holds the parts of a page, style.css and slider.js what they look like and do.
"""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

PNG_PIXELS, PNG_BYTES = 120_000, 40_000  # an image whose PNG has not more of both is embedded without loss
JPEG_QUALITY, WEBP_QUALITY = 88, 82

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Lost:
    """Stands in place of something that could not be shown. text: which file, and why."""

    text: str


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a data URI with the size of its file, or, with an empty URI, the words in its place."""

    alt: str
    uri: str = ""
    width: int = 0
    height: int = 0
    words: str = "cannot be read"


def environment(folder: str | Path) -> Environment:
    """The templates of a folder, beside those that all pages share."""
    made = Environment(
        loader=FileSystemLoader([Path(folder), Path(__file__).with_name("templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_readable,
    )
    made.tests["lost"] = lambda value: isinstance(value, Lost)
    return made


def _readable(value: Any) -> Any:
    """Return what a template writes of a value: nothing of None, and of a text no control characters."""
    if value is None:
        return ""
    return _CONTROL.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def data_uri(image: Image.Image, side: int, lossy: str = "JPEG") -> str:
    """Return an RGB image as a data URI, its longer side at most `side`: PNG where that is small, else `lossy`.

    lossy: `JPEG`, or `WEBP`, which takes a third of its bytes.
    """
    image = shrunk(image, side)
    png, small = io.BytesIO(), io.BytesIO()
    if lossy == "WEBP":
        image.save(small, "WEBP", quality=WEBP_QUALITY)
        return "data:image/webp;base64," + base64.b64encode(small.getvalue()).decode()
    if image.width * image.height <= PNG_PIXELS:
        image.save(png, "PNG")
        if png.tell() <= PNG_BYTES:
            return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    image.save(small, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose longer side is at most `side` pixels; a large one is not copied on the way."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    return image.resize(size, Image.LANCZOS, reducing_gap=3.0)

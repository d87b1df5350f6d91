"""Pixels in and out: any image becomes RGB, and RGB becomes what a network takes, and back.

`load_image` reads every image: it applies the EXIF orientation, composites transparency over white, scales 16-bit
and float images to 8 bits, and raises an `ImageError` that names the file for what it cannot read. `read_source` reads
it together with what RGB does not hold, for those who write the image again.
"""

import importlib
import io
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from faceprior.files import DECODE_ERRORS, atomic_write, is_heif

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ImageSource = str | Path | Image.Image | np.ndarray

MAX_PIXELS = 200_000_000
JPEG_QUALITY = 95


class ImageError(ValueError):
    """An image that cannot be read or breaks a rule; the message names file, rule and way out."""


def __getattr__(name: str) -> ModuleType:
    if name == "cv2":
        return _import_cv2()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _import_cv2() -> ModuleType:
    """Import OpenCV on first use; `from faceprior.images import cv2` is how every module gets it."""
    try:
        return importlib.import_module("cv2")
    except ModuleNotFoundError as error:
        raise ImportError("OpenCV is not installed: pip install opencv-python-headless") from error
    except ImportError as error:
        raise ImportError(
            f"OpenCV does not load ({error}). The build opencv-python needs the libraries of a desktop,"
            " the headless one does not: pip install --force-reinstall --no-deps opencv-python-headless"
        ) from error


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as RGB, the way a viewer shows it.

    Args:
        source: a path, a PIL image of any mode, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of bool,
            uint8, uint16 or float in [0, 1]. The EXIF orientation is applied and removed; transparency is
            composited over white; 16 bits become 8 by dividing by 257; of an animated file the first frame is
            taken. PIL's mode "I" is read as 16 bits (0..65535) and "F" as [0, 1]. Colours are not converted
            between profiles.
        max_pixels: largest width x height, checked before the pixels are decoded. Pillow's own limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`, applies as well.

    Returns:
        The image. Its `info` holds the ICC profile of an RGB image under "icc_profile", and no other metadata. It
        may be `source` itself: copy it before you change it in place.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: another kind of source.
        ImageError: the image is unreadable, truncated, empty, too large or out of range.
    """
    if isinstance(source, np.ndarray):
        return _image_from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "the image")
        return _to_rgb(source, name, max_pixels)
    if isinstance(source, (str, Path)):
        return _image_from_file(Path(source), max_pixels)
    raise TypeError(
        f"an image has to be a path, a PIL image or an array but is {type(source).__name__}"
        " (`to_pil` turns pixel values into images)"
    )


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image from the bytes of a file, such as a member of an archive, as `load_image` reads the file.

    name: its name in error messages. Raises ImageError.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    with io.BytesIO(data) as file, _open(file, Path(name)) as image:
        return _to_rgb(image, name, max_pixels, decoded_here=True)


# ---- an image with what RGB does not hold


@dataclass(frozen=True)
class Metadata:
    """What a file says about its image, for `save_image`.

    exif: EXIF data with orientation 1, empty without any. dpi: pixels per inch along x and y. text: the texts of a PNG
    file, XMP under "XML:com.adobe.xmp", and the comment of a JPEG or GIF file under "Comment".
    """

    exif: bytes = b""
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceImage:
    """An image as `load_image` reads it, and what RGB does not hold of it.

    rgb: as `load_image` returns it: upright, over white. rgba: upright, with the colours below the transparency as they
    are stored; None without transparency. mode: Pillow's mode of the file, such as L, P or CMYK. lost: what no image of
    8 bits in the modes L, LA, RGB or RGBA holds of the file, in words.
    """

    rgb: Image.Image
    rgba: Image.Image | None = None
    mode: str = "RGB"
    icc_profile: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)
    lost: tuple[str, ...] = ()

    def with_pixels(self, rgb: Image.Image) -> Image.Image:
        """Return `rgb`, an edited copy of the own `rgb`, with the own transparency: RGB, or RGBA.

        Pixels that were not edited, and those that are fully transparent, are the file's own; an edit of a partly
        transparent pixel changes its colour by as much as it changed over white.
        """
        if self.rgba is None:
            return rgb
        image = self.rgba.copy()
        for top in range(0, rgb.height, _STRIP):  # in strips: arrays of a whole photograph take several times its size
            strip = (0, top, rgb.width, min(top + _STRIP, rgb.height))
            edited, own = np.asarray(rgb.crop(strip)), np.asarray(self.rgb.crop(strip))
            if (edited == own).all():
                continue
            stored = np.asarray(self.rgba.crop(strip))
            edit = edited.astype(np.int16) - own
            edit[stored[..., 3] == 0] = 0
            colors = np.clip(stored[..., :3] + edit, 0, 255).astype(np.uint8)
            image.paste(Image.fromarray(np.concatenate([colors, stored[..., 3:]], axis=2)), strip)
        image.info = dict(self.rgb.info)
        return image

    def in_own_mode(self, image: Image.Image) -> Image.Image:
        """Return an image of `with_pixels` in the file's kind of mode, with its ICC profile: grey as L or LA."""
        grey = "L" if self.rgba is None else "LA"
        image = image.convert(grey) if self.mode in _GREY_MODES else image._new(image.im)  # whose pixels are shared
        image.info = {"icc_profile": self.icc_profile} if self.icc_profile else {}
        return image


_GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_OTHER_COLORS = ("CMYK", "YCbCr", "LAB", "HSV")
_FIRST_IS_WHOLE = ("MPO", "PSD")  # formats of one image whose other frames are previews, depths or layers
_REDUCED = 254  # TIFF tag NewSubfileType: bit 0 marks a smaller copy of another page
# The TIFF tags that describe an image, not how its pixels are stored
_DESCRIBING_TAGS = frozenset(
    (270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 33432, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
)
_XMP, _COMMENT = "XML:com.adobe.xmp", "Comment"  # keys of a PNG file's texts
_COMMENT_BYTES, _XMP_BYTES = 65533, 65504  # a JPEG segment holds no more
_STRIP = 256  # rows of pixels that are edited at a time


def read_source(source: ImageSource) -> SourceImage:
    """Read an image as `load_image` does, with its transparency and metadata; the same errors."""
    if isinstance(source, np.ndarray):
        rgba = Image.fromarray(_eight_bit(source, "the array")) if source.ndim == 3 and source.shape[2] == 4 else None
        return SourceImage(load_image(source), rgba, "RGBA" if rgba else "L" if source.ndim == 2 else "RGB")
    if isinstance(source, Image.Image):
        return _read_source(source, str(getattr(source, "filename", "") or "the image"))
    rgb_only = not isinstance(source, (str, Path))
    if rgb_only:
        return SourceImage(load_image(source))  # which names the types that it takes
    path = Path(source)
    _check_file(path)
    with path.open("rb") as file, _open(file, path) as image:
        return _read_source(image, str(path), decoded_here=True)


def _read_source(image: Image.Image, name: str, decoded_here: bool = False) -> SourceImage:
    lost = _lost(image, name)
    rgb = _to_rgb(image, name, MAX_PIXELS, decoded_here)
    try:
        rgba = ImageOps.exif_transpose(image).convert("RGBA") if image.has_transparency_data else None
    except DECODE_ERRORS as error:
        raise _decode_error(name, error) from error
    metadata, damaged = _metadata(image)
    profile = image.info.get("icc_profile")
    keeps_profile = profile and image.mode not in _OTHER_COLORS
    lost += ("the colour profile",) * bool(profile and not keeps_profile) + damaged
    return SourceImage(rgb, rgba, image.mode, profile if keeps_profile else None, metadata, lost)


def _lost(image: Image.Image, name: str) -> tuple[str, ...]:
    """Name what 8 bits in RGB do not hold of an image whose pixels are not decoded yet."""
    raw_modes = [str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in getattr(image, "tile", ())]
    lost = []
    if image.mode.startswith("I") or any(";16" in mode for mode in raw_modes):
        lost.append("16 bits per channel")
    if image.mode == "F":
        lost.append("floating-point values")
    if image.mode in _OTHER_COLORS:
        lost.append(f"{image.mode} colours")
    more = _count_frames(image, name) - 1 if image.format in _FIRST_IS_WHOLE else 0
    if more > 0:
        lost.append(f"{more} further image{'s' * (more > 1)} in the file ({image.format})")
    return tuple(lost)


def _metadata(image: Image.Image) -> tuple[Metadata, tuple[str, ...]]:
    """The metadata of a decoded image, and what of them is damaged."""
    damaged = ()
    try:
        exif = image.getexif()
        if image.format == "TIFF":
            kept = Image.Exif()
            for tag in _DESCRIBING_TAGS & exif.keys():
                kept[tag] = exif.get_ifd(tag) if tag in set(ExifTags.IFD) else exif[tag]
            exif = kept
        if ExifTags.Base.Orientation in exif:
            exif[ExifTags.Base.Orientation] = 1
        data = exif.tobytes() if len(exif) else b""
    except DECODE_ERRORS:
        data, damaged = b"", ("damaged EXIF data",)
    dpi = image.info.get("dpi")
    try:
        dpi = tuple(map(float, dpi)) if dpi else None
    except DECODE_ERRORS:
        dpi = None
    if dpi and not (len(dpi) == 2 and all(1 < value < 1e6 for value in dpi)):  # 1 stands for no unit
        dpi = None
    text = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    xmp = image.info.get("xmp")
    if isinstance(xmp, bytes):
        text.setdefault(_XMP, xmp.decode("utf-8", "replace"))
    comment = image.info.get("comment")  # of a JPEG or GIF file
    if isinstance(comment, bytes) and comment.strip(b"\0 "):
        text.setdefault(_COMMENT, comment.rstrip(b"\0").decode("utf-8", "replace"))
    if _XMP in text:
        text[_XMP] = re.sub(r'(tiff:Orientation(?:="|>))\d', r"\g<1>1", text[_XMP])
    return Metadata(data, dpi, text), damaged


def count_frames(path: str | Path) -> int:
    """Return how many images a file holds: frames of an animation or pages; its pixels are not decoded.

    Previews, smaller copies of a page and layers do not count. Raises as `load_image` does for the file.
    """
    path = Path(path)
    _check_file(path)
    with path.open("rb") as file, _open(file, path) as image:
        return 1 if image.format in _FIRST_IS_WHOLE else _count_frames(image, str(path))


def _count_frames(image: Image.Image, name: str) -> int:
    try:
        count = getattr(image, "n_frames", 1)
        if image.format != "TIFF" or count == 1:
            return count
        reduced = 0
        for number in range(count):
            image.seek(number)
            reduced += bool(image.tag_v2.get(_REDUCED, 0) & 1)
        image.seek(0)
        return max(1, count - reduced)
    except DECODE_ERRORS as error:
        raise _decode_error(name, error) from error


def as_array(image: ImageSource) -> np.ndarray:
    """Any image that `load_image` takes -> (H, W, 3) uint8 RGB, for reading only: such an array is not copied."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        _check_size(image.shape[1], image.shape[0], "the array", MAX_PIXELS)
        return image
    return np.asarray(load_image(image))


def to_pixel_values(images: ImageSource | Sequence[ImageSource], size: int | None = None) -> "torch.Tensor":
    """Images -> float32 (B, 3, H, W) in [-1, 1].

    images: one image or a list, anything `load_image` takes. size: side in pixels of the square that they are resized
    to (shorter side with LANCZOS, then the centre is cropped); without it all need the same size.
    """
    import torch

    if not isinstance(images, (list, tuple)):
        images = [images]
    if len(images) == 0:
        raise ValueError("`images` is empty: a batch needs at least one image")
    arrays = [as_array(image) if size is None else np.asarray(_square(image, size)) for image in images]
    shapes = sorted({array.shape[1::-1] for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"the images of a batch need one size but have {shapes} (width, height): pass `size`")
    batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return (batch.float() / 127.5 - 1).contiguous()


def to_pil(pixel_values: "torch.Tensor") -> list[Image.Image]:
    """(B, 3, H, W) or (3, H, W) in [-1, 1] -> PIL images; values outside are clamped, the rest is rounded."""
    if pixel_values.ndim == 3:
        pixel_values = pixel_values[None]
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"`pixel_values` has to be (B, 3, H, W) but is {tuple(pixel_values.shape)}")
    values = pixel_values.detach().float().cpu()
    if not bool(values.isfinite().all()):
        raise ValueError("`pixel_values` holds NaN or infinity: the network that made it overflowed")
    values = ((values.clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).contiguous().numpy()]


def _square(image: ImageSource, size: int) -> Image.Image:
    return ImageOps.fit(load_image(image), (size, size), method=Image.Resampling.LANCZOS)


def _image_from_file(path: Path, max_pixels: int) -> Image.Image:
    _check_file(path)
    with path.open("rb") as file, _open(file, path) as image:
        return _to_rgb(image, str(path), max_pixels, decoded_here=True)


def _check_file(path: Path) -> None:
    # os.path: False for a name that is too long, where Path raises
    if os.path.isdir(path):
        raise ImageError(f"{path} is a folder, not an image: `find_images` lists the images in it")
    if not os.path.exists(path):
        if os.path.islink(path):
            raise ImageError(f"{path} is a link that leads nowhere: {os.readlink(path)} does not exist")
        hint = " (an address on the web: download it first)" if re.match(r"https?:", str(path)) else ""
        raise FileNotFoundError(f"no image at {path}{hint}")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes)")


def _open(file: IO[bytes], path: Path) -> Image.Image:
    """Read the header only."""
    if is_heif(file):
        _register_heif(path)
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that Pillow can read: convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} is beyond Pillow's own limit ({error}): shrink it or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except DECODE_ERRORS as error:
        raise ImageError(f"{path} cannot be read: {error}") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int, decoded_here: bool = False) -> Image.Image:
    _check_size(image.width, image.height, name, max_pixels)
    try:
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image  # it would copy an upright image, too
    except DECODE_ERRORS as error:
        raise _decode_error(name, error) from error
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    info = {"icc_profile": profile} if profile else {}
    rgb = _convert(upright, name)
    if rgb is image:
        if type(image) is Image.Image and image.info == info:
            return image
        # A plain image, because the class of a file keeps metadata. Only pixels of a file opened here are shared: one
        # that the caller opened may decode its next frame into them.
        rgb = image._new(image.im) if decoded_here else image.copy()
    rgb.info = info
    return rgb


def verify_image(path: str | Path) -> tuple[int, int]:
    """Check a file without decoding its pixels, as far as its format allows (PNG: by checksums) -> (width, height).

    Raises as `load_image` does for the file.
    """
    path = Path(path)
    _check_file(path)
    with path.open("rb") as file, _open(file, path) as image:
        _check_size(image.width, image.height, str(path), MAX_PIXELS)
        try:
            image.verify()
        except DECODE_ERRORS as error:
            raise _decode_error(str(path), error) from error
        return image.size


def _decode_error(name: str, error: Exception) -> ImageError:
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return ImageError(f"{name} is truncated ({error}): the file ends early, copy or download it again")
    return ImageError(f"{name} cannot be decoded: {error}")


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise ImageError(f"{name} has no pixels: its size is {width}x{height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height} pixels, more than `max_pixels` = {max_pixels}:"
            " shrink it or pass a larger `max_pixels`"
        )


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Any mode -> RGB; an RGB image is returned as it is."""
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bit(_sixteen_bit(np.asarray(image), name), name)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_eight_bit(np.asarray(image), name)).convert("RGB")
    try:
        if image.has_transparency_data:
            return _over_white(image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} has the mode {image.mode}, which Pillow cannot turn into RGB") from error


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _sixteen_bit(array: np.ndarray, name: str) -> np.ndarray:
    """The integers of PIL's "I" modes as uint16."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds integers from {low} to {high}, but 16 bits go from 0 to 65535: rescale it")
    return array.astype(np.uint16)


def _eight_bit(array: np.ndarray, name: str) -> np.ndarray:
    """bool, uint8, uint16 (0..65535) or float [0, 1] -> uint8, rounded."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        return _eight_bit_from_float(array, name)
    raise ImageError(f"{name} has the type {array.dtype}: bool, uint8, uint16 and float in [0, 1] can be read")


def _eight_bit_from_float(array: np.ndarray, name: str) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # so written that NaN fails too
        raise ImageError(f"{name} holds floats from {low:g} to {high:g}, but they have to lie in [0, 1]: rescale it")
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _image_from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"an array has to be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last, but is {array.shape}"
        )
    _check_size(array.shape[1], array.shape[0], "the array", max_pixels)
    pixels = np.ascontiguousarray(_eight_bit(array, "the array"))
    if pixels.shape[2] == 4:
        return _over_white(Image.fromarray(pixels))
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def _register_heif(path: Path) -> None:
    """Let Pillow read HEIC, by the package pillow-heif; ImageError without it."""
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise ImageError(f"{path} is a HEIC image: `pip install pillow-heif`, or convert it to PNG or JPEG") from error
    heif.register_heif_opener()


def save_image(
    image: Image.Image | np.ndarray, path: str | Path, metadata: Metadata | None = None, quality: int = JPEG_QUALITY
) -> Path:
    """Write an image in the format that the suffix of `path` names, whole or not at all; returns the path.

    image: a PIL image, kept in its mode, or an array as `load_image` takes it ((H, W) uint8 stays grey); an ICC profile
    in `image.info` is written too. metadata: written to JPEG, PNG, WebP and TIFF files as far as the format holds it
    (see `not_held`). quality: of JPEG and WebP files, in [1, 100]. Raises ValueError for a format that is not written,
    and for an image with more pixels on a side than the format holds.
    """
    path = Path(path)
    kind = _written_format(path)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image) if _is_grey(image) else load_image(image)
    if max(image.size) > (most := _MOST_PIXELS.get(kind, math.inf)):
        raise ValueError(
            f"{path} would have {image.width}x{image.height} pixels, but a {kind} file has at most {most} on a side:"
            " write it as PNG"
        )
    options = _metadata_options(image, metadata or Metadata(), kind) if kind in _DESCRIBED_FORMATS else {}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = quality
    if kind == "JPEG":
        options["subsampling"] = 0
    with atomic_write(path) as file:
        image.save(file, format=kind, **options)
    return path


def contact_sheet(images: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Join images of one size, (H, W, 3) each, in rows of `columns`; the last row is filled with grey."""
    blank = np.full_like(images[0], 128)
    rows = -(-len(images) // columns)
    padded = images + [blank] * (rows * columns - len(images))
    return np.vstack([np.hstack(padded[r * columns : (r + 1) * columns]) for r in range(rows)])


def not_held(image: Image.Image, metadata: Metadata, path: str | Path) -> tuple[str, ...]:
    """Name what the format that the suffix of `path` names does not hold of an image and its metadata, in words."""
    kind, lost = _written_format(Path(path)), []
    if kind == "JPEG" and "A" in image.getbands():
        lost.append("transparency (JPEG)")
    if kind not in _DESCRIBED_FORMATS:
        return (*lost, f"metadata ({kind})") if metadata != Metadata() or image.info.get("icc_profile") else tuple(lost)
    if metadata.dpi and kind == "WEBP":
        lost.append("the resolution in pixels per inch (WebP)")
    texts = metadata.text.keys() - ({_XMP, _COMMENT} if kind == "JPEG" else {_XMP} if kind == "WEBP" else ())
    long_xmp = kind == "JPEG" and len(metadata.text.get(_XMP, "").encode()) > _XMP_BYTES
    if texts and kind != "PNG" or long_xmp:
        lost.append(f"texts ({'XMP' if long_xmp else ', '.join(sorted(texts))})")
    return tuple(lost)


_DESCRIBED_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
_MOST_PIXELS = {"JPEG": 65500, "WEBP": 16383}  # on a side


def _written_format(path: Path) -> str:
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"no image format is written for the suffix {path.suffix!r} of {path}: use .png or .jpg")
    return kind


def _metadata_options(image: Image.Image, metadata: Metadata, kind: str) -> dict[str, Any]:
    """The options of Pillow's writer for `metadata` and the image's ICC profile."""
    options: dict[str, Any] = {"icc_profile": image.info.get("icc_profile")}
    if metadata.exif:
        options["exif"] = metadata.exif
    if metadata.dpi and kind != "WEBP":
        options["dpi"] = metadata.dpi
    if metadata.text and kind == "PNG":
        options["pnginfo"] = PngInfo()
        for key, value in metadata.text.items():
            options["pnginfo"].add_itxt(key, value)
    if kind == "JPEG" and _COMMENT in metadata.text:
        options["comment"] = metadata.text[_COMMENT].encode()[:_COMMENT_BYTES]
    xmp = metadata.text.get(_XMP, "").encode()
    if xmp and (kind == "WEBP" or (kind == "JPEG" and len(xmp) <= _XMP_BYTES)):
        options["xmp"] = xmp
    return options


def _is_grey(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.dtype == np.uint8

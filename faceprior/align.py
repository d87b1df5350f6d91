"""FFHQ alignment of a face to the canonical crop, and pasting the crop back.

Coordinates are pixel coordinates whose integers are pixel centres: the first pixel of a row covers -0.5 to 0.5.
Landmarks are given in them, and the (2, 3) matrices map points of the photograph to points of the crop:
`crop_point = matrix @ (x, y, 1)`. "Edge" coordinates, which PIL's transforms take, are larger by 0.5.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from faceprior.images import ImageSource, cv2, load_image

Resampling = Image.Resampling

_OVAL_END = 1.4  # of `face_mask`, where the weight is 0, in radii of the face
_CORNER_RADIUS = 0.35  # of `crop_mask`, a fraction of half its side
_MOST_SIDES = 1000  # of a photograph's longer side: of a larger square nothing is seen, and its border takes memory
_FILTER_REACH = 4  # pixels that the filters of `_sample` look at beyond a sample, and some to spare
_HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixel centres -> edges
_BAND = 2**18  # pixels that are pasted at once, so that the memory does not grow with the face


class AlignmentError(ValueError):
    """Landmarks that span no face, or a face that lies outside of its photograph; the message says which."""


@dataclass(frozen=True)
class AlignedFace:
    """The `crop` of a face, and the (2, 3) `matrix` from the photograph's pixel coordinates to the crop's."""

    crop: Image.Image
    matrix: np.ndarray


def alignment_quad(landmarks: np.ndarray) -> np.ndarray:
    """The square around a face that FFHQ crops (Karras et al. 2019, dataset script).

    landmarks: (5, 2) in pixels, left and right as in the image. Returns (4, 2): the corners top left, bottom left,
    bottom right, top right of the crop, in pixels of the photograph. With e the vector from eye to eye and m the one
    from the middle of the eyes to the middle of the mouth, the side 2|x| of the square is 2 max(2.0 |e|, 1.8 |m|), its
    centre is the middle of the eyes + 0.1 m, and its x axis points along e - rot90(m).

    Raises ValueError for landmarks of another shape or that are not finite, AlignmentError if they span no face.
    """
    points = _checked_landmarks(landmarks)
    eye_middle = (points[0] + points[1]) / 2
    eye_to_eye = points[1] - points[0]
    eye_to_mouth = (points[3] + points[4]) / 2 - eye_middle
    axis = eye_to_eye - eye_to_mouth[::-1] * [-1, 1]
    _check_spread(eye_to_eye, eye_to_mouth, axis)
    x = axis / np.hypot(*axis) * max(2.0 * np.hypot(*eye_to_eye), 1.8 * np.hypot(*eye_to_mouth))
    y = x[::-1] * [-1, 1]
    centre = eye_middle + 0.1 * eye_to_mouth
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def _checked_landmarks(landmarks: Any) -> np.ndarray:
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise ValueError(f"`landmarks` have to be (5, 2) but are {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"`landmarks` have to be finite but are {points.tolist()}")
    return points


def _check_spread(eye_to_eye: np.ndarray, eye_to_mouth: np.ndarray, axis: np.ndarray) -> None:
    """In a face both vectors agree on the x axis, so their lengths add up; with swapped sides they cancel out."""
    eyes, mouth = np.hypot(*eye_to_eye), np.hypot(*eye_to_mouth)
    if eyes < 1e-3:
        raise AlignmentError("`landmarks` span no face: both eyes lie on one point")
    if np.hypot(*axis) < 0.4 * (eyes + mouth):
        raise AlignmentError(
            "`landmarks` span no face: eyes and mouth contradict each other. The order is left eye, right"
            " eye, nose, left and right mouth corner, as seen in the image, not by the person"
        )


def align_face(image: ImageSource, landmarks: np.ndarray, size: int = 512) -> AlignedFace:
    """Crop the square of `alignment_quad` from a photograph and resize it to `size` x `size` pixels.

    landmarks: (5, 2) in pixels of the photograph, left and right as in the image once the head is upright (see
    `detect.Face`): the crop of a head in any orientation is upright. A larger square is first shrunk by
    a whole factor and then sampled densely, so that nothing aliases. Outside of the photograph the crop shows its
    reflection, blurred as in FFHQ (sigma 0.02 of the square's side) and fading to the median colour; unlike in FFHQ,
    the photograph's own pixels near its border are not blurred.

    Raises AlignmentError for landmarks that span no face or whose square lies outside of the photograph, is smaller
    than a pixel, or more than 1000 times as large as the photograph.
    """
    if size < 1:
        raise ValueError(f"`size` has to be at least 1 pixel but is {size}")
    photograph, quad = load_image(image), alignment_quad(landmarks)
    side = np.hypot(*(quad[3] - quad[0]))
    if not 1 <= side <= _MOST_SIDES * max(photograph.size):
        raise AlignmentError(
            f"the square around the face has a side of {side:.3g} pixels in a photograph of {photograph.size} (width,"
            " height): nothing of a face can be seen"
        )
    matrix = _matrix_of_quad(quad, size)

    # the part of the photograph around the square, so that no step works on the rest
    region, to_region = _cut(photograph, quad, size)
    region, to_region = _pad(region, to_region, quad)

    inverse = to_region @ np.linalg.inv(_edges(matrix))  # edges: crop -> region
    fine = _fineness(inverse)
    crop = Image.fromarray(_to_bytes(_sample(region, inverse, (size, size), fine)))
    return AlignedFace(crop if fine == 1 else crop.resize((size, size), Resampling.LANCZOS), matrix)


def _matrix_of_quad(quad: np.ndarray, size: int) -> np.ndarray:
    """The (2, 3) map from pixel centres of the photograph to pixel centres of the crop."""
    right, down = quad[3] - quad[0], quad[1] - quad[0]
    side = np.hypot(*right)
    rotation = np.stack([right, down]) / side * (size / side)
    # the quad's first corner is the crop's corner, half a pixel before its first centre
    return np.column_stack([rotation, -rotation @ quad[0] - 0.5])


def _edges(matrix: np.ndarray) -> np.ndarray:
    """A (2, 3) map of centre coordinates -> the (3, 3) map of edge coordinates, where pixel i covers i to i + 1."""
    return _HALF @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(_HALF)


def _cut(photograph: Image.Image, quad: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the photograph around the quad, shrunk, (H, W, 3), and the (3, 3) map of edges into it."""
    side = np.hypot(*(quad[3] - quad[0]))
    border = max(round(side * 0.1), 3)
    corners = quad + 0.5
    low = np.maximum(np.floor(corners.min(0)).astype(int) - border, 0)
    high = np.minimum(np.ceil(corners.max(0)).astype(int) + border, photograph.size)
    if (corners.max(0) <= 0).any() or (corners.min(0) >= photograph.size).any():
        raise AlignmentError(f"the face lies outside of the photograph, which is {photograph.size} (width, height)")
    shrink = max(1, int(side / size * 0.5))
    to_region = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, shrink]]) / shrink
    return _block_means(photograph, (*low.tolist(), *high.tolist()), shrink), to_region


def _block_means(photograph: Image.Image, box: tuple[int, int, int, int], shrink: int) -> np.ndarray:
    """The part `box` (xyxy) of a photograph, shrunk by a whole factor: (H, W, 3), uint8 at factor 1, else float32.

    Blocks that extend beyond the box repeat its last pixels. Works on some rows at a time: large faces have many.
    """
    x0, y0, x1, y1 = box
    if shrink == 1:
        return np.asarray(photograph.crop(box))
    width, rows = -(-(x1 - x0) // shrink), max(1, _BAND // ((x1 - x0) * shrink))
    bands = []
    for top in range(y0, y1, rows * shrink):
        part = np.asarray(photograph.crop((x0, top, x1, min(top + rows * shrink, y1))))
        height = -(-len(part) // shrink)
        missing = height * shrink - len(part), width * shrink - part.shape[1]
        whole = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge").astype(np.float32)
        bands.append(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA))
    return np.concatenate(bands)


def _pad(region: np.ndarray, to_region: np.ndarray, quad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add a blurred reflection where the quad leaves the region; returns the (3, 3) map of edges into the result."""
    corners = (quad + 0.5) @ to_region[:2, :2].T + to_region[:2, 2]
    side = np.hypot(*(corners[3] - corners[0]))
    low = np.floor(corners.min(0)).astype(int)
    high = np.ceil(corners.max(0)).astype(int)
    before, after = -low, high - region.shape[1::-1]
    if max(*before, *after) <= 0:
        return region, to_region
    least = max(round(0.3 * side), 3)
    before, after = np.maximum(before, least), np.maximum(after, least)
    visible = np.stack([low - _FILTER_REACH, high + _FILTER_REACH]) + before
    padded = _blurred_border(region, before, after, 0.02 * side, visible)
    shift = np.array([[1, 0, before[0]], [0, 1, before[1]], [0, 0, 1]])
    return padded, shift @ to_region


def _blurred_border(
    image: np.ndarray, before: np.ndarray, after: np.ndarray, sigma: float, visible: np.ndarray
) -> np.ndarray:
    """Widen image (H, W, 3) by `before` and `after` (x, y) pixels with its blurred reflection.

    visible: (2, 2), the (x, y) corners of the part of the result that the crop shows: the border is blurred only there.
    """
    widths = ((before[1], after[1]), (before[0], after[0]), (0, 0))
    original = np.pad(image, widths, "reflect")
    height, width = original.shape[:2]
    median = np.median(original, axis=(0, 1)).astype(np.float32)
    # 0 at the photograph's border, 1 at the outer edge
    depth = np.maximum(_depth(width, before[0], after[0]), _depth(height, before[1], after[1])[:, None])[..., None]

    # only the strips beside the image, as far as they are visible: the blur is slow
    result = original.copy()
    (left, top), (right, bottom) = before, before + image.shape[1::-1]
    (x0, y0), (x1, y1) = np.clip(visible, 0, (width, height))
    strips = (
        (slice(y0, top), slice(x0, x1)),
        (slice(bottom, y1), slice(x0, x1)),
        (slice(y0, y1), slice(x0, left)),
        (slice(y0, y1), slice(right, x1)),
    )
    for rows, columns in strips:
        if rows.start < rows.stop and columns.start < columns.stop:
            blurred = _blurred(original, rows, columns, max(sigma, 1e-3))
            result[rows, columns] = _to_bytes(blurred + (median - blurred) * depth[rows, columns])
    return result


def _blurred(image: np.ndarray, rows: slice, columns: slice, sigma: float) -> np.ndarray:
    """A part of the Gaussian blur of an image (H, W, 3), float32, without blurring the rest."""
    reach = math.ceil(4 * sigma) + 1  # OpenCV cuts the kernel off at 4 sigma
    y, x = max(rows.start - reach, 0), max(columns.start - reach, 0)
    part = image[y : rows.stop + reach, x : columns.stop + reach].astype(np.float32)
    blurred = cv2.GaussianBlur(part, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return blurred[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]


def _depth(length: int, before: int, after: int) -> np.ndarray:
    """How deep in the padding a pixel lies, from 0 (inside) to 1 (outermost): (length,) float32."""
    position = np.arange(length, dtype=np.float32)
    return np.clip(np.maximum(1 - position / before, 1 - (length - 1 - position) / after), 0, 1)


def _fineness(inverse: np.ndarray) -> int:
    """How many samples a pixel needs along each axis, so that they lie at least as densely as the pixels under them."""
    return max(1, math.ceil(_scale(inverse) - 1e-6))


def _sample(
    image: np.ndarray, inverse: np.ndarray, size: tuple[int, int], fine: int, kernel: str = "cubic"
) -> np.ndarray:
    """Sample `image` (H, W[, C]), uint8 or float32, under `inverse`, the (3, 3) map of edges to it, `fine` times finer.

    size: (width, height). kernel: cubic or linear. Returns (height * fine, width * fine[, C]) of the image's type;
    beyond the image its outermost pixels are repeated. Positions are rounded to 1/32 pixel of the image.
    """
    to_image = np.linalg.inv(_HALF) @ inverse @ np.diag([1 / fine, 1 / fine, 1]) @ _HALF  # of pixel centres
    flags = (cv2.INTER_CUBIC if kernel == "cubic" else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP
    dense = size[0] * fine, size[1] * fine
    return cv2.warpAffine(image, to_image[:2], dense, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Round and clip to uint8."""
    return pixels if pixels.dtype == np.uint8 else cv2.convertScaleAbs(np.maximum(pixels, 0))


def _scale(matrix: np.ndarray) -> float:
    return math.sqrt(abs(np.linalg.det(matrix[:2, :2])))


def crop_mask(size: int, feather: float = 0.08) -> np.ndarray:
    """The weight of a crop in the photograph: (size, size) float32, 1 inside, 0 on its border and rounded corners.

    feather: width of the soft edge as a fraction of `size`, in [0, 0.5]; its profile is 3 t^2 - 2 t^3.
    """
    if not 0 <= feather <= 0.5:
        raise ValueError(f"`feather` has to lie in [0, 0.5] but is {feather}")
    half = (size - 1) / 2
    offset = np.abs(np.arange(size) - half)
    radius = _CORNER_RADIUS * half
    # distance to the rounded square, negative inside (the border's pixel centres lie on it)
    outward = np.stack(np.meshgrid(offset, offset)) - (half - radius)
    distance = np.hypot(*np.maximum(outward, 0)) + np.minimum(outward.max(0), 0) - radius
    return _soft_step(-distance / max(feather * size, 1e-6))


def face_mask(landmarks: np.ndarray, size: int) -> np.ndarray:
    """The weight of a face in its aligned crop: (size, size) float32, 1 on the face, 0 beyond an oval around it.

    landmarks: (5, 2) in pixels of the crop. With e the distance of the eyes and m the vector from their middle to the
    middle of the mouth, the face is an ellipse along m from 1.05 |m| above the eyes to 1.75 |m| below them, at each
    side 1.1 e, or |m| where that is wider: in a profile, whose eyes lie close to each other. It is shifted away from
    the nose by half of what the nose lies beside the line m. The weight falls from 1 at the ellipse to 0 at one 1.4
    times as large, with the profile 3 t^2 - 2 t^3, and is 0 on the crop's border, whatever the landmarks (`crop_mask`).
    """
    points = _checked_landmarks(landmarks)
    eyes = (points[0] + points[1]) / 2
    down = (points[3] + points[4]) / 2 - eyes
    length, between = float(np.hypot(*down)), float(np.hypot(*(points[1] - points[0])))
    if length < 0.1 * between:  # a crop is upright
        down, length = np.array([0, between]), between
    down = down / max(length, 1e-6)
    across = np.array([down[1], -down[0]])
    centre = eyes + 0.35 * length * down - 0.5 * ((points[2] - eyes) @ across) * across
    half_height, half_width = max(1.4 * length, 1e-6), max(1.1 * between, length, 1e-6)
    x, y = np.meshgrid(np.arange(size) - centre[0], np.arange(size) - centre[1])
    radius = np.hypot((x * across[0] + y * across[1]) / half_width, (x * down[0] + y * down[1]) / half_height)
    return _soft_step((_OVAL_END - radius) / (_OVAL_END - 1)) * crop_mask(size)


def _soft_step(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1).astype(np.float32)
    return t**2 * (3 - 2 * t)


def paste_face(
    image: ImageSource,
    crop: ImageSource,
    matrix: np.ndarray,
    feather: float = 0.08,
    mask: np.ndarray | Image.Image | None = None,
    before: ImageSource | None = None,
) -> Image.Image:
    """Paste an aligned crop back into its photograph.

    crop: square, of the size that `matrix` (2, 3), photograph -> crop, was made for. mask: (size, size) weights in
    [0, 1] in the crop's pixels, or a grey image, such as `face_mask`; without it `crop_mask(size, feather)`. Returns a
    new image; the photograph itself is not changed. Where the weight is 0, and outside of the crop, all pixels equal
    the photograph's; where the crop is finer than the photograph it is antialiased. A crop may lie partly outside.

    before: the aligned crop that `crop` was made from. With it the change, `crop` minus `before`, is added to the
    photograph, so that detail finer than the crop's pixels stays, and an untouched crop changes nothing. Without it
    `crop` replaces the pixels: an untouched one whose square is not larger than `size` comes back with a mean absolute
    error below 1.5 of 255 where the weight is above 0 (0.9 and 1.0 measured on two photographs, squares of 172 and 349
    pixels, `size` 512).
    """
    pasted, crop = load_image(image).copy(), load_image(crop)
    weight = crop_mask(_checked_size(crop), feather) if mask is None else mask
    paste_onto(pasted, crop, matrix, weight, before)
    return pasted


def paste_onto(
    canvas: Image.Image,
    crop: ImageSource,
    matrix: np.ndarray,
    mask: np.ndarray | Image.Image,
    before: ImageSource | None = None,
    photograph: Image.Image | None = None,
) -> None:
    """Paste an aligned crop into the RGB image `canvas` itself, as `paste_face` does into a copy.

    photograph: what the change is added to where `before` is given, of the canvas's size divided by a whole factor,
    and enlarged by it (LANCZOS); without it the canvas. They differ where other faces are in the canvas already.
    matrix: from the canvas's pixels to the crop's, see `enlarged`.
    """
    crop = load_image(crop)
    size, to_crop = _checked_size(crop), _edges(_checked_matrix(matrix))
    weight = _checked_mask(mask, size)
    box = _place(to_crop, size, canvas.size)
    if box is None:
        return
    change = np.asarray(crop)
    if before is not None:
        change = change.astype(np.float32) - _checked_before(before, size)
    rows = max(1, _BAND // (box[2] - box[0]))
    for top in range(box[1], box[3], rows):
        band = (box[0], top, box[2], min(top + rows, box[3]))
        _paste_band(canvas, change, to_crop, weight, band, None if before is None else photograph or canvas)


def _paste_band(
    canvas: Image.Image,
    change: np.ndarray,
    to_crop: np.ndarray,
    weight: np.ndarray,
    band: tuple[int, int, int, int],
    photograph: Image.Image | None,
) -> None:
    """Blend the crop into some rows of the canvas; with a `photograph` it is added to it first."""
    soft = _warp_back(weight, to_crop, band, "linear")
    shown = np.flatnonzero(soft.any(axis=0))
    if not len(shown):
        return
    # only the columns where the face shows: of a turned square half of the box is empty
    left, right = int(shown[0]), int(shown[-1]) + 1
    band = (band[0] + left, band[1], band[0] + right, band[3])
    soft = np.ascontiguousarray(soft[:, left:right])[..., None]
    pixels = np.asarray(canvas.crop(band))
    face = _warp_back(change, to_crop, band, "cubic")
    if photograph is not None:
        face = face + (pixels if photograph is canvas else np.asarray(_enlarged_part(photograph, band, canvas.width)))
    face = np.clip(face, 0, 255, dtype=np.float32)
    blended = pixels + (face - pixels) * soft  # soft 0: the pixel itself
    canvas.paste(Image.fromarray(_to_bytes(blended)), band[:2])


def _warp_back(crop: np.ndarray, to_crop: np.ndarray, box: tuple[int, int, int, int], kernel: str) -> np.ndarray:
    """Resample a crop (S, S[, C]) on the photograph's pixels in `box` (xyxy) -> float32 (h, w[, C])."""
    size = box[2] - box[0], box[3] - box[1]
    inverse = to_crop @ np.array([[1, 0, box[0]], [0, 1, box[1]], [0, 0, 1]])
    fine = _fineness(inverse)
    sampled = _sample(crop, inverse, size, fine, kernel).astype(np.float32, copy=False)
    return sampled if fine == 1 else cv2.resize(sampled, size, interpolation=cv2.INTER_AREA)


def enlarged(matrix: np.ndarray, factor: int) -> np.ndarray:
    """The (2, 3) matrix from a photograph's pixels to a crop's for the photograph enlarged by a whole factor."""
    edges = _edges(_checked_matrix(matrix)) @ np.diag([1 / factor, 1 / factor, 1])
    return (np.linalg.inv(_HALF) @ edges @ _HALF)[:2]


def _enlarged_part(photograph: Image.Image, box: tuple[int, int, int, int], width: int) -> Image.Image:
    """The part `box` (xyxy) of a photograph enlarged to `width`, as cut out of the whole one."""
    factor = width // photograph.width
    if factor == 1:
        return photograph.crop(box)
    # in the photograph's pixels, with the neighbours that the filter reads
    low = [max(edge // factor - _FILTER_REACH, 0) for edge in box[:2]]
    high = [min(-(-edge // factor) + _FILTER_REACH, side) for edge, side in zip(box[2:], photograph.size, strict=True)]
    part = photograph.crop((*low, *high))
    part = part.resize((part.width * factor, part.height * factor), Resampling.LANCZOS)
    x, y = low[0] * factor, low[1] * factor
    return part.crop((box[0] - x, box[1] - y, box[2] - x, box[3] - y))


def _place(to_crop: np.ndarray, size: int, photograph: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box (x0, y0, x1, y1) of the photograph's pixels that the crop covers, also partly; None if it covers none."""
    corners = np.array([[0, 0, 1], [0, size, 1], [size, size, 1], [size, 0, 1]])
    placed = (corners @ np.linalg.inv(to_crop).T)[:, :2]
    low = np.clip(np.floor(placed.min(0)), 0, photograph).astype(int)
    high = np.clip(np.ceil(placed.max(0)), 0, photograph).astype(int)
    return (*low.tolist(), *high.tolist()) if (high > low).all() else None


def _checked_size(crop: Image.Image) -> int:
    if crop.width != crop.height:
        raise ValueError(f"`crop` has to be square but is {crop.width}x{crop.height}")
    return crop.width


def _checked_before(before: ImageSource, size: int) -> np.ndarray:
    pixels = np.asarray(load_image(before))
    if pixels.shape[:2] != (size, size):
        raise ValueError(f"`before` has to be {size}x{size}, like the crop, but is {pixels.shape[1]}x{pixels.shape[0]}")
    return pixels


def _checked_matrix(matrix: Any) -> np.ndarray:
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (2, 3) or not np.isfinite(values).all() or _scale(values) < 1e-6:
        raise ValueError(f"`matrix` has to be (2, 3), finite and invertible but is {values.tolist()}")
    return values


def _checked_mask(mask: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """The mask as (size, size) float32 in [0, 1]; grey images and uint8 arrays range from 0 to 255."""
    values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    values = values / np.float32(255) if values.dtype == np.uint8 else values.astype(np.float32)
    if values.shape != (size, size):
        raise ValueError(f"`mask` has to be ({size}, {size}), like the crop, but is {values.shape}")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`mask` has to lie in [0, 1] but goes from {values.min():g} to {values.max():g}")
    return values.astype(np.float32)

"""
Seconds to cut a face out of a large photograph and to paste it back: ours beside the straightforward way.

    python tests/benchmarks/aligning.py                          # 24 megapixels, a square of 1280 pixels, a crop of 512
    python tests/benchmarks/aligning.py --side 400 --angle 160

The straightforward way warps the whole photograph: `cv2.warpAffine` for the crop, and back again for the crop and its
mask, blended over all pixels, as the codes of most restorers do. Both are run in turns; the medians count. Aim: below
0.15 s together.
"""

import argparse
import math
import time

import numpy as np
from PIL import Image
from skimage import data

from faceprior.align import align_face, alignment_quad, face_mask, paste_face
from faceprior.images import cv2

ASTRONAUT = np.array([[206, 102], [249, 105], [227, 130], [204, 142], [247, 144]], dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=6000, help="pixels, of the photograph")
    parser.add_argument("--height", type=int, default=4000, help="pixels, of the photograph")
    parser.add_argument("--side", type=float, default=1280, help="pixels of the photograph, side of the face's square")
    parser.add_argument("--angle", type=float, default=0, help="degrees, by which the face is turned")
    parser.add_argument("--size", type=int, default=512, help="pixels, side of the crop")
    parser.add_argument("--rounds", type=int, default=7, help="times that both are run; the medians count")
    options = parser.parse_args()

    photograph, landmarks = make_photograph(options)
    ways = {"whole photograph": (warp_align, warp_paste), "ours": (align_face, our_paste)}
    seconds = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, (align, paste) in ways.items():
            start = time.perf_counter()
            aligned = align(photograph, landmarks, options.size)
            middle = time.perf_counter()
            paste(photograph, aligned, landmarks)
            seconds[name].append((middle - start, time.perf_counter() - middle))
    medians = {name: np.median(values[1:], axis=0) for name, values in seconds.items()}  # the first warms up
    for name, (aligning, pasting) in medians.items():
        print(f"{name}: align {aligning:.3f} s, paste {pasting:.3f} s, together {aligning + pasting:.3f} s")
    print(f"ratio: {medians['whole photograph'].sum() / medians['ours'].sum():.2f}, {cv2.getNumThreads()} threads")


def make_photograph(options: argparse.Namespace) -> tuple[Image.Image, np.ndarray]:
    """The astronaut, turned and enlarged until the square of the face has the wanted side, and her landmarks."""
    corner, _, _, right = alignment_quad(ASTRONAUT)
    scale, angle = options.side / np.hypot(*(right - corner)), math.radians(options.angle)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shift = np.array([options.width, options.height]) / 2 - turn @ ASTRONAUT.mean(0)
    matrix = np.column_stack([turn, shift])
    size = options.width, options.height
    pixels = cv2.warpAffine(data.astronaut(), matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return Image.fromarray(pixels), ASTRONAUT @ turn.T + shift


def our_paste(photograph: Image.Image, aligned, landmarks: np.ndarray) -> Image.Image:
    mask = face_mask(landmarks @ aligned.matrix[:, :2].T + aligned.matrix[:, 2], aligned.crop.width)
    return paste_face(photograph, aligned.crop, aligned.matrix, mask=mask)


def warp_align(photograph: Image.Image, landmarks: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    corners = np.float32([[0, 0], [0, size], [size, size]])
    matrix = cv2.getAffineTransform(alignment_quad(landmarks)[:3].astype(np.float32), corners)
    return cv2.warpAffine(np.asarray(photograph), matrix, (size, size), flags=cv2.INTER_CUBIC), matrix


def warp_paste(photograph: Image.Image, aligned, landmarks: np.ndarray) -> Image.Image:
    crop, matrix = aligned
    inverse, pixels = cv2.invertAffineTransform(matrix), np.asarray(photograph)
    mask = face_mask(landmarks @ matrix[:, :2].T + matrix[:, 2], len(crop))
    face = cv2.warpAffine(crop, inverse, photograph.size, flags=cv2.INTER_CUBIC)
    weight = cv2.warpAffine(mask, inverse, photograph.size)[..., None]
    return Image.fromarray((pixels * (1 - weight) + face * weight).astype(np.uint8))


if __name__ == "__main__":
    main()

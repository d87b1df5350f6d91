"""Measurements of an image: what each number means, by hand, by a property, and on drawn portraits."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from faceprior.procedural import draw_portrait
from faceprior.quality import NearDuplicates, perceptual_hash, sharpness


@pytest.fixture(scope="module")
def portraits():
    return [(Image.fromarray(drawing.image), drawing.box) for drawing in (draw_portrait(s, 256) for s in range(8))]


# ------------------------------------------------------------------------------------------------- sharpness


def test_sharpness_of_white_noise():
    """The Laplacian's kernel has the squares 4 x 1 + 16, so of independent values it has 20 times the variance."""
    noise = np.random.default_rng(0).normal(128, 20, (64, 64)).clip(0, 255).astype(np.uint8)
    assert sharpness(Image.fromarray(noise), (0, 0, 64, 64)) == pytest.approx(20, rel=0.05)


def test_sharpness_of_a_flat_and_of_a_one_pixel_face():
    assert sharpness(Image.new("RGB", (50, 50), "gray"), (10, 10, 30, 30)) == 0
    assert sharpness(Image.new("RGB", (50, 50), "gray"), (10.2, 10.2, 10.3, 10.3)) == 0


def test_sharpness_does_not_depend_on_contrast_and_brightness(portraits):
    image, box = portraits[0]
    dim = Image.fromarray((np.asarray(image) * 0.5 + 40).astype(np.uint8))
    assert sharpness(dim, box) == pytest.approx(sharpness(image, box), rel=0.1)


def test_sharpness_is_relative_to_the_face(portraits):
    """Enlarged to twice its size, at which its pixels are half as sharp, a face is about as sharp as it was."""
    for image, box in portraits:
        large = image.resize((512, 512), Image.BICUBIC)
        assert sharpness(large, [2 * edge for edge in box]) == pytest.approx(sharpness(image, box), rel=0.3)


def test_a_limit_of_5_percent_is_a_blur_of_2_percent(portraits):
    """As the docstring says: sharp faces have 0.15 at least; 1% of the side, about 0.15; 2%, about 0.045."""
    for image, box in portraits:
        side, found = max(box[2] - box[0], box[3] - box[1]), []
        for share in (0, 0.01, 0.02, 0.03):
            blurred = image.filter(ImageFilter.GaussianBlur(share * side)) if share else image
            found.append(sharpness(blurred, box))
        assert found == sorted(found, reverse=True)
        assert found[0] > 0.15 and 0.05 < found[1] < 0.3 and 0.02 < found[2] < 0.08 and found[3] < 0.05


# --------------------------------------------------------------------------------------- near-duplicates


def changed(image: Image.Image) -> list[Image.Image]:
    """The same image, as it is found again on the web."""
    file = io.BytesIO()
    image.resize((180, 180), Image.LANCZOS).save(file, "JPEG", quality=60)
    return [image.resize((128, 128), Image.BICUBIC), Image.open(file), image.point(lambda v: min(255, v * 1.1))]


def test_near_duplicates_are_near_and_others_are_not(portraits):
    hashes = [perceptual_hash(image) for image, _ in portraits]
    for (image, _), value in zip(portraits, hashes, strict=True):
        assert all((perceptual_hash(copy) ^ value).bit_count() <= 4 for copy in changed(image))
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 4
    assert max(value.bit_length() for value in hashes) <= 64


def test_the_hash_by_hand():
    """A cosine of k half waves across 32 columns is the DCT's frequency (0, k) alone, far above the median of 0."""
    wave = np.cos(np.pi * (np.arange(32) + 0.5) * 3 / 32)
    image = Image.fromarray(np.tile(128 + 100 * wave, (32, 1)).round().astype(np.uint8))
    bits = f"{perceptual_hash(image):064b}"
    assert bits[0] == bits[3] == "1"
    inverted = f"{perceptual_hash(Image.eval(image, lambda v: 255 - v)):064b}"
    assert inverted[0] == "1" and inverted[3] == "0"


def test_distances_of_hashes():
    """0b0111 differs from 0b0000 in 3 bits and from 0b0110 in 1: the first photograph within the limit is named."""
    duplicates = NearDuplicates(max_distance=2)
    assert duplicates.find(0) is None
    duplicates.add("a", 0b0000)
    duplicates.add("b", 0b0110)
    assert duplicates.find(0b0111) == ("b", 1)
    assert duplicates.find(0b0010) == ("a", 1)
    assert duplicates.find(0b111000) is None
    top = 2**64 - 1
    duplicates.add("c", top)
    assert duplicates.find(top - 1) == ("c", 1)


def test_near_duplicates_can_be_left_in():
    duplicates = NearDuplicates(max_distance=-1)
    duplicates.add("a", 7)
    assert duplicates.find(7) is None

"""Measurements of an image: what each number means, by hand, by a property, and on drawn portraits."""

import io
import itertools
import math

import cv2
import numpy as np
import pytest
import skimage.data
from matplotlib import cbook
from PIL import Image, ImageFilter

from faceprior.procedural import draw_portrait
from faceprior.quality import (
    NearDuplicates,
    blockiness,
    fine_detail,
    finest_octave,
    noise_level,
    perceptual_hash,
    sharpness,
)


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
    assert duplicates.nearest(0b1111111) == ("b", 5)  # whatever the limit
    assert NearDuplicates(max_distance=2).nearest(0) is None


def test_near_duplicates_can_be_left_in():
    duplicates = NearDuplicates(max_distance=-1)
    duplicates.add("a", 7)
    assert duplicates.find(7) is None


# ------------------------------------------------------------------------------------ noise and JPEG blocks

Y, X = np.mgrid[:200, :240].astype(np.float32)
SMOOTH = {
    "flat": np.full_like(X, 128),
    "linear": 40 + 0.5 * X + 0.3 * Y,
    "quadratic": 30 + 0.002 * X**2 + 0.001 * Y**2,
    "shade": 128 + 90 * np.sin(X / 40) * np.cos(Y / 50),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("sigma", [1.5, 5, 20])
def test_noise_level_recovers_sigma(name, sigma):
    """With 47000 pixels the estimate itself varies by about 1%."""
    noise = np.random.default_rng(0).normal(0, sigma, X.shape)
    assert noise_level((SMOOTH[name] + noise).astype(np.float32)) == pytest.approx(sigma, rel=0.1)


def test_noise_level_is_blind_to_smooth_structure():
    """Second differences along both axes of a + bx + cy + dx^2 + ey^2 are 0."""
    for name in ("flat", "linear", "quadratic"):
        assert noise_level(SMOOTH[name]) < 0.01


def test_noise_level_by_hand():
    """A pixel that is h higher answers with h x (1 2 1, 2 4 2, 1 2 1) around it: 16 h over (12 - 2) x (9 - 2) pixels.

    Immerkaer: sigma = sqrt(pi / 2) / 6 x mean = sqrt(pi / 2) / 6 x 16 h / 70.
    """
    gray = np.zeros((9, 12), np.float32)
    gray[4, 5] = 30
    assert noise_level(gray) == pytest.approx(math.sqrt(math.pi / 2) / 6 * 16 * 30 / 70, rel=1e-5)


def test_blockiness_by_hand():
    """Blocks that differ by 4 grey levels from their right neighbours, and by none from those below.

    Along x the steps are 4 at the borders and 0 elsewhere: (4 + .001) / (0 + .001) = 4001; along y .001 / .001 = 1.
    """
    gray = np.repeat(np.arange(4, dtype=np.float32) * 4, 8)[None].repeat(32, axis=0)
    assert blockiness(gray) == pytest.approx((4001 + 1) / 2, rel=1e-3)


@pytest.mark.parametrize("shape", [(256, 256), (250, 131), (16, 16)])
def test_blockiness_of_noise_is_about_one(shape):
    gray = np.random.default_rng(0).normal(128, 20, shape).astype(np.float32)
    assert blockiness(gray) == pytest.approx(1, abs=0.3 if min(shape) == 16 else 0.1)


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 1)])
def test_blockiness_without_a_block_border(shape):
    assert blockiness(np.zeros(shape, np.float32)) == 1


def test_blockiness_grows_as_the_quality_of_jpeg_falls(portraits):
    values = []
    for quality in (95, 30, 5):
        file = io.BytesIO()
        portraits[3][0].save(file, "JPEG", quality=quality)
        rgb = np.asarray(Image.open(file))
        values.append(blockiness(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(float)))
    assert values == sorted(values) and values[-1] > 1.5


# ------------------------------------------------------------------------------------------------- fine detail


def waves(size, *waves_):
    """The sum of cosines over a part of the image: (frequency in cycles per pixel, amplitude, columns that show it)."""
    x = np.arange(size) + 0.5
    image = np.zeros((size, size))
    for frequency, amplitude, columns in waves_:
        image[:, columns] += (amplitude * np.cos(2 * np.pi * frequency * x))[columns]
    return image


def test_fine_detail_of_waves_by_hand():
    """Twice as small holds 0.25 cycles per pixel. One wave of 0.1875 (below) everywhere has the energy A^2 / 2; one of
    0.37 (above) in a quarter of the columns B^2 / 8, and the median of the band there is about 0. So for B = 2 A the
    ratio is 1, whatever A; a wave of 0.09 belongs to another octave.
    """
    below, quarter = slice(None), slice(0, 256)
    image = waves(1024, (0.1875, 20, below), (0.37, 40, quarter), (0.09, 50, below))
    assert fine_detail(image, 2) == pytest.approx(1, rel=0.1)  # where the wave ends, it leaks
    assert fine_detail(waves(1024, (0.1875, 20, below), (0.37, 20, quarter)), 2) == pytest.approx(0.25, rel=0.1)
    assert fine_detail(waves(1024, (0.1875, 20, below)), 2) < 0.01
    # a nearly empty octave below counts an eighth, 400, of a wave of 0.045 with the energy 80^2 / 2; B^2 / 8 is 200
    blurred = waves(1024, (0.1875, 2, below), (0.37, 40, quarter), (0.045, 80, below))
    assert fine_detail(blurred, 2) == pytest.approx(0.5, rel=0.1)


def test_noise_has_no_fine_detail():
    """The variance of white noise follows from its median; what is left of it is below 0.02 of the octave below."""
    noise = np.random.default_rng(0).normal(128, 30, (512, 512))
    for scale in (1.3, 2, 4):
        assert fine_detail(noise, scale) < 0.02


def test_jpeg_blocks_are_no_fine_detail():
    """A soft image in which steps stand at every 8th pixel, wherever the first one is."""
    soft = np.asarray(
        Image.fromarray(skimage.data.astronaut()).convert("L").resize((128, 128)).resize((512, 512)), float
    )
    for shift in (0, 3):
        grid = np.roll(np.kron(np.random.default_rng(0).normal(0, 4, (64, 64)), np.ones((8, 8))), shift, (0, 1))
        assert fine_detail(soft + grid, 2) < 0.05


@pytest.mark.parametrize("name", ["astronaut", "hopper"])
def test_fine_detail_tells_sharp_photographs_from_soft_ones(name):
    """Sharp above 0.1 at every scale, with noise of 4 levels or JPEG at 50 above 0.06, enlarged or blurred below."""
    if name == "astronaut":
        image = Image.fromarray(skimage.data.astronaut()).crop((170, 60, 280, 190))
    else:
        with cbook.get_sample_data("grace_hopper.jpg") as file:
            image = Image.open(file).convert("RGB").crop((160, 110, 370, 350))
    gray = image.convert("L")
    noise = np.random.default_rng(0).normal(0, 4, gray.size[::-1])
    buffer = io.BytesIO()
    gray.save(buffer, "JPEG", quality=50)
    for scale in (1.5, 2, 2.8):
        small = gray.resize([round(side / scale / 1.5) for side in gray.size], Image.LANCZOS)
        enlarged = np.asarray(small.resize(gray.size, Image.BICUBIC), float)
        blurred = np.asarray(gray.filter(ImageFilter.GaussianBlur(1.5)), float)
        assert fine_detail(np.asarray(gray, float), scale) > 0.1
        assert fine_detail(np.asarray(gray, float) + noise, scale) > 0.06
        assert fine_detail(np.asarray(Image.open(buffer), float), scale) > 0.06
        for soft in (enlarged, blurred):
            assert fine_detail(soft, scale) < 0.06 and fine_detail(soft + noise, scale) < 0.06


@pytest.mark.parametrize("sigma", [2, 2.5, 4])
def test_what_compression_leaves_of_a_blurred_photograph_is_no_detail(sigma):
    """Two octaves of JPEG's remainders have like energies, whatever their ratio; saved again off its first grid."""
    image = Image.fromarray(skimage.data.astronaut()).filter(ImageFilter.GaussianBlur(sigma))
    for quality in (20, 40, 60):
        sheet = Image.new("RGB", (640, 640), "gray")
        sheet.paste(saved(image, quality), (20, 60))
        gray = np.asarray(saved(sheet, 90).crop((190, 120, 300, 250)).convert("L"), float)
        for scale in (1.3, 2):
            assert fine_detail(gray, scale) < 0.06


def saved(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert(image.mode)


def test_nothing_is_finer_than_an_image_of_equal_size():
    noise = np.random.default_rng(0).normal(128, 30, (64, 64))
    assert fine_detail(noise, 1) == fine_detail(noise, 0.5) == fine_detail(noise, 1.2) == 0
    assert fine_detail(noise[:12], 2) == fine_detail(np.zeros((64, 64)), 2) == 0


# ---------------------------------------------------------------------------------------- the finest octave


def test_the_finest_octave_of_waves_by_hand():
    """Waves of 0.37 and 0.1875 cycles per pixel stand for the two octaves: A^2 / B^2, whatever coarser ones do."""
    everywhere = slice(None)
    image = waves(1024, (0.1875, 20, everywhere), (0.37, 10, everywhere), (0.09, 50, everywhere))
    assert finest_octave(image) == pytest.approx(0.25, rel=0.05)
    # an octave that is nearly empty counts an eighth of the one two below, 40^2 of 80^2: 10^2 over 40^2 / 2
    assert finest_octave(waves(1024, (0.37, 10, everywhere), (0.045, 80, everywhere))) == pytest.approx(1 / 8, rel=0.05)


def test_the_finest_octave_of_a_photograph_and_of_an_enlarged_one():
    image = Image.fromarray(skimage.data.astronaut()).convert("L").crop((170, 60, 298, 188))
    assert finest_octave(np.asarray(image, float)) > 0.15
    enlarged = image.resize((64, 64), Image.LANCZOS).resize((128, 128), Image.BICUBIC)
    assert finest_octave(np.asarray(enlarged, float)) < 0.1


def test_nothing_too_small_has_octaves():
    assert finest_octave(np.ones((15, 40))) == finest_octave(np.zeros((64, 64))) == 0

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
from conftest import load_stage

from faceprior.config import parse_config
from faceprior.degrade import (
    PRESETS,
    Degradation,
    DegradationConfig,
    apply_degradation,
    degrade,
    gaussian_kernel,
    ranges_of,
    sample_degradation,
    scaled,
)
from faceprior.images import cv2

NEUTRAL = DegradationConfig(blur_sigma=(0.0, 0.0), downsample=(1.0, 1.0), noise=(0.0, 0.0), jpeg=None)


def face():
    return np.ascontiguousarray(skimage.data.astronaut()[:256, 100:356])


def rng(seed=0):
    return np.random.default_rng(seed)


# --- the kernel ---


@pytest.mark.parametrize(("size", "sigma"), [(41, 0.1), (41, 3.0), (41, 10.0), (11, 2.5)])
def test_an_isotropic_kernel_is_opencvs(size, sigma):
    """The outer product of OpenCV's one-dimensional kernel with itself, whatever the angle."""
    line = cv2.getGaussianKernel(size, sigma)
    for angle in (0.0, 1.0):
        np.testing.assert_allclose(gaussian_kernel(size, (sigma, sigma), angle), line @ line.T, atol=1e-7)


def test_an_anisotropic_kernel_is_separable_along_its_axes():
    """At angle 0 the first sigma runs along x: rows of the kernel. At 90 degrees it runs along y."""
    along, across = cv2.getGaussianKernel(41, 4.0), cv2.getGaussianKernel(41, 1.5)
    np.testing.assert_allclose(gaussian_kernel(41, (4.0, 1.5)), across @ along.T, atol=1e-7)
    np.testing.assert_allclose(gaussian_kernel(41, (4.0, 1.5), math.pi / 2), along @ across.T, atol=1e-7)


@pytest.mark.parametrize("angle", [0.4, -2.0])
def test_a_turned_kernel_has_the_turned_covariance(angle):
    """Its second moments are R diag(sigma^2) R^T: for sigma 4 and 2 on a wide grid to 1e-3."""
    kernel = gaussian_kernel(61, (4.0, 2.0), angle)
    y, x = np.mgrid[:61, :61] - 30.0
    moments = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(moments, turn @ np.diag([16, 4]) @ turn.T, atol=1e-3)
    assert kernel.sum() == pytest.approx(1)


def test_a_kernel_needs_a_width():
    with pytest.raises(ValueError, match="sigma"):
        gaussian_kernel(5, (1.0, 0.0))


# --- drawing ---


@pytest.mark.parametrize("name", PRESETS)
def test_strengths_lie_in_the_presets_ranges_and_fill_them(name):
    """Over 400 draws the extremes come within 5% of both ends of each range."""
    config = PRESETS[name]
    drawn = [sample_degradation(config, rng(seed)) for seed in range(400)]
    for field, bounds in (("downsample", config.downsample), ("noise", config.noise), ("jpeg", config.jpeg)):
        values = np.array([getattr(degradation, field) for degradation in drawn])
        margin = 0.05 * (bounds[1] - bounds[0])
        assert bounds[0] <= values.min() < bounds[0] + margin and bounds[1] - margin < values.max() <= bounds[1]
    sigmas = np.array([degradation.blur_sigma for degradation in drawn])
    assert config.blur_sigma[0] <= sigmas.min() and sigmas.max() <= config.blur_sigma[1]
    assert 0.4 < (sigmas[:, 0] == sigmas[:, 1]).mean() < 0.6
    assert np.mean([degradation.gray for degradation in drawn]) <= 4 * config.gray_prob
    jittered = np.array([any(degradation.jitter) for degradation in drawn])
    assert jittered.mean() == pytest.approx(config.jitter_prob, abs=0.08)


def test_the_same_generator_draws_the_same():
    """And a later draw does not depend on what the earlier ones came out as."""
    assert sample_degradation(PRESETS["gfpgan"], rng(3)) == sample_degradation(PRESETS["gfpgan"], rng(3))
    plain, jittered = rng(3), rng(3)
    sample_degradation(PRESETS["authface"], plain)
    sample_degradation(replace(PRESETS["authface"], jitter_prob=1.0, gray_prob=1.0), jittered)
    assert plain.random() == jittered.random()


def test_a_degradation_round_trips_through_json():
    for name in PRESETS:
        degradation = sample_degradation(PRESETS[name], rng(5))
        assert Degradation.from_dict(json.loads(json.dumps(degradation.to_dict()))) == degradation
    assert Degradation.from_dict(Degradation().to_dict()) == Degradation()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blur_kernel", 40),
        ("blur_kernel", -1),
        ("blur_sigma", (5, 1)),
        ("downsample", (0, 4)),
        ("noise", (-1, 4)),
        ("jpeg", (60, 101)),
        ("gray_prob", 1.5),
        ("noise", (math.nan, 1)),
    ],
)
def test_a_config_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        DegradationConfig(**{field: value})


# --- a stage's settings ---


@pytest.mark.parametrize("stage", ["06_train_restorer", "07_eval"])
def test_a_stage_takes_the_preset_and_any_range_over_it(stage):
    """At 128 pixels a quarter of the sizes, unless that is off; what is not given is the preset's."""
    config_class = load_stage(stage).Config
    for name in PRESETS:
        assert ranges_of(config_class(degradation=name), 512) == PRESETS[name]
        assert ranges_of(config_class(degradation=name), 128) == scaled(PRESETS[name], 128)
    words = "--degradation gfpgan --blur_sigma 1 4 --jpeg 0 0 --jitter_prob 0 --gray_prob 0.5 --no-scale_degradation"
    config = parse_config(config_class, words.split())
    expected = replace(PRESETS["gfpgan"], blur_sigma=(1.0, 4.0), jpeg=None, jitter_prob=0.0, gray_prob=0.5)
    assert ranges_of(config, 128) == expected
    assert ranges_of(replace(config, scale_degradation=True), 128) == scaled(expected, 128)
    for wrong in ({"noise": (5.0,)}, {"downsample": (8.0, 2.0)}, {"jpeg": (0, 50)}, {"blur_kernel": 4}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` has to be"):
            ranges_of(config_class(**wrong), 512)


# --- applying ---


def test_neutral_strengths_change_nothing():
    np.testing.assert_array_equal(apply_degradation(face(), Degradation(), rng()), face())
    np.testing.assert_array_equal(degrade(face(), NEUTRAL, rng()), face())


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_generator_gives_the_same_pixels(name):
    first, second = (degrade(face(), PRESETS[name], rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == face().shape and first.dtype == np.uint8
    assert (degrade(face(), PRESETS[name], rng(8)) != first).any()


def test_a_drawn_degradation_can_be_applied_again():
    """The strengths once drawn, only the noise takes from the generator."""
    degradation = sample_degradation(PRESETS["authface"], rng(1))
    first = apply_degradation(face(), degradation, rng(2))
    np.testing.assert_array_equal(first, apply_degradation(face(), degradation, rng(2)))


def test_the_image_is_left_alone():
    image = face()
    degrade(image, PRESETS["codeformer"], rng())
    np.testing.assert_array_equal(image, face())


def test_blur_by_opencv():
    blurred = apply_degradation(face(), Degradation(blur_kernel=41, blur_sigma=(3.0, 3.0)), rng())
    expected = cv2.GaussianBlur(face().astype(np.float32), (41, 41), 3.0, borderType=cv2.BORDER_REFLECT_101)
    assert np.abs(blurred - expected).max() <= 0.51


def test_noise_has_the_drawn_deviation():
    """On grey 128 of 60000 values: sigma 12, and 1/12 from rounding."""
    grey = np.full((100, 200, 3), 128, np.uint8)
    noisy = apply_degradation(grey, Degradation(noise=12.0), rng()).astype(float)
    assert noisy.std() == pytest.approx(math.sqrt(144 + 1 / 12), rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.2)


def test_downsampling_loses_what_is_finer_and_keeps_the_size():
    """A chessboard of 4 px squares at a factor of 8 is grey: each sample lies in the middle of four squares."""
    board = np.repeat((np.indices((64, 64)) // 4).sum(0)[..., None] % 2 * 255, 3, axis=2).astype(np.uint8)
    degraded = apply_degradation(board, Degradation(downsample=8.0), rng())
    assert degraded.shape == (64, 64, 3) and np.abs(degraded.astype(float) - 127.5).max() < 1
    tiny = apply_degradation(board[:3, :5], Degradation(downsample=30.0), rng())
    assert tiny.shape == (3, 5, 3)


def test_jpeg_by_pillow():
    """The same quality through another encoder: as far from the image, and close to each other."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(face()).save(buffer, "jpeg", quality=60)
    expected = np.asarray(Image.open(buffer), float)
    degraded = apply_degradation(face(), Degradation(jpeg=60), rng()).astype(float)
    loss = np.abs(expected - face()).mean()
    assert np.abs(degraded - face()).mean() == pytest.approx(loss, rel=0.1)
    assert np.abs(degraded - expected).mean() < 0.3 * loss


def test_stronger_is_worse():
    """The error grows with each strength by itself."""
    for field, values in (("downsample", (2, 4, 8)), ("noise", (5, 10, 20)), ("jpeg", (90, 60, 30))):
        errors = [
            np.abs(apply_degradation(face(), Degradation(**{field: value}), rng()).astype(float) - face()).mean()
            for value in values
        ]
        assert errors == sorted(errors) and errors[0] > 0


def test_colour_shift_and_grey():
    """R + 10, G - 20, B as it is, cut at 0..255; grey is .299 R + .587 G + .114 B."""
    image = np.full((4, 4, 3), (250, 100, 50), np.uint8)
    shifted = apply_degradation(image, Degradation(jitter=(10.0, -20.0, 0.0)), rng())
    assert shifted[0, 0].tolist() == [255, 80, 50]
    grey = apply_degradation(image, Degradation(gray=True), rng())
    assert grey[0, 0].tolist() == [round(0.299 * 250 + 0.587 * 100 + 0.114 * 50)] * 3


def test_only_rgb_bytes_are_taken():
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            apply_degradation(bad, Degradation(), rng())


# --- smaller faces ---


def test_scaled_by_hand():
    """128 px is r = 1/4: kernel 41 / 4 = 10.25 -> 11, sigma .1..10 -> .025..2.5, factor .8..8 -> .8..2."""
    config = scaled(PRESETS["authface"], 128)
    assert config.blur_kernel == 11
    assert config.blur_sigma == (0.025, 2.5)
    assert config.downsample == (0.8, 2.0)
    assert (config.noise, config.jpeg) == ((0, 20), (60, 100))
    assert scaled(PRESETS["codeformer"], 128).downsample == (1.0, 7.5)
    assert scaled(PRESETS["authface"], 8).blur_kernel == 3


def test_scaled_leaves_large_faces_alone():
    for size in (512, 1024):
        assert scaled(PRESETS["diffbir"], size) == PRESETS["diffbir"]


def test_a_scaled_degradation_looks_the_same_but_smaller():
    """Degrading at 512 and shrinking to 128 gives about what the scaled strengths give at 128."""
    large = cv2.resize(face(), (512, 512), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(large, (128, 128), interpolation=cv2.INTER_AREA)
    at_large = Degradation(blur_kernel=41, blur_sigma=(6.0, 6.0), downsample=6.0)
    at_small = Degradation(blur_kernel=11, blur_sigma=(1.5, 1.5), downsample=1.5)
    shrunk = cv2.resize(apply_degradation(large, at_large, rng()), (128, 128), interpolation=cv2.INTER_AREA)
    difference = np.abs(apply_degradation(small, at_small, rng()).astype(float) - shrunk).mean()
    assert difference < 0.2 * np.abs(small.astype(float) - shrunk).mean()

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

from faceprior.color import adain_color_fix, find_tone, keep_tone, wavelet_color_fix, wavelet_decompose
from faceprior.images import to_pil, to_pixel_values
from faceprior.procedural import draw_portrait


def make_image(seed, size=96):
    """(1, 3, size, size) in [-1, 1]: smooth patches and noise."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = F.interpolate(patches, size=(size, size), mode="bicubic")
    return (smooth * 2 - 1 + 0.1 * torch.randn(1, 3, size, size, generator=generator)).clamp(-1, 1)


def test_one_level_by_hand():
    """An impulse of 16 in the middle becomes the outer product of [1, 2, 1] with itself."""
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 16
    line = torch.tensor([0.0, 1, 2, 1, 0])
    high, low = wavelet_decompose(x, levels=1)
    torch.testing.assert_close(low[0, 0], torch.outer(line, line))
    torch.testing.assert_close(high, x - low)


def test_levels_agree_with_dilated_convolutions():
    """The low band of level k by torch's own convolution with dilation 2^k on a replicated border."""
    x = make_image(0)
    line = torch.tensor([1.0, 2, 1]) / 4
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    expected = x
    for level in range(5):
        d = 2**level
        expected = F.conv2d(F.pad(expected, (d,) * 4, mode="replicate"), kernel, dilation=d, groups=3)
    high, low = wavelet_decompose(x)
    torch.testing.assert_close(low, expected)
    torch.testing.assert_close(high + low, x)


@pytest.mark.parametrize("fix", [wavelet_color_fix, adain_color_fix])
def test_an_image_with_its_own_colours_is_itself(fix):
    torch.testing.assert_close(fix(make_image(0), make_image(0)), make_image(0))


@pytest.mark.parametrize("fix", [wavelet_color_fix, adain_color_fix])
def test_a_shift_of_the_colours_is_undone(fix):
    """Content that differs from style by a constant per channel becomes the style."""
    style = make_image(0)
    shift = torch.tensor([0.3, -0.2, 0.1]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(fix(style + shift, style), style)


def test_wavelet_result_has_the_low_band_of_the_style():
    """At a frequency that the smoothing passes with gain g, the low bands differ by g (1 - g) of the difference
    between content and style. The gain is a product of squared cosines, so g (1 - g) <= 1/4: for every image
    (but for the border), and far less on the lowest frequencies.
    """
    content, style = make_image(1), make_image(2)
    difference = wavelet_decompose(wavelet_color_fix(content, style))[1] - wavelet_decompose(style)[1]
    assert difference.norm() < (content - style).norm() / 4
    shift = (difference.mean((2, 3)) / (content - style).mean((2, 3))).abs()
    assert shift.max() < 0.1


def test_wavelet_result_has_the_detail_of_the_content():
    """By construction content - low(content) + low(style)."""
    content, style = make_image(1), make_image(2)
    detail = wavelet_color_fix(content, style) - wavelet_decompose(style)[1]
    torch.testing.assert_close(detail, wavelet_decompose(content)[0])


def test_adain_result_has_the_statistics_of_the_style():
    """Mean exactly; deviation to the 1e-5 added to both variances."""
    content, style = make_image(1), 0.5 * make_image(2)
    result = adain_color_fix(content, style)
    torch.testing.assert_close(result.mean((2, 3)), style.mean((2, 3)))
    torch.testing.assert_close(result.std((2, 3)), style.std((2, 3)), rtol=1e-3, atol=0)


def test_constant_images_take_the_styles_colour():
    content, style = torch.full((1, 3, 40, 40), 0.9), torch.full((1, 3, 40, 40), -0.4)
    torch.testing.assert_close(adain_color_fix(content, style), style)
    torch.testing.assert_close(wavelet_color_fix(content, style), style)
    assert adain_color_fix(content, make_image(0, 40)).isfinite().all()


def test_images_of_a_batch_do_not_mix():
    content, style = torch.cat([make_image(1), make_image(2)]), torch.cat([make_image(3), make_image(4)])
    for fix in (wavelet_color_fix, adain_color_fix):
        torch.testing.assert_close(fix(content, style)[1:], fix(make_image(2), make_image(4)))


@pytest.mark.parametrize("size", [1, 5])
def test_images_smaller_than_the_kernel(size):
    content, style = make_image(1, size), make_image(2, size)
    assert wavelet_color_fix(content, style).shape == content.shape
    assert adain_color_fix(content, style).isfinite().all()


def test_half_precision_stays_half_and_close():
    content, style = make_image(1), make_image(2)
    for fix in (wavelet_color_fix, adain_color_fix):
        result = fix(content.half(), style.half())
        assert result.dtype == torch.float16
        torch.testing.assert_close(result.float(), fix(content, style), rtol=0, atol=5e-3)


def test_gradients_flow():
    content = make_image(1).requires_grad_()
    (wavelet_color_fix(content, make_image(2)) + adain_color_fix(content, make_image(2))).sum().backward()
    assert content.grad.isfinite().all()


def test_shapes_have_to_agree():
    for fix in (wavelet_color_fix, adain_color_fix):
        with pytest.raises(ValueError, match="resize"):
            fix(make_image(0, 32), make_image(0, 64))
        with pytest.raises(ValueError, match="B, C, H, W"):
            fix(make_image(0)[0], make_image(0)[0])
    with pytest.raises(ValueError, match="levels"):
        wavelet_decompose(make_image(0), levels=0)


# ---- grey and toned images


@pytest.fixture(scope="module")
def portraits():
    return [Image.fromarray(draw_portrait(seed, 128).image) for seed in range(6)]


def toned(image, white=(255, 255, 255), black=(0, 0, 0), gamma=(1, 1, 1)):
    """A portrait printed in one ink: each channel a curve of the grey value."""
    grey = np.asarray(image.convert("L"))[..., None] / 255
    return Image.fromarray(np.rint(black + (np.array(white) - black) * grey**gamma).astype(np.uint8))


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


TONES = {
    "grey": {},
    "sepia": {"white": (255, 232, 195)},
    "blue": {"white": (200, 215, 255), "black": (0, 0, 20)},
    "two inks": {"white": (255, 240, 200), "black": (20, 10, 60)},
    "curve": {"gamma": (0.8, 1, 1.3)},
}


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("quality", [None, 95])
def test_a_toned_image_keeps_its_tone(portraits, tone, quality):
    """Whatever is drawn: the colours of the result are those that the tone has at its luminance, to rounding."""
    for image, other in zip(portraits, portraits[1:], strict=False):
        style = toned(image, **TONES[tone])
        style = style if quality is None else jpeg(style, quality)
        (result,) = to_pil(keep_tone(to_pixel_values(other), to_pixel_values(style)))
        found = np.asarray(result).astype(int)
        if tone == "grey":
            assert (found == np.asarray(other.convert("L"))[..., None]).mean() > 0.99 and not np.ptp(found, 2).any()
            continue
        weights = [0.299, 0.587, 0.114]
        ramp = np.asarray(toned(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), **TONES[tone]))[0].astype(int)
        light, own = found @ weights, np.asarray(style) @ weights
        known = (light > own.min() + 5) & (light < own.max() - 5)  # beyond it the tone is guessed
        expected = ramp[np.abs(light[known][:, None] - ramp @ weights).argmin(1)]
        assert known.mean() > 0.3 and np.abs(found[known] - expected).max() <= (4 if quality is None else 8)


def test_images_in_colours_come_back_bit_for_bit(portraits):
    """Pale, blurred, compressed or noisy ones, too, and beside grey ones in a batch."""
    noise = np.random.default_rng(0).normal(0, 5, (128, 128, 3))
    for image in portraits:
        for saturation in (1, 0.3, 0.15):
            pale = ImageEnhance.Color(image).enhance(saturation)
            noisy = Image.fromarray(np.clip(np.asarray(pale) + noise * saturation, 0, 255).astype(np.uint8))
            for style in (pale, pale.filter(ImageFilter.GaussianBlur(4)), jpeg(pale, 60), noisy):
                assert find_tone(to_pixel_values(style)[0]) is None, saturation
    content, style = make_image(1, 128), to_pixel_values([portraits[0], portraits[1].convert("L")])
    result = keep_tone(content.expand(2, -1, -1, -1), style)
    assert result.dtype == content.dtype
    assert (result[0] == content[0]).all() and (result[1] == result[1, :1]).all()


def test_grey_under_coloured_noise_is_grey(portraits):
    noise = np.random.default_rng(0).normal(0, 6, (128, 128, 3))
    for image in portraits:
        grey = np.asarray(image.convert("L"))[..., None] + noise
        style = to_pixel_values(Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)))
        result = keep_tone(to_pixel_values(image), style)
        assert (result == result[:, :1]).all()


def test_an_image_of_one_colour_has_a_tone():
    style = torch.tensor([0.5, 0.2, -0.3]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    result = keep_tone(style + 0.1, style)
    torch.testing.assert_close(result, style + 0.1, rtol=0, atol=2e-2)

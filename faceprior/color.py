"""Transfer the colours of one image to another: by wavelets (StableSR), by mean and deviation (AdaIN), or by its tone.

Tensors are (B, 3, H, W), any floating dtype. Those of the wavelets and of AdaIN may have any range, and the computation
runs in float32; the tone is that of pixels in [-1, 1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def wavelet_decompose(x: torch.Tensor, levels: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Split x into a high and a low band, `high + low = x` (colour fix of StableSR, arXiv 2305.07015).

    x: (B, C, H, W). The low band is x smoothed `levels` times by the kernel [1, 2, 1] / 4 along both axes, dilated by
    1, 2, 4, ... pixels, with the border replicated; 5 levels smooth over about 2 * (2^5 - 1) + 1 = 63 pixels. The high
    band is summed level by level, so that it rounds as StableSR's, which the official code cuts to 8 bits.
    """
    if x.ndim != 4:
        raise ValueError(f"`x` has to be (B, C, H, W) but is {tuple(x.shape)}")
    if levels < 1:
        raise ValueError(f"`levels` has to be at least 1 but is {levels}")
    low = x.float()
    high = torch.zeros_like(low)
    for level in range(levels):
        finer, low = low, _smooth(low, 2**level)
        high += finer - low
    return high.to(x.dtype), low.to(x.dtype)


def _smooth(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """Smooth by [1, 2, 1] / 4 along height and width, taps `dilation` pixels apart, border replicated."""
    d = dilation
    x = F.pad(x, (d, d, d, d), mode="replicate")
    x = (x[..., : -2 * d] + 2 * x[..., d:-d] + x[..., 2 * d :]) / 4
    return (x[..., : -2 * d, :] + 2 * x[..., d:-d, :] + x[..., 2 * d :, :]) / 4


def wavelet_color_fix(content: torch.Tensor, style: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """The high band of `content` on the low band of `style`; both (B, 3, H, W), result not clamped."""
    _check_pair(content, style)
    high, _ = wavelet_decompose(content.float(), levels)
    _, low = wavelet_decompose(style.float(), levels)
    return (high + low).to(content.dtype)


def adain_color_fix(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """`content` with the channel means and deviations of `style` (AdaIN, arXiv 1703.06868, Eq. 8).

    Both (B, 3, H, W), result not clamped. 1e-5 is added to both variances, as in the paper's code, so that a constant
    image gets the mean of `style`.
    """
    _check_pair(content, style)
    mean, deviation = _statistics(content.float())
    style_mean, style_deviation = _statistics(style.float())
    return ((content.float() - mean) / deviation * style_deviation + style_mean).to(content.dtype)


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, "none": lambda content, style: content}


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    return mean, (variance + 1e-5).sqrt()


def _check_pair(content: torch.Tensor, style: torch.Tensor) -> None:
    if content.shape != style.shape or content.ndim != 4:
        raise ValueError(
            "`content` and `style` have to be (B, C, H, W) of one shape but are"
            f" {tuple(content.shape)} and {tuple(style.shape)}: resize one to the other"
        )


# ---- grey and toned images

LUMINANCE = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # of R, G, B (ITU-R BT.601)
_DEGREE = 4  # of the polynomial from luminance to chroma
_CELLS = 8  # per side: the residuals are averaged over so many cells
_CLEAN = 0.25  # largest residual of the cells of a one-tone image, of 255: what rounding to 8 bits leaves
_NOISY = 1.2  # the same below noise or JPEG artefacts,
_NOISE = 0.45  # where it is at most this fraction of the pixels' residual: in colour photographs it is 0.5 to 0.9
_GREY = 1.0  # a tone whose chroma is less, of 255, is grey


@dataclass(frozen=True)
class Tone:
    """The one colour that an image has at each luminance: grey, sepia, or another line or curve in colour space.

    chroma: (degree + 1, 3), coefficients in Legendre polynomials of the luminance over [0, 255]; R, G, B minus the
    luminance. low, high: the range of luminance in the image. slope: (3,), the change of the chroma per luminance
    beyond that range.
    """

    chroma: torch.Tensor
    low: float
    high: float
    slope: torch.Tensor

    def colors(self, luminance: torch.Tensor) -> torch.Tensor:
        """Luminance (N,) in [0, 255] -> R, G, B (N, 3) in [0, 255], from the tone's black to its white."""
        ramp = torch.linspace(0, 255, 1021, dtype=luminance.dtype)
        colors = self._colors(ramp)
        possible = ramp[((colors >= 0) & (colors <= 255)).all(1)]
        if len(possible):
            luminance = luminance.clamp(possible[0], possible[-1])
        return self._colors(luminance).clamp(0, 255)

    def _colors(self, luminance: torch.Tensor) -> torch.Tensor:
        inside = luminance.clamp(self.low, self.high)
        chroma = _legendre(inside) @ self.chroma + (luminance - inside)[:, None] * self.slope
        return luminance[:, None] + chroma


def find_tone(image: torch.Tensor) -> Tone | None:
    """Return the tone of an image (3, H, W) in [-1, 1], or None for one in colours.

    The chroma of a grey or toned image is a function of its luminance. JPEG and noise hide that in the single pixels,
    but not in the average of many: the residuals of a smooth fit cancel out within a cell, whereas the colours of
    skin, hair and clothes do not, however pale they are.
    """
    pixels = (image.detach().double().cpu() + 1) * 127.5
    luminance, chroma = _luminance_chroma(pixels)
    tone, slope = _fit(_legendre(luminance), chroma), _fit(_legendre(luminance)[:, :2], chroma)[1] / 127.5

    fitted = _legendre(luminance) @ tone
    residual = (chroma - fitted).T.reshape(image.shape)
    of_pixels, of_cells = _length(residual), _length(F.adaptive_avg_pool2d(residual, _CELLS))
    if of_cells > _CLEAN and (of_cells > _NOISY or of_cells > _NOISE * of_pixels):
        return None
    if _length(fitted.T) < _GREY:
        tone, slope = torch.zeros_like(tone), torch.zeros_like(slope)
    return Tone(tone, float(luminance.min()), float(luminance.max()), slope)


def _luminance_chroma(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) in [0, 255] -> luminance (HW,) and what the channels differ from it (HW, 3)."""
    pixels = pixels.flatten(1).T
    luminance = pixels @ LUMINANCE
    return luminance, pixels - luminance[:, None]


def _fit(basis: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    """Least squares, slightly damped: an image of one colour determines no curve."""
    damping = 1e-6 * len(basis) * torch.eye(basis.shape[1], dtype=basis.dtype)
    return torch.linalg.solve(basis.T @ basis + damping, basis.T @ chroma)


def keep_tone(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """`content` in the tone of `style` where that is grey or toned; images in colours are returned as they are.

    Both (B, 3, H, W) in [-1, 1]. Only the luminance of a toned image is taken from `content`.
    """
    _check_pair(content, style)
    return torch.stack([_toned(image, find_tone(own)) for image, own in zip(content, style, strict=True)])


def _toned(image: torch.Tensor, tone: Tone | None) -> torch.Tensor:
    if tone is None:
        return image
    luminance = torch.einsum("c,chw->hw", LUMINANCE, (image.double().cpu() + 1) * 127.5).clamp(0, 255)
    colors = tone.colors(luminance.flatten()).T.reshape(image.shape)
    return (colors / 127.5 - 1).clamp(-1, 1).to(image)


def _legendre(luminance: torch.Tensor) -> torch.Tensor:
    """Luminance (N,) in [0, 255] -> the Legendre polynomials of degree 0, 1, ... (N, degree + 1)."""
    x = luminance / 127.5 - 1
    columns = [torch.ones_like(x), x]
    for n in range(1, _DEGREE):
        columns.append(((2 * n + 1) * x * columns[n] - n * columns[n - 1]) / (n + 1))
    return torch.stack(columns, dim=1)


def _length(residual: torch.Tensor) -> float:
    """The root mean square of the lengths of the colour vectors (3, ...)."""
    return float(residual.square().sum(0).mean().sqrt())

"""Transfer the colours of one image to another: by wavelets (StableSR) or by mean and deviation (AdaIN).

Tensors are (B, 3, H, W), any range, any floating dtype; the computation runs in float32.
"""

import torch
import torch.nn.functional as F


def wavelet_decompose(x: torch.Tensor, levels: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Split x into a high and a low band, `high + low = x` (colour fix of StableSR, arXiv 2305.07015).

    x: (B, C, H, W). The low band is x smoothed `levels` times by the kernel [1, 2, 1] / 4 along both axes, dilated by
    1, 2, 4, ... pixels, with the border replicated; 5 levels smooth over about 2 * (2^5 - 1) + 1 = 63 pixels.
    """
    if x.ndim != 4:
        raise ValueError(f"`x` has to be (B, C, H, W) but is {tuple(x.shape)}")
    if levels < 1:
        raise ValueError(f"`levels` has to be at least 1 but is {levels}")
    low = x.float()
    for level in range(levels):
        low = _smooth(low, 2**level)
    return (x.float() - low).to(x.dtype), low.to(x.dtype)


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


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    return mean, (variance + 1e-5).sqrt()


def _check_pair(content: torch.Tensor, style: torch.Tensor) -> None:
    if content.shape != style.shape or content.ndim != 4:
        raise ValueError(
            "`content` and `style` have to be (B, C, H, W) of one shape but are"
            f" {tuple(content.shape)} and {tuple(style.shape)}: resize one to the other"
        )

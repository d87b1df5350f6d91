"""Metrics of image pairs (PSNR, SSIM, landmarks, LPIPS) and of folders (FID, KID), and statistics with 95% intervals.

Nothing is downloaded: where the weights of a metric are missing it raises `MetricUnavailable`, which names the file and
the command that gets it.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from faceprior.files import find_images
from faceprior.images import ImageSource, as_array, cv2, to_pixel_values

if TYPE_CHECKING:
    import torch

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + INCEPTION_FILE

_LPIPS_BACKBONES = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class MetricUnavailable(RuntimeError):
    """A number that cannot be measured on this machine; the message says what is missing and how to get it."""


# ---- image pairs


def psnr(a: ImageSource, b: ImageSource, luma: bool = False) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE); infinite for equal images.

    a, b: images of one size. The mean square error runs over all pixels and R, G, B as in the
    evaluation of GFP-GAN and CodeFormer; luma: over the Y channel of ITU-R BT.601 instead.
    """
    first, second = _pair(a, b, luma)
    mse = float(np.mean((first - second) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ssim(a: ImageSource, b: ImageSource, luma: bool = False) -> float:
    """Structural similarity (Wang et al. 2004, Eq. 13), 1 for equal images.

    a, b: images of one size, 11 px at least. Gaussian window of 11 px, sigma 1.5, K1 = .01, K2 = .03,
    range 255, only windows that lie inside the image; the mean over R, G, B as in the evaluation of
    GFP-GAN and CodeFormer, or, with luma, on the Y channel of ITU-R BT.601.
    """
    first, second = _pair(a, b, luma)
    if min(first.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of {SSIM_WINDOW} px at least but got {first.shape[:2]} (height, width)")
    mean_a, mean_b = _windowed(first), _windowed(second)
    variance_a = _windowed(first**2) - mean_a**2
    variance_b = _windowed(second**2) - mean_b**2
    covariance = _windowed(first * second) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(likeness.mean())


def _pair(a: ImageSource, b: ImageSource, luma: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return both images as (H, W, C) float64 in 0..255."""
    first, second = as_array(a), as_array(b)
    if first.shape != second.shape:
        raise ValueError(f"the images need one size but are {first.shape[:2]} and {second.shape[:2]} (height, width)")
    if luma:
        return _luma(first), _luma(second)
    return first.astype(np.float64), second.astype(np.float64)


def _luma(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, 1), Y of ITU-R BT.601 in 16..235."""
    return 16 + rgb.astype(np.float64) @ np.array([[65.481], [128.553], [24.966]]) / 255


def _windowed(x: np.ndarray) -> np.ndarray:
    """Return the Gaussian mean of every window inside the image, channel by channel."""
    smooth = cv2.GaussianBlur(x, (SSIM_WINDOW, SSIM_WINDOW), SSIM_SIGMA)
    edge = SSIM_WINDOW // 2
    return smooth[edge : x.shape[0] - edge, edge : x.shape[1] - edge]


def landmark_error(detected: np.ndarray, reference: np.ndarray) -> float:
    """Mean distance of five landmarks as a fraction of the reference's inter-ocular distance.

    detected, reference: (5, 2) pixels, in the order of `faceprior.detect.LANDMARK_NAMES`.
    """
    detected, reference = np.asarray(detected, np.float64), np.asarray(reference, np.float64)
    if detected.shape != (5, 2) or reference.shape != (5, 2):
        raise ValueError(f"landmarks have to be (5, 2) but are {detected.shape} and {reference.shape}")
    between_eyes = np.hypot(*(reference[1] - reference[0]))
    if not between_eyes > 0:
        raise ValueError("the reference landmarks have both eyes on one point")
    return float(np.hypot(*(detected - reference).T).mean() / between_eyes)


def lpips_distance(a: ImageSource, b: ImageSource, net: "str | torch.nn.Module" = "alex") -> float:
    """Learned perceptual distance (LPIPS 0.1, arXiv 1801.03924), 0 for equal images.

    a, b: images of one size. net: "alex" (the field's choice for reporting), "vgg", "squeeze", or an
    `lpips.LPIPS` module, on whose device the images are compared.

    Raises MetricUnavailable if torchvision's weights of the backbone are not in torch's cache.
    """
    import torch

    model = _lpips_model(net) if isinstance(net, str) else net
    device = next(model.parameters()).device
    with torch.no_grad():
        return float(model(to_pixel_values(a).to(device), to_pixel_values(b).to(device)))


@functools.cache
def _lpips_model(net: str) -> "torch.nn.Module":
    if net not in _LPIPS_BACKBONES:
        raise ValueError(f"`net` has to be one of {', '.join(_LPIPS_BACKBONES)} but is {net!r}")
    require_lpips(net)
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in the old way
        return lpips.LPIPS(net=net, verbose=False).requires_grad_(False)


def require_lpips(net: str = "alex") -> None:
    """Raise MetricUnavailable without the weights of an LPIPS network's backbone."""
    import torch
    import torchvision

    name = _LPIPS_BACKBONES[net]
    url = getattr(torchvision.models, name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        raise MetricUnavailable(
            f"LPIPS ({net}) needs {path}, which does not exist. With a network: `python -c 'from"
            f" torchvision.models import {name} as W; W.IMAGENET1K_V1.get_state_dict()'`, or download {url} to it"
        )


# ---- folders


def fid(
    folder_a: str | Path | Sequence[Path],
    folder_b: str | Path | Sequence[Path],
    extractor: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> float:
    """Frechet distance between the features of two folders or lists of images (FID, arXiv 1706.08500, Eq. 6).

    Settings: clean-fid (arXiv 2104.11222) in mode "clean": every image of the folder and its sub-folders, read by
    `load_image` as everything that is measured (upright, transparency over white, 8 bits), resized to 299x299 by PIL's
    antialiased bicubic filter without rounding; features of Inception V3 (2048 values, weights
    `inception-2015-12-05.pt`); sample covariances. Name the reference set under every FID, and compare only numbers of
    equally many images: below some thousand the value is biased upwards.

    extractor: another network, from pixels (B, 3, 299, 299) float32 in 0..255 on `device` to features (B,
    D), such as `features.tiny_fid_extractor`; the number is then no longer comparable with published FIDs.

    Raises MetricUnavailable if Inception is needed and its weights are not on the disk.
    """
    features = [folder_features(folder, extractor, device, batch_size) for folder in (folder_a, folder_b)]
    return frechet_distance(*features)


class SubsetMean(NamedTuple):
    """The mean over random subsets, and its standard deviation; None where all subsets are the whole set."""

    mean: float
    std: float | None


def kid(
    folder_a: str | Path | Sequence[Path],
    folder_b: str | Path | Sequence[Path],
    extractor: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> SubsetMean:
    """Kernel Inception distance of two folders or lists of images (KID, arXiv 1801.01401), on the features of `fid`.

    It has no bias in the number of images, as FID has, so that it is the one to read for few. Arguments and errors as
    for `fid`. See `kernel_distance`.
    """
    features = [folder_features(folder, extractor, device, batch_size) for folder in (folder_a, folder_b)]
    return kernel_distance(*features)


def kernel_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    partners: Sequence[int] | None = None,
) -> SubsetMean:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^3 of two sets of features (N, D), N >= 2.

    As clean-fid's: the mean over `subsets` random subsets of `subset_size` features of each set, or of the smaller
    set's number; drawn without replacement, by `seed`. partners: place in b of what each feature of a was made from, as
    a restored face of its reference, or -1; such pairs do not count. They are alike whatever the sets are, and would
    bring the value of a few images far below 0.
    """
    a, b = (np.asarray(features, np.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise ValueError(f"features have to be (N, D) and (M, D) with N, M >= 2 but are {a.shape} and {b.shape}")
    size, generator = min(len(a), len(b), subset_size), np.random.default_rng(seed)
    own = np.full(len(a), -1) if partners is None else np.asarray(partners)
    if len(a) == len(b) == size:  # every subset is the whole set
        return SubsetMean(_squared_mmd(a, b, own[:, None] != np.arange(len(b))), None)
    values = []
    for _ in range(subsets):
        i, j = (generator.choice(len(x), size, replace=False) for x in (a, b))
        values.append(_squared_mmd(a[i], b[j], own[i, None] != j))
    return SubsetMean(float(np.mean(values)), float(np.std(values)))


def kernel_influence(
    features: np.ndarray, references: np.ndarray, partners: Sequence[int] | None = None, block: int = 1000
) -> np.ndarray:
    """Return how much each of N features adds to `kernel_distance`, (N,) with mean 0; see `frechet_influence`.

    Twice its mean kernel with the others less that with the references, `partners` left out. block: features at once.
    """
    a, b = (np.asarray(x, np.float64) for x in (features, references))
    own, values = np.full(len(a), -1) if partners is None else np.asarray(partners), np.empty(len(a))
    for start in range(0, len(a), block):
        x = a[start : start + block]
        alone = (np.square(x).sum(1) / x.shape[1] + 1) ** 3
        within = (((x @ a.T / x.shape[1] + 1) ** 3).sum(1) - alone) / (len(a) - 1)
        across = np.zeros(len(x))
        for place in range(0, len(b), block):
            counts = own[start : start + block, None] != np.arange(place, min(place + block, len(b)))
            across += (((x @ b[place : place + block].T / x.shape[1] + 1) ** 3) * counts).sum(1)
        has_partner = own[start : start + block] >= 0
        values[start : start + block] = 2 * (within - across / (len(b) - has_partner))
    return values - values.mean()


def _squared_mmd(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> float:
    """The unbiased estimate (Gretton et al. 2012, Eq. 3) for two sets of equal number m.

    counts: (m, m), which pairs of both sets count; without those of one place it is their Eq. 4.
    """
    m, dimensions = a.shape
    within = sum(kernel.sum() - np.trace(kernel) for kernel in ((x @ x.T / dimensions + 1) ** 3 for x in (a, b)))
    return float(within / (m * (m - 1)) - 2 * ((a @ b.T / dimensions + 1) ** 3)[counts].mean())


def folder_features(
    folder: str | Path | Sequence[Path],
    extractor: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> np.ndarray:
    """Return the features (N, D) of all images of a folder or list; arguments and errors as for `fid`."""
    import torch
    from cleanfid.resize import build_resizer

    extractor = extractor or _inception(device)
    files = find_images(folder) if isinstance(folder, str | Path) else folder
    if len(files) < 2:
        raise ValueError(f"FID and KID need at least two images a folder, but {folder} holds {len(files)}")
    resize, features = build_resizer("clean"), []
    for start in range(0, len(files), batch_size):
        pixels = np.stack([resize(as_array(file)) for file in files[start : start + batch_size]])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)  # (B, 3, 299, 299) float32 in 0..255
        with torch.no_grad():
            features.append(extractor(batch).cpu().numpy())
    return np.concatenate(features)


@functools.cache
def _inception(device: str) -> "Callable[[torch.Tensor], torch.Tensor]":
    """Return clean-fid's Inception; the package keeps the weights in /tmp (on Windows in the current folder)."""
    import torch
    from cleanfid.features import build_feature_extractor

    require_inception()
    return build_feature_extractor("clean", device=torch.device(device), use_dataparallel=False)


def require_inception() -> None:
    """Raise MetricUnavailable without the weights of Inception V3 that FID and KID need."""
    import platform

    path = Path("./" if platform.system() == "Windows" else "/tmp", INCEPTION_FILE)
    if not path.is_file():
        raise MetricUnavailable(
            f"FID and KID need the Inception weights {path}, which do not exist. With a network:"
            f" `curl -L -o {path} {INCEPTION_URL}`"
        )


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets of features (N, D), N >= 2.

    With S = R^T R from the QR decomposition of the centred features, the trace of the root is the sum of
    the singular values of R_a R_b^T: no root of a nearly singular matrix is taken.
    """
    mean_a, _, root_a = _gaussian(features_a)
    mean_b, _, root_b = _gaussian(features_b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross)


def frechet_influence(features: np.ndarray, references: np.ndarray) -> tuple[float, np.ndarray]:
    """Return `frechet_distance`, and how much each of the N features adds to it: its influence, (N,) with mean 0.

    std(influence) / sqrt(N) is the distance's standard error over the images, with the references as they are (the
    infinitesimal jackknife; the limit law is that of Rippl, Munk and Sturm 2016), in one decomposition: 40 s for 5,000
    images of 2048 features on one core. The upward bias of few images is not in it. The derivative of the distance at
    x - m_a = d is 2 d . (m_a - m_b) + d . (I - T) d with the transport T S_a T = S_b. From X = sqrt(N - 1) Q R_a and
    R_a R_b^T = U s V^T follows d . T d = (N - 1) sum_k s_k (q . u_k)^2, without an inverse.
    """
    mean_a, columns, root_a = _gaussian(features, "reduced")
    mean_b, _, root_b = _gaussian(references)
    u, s, _ = np.linalg.svd(root_a @ root_b.T, full_matrices=False)
    centred = np.asarray(features, dtype=np.float64) - mean_a
    values = 2 * centred @ (mean_a - mean_b) + np.square(centred).sum(1)
    values -= (len(centred) - 1) * np.square(columns @ u) @ s
    distance = ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * s.sum()
    return float(distance), values - values.mean()


def _gaussian(features: np.ndarray, mode: Literal["r", "reduced"] = "r") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean (D,), Q (N, K), which is empty in the mode "r", and R (K, D): R^T R is the sample covariance.

    K: the lower one of N and D. sqrt(N - 1) Q R are the centred features.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have to be (N, D) with N >= 2 but are {features.shape}")
    mean = features.mean(0)
    made = np.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode=mode)
    return (mean, np.empty(0), made) if mode == "r" else (mean, *made)


# ---- statistics


class Interval(NamedTuple):
    """A mean and the half width of its 95% confidence interval."""

    mean: float
    half_width: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and the half width of its 95% interval, by Student's t distribution.

    half width = t(.975, n - 1) s / sqrt(n); infinite for one value. Raises ValueError for none or for NaN.
    """
    from scipy import stats

    numbers = _checked_values(values)
    if len(numbers) == 1:
        return Interval(float(numbers[0]), math.inf)
    error = numbers.std(ddof=1) / math.sqrt(len(numbers))
    return Interval(float(numbers.mean()), float(stats.t.ppf(0.975, len(numbers) - 1) * error))


@dataclass(frozen=True)
class PairedTest:
    """Paired t test of a against b: the mean of a - b, its 95% half width, the two-sided p value, n pairs."""

    mean_difference: float
    half_width: float
    p_value: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairedTest:
    """Test whether two methods differ on the same items, by Student's paired t test.

    a, b: one value per item, in the same order, two items at least. Where all
    differences are equal, p is 1 if they are zero, else 0.
    """
    from scipy import stats

    first, second = _checked_values(a), _checked_values(b)
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"a paired test needs two or more pairs but got {len(first)} and {len(second)} values")
    differences = first - second
    mean, half_width = mean_interval(differences)
    if half_width == 0:
        return PairedTest(mean, half_width, 1.0 if mean == 0 else 0.0, len(first))
    return PairedTest(mean, half_width, float(stats.ttest_rel(first, second).pvalue), len(first))


class FractionInterval(NamedTuple):
    """A fraction in [0, 1] and its 95% confidence interval; the fields are the keys of the scorer's report.json."""

    share: float
    low: float
    high: float


def fraction_interval(correct: Sequence[bool]) -> FractionInterval:
    """Return the fraction of True and its 95% interval (Wilson 1927), which lies within [0, 1]. ValueError for none."""
    from scipy import stats

    values = _checked_values(correct)
    interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return FractionInterval(float(values.mean()), float(interval.low), float(interval.high))


class CalibrationBin(NamedTuple):
    """Pairs of like margin: their number, mean |margin|, mean sigmoid(|margin|), and the fraction in correct order."""

    pairs: int
    margin: float
    expected: float
    right: float


class Calibration(NamedTuple):
    """expected_error: in [0, 1], 0 at best; bins: from the smallest margins to the largest."""

    expected_error: float
    bins: list[CalibrationBin]


def ranking_calibration(margins: Sequence[float], bins: int = 10) -> Calibration:
    """Measure whether pairs of margin m are in the correct order with probability sigmoid(|m|) (Face Score, Eq. 5).

    margins: s(good) - s(bad) of pairs that were not trained on; the order is correct above 0. Sorted by |m|, the
    pairs are split into `bins` groups of equal number, ten pairs in each at least. The expected calibration error (Guo
    et al. 2017, arXiv 1706.04599, Eq. 3) is the mean over the pairs of |fraction in order - mean sigmoid(|m|)| of their
    group.
    """
    values = _checked_values(margins)
    values = values[np.argsort(np.abs(values), kind="stable")]
    groups = np.array_split(values, min(bins, max(1, len(values) // 10)))
    found = [
        CalibrationBin(
            len(group),
            float(np.abs(group).mean()),
            float((1 / (1 + np.exp(-np.abs(group)))).mean()),
            float((group > 0).mean()),
        )
        for group in groups
    ]
    return Calibration(sum(b.pairs * abs(b.right - b.expected) for b in found) / len(values), found)


def _checked_values(values: Sequence[float]) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"values have to be a list of finite numbers, one at least, but are {values}")
    return numbers

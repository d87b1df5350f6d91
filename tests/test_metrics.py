import math
import statistics
import subprocess
import sys
import warnings

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from PIL import Image

from faceprior import metrics
from faceprior.metrics import (
    MetricUnavailable,
    fid,
    fraction_interval,
    frechet_distance,
    frechet_influence,
    kernel_distance,
    kernel_influence,
    kid,
    landmark_error,
    lpips_distance,
    mean_interval,
    paired_test,
    psnr,
    ranking_calibration,
    ssim,
)


@pytest.fixture(scope="module")
def pictures():
    """A photograph and the same with noise of sigma 20."""
    clean = skimage.data.astronaut()[:160, 140:300]
    noise = np.random.default_rng(0).normal(0, 20, clean.shape)
    return clean, np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


# --- images ---


def test_psnr_by_hand():
    """All pixels differ by 10 in one of three channels: MSE 100 / 3, PSNR 10 log10(3 * 255^2 / 100)."""
    a = np.zeros((4, 4, 3), np.uint8)
    b = a + np.array([10, 0, 0], np.uint8)
    assert psnr(a, b) == pytest.approx(10 * math.log10(3 * 255**2 / 100))
    assert psnr(a, a) == math.inf


def test_psnr_on_luma_by_hand():
    """Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255: 10 in green moves it by 5.0413."""
    a = np.zeros((4, 4, 3), np.uint8)
    b = a + np.array([0, 10, 0], np.uint8)
    assert psnr(a, b, luma=True) == pytest.approx(20 * math.log10(255 / (128.553 * 10 / 255)))


def test_psnr_and_ssim_agree_with_scikit_image(pictures):
    """scikit-image's Gaussian SSIM with population covariances is Wang's; it averages the same windows."""
    a, b = pictures
    assert psnr(a, b) == pytest.approx(skimage.metrics.peak_signal_noise_ratio(a, b))
    expected = skimage.metrics.structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_ssim_on_luma_agrees_with_scikit_image(pictures):
    from skimage.color import rgb2ycbcr

    a, b = pictures
    expected = skimage.metrics.structural_similarity(
        *(rgb2ycbcr(picture)[..., 0] for picture in (a, b)),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert ssim(a, b, luma=True) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_equal_and_of_tiny_images(pictures):
    assert ssim(pictures[0], pictures[0]) == pytest.approx(1)
    assert ssim(pictures[0][:11, :11], pictures[0][:11, :11]) == pytest.approx(1)
    with pytest.raises(ValueError, match="11 px"):
        ssim(pictures[0][:10], pictures[0][:10])


def test_images_of_any_kind(pictures, tmp_path):
    a, b = pictures
    Image.fromarray(a).save(tmp_path / "a.png")
    assert psnr(tmp_path / "a.png", Image.fromarray(b)) == psnr(a, b)
    with pytest.raises(ValueError, match="one size"):
        psnr(a, b[:-1])


def test_landmark_error_by_hand():
    """Eyes 10 apart; one landmark of five off by (3, 4), that is 5: 5 / 5 / 10 = 0.1."""
    reference = np.array([[0, 0], [10, 0], [5, 5], [2, 9], [8, 9]])
    detected = reference + np.array([[0, 0], [0, 0], [3, 4], [0, 0], [0, 0]])
    assert landmark_error(detected, reference) == pytest.approx(0.1)
    assert landmark_error(reference, reference) == 0
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        landmark_error(reference[:4], reference)
    with pytest.raises(ValueError, match="one point"):
        landmark_error(reference, np.ones((5, 2)))


# --- LPIPS ---


@pytest.fixture(scope="module")
def random_lpips():
    """The linear heads of the package on a random AlexNet."""
    import lpips

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in the old way
        return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)


def test_lpips_of_an_image_with_itself_is_zero(pictures, random_lpips):
    a, b = pictures
    assert lpips_distance(a, a, random_lpips) == 0
    assert lpips_distance(a, b, random_lpips) == pytest.approx(lpips_distance(b, a, random_lpips))
    assert lpips_distance(a, b, random_lpips) > 0


def test_lpips_takes_values_in_minus_one_to_one(pictures, random_lpips):
    """The same as the package's own call, which expects [-1, 1]."""
    a, b = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in pictures)
    with torch.no_grad():
        expected = random_lpips(a, b).item()
    assert lpips_distance(*pictures, random_lpips) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_without_weights_says_what_is_missing(pictures, tmp_path, monkeypatch, net):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics._lpips_model.cache_clear()
    with pytest.raises(MetricUnavailable, match=rf"LPIPS \({net}\).*{tmp_path}.*\.pth.*python -c"):
        lpips_distance(*pictures, net)
    assert not list(tmp_path.rglob("*.pth"))


def test_lpips_from_the_cache(pictures, tmp_path, monkeypatch):
    """With a file of the right name and shape in torch's cache the metric runs, without a network."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics._lpips_model.cache_clear()
    url = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    path = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    assert lpips_distance(*pictures, "squeeze") > 0
    metrics._lpips_model.cache_clear()


def test_lpips_knows_its_nets(pictures):
    with pytest.raises(ValueError, match="alex, vgg, squeeze"):
        lpips_distance(*pictures, "resnet")


# --- FID ---


def colour_statistics(pixel_values):
    """(B, 3, 299, 299) in 0..255 -> (B, 6): means and deviations of the channels."""
    assert pixel_values.shape[1:] == (3, 299, 299) and pixel_values.max() > 2
    return torch.cat([pixel_values.mean((2, 3)), pixel_values.std((2, 3))], dim=1)


def folder_of(path, seed, brightness=0):
    path.mkdir()
    generator = np.random.default_rng(seed)
    for i in range(12):
        values = generator.integers(0, 200, (1, 1, 3)) + generator.integers(0, 40, (16, 16, 3)) + brightness
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path / f"{i}.png")
    return path


def test_fid_of_a_folder_with_itself_is_zero(tmp_path):
    folder = folder_of(tmp_path / "a", 0)
    assert fid(folder, folder, colour_statistics) == pytest.approx(0, abs=1e-6)


def test_fid_grows_with_the_distance(tmp_path):
    a = folder_of(tmp_path / "a", 0)
    near, far = folder_of(tmp_path / "near", 0, brightness=2), folder_of(tmp_path / "far", 0, brightness=10)
    assert 0 < fid(a, near, colour_statistics) < fid(a, far, colour_statistics)


def test_fid_agrees_with_clean_fid(tmp_path):
    """Its features of the two folders, and Eq. 6 with scipy's matrix root."""
    from cleanfid.fid import get_folder_features
    from scipy.linalg import sqrtm

    folders = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 1)
    cpu = torch.device("cpu")
    x, y = (
        get_folder_features(str(folder), colour_statistics, num_workers=0, device=cpu, verbose=False)
        for folder in folders
    )
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert fid(*folders, colour_statistics) == pytest.approx(expected, rel=1e-5)


def test_fid_reads_as_everything_else_does(tmp_path):
    """Turned by EXIF, transparent, in 16 bits, under any suffix: the same images as upright RGB ones."""
    plain, odd = folder_of(tmp_path / "plain", 0), tmp_path / "odd"
    odd.mkdir()
    for path in sorted(plain.iterdir()):
        image = Image.open(path)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.rotate(90).save(odd / path.name, exif=exif)
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    cut = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    for folder in (plain, odd):
        grey.convert("RGB").save(folder / "grey.png")
        Image.new("RGB", (16, 16), "white").save(folder / "white.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(odd / "grey.png")
    cut.save(odd / "white.png")
    (odd / "white.png").rename(odd / "white")
    assert fid(plain, odd, colour_statistics) == pytest.approx(0, abs=1e-6)


def test_fid_needs_images(tmp_path):
    folder = folder_of(tmp_path / "a", 0)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match="at least two"):
        fid(folder, tmp_path / "one", colour_statistics)
    with pytest.raises(FileNotFoundError, match="gone"):
        fid(folder, tmp_path / "gone", colour_statistics)


def test_fid_without_inception_says_what_is_missing(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a", 0)
    monkeypatch.setattr(metrics, "INCEPTION_FILE", "no-such-inception.pt")
    metrics._inception.cache_clear()
    with pytest.raises(MetricUnavailable, match="no-such-inception.pt.*curl"):
        fid(folder, folder)


def test_frechet_distance_of_known_gaussians():
    """Two points +-s on each axis have covariance diag(2 s^2 / (n - 1)) exactly.

    In two dimensions n = 4: s = (3, 1) gives variances (6, 2/3), twice that s gives (24, 8/3). Means apart by
    (1, 2): 1 + 4 + (sqrt 24 - sqrt 6)^2 + (sqrt 8/3 - sqrt 2/3)^2 = 5 + 6 + 2/3.
    """
    a = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert frechet_distance(a, 2 * a + (1, 2)) == pytest.approx(5 + 6 + 2 / 3)


def test_frechet_distance_of_fewer_images_than_features():
    """Singular covariances: two one-dimensional clouds on orthogonal axes share nothing.

    Variances 2 s^2 = 2 and 8 on different axes: tr S_a + tr S_b = 10, the root of the product is 0.
    """
    a, b = np.zeros((2, 64)), np.zeros((2, 64))
    a[:, 3], b[:, 40] = (-1, 1), (-2, 2)
    assert frechet_distance(a, b) == pytest.approx(10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


# --- KID ---


def test_kid_by_hand():
    """Features (1, 1), (-1, 1) and (1, -1), (1, 1), D = 2: x . y / 2 + 1 is 1 within a, (1 - 1) / 2 + 1 = 1 within b.

    Between them the products are 0, 2, -2, 0, that is 1, 2, 0, 1, of which the cubes have the mean 10 / 4:
    1 + 1 - 2 * 2.5 = -3, which an unbiased estimate may be.
    """
    a, b = np.array([[1.0, 1], [-1, 1]]), np.array([[1.0, -1], [1, 1]])
    assert kernel_distance(a, b) == (-3, None)


def test_kid_agrees_with_clean_fid():
    """Sets of one size below 1000 are one subset there, too."""
    from cleanfid.fid import kernel_distance as expected

    x, y = np.random.default_rng(0).normal(size=(2, 60, 16)) + np.array([0, 0.3])[:, None, None]
    assert kernel_distance(x, y).mean == pytest.approx(expected(x, y, num_subsets=3), rel=1e-6)


def test_kid_of_subsets_is_that_of_the_sets():
    """The mean of 100 subsets of 50 within three standard errors (std / 10) of the whole sets' value."""
    x, y = np.random.default_rng(1).normal(size=(2, 400, 8)) + np.array([0, 0.5])[:, None, None]
    mean, std = kernel_distance(x, y, subset_size=50)
    whole, none = kernel_distance(x, y)
    assert none is None and std > 0 and abs(mean - whole) < 3 * std / 10
    assert kernel_distance(x, y, subset_size=50) == (mean, std) != kernel_distance(x, y, subset_size=50, seed=1)
    with pytest.raises(ValueError, match="N, M >= 2"):
        kernel_distance(x, y[:1])


def test_kid_of_restored_faces_leaves_each_one_s_own_reference_out():
    """Faces that are their references are at 0; with the pairs of like ones it is below 0, the lower the fewer."""
    x = np.random.default_rng(2).normal(size=(8, 4)) + 1
    assert kernel_distance(x, x, partners=range(8)).mean == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, x).mean < -0.1
    shuffled = np.random.default_rng(3).permutation(8)
    near = x + 0.1
    expected = kernel_distance(near, x, partners=range(8))
    assert kernel_distance(near, x[shuffled], partners=np.argsort(shuffled)).mean == pytest.approx(expected.mean)
    whole = kernel_influence(near, x, partners=range(8))
    np.testing.assert_allclose(kernel_influence(near, x, partners=range(8), block=3), whole)
    mean, std = kernel_distance(near, x, subset_size=4, partners=range(8))
    assert abs(mean - expected.mean) < 3 * std / 10


def test_kid_of_folders(tmp_path):
    a = folder_of(tmp_path / "a", 0)
    near, far = folder_of(tmp_path / "near", 0, brightness=2), folder_of(tmp_path / "far", 0, brightness=10)
    assert kid(a, near, colour_statistics).mean < kid(a, far, colour_statistics).mean


# --- the influence of each image ---


def two_sets(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features whose deviations fall as 1 / sqrt(k), as those of images do."""
    generator, spread = np.random.default_rng(seed), np.arange(1, d + 1) ** -0.5
    return generator.normal(size=(n, d)) * spread + 0.2, generator.normal(size=(500, d)) * 1.2 * spread


@pytest.mark.parametrize("kind", ["fid", "kid"])
def test_the_influence_is_what_leaving_an_image_out_changes(kind):
    """(N - 1) (value of all - value without i): of 400 images the same but for terms of the order of 1 / N."""
    x, y = two_sets(400, 6, 0)
    within, across = ((x @ other.T / 6 + 1) ** 3 for other in (x, y))

    def value(keep: np.ndarray) -> float:
        """FID, or the unbiased squared MMD but for its part of the references alone."""
        if kind == "fid":
            return frechet_distance(x[keep], y)
        own = within[np.ix_(keep, keep)]
        return (own.sum() - np.trace(own)) / (len(keep) * (len(keep) - 1)) - 2 * across[keep].mean()

    influence = frechet_influence(x, y)[1] if kind == "fid" else kernel_influence(x, y)
    assert frechet_influence(x, y)[0] == pytest.approx(frechet_distance(x, y))
    assert influence.shape == (400,) and influence.mean() == pytest.approx(0, abs=1e-9)
    everything, some = np.arange(400), range(0, 400, 8)
    left_out = np.array([399 * (value(everything) - value(np.delete(everything, i))) for i in some])
    assert np.corrcoef(influence[::8], left_out)[0, 1] > 0.999
    assert np.abs(influence[::8] - left_out).max() < 0.2 * influence.std()


@pytest.mark.parametrize(("n", "d"), [(60, 24), (20, 32)])
def test_the_error_of_fid_is_that_of_new_images(n, d):
    """std / sqrt(N) beside the deviation over 200 new sets: below 25% apart, with fewer images than features, too."""
    values, errors = [], []
    for seed in range(200):
        x, y = two_sets(n, d, seed)[0], two_sets(2, d, 9)[1]
        value, influence = frechet_influence(x, y)
        values.append(value)
        errors.append(influence.std(ddof=1) / math.sqrt(n))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


# --- how sure ---


def test_mean_interval_by_hand():
    """1, 2, 3, 4, 5: mean 3, s^2 = 10 / 4; t(.975, 4) = 2.776 (tables): 2.776 sqrt(2.5 / 5) = 1.963."""
    interval = mean_interval([1, 2, 3, 4, 5])
    assert interval.mean == 3
    assert interval.half_width == pytest.approx(1.963, abs=1e-3)
    assert mean_interval([2.0, 2.0]) == (2.0, 0.0)
    assert mean_interval([7]) == (7.0, math.inf)


def test_mean_interval_covers_the_mean_in_95_of_100_cases():
    """2000 samples of 5 normal values: 95% +- 3 sqrt(.95 * .05 / 2000) = 1.5%."""
    samples = np.random.default_rng(0).normal(3, 2, (2000, 5))
    intervals = [mean_interval(sample) for sample in samples]
    covered = statistics.mean(abs(mean - 3) <= half_width for mean, half_width in intervals)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t = 2 sqrt 3 at 2 degrees of freedom.

    There p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14); half width t(.975, 2) / sqrt 3 = 4.303 / 1.732.
    """
    result = paired_test([2, 4, 6], [1, 2, 3])
    assert result.mean_difference == 2 and result.n == 3
    assert result.p_value == pytest.approx(1 - math.sqrt(12 / 14))
    assert result.half_width == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert paired_test([1, 2, 3], [2, 4, 6]).mean_difference == -2


def test_paired_test_without_spread():
    assert paired_test([1, 2], [1, 2]).p_value == 1
    assert paired_test([1, 2], [0, 1]).p_value == 0
    assert paired_test([1, 2], [0, 1]).to_dict()["mean_difference"] == 1


@pytest.mark.parametrize("values", [[], [1, math.nan], [[1, 2]], [math.inf, 1]])
def test_values_have_to_be_numbers(values):
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_pairs_have_to_be_pairs():
    for a, b in (([1], [2]), ([1, 2], [1, 2, 3])):
        with pytest.raises(ValueError, match="pairs"):
            paired_test(a, b)


def test_importing_metrics_loads_no_torch():
    code = "import sys, faceprior.metrics; assert not {'torch', 'scipy', 'lpips'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- shares and margins ---


def test_a_share_by_hand():
    """8 of 10, z = 1.96: the middle is (.8 + z^2 / 20) / (1 + z^2 / 10), the half width as in Wilson's formula."""
    z = statistics.NormalDist().inv_cdf(0.975)
    middle = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert fraction_interval([True] * 8 + [False] * 2) == pytest.approx((0.8, middle - half, middle + half))
    share, low, high = fraction_interval(np.array([True]))
    assert (share, high) == (1, 1) and 0.1 < low < 0.3
    with pytest.raises(ValueError, match="one at least"):
        fraction_interval([])


def test_calibration_by_hand():
    """Ten pairs a margin apart of ln 3 (sigmoid 3/4), six in order, and ten of ln 9 (9/10), all in order.

    The groups are .15 and .1 off, so the error is .125; a tie is no right order.
    """
    small, large = math.log(3), math.log(9)
    error, bins = ranking_calibration([small] * 6 + [large] * 10 + [-small] * 4)
    assert error == pytest.approx(0.125)
    assert bins[0] == pytest.approx((10, small, 0.75, 0.6)) and bins[1] == pytest.approx((10, large, 0.9, 1.0))
    assert ranking_calibration([0.0]) == (0.5, [(1, 0, 0.5, 0)])


def test_margins_that_are_probabilities_are_calibrated():
    """50,000 pairs drawn in order with the probability sigmoid(|m|): the error is that of chance, below a hundredth."""
    rng = np.random.default_rng(0)
    sizes = rng.exponential(1.5, 50_000)
    margins = np.where(rng.random(50_000) < 1 / (1 + np.exp(-sizes)), sizes, -sizes)
    error, bins = ranking_calibration(margins)
    assert error < 0.01 and [b.pairs for b in bins] == [5000] * 10
    assert ranking_calibration(3 * margins).expected_error > 0.05  # too sure of itself

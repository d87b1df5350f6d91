"""Every formula that is trained on, by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from faceprior.diffusion import pred_original_sample, training_target
from faceprior.losses import (
    discriminator_loss,
    dpo_loss,
    facial_loss,
    generator_loss,
    gram_matrix,
    guidance_loss,
    min_snr_weight,
    noise_loss,
    normalized_time,
    pairwise_ranking_loss,
    reward_loss,
    squared_error,
    step_weights,
    style_distance,
    time_weight,
)


def test_ranking_loss_by_hand():
    """Margins 0, ln 3, -ln 3 give sigmoid 1/2, 3/4, 1/4; the mean of their -log."""
    good, bad = torch.tensor([1.0, math.log(3), 2.0]), torch.tensor([1.0, 0.0, 2 + math.log(3)])
    expected = -torch.tensor([0.5, 0.75, 0.25]).log().mean()
    torch.testing.assert_close(pairwise_ranking_loss(good, bad), expected)


def test_ranking_loss_of_large_margins():
    """-log sigmoid(-m) tends to m: no overflow in float32, and none from float16 rewards."""
    assert pairwise_ranking_loss(torch.tensor([0.0]), torch.tensor([500.0])).item() == 500
    assert pairwise_ranking_loss(torch.tensor([500.0]), torch.tensor([0.0])).item() == 0
    half = pairwise_ranking_loss(torch.tensor([-6e4], dtype=torch.float16), torch.tensor([6e4], dtype=torch.float16))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(12e4, rel=1e-3)


def test_ranking_loss_pulls_the_sides_apart():
    """d/dgood of -log sigmoid(good - bad) is -(1 - sigmoid), at margin ln 3: -1/4; for bad the opposite."""
    good, bad = torch.tensor([math.log(3)], requires_grad=True), torch.zeros(1, requires_grad=True)
    pairwise_ranking_loss(good, bad).backward()
    torch.testing.assert_close(good.grad, torch.tensor([-0.25]))
    torch.testing.assert_close(bad.grad, torch.tensor([0.25]))


def test_guidance_loss_by_hand():
    """One sample, two channels, a row of two cells, the mask 1 and 1/2.

    The differences 2, 4 and 6, 8 of the two channels become 2, 2 and 6, 4 under the mask: (4 + 4 + 36 + 16) / 4 = 15.
    """
    target = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    prediction = torch.tensor([[[[3.0, 5.0]], [[6.0, 8.0]]]])
    mask = torch.tensor([[[[1.0, 0.5]]]])
    assert guidance_loss(target, prediction, mask).item() == 15


def test_guidance_loss_sees_the_face_only_and_leaves_the_target():
    target, prediction = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2))
    mask = torch.zeros(2, 1, 3, 3)
    mask[..., 1, 1] = 1
    guidance_loss(target, prediction, mask).backward()
    assert target.grad is None
    touched = prediction.grad.abs().sum(dim=(0, 1)) > 0
    assert touched.int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_guidance_loss_takes_another_distance():
    """The l1 distance of 0 and 2 under a mask of one is 2; the distance sees float32."""

    def l1(a, b, mask):
        assert a.dtype == b.dtype == torch.float32
        return (mask * (a - b)).abs().mean()

    latents = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float16)
    assert guidance_loss(torch.zeros_like(latents), latents, torch.ones(1, 1, 1, 1, dtype=torch.bool), l1).item() == 2


def test_guidance_loss_weighs_faces_by_their_area():
    """The same difference of 3 on 1 and on 4 of 16 cells: 9 / 16 and 4 x 9 / 16."""
    for cells, expected in ((1, 9 / 16), (4, 36 / 16)):
        mask = torch.zeros(1, 1, 1, 16)
        mask[..., :cells] = 1
        latents = torch.zeros(1, 2, 1, 16)
        assert guidance_loss(latents, latents + 3, mask).item() == pytest.approx(expected)


def test_dpo_loss_by_hand():
    """beta 4: the gains on good are 1 and 0, those on bad 1 - ln(3)/2 and ln(3)/2.

    So the margins are ln(3)/2 and -ln(3)/2, times beta / 2: ln 3 and -ln 3, whose sigmoids are 3/4 and 1/4.
    """
    half = math.log(3) / 2
    original = torch.tensor([2.0, 2.0])
    loss = dpo_loss(torch.tensor([1.0, 2.0]), torch.tensor([1 + half, 2 - half]), original, original, beta=4.0)
    torch.testing.assert_close(loss, -torch.tensor([0.75, 0.25]).log().mean())


def test_dpo_loss_of_the_original_model_is_ln_2():
    """Whatever the two sides' errors are; the gradient lowers the good side's error and raises the bad one's.

    d/de of -log sigmoid at 0 is beta / 4, over two pairs beta / 8; the original's errors get no gradient.
    """
    good, bad = torch.tensor([0.3, 1.0], requires_grad=True), torch.tensor([0.1, 2.0], requires_grad=True)
    original = [side.detach().clone().requires_grad_() for side in (good, bad)]
    loss = dpo_loss(good, bad, *original, beta=8.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert good.grad.tolist() == [1.0, 1.0] and bad.grad.tolist() == [-1.0, -1.0]
    assert all(error.grad is None for error in original)


def test_squared_error_by_hand():
    """Differences 1, 3 of the one sample and 0, 2 of the other: 10 / 2 and 4 / 2, in float32."""
    model_pred = torch.tensor([[2.0, 0.0], [1.0, 4.0]], dtype=torch.bfloat16).view(2, 2, 1, 1)
    target = torch.tensor([[1.0, 3.0], [1.0, 2.0]]).view(2, 2, 1, 1)
    error = squared_error(model_pred, target)
    assert error.tolist() == [5.0, 2.0] and error.dtype == torch.float32


def test_reward_loss_by_hand():
    """Rewards 1 and 4 of three images: -5 / 2, with -1 / 2 as their gradient; without any reward 0, with gradient 0."""
    rewards = torch.tensor([1.0, math.nan, 4.0], requires_grad=True)
    loss = reward_loss(rewards)
    loss.backward()
    assert loss.item() == -2.5 and rewards.grad.tolist() == [-0.5, 0.0, -0.5]
    none = torch.tensor([math.nan], requires_grad=True)
    reward_loss(none).backward()
    assert reward_loss(none).item() == 0 and none.grad.tolist() == [0.0]


def test_noise_loss_by_hand():
    """Differences 1 and 3: (1 + 9) / 2 = 5, in float32 whatever the network ran in."""
    loss = noise_loss(torch.tensor([2.0, 0.0], dtype=torch.bfloat16), torch.tensor([1.0, 3.0]))
    assert loss.item() == 5 and loss.dtype == torch.float32


def test_noise_loss_with_weights_by_hand():
    """Errors (1 + 9) / 2 = 5 and (4 + 4) / 2 = 4 with weights 1/5 and 1: (1 + 4) / 2."""
    model_pred = torch.tensor([[1.0, 3.0], [2.0, -2.0]]).view(2, 1, 1, 2)
    assert noise_loss(model_pred, torch.zeros(2, 1, 1, 2), torch.tensor([0.2, 1.0])).item() == 2.5


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("epsilon", [1.0, 1.0, 1.0, 0.5]),  # min(SNR, 5) / SNR; at SNR 0 its limit
        ("v_prediction", [0.0, 1 / 4, 1 / 2, 5 / 11]),  # min(SNR, 5) / (SNR + 1)
        ("sample", [0.0, 1 / 3, 1.0, 5.0]),  # min(SNR, 5)
    ],
)
def test_min_snr_weights_by_hand(kind, weights):
    """alpha_bar 0, 1/4, 1/2 and 10/11 are SNR 0, 1/3, 1 and 10."""
    alpha_bar = torch.tensor([0.0, 1 / 4, 1 / 2, 10 / 11])
    torch.testing.assert_close(min_snr_weight(alpha_bar, kind, gamma=5.0), torch.tensor(weights))


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_every_prediction_as_its_x0(kind, gamma):
    """w ||target - prediction||^2 = min(SNR, gamma) ||x_0 - x_0 of the prediction||^2, by diffusers' scheduler."""
    scheduler = DDPMScheduler(prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    latents, noise, error = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(3))
    timesteps = torch.tensor([10, 200, 500, 900])
    target = training_target(scheduler, latents, noise, timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    found = pred_original_sample(scheduler, target + error, timesteps, noisy)
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma) * squared_error(found, latents)
    loss = noise_loss(target + error, target, min_snr_weight(alpha_bar, kind, gamma))
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-3, atol=0)


def test_min_snr_of_flow_matching_is_refused():
    with pytest.raises(ValueError, match="of epsilon, v_prediction and sample, but the prediction is flow_prediction"):
        min_snr_weight(torch.tensor([0.5]), "flow_prediction")


def test_normalized_time_by_hand():
    """(t + 1/2) / T: 0, 1, 3 of 4 are 1/8, 3/8, 7/8; both ends keep a finite logit."""
    assert normalized_time(torch.tensor([0, 1, 3]), 4).tolist() == [0.125, 0.375, 0.875]
    assert time_weight(normalized_time(torch.tensor([0, 999]), 1000)).isfinite().all()


def test_time_weight_by_hand():
    """w(t) = exp(-(ln(t / (1 - t)) + 1/2)^2 / 2) / sqrt(2 pi), 1 / sqrt(2 pi) = .3989.

    t = .5:   logit 0,       exp(-.125)             = .8825, w = .352
    t = .32:  logit -.7538,  exp(-.2538^2 / 2)      = .9683, w = .386
    t = .061: logit -2.7340, exp(-2.2340^2 / 2)     = .0825, w = .033
    t = .9:   logit 2.1972,  exp(-2.6972^2 / 2)     = .0263, w = .0105 (the specification rounds it to .011)
    """
    weights = time_weight(torch.tensor([0.5, 0.32, 0.061, 0.9]))
    torch.testing.assert_close(weights, torch.tensor([0.352, 0.386, 0.033, 0.0105]), rtol=0, atol=5e-4)
    for t, weight in zip((0.5, 0.32, 0.061, 0.9), weights.tolist(), strict=True):
        logit = math.log(t) - math.log1p(-t)
        assert weight == pytest.approx(math.exp(-((logit + 0.5) ** 2) / 2) / math.sqrt(2 * math.pi), rel=1e-5)


@pytest.mark.parametrize(("m", "s"), [(-0.5, 1.0), (0.0, 1.0), (0.5, 1.0), (-0.5, 0.5)])
def test_time_weight_peaks_at_sigmoid_of_m(m, s):
    """There the exponent is 0, and w = 1 / (s sqrt(2 pi)); the paper's ablations. For m = -1/2 it is at t = .3775."""
    peak = 1 / (1 + math.exp(-m))
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    weights = time_weight(t, m, s)
    assert abs(t[weights.argmax()].item() - peak) <= 0.001
    assert time_weight(torch.tensor(peak), m, s).item() == pytest.approx(1 / (s * math.sqrt(2 * math.pi)), rel=1e-5)
    assert (weights.diff()[t[1:] <= peak] > 0).all() and (weights.diff()[t[:-1] >= peak] < 0).all()


def test_step_weights_by_hand():
    """Of four steps, t is 1/8, 3/8, 5/8, 7/8; the constant is their mean, so both weigh alike over a training."""
    expected = time_weight(torch.tensor([0.125, 0.375, 0.625, 0.875]), 0.5, 2.0)
    torch.testing.assert_close(step_weights(4, 0.5, 2.0), expected)
    torch.testing.assert_close(step_weights(4, 0.5, 2.0, constant=True), expected.mean().expand(4))


def test_gram_matrix_by_hand():
    """Channels (1, 2) and (3, 4) on one row of two cells: products 5, 11, 25 over C H W = 4."""
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    expected = torch.tensor([[[5.0, 11.0], [11.0, 25.0]]]) / 4
    assert torch.equal(gram_matrix(features), expected)
    assert torch.equal(gram_matrix(features.flip(3)), expected)  # wherever the channels respond
    assert gram_matrix(features.bfloat16()).dtype == torch.float32


def test_style_distance_by_hand():
    """Against zeros the mean entry of the Gram matrix: 52 / 4 / 4 = 3.25; half of it for the fine level, whole for the
    coarse one, whose features are twice as large, so that its Gram matrix is four times: 1.625 + 13."""
    fine = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    levels, zeros = (fine, 2 * fine), (torch.zeros_like(fine),) * 2
    assert style_distance(levels, zeros).tolist() == [1.625 + 13]
    assert style_distance(zeros, levels).tolist() == [1.625 + 13]
    assert style_distance(levels, levels).tolist() == [0]


def test_style_distance_is_per_sample_and_leaves_the_target():
    features, targets = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    both = style_distance([features], [targets], [1.0])
    assert both.shape == (2,)
    both[0].backward()
    assert targets.grad is None
    assert features.grad[0].abs().sum() > 0 and features.grad[1].abs().sum() == 0


def test_losses_of_the_two_sides_by_hand():
    """softplus(0) = ln 2, softplus(-ln 3) = ln 4/3, softplus(ln 3) = ln 4.

    Fake logits 0 and ln 3: the generator wants them high, (ln 2 + ln 4/3) / 2; the discriminator low,
    (ln 2 + ln 4) / 2, and real logits ln 3 high, ln 4/3.
    """
    fake, real = torch.tensor([[0.0, math.log(3)]]), torch.full((1, 2), math.log(3))
    assert generator_loss(fake).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    expected = math.log(4 / 3) + (math.log(2) + math.log(4)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_facial_loss_by_hand():
    """0.5 (2 * 3 + 10 * 0.1) = 3.5 and 0.25 (2 * 1 + 10 * 0.2) = 1; their mean."""
    weight, adversarial, style = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 1.0]), torch.tensor([0.1, 0.2])
    torch.testing.assert_close(facial_loss(weight, adversarial, style, 2.0, 10.0), torch.tensor(2.25))

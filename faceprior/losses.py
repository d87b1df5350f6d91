"""Every formula that is trained on, in float32 whatever dtype the network ran in.

Face Score (arXiv 2406.17100): `pairwise_ranking_loss` (Eq. 5, stage 2), `guidance_loss` (Eq. 7, stage 4). Beside it in
stage 4: `dpo_loss` (Diffusion-DPO, arXiv 2311.12908) and `reward_loss` (DRaFT, arXiv 2309.17400).
AuthFace (arXiv 2410.09864): `noise_loss` (Eq. 1, stages 5 and 6), and the facial feature loss of stage 6, whose text at
hand breaks off before Eqs. 2 to 5: `time_weight` is Eq. 3, the others follow GFP-GAN (arXiv 2101.04061). Not in the
paper: `min_snr_weight` of stage 5 (arXiv 2303.09556).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_ranking_loss(good: Tensor, bad: Tensor) -> Tensor:
    """-log sigmoid(s(good) - s(bad)), averaged over the pairs (Face Score, Eq. 5).

    good, bad: (B,) rewards of the two sides of each pair.
    """
    return -F.logsigmoid(good.float() - bad.float()).mean()


def masked_l2(target: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """||m o z_good - m o z_bad||^2 / (B C H W): the l2 distance of Face Score's Eq. 7; arguments as of `guidance_loss`.

    The paper does not print the norm's scale. The sum over the face is divided by the size of the whole frame, a
    constant, which Adam's steps hardly depend on, as Eq. 7 applies d to whole masked frames. So faces count by their
    area, and small ones less; the mean over each face would weigh them alike, which Eq. 7 does not say.
    """
    return F.mse_loss(mask * prediction, mask * target)


def guidance_loss(
    target: Tensor,
    prediction: Tensor,
    mask: Tensor,
    distance: Callable[[Tensor, Tensor, Tensor], Tensor] = masked_l2,
) -> Tensor:
    """d(m o z_good, m o z_bad): distance of a bad face's denoised latents from the good one's (Face Score, Eq. 7).

    target: (B, C, H, W), x0 of the good image as the original model predicts it, no gradient; prediction: the same
    shape, x0 of the bad image as the trained model predicts it; mask: (B, 1, H, W) in [0, 1], the face on the latent
    grid; distance: takes the three of them in float32 and applies the mask, the paper's l2 by default.
    """
    return distance(target.float().detach(), prediction.float(), mask.float())


def noise_loss(model_pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """||e - e_theta||^2, mean squared error of the predicted noise (AuthFace, Eq. 1; DDPM, Eq. 14).

    model_pred, target: (B, C, H, W). With a v-prediction model the target is the velocity. weight: (B,), of each
    sample's error, see `min_snr_weight`.
    """
    if weight is None:
        return F.mse_loss(model_pred.float(), target.float())
    return (weight * squared_error(model_pred, target)).mean()


def min_snr_weight(alpha_bar: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight of a sample's loss at its timestep (Hang et al., arXiv 2303.09556, section 3.4) -> as alpha_bar.

    alpha_bar: any shape, [0, 1), with SNR = alpha_bar / (1 - alpha_bar); gamma: limit of the weight, the paper's is 5.
    The loss on x_0 is weighted by min(SNR, gamma); the others are that loss times a factor, by which it is divided:

        sample        ||x_0 - x||^2                              min(SNR, gamma)
        epsilon       ||e - e_theta||^2 = SNR ||x_0 - x||^2      min(SNR, gamma) / SNR = min(1, gamma / SNR)
        v_prediction  ||v - v_theta||^2 = (SNR + 1) ||...||^2    min(SNR, gamma) / (SNR + 1)

    At zero SNR, where noise says nothing of x_0, epsilon's is its limit, 1. Raises ValueError for another prediction.
    """
    snr = alpha_bar.float() / (1 - alpha_bar.float())
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    raise ValueError(
        f"min-SNR weights are of epsilon, v_prediction and sample, but the prediction is {prediction_type}"
    )


def dpo_loss(good: Tensor, bad: Tensor, original_good: Tensor, original_bad: Tensor, beta: float = 2000.0) -> Tensor:
    """-log sigmoid(beta / 2 ((o_good - e_good) - (o_bad - e_bad))), averaged over the pairs (Diffusion-DPO, Eq. 14).

    good, bad: (B,) squared errors e of the trained model on the two sides, see `squared_error`; original_good,
    original_bad: o, those of the original model, no gradient. The loss falls as the trained model becomes better than
    the original at denoising the good side, by more than at denoising the bad one (arXiv 2311.12908).

    beta: strength of the pull to the original model, the paper's is 2000 for Stable Diffusion 1.5 and 5000 for SDXL.
    As in the authors' code, errors are means over the latents, and beta stands for the equation's 2 beta T w(lambda),
    with a constant w.
    """
    gain = (original_good - original_bad).detach().float() - (good.float() - bad.float())
    return -F.logsigmoid(0.5 * beta * gain).mean()


def squared_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """||e - e_theta||^2 / (C H W) of each sample: (B, C, H, W) each -> (B,)."""
    return (model_pred.float() - target.float()).square().mean(dim=(1, 2, 3))


def reward_loss(rewards: Tensor) -> Tensor:
    """-r(x), averaged over the images that have a reward (DRaFT, arXiv 2309.17400, Eq. 1); 0 if none has.

    rewards: (B,), NaN where there is none.
    """
    has = ~rewards.isnan()
    return -rewards.float()[has].sum() / has.sum().clamp(min=1)


def normalized_time(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """Map discrete timesteps 0..T-1 to the middle of their step in (0, 1), 0 = clean.

    The paper writes t in (0, 1) and does not say how the steps map to it; the middle keeps logit(t) finite.
    """
    return (timesteps.float() + 0.5) / num_train_timesteps


def time_weight(t: Tensor, m: float = -0.5, s: float = 1.0) -> Tensor:
    """Weight of the facial feature loss over time: a normal density of logit(t) (AuthFace, Eq. 3).

    w(t) = exp(-(logit(t) - m)^2 / (2 s^2)) / (s sqrt(2 pi)); t: any shape, in (0, 1), 0 = clean. The peak is at
    t = sigmoid(m), 0.378 for the paper's m = -0.5 (it states 0.37); the density of a logit-normal variable, which has
    another factor 1 / (t (1 - t)), would peak at 0.28 and is not what the paper describes.
    """
    logit = torch.log(t / (1 - t))
    return torch.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))


def step_weights(num_train_timesteps: int, m: float = -0.5, s: float = 1.0, constant: bool = False) -> Tensor:
    """Return `time_weight` of every discrete timestep, (T,); constant: their mean at each of them.

    The paper's ablation (Table 2, "Const.") does not say which constant. The mean gives the loss the same weight over a
    training that draws its timesteps evenly, so that the two differ in time only.
    """
    weights = time_weight(normalized_time(torch.arange(num_train_timesteps), num_train_timesteps), m, s)
    return weights.mean().expand(num_train_timesteps) if constant else weights


def gram_matrix(features: Tensor) -> Tensor:
    """F F^T / (C H W): (B, C, H, W) -> (B, C, C), correlations of the channels over all places (Gatys et al., 2016)."""
    flat = features.float().flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def style_distance(
    features: Sequence[Tensor], target_features: Sequence[Tensor], level_weights: Sequence[float] = (0.5, 1.0)
) -> Tensor:
    """Mean absolute difference of the Gram matrices, weighted over the levels -> (B,) (GFP-GAN).

    features, target_features: one (B, C, H, W) per level, from fine to coarse; the targets get no gradient;
    level_weights: those of GFP-GAN's code.
    """
    levels = zip(features, target_features, level_weights, strict=True)
    return sum(w * (gram_matrix(a) - gram_matrix(b.detach())).abs().mean(dim=(1, 2)) for a, b, w in levels)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """softplus(-D(fake)), averaged over each sample's logits (B, ...) -> (B,), as in GFP-GAN's code."""
    return F.softplus(-fake_logits.float()).flatten(1).mean(dim=1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy of real as 1 and fake as 0, summed over both: (B, ...) each -> (B,)."""
    return generator_loss(real_logits) + generator_loss(-fake_logits)


def facial_loss(
    weight: Tensor, adversarial: Tensor, style: Tensor, lambda_d: float = 1.0, lambda_s: float = 200.0
) -> Tensor:
    """w(t) (lambda_d adversarial + lambda_s style), averaged over the batch (AuthFace, Eqs. 2 to 5, reconstructed).

    weight: (B,), w(t) of every sample's timestep; adversarial, style: (B,), summed over left eye, right eye and mouth;
    lambda_d, lambda_s: GFP-GAN's by default, as AuthFace's are not published. With these the noise loss of the tiny
    ControlNet rose, so stage 6's defaults are smaller, lambda_d most: the adversarial part brought restored eyes and
    mouths no closer to the clean ones, the style part did.
    """
    return (weight * (lambda_d * adversarial + lambda_s * style)).mean()

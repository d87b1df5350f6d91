"""The Face Score as a reward of predicted faces: at small t only, held to the clean face's structure, and watched."""

import pytest
import torch

from faceprior import tiny
from faceprior.detect import Face
from faceprior.restoration_reward import STRUCTURE_SIDE, RestorationReward, structure_distance
from faceprior.reward_tuning import FaceReward


def whole(image):
    return [Face((0, 0, image.shape[1], image.shape[0]), None, 1.0)]


@pytest.fixture(scope="module")
def reward():
    vae = tiny.tiny_sdxl().vae.requires_grad_(False)
    return RestorationReward(FaceReward(tiny.tiny_scorer(), whole, weight=0.5), vae, t_end=0.3, structure=2.0)


def latents(seed, count=3):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_only_samples_at_small_t_get_a_gradient(reward):
    prediction, clean = latents(0).requires_grad_(), latents(1)
    loss = reward(prediction, clean, torch.tensor([0.1, 0.3, 0.9]))
    loss.backward()
    reached = prediction.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert reached.tolist() == [True, False, False]
    assert all(parameter.grad is None for parameter in reward.reward.scorer.parameters())
    m = reward.measures
    assert m["rewarded"].item() == pytest.approx(1 / 3)
    assert loss.item() == pytest.approx(0.5 * (-m["face_score"] + 2.0 * m["structure"]).item(), rel=1e-5)


def test_without_a_sample_at_small_t_there_is_no_reward(reward):
    prediction = latents(0).requires_grad_()
    loss = reward(prediction, latents(1), torch.tensor([0.5, 0.6, 0.7]))
    loss.backward()
    assert loss.item() == 0 and prediction.grad.abs().max() == 0
    assert {name: value.item() for name, value in reward.measures.items()} == dict.fromkeys(reward.measures, 0)


def test_a_step_up_the_gradient_raises_the_score(reward):
    """Without the structural term: it is the score's gradient, not another one."""
    alone = RestorationReward(reward.reward, reward.vae, 1.0, structure=0.0)
    prediction, t = latents(0, 1).requires_grad_(), torch.tensor([0.1])
    before = alone(prediction, latents(1, 1), t)
    before.backward()
    step = 1e-2 * prediction.grad / prediction.grad.norm()
    assert alone((prediction - step).detach(), latents(1, 1), t) < before


def test_structure_by_hand():
    """A shift of all pixels by 0.25 is 0.25; what has the mean 0 within each cell is nothing."""
    side = 2 * STRUCTURE_SIDE
    clean = torch.zeros(2, 3, side, side)
    checks = (torch.arange(side)[:, None] + torch.arange(side)) % 2 * 2.0 - 1
    other = torch.stack([clean[0] + 0.25, clean[1] + 0.5 * checks])
    assert structure_distance(other, clean).tolist() == pytest.approx([0.25, 0.0])


def test_the_watch_compares_with_the_clean_faces(reward):
    """A prediction that is the clean latents changes nothing; the history keeps a row for each face."""
    history = []
    same = reward.watch(latents(1), latents(1), history)
    assert same["drift"] == 0 and same["score_change"] == 0 and same["sharpness_ratio"] == 1 and same["hacking"] == 0
    other = reward.watch(latents(2), latents(1), history)
    assert other["drift"] > 0 and len(history) == 6

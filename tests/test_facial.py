"""The facial feature loss: where it looks, whom its gradients reach, and the discriminators' own training."""

import json
import math

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from faceprior.diffusion import pred_original_sample
from faceprior.facial import (
    LANDMARKS_FILE,
    FacialDiscriminators,
    FacialFeatureLoss,
    LatentDiscriminator,
    crop_regions,
    find_landmarks,
    without_landmarks,
)
from faceprior.losses import facial_loss, generator_loss, style_distance
from faceprior.training import make_accelerator, seeded

# x, y in pixels of a 512 x 512 face, on whole or half cells of 8 pixels from its edge
LANDMARKS = torch.tensor([[183.5, 239.5], [327.5, 247.5], [255.5, 300.0], [199.5, 379.5], [303.5, 387.5]])


def make_facial(accumulation=1, seed=0, **options) -> FacialFeatureLoss:
    with seeded(seed):
        discriminators = FacialDiscriminators(4)
    return FacialFeatureLoss(discriminators, make_accelerator("cpu", "no", accumulation), 512, **options)


def random_latents(batch: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 4, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_boxes_on_whole_cells_are_slices_of_the_latents():
    """At 512 pixels and 8 a cell, 80 pixels are 10 cells: the left eye's middle, 184 from the left, is border 23.

    So it is columns 18 to 28; the right one, 328, is border 41; rows 30 and 31. The mouth's middle, 252, is 31.5 cells:
    15 cells are columns 24 to 39; 384 in y is 48, half a cell off, so its rows are means of two.
    """
    latents = random_latents(2, 0)
    second = LANDMARKS + torch.tensor([8.0, -16.0])
    crops = crop_regions(latents, torch.stack([LANDMARKS, second]), 512)
    left, other_left, right, other_right = crops["eyes"]
    torch.testing.assert_close(left, latents[0, :, 25:35, 18:28])
    torch.testing.assert_close(right, latents[0, :, 26:36, 36:46])
    torch.testing.assert_close(other_left, latents[1, :, 23:33, 19:29])
    torch.testing.assert_close(other_right, latents[1, :, 24:34, 37:47])
    rows = (latents[0, :, 40:55] + latents[0, :, 41:56]) / 2
    torch.testing.assert_close(crops["mouth"][0], rows[..., 24:39])


@pytest.mark.parametrize(("resolution", "cells"), [(128, 32), (128, 16), (512, 64), (1024, 128)])
def test_boxes_scale_with_image_and_latents(resolution, cells):
    """On latents that hold their own place in the image, a crop's mean is its landmark and its span the box."""
    place = (torch.arange(cells) + 0.5) * resolution / cells  # from the image's edge, pixels
    latents = torch.stack([place.expand(cells, cells), place[:, None].expand(cells, cells)])[None]
    landmarks = (LANDMARKS + 0.5) * resolution / 512 - 0.5
    crops = crop_regions(latents, landmarks[None], resolution)
    assert crops["eyes"].shape == (2, 2, 10, 10) and crops["mouth"].shape == (1, 2, 15, 15)
    middles = torch.stack([landmarks[0], landmarks[1], (landmarks[3] + landmarks[4]) / 2]) + 0.5
    found = torch.cat([crops["eyes"], crops["mouth"].mean(dim=(2, 3), keepdim=True).expand(-1, -1, 10, 10)])
    torch.testing.assert_close(found.mean(dim=(2, 3)), middles)
    x, y = crops["eyes"][0, 0, 0], crops["mouth"][0, 1, :, 0]
    assert (x[-1] - x[0]).item() == pytest.approx(80 / 512 * resolution * 9 / 10, rel=1e-4)
    assert (y[-1] - y[0]).item() == pytest.approx(120 / 512 * resolution * 14 / 15, rel=1e-4)


def test_discriminator_has_two_levels_and_can_be_saved():
    with seeded(1):
        discriminator, other = LatentDiscriminator(4), LatentDiscriminator(4)
    latents = random_latents(3, 1)[..., :15, :15]
    (fine, coarse), logits = discriminator(latents)
    assert fine.shape == (3, 128, 7, 7) and coarse.shape == (3, 256, 3, 3) and logits.shape == (3, 1, 3, 3)
    assert not torch.equal(other(latents)[1], logits)
    other.load_state_dict(discriminator.state_dict())
    assert torch.equal(other(latents)[1], logits)


def test_parts_by_hand():
    """Both eyes go through the one discriminator of eyes; three regions are summed."""
    facial = make_facial()
    prediction, latents, landmarks = random_latents(2, 1), random_latents(2, 2), LANDMARKS.expand(2, 5, 2)
    parts = facial(prediction, latents, landmarks)
    for i in range(2):
        fake = crop_regions(prediction[i : i + 1], landmarks[:1], 512)
        real = crop_regions(latents[i : i + 1], landmarks[:1], 512)
        adversarial = style = 0.0
        for name, k in (("eyes", 0), ("eyes", 1), ("mouth", 0)):
            discriminator = facial.discriminators.regions[name]
            features, logits = discriminator(fake[name][k : k + 1])
            adversarial += generator_loss(logits).item()
            style += style_distance(features, discriminator(real[name][k : k + 1])[0]).item()
        assert parts[0][i].item() == pytest.approx(adversarial, rel=1e-5)
        assert parts[1][i].item() == pytest.approx(style, rel=1e-5)


def test_accuracy_by_hand():
    """Of each side the fraction of logits with the right sign; a face that was not found counts as 0.5."""
    facial = make_facial()
    prediction, latents = random_latents(2, 1), random_latents(2, 2)
    landmarks = torch.stack([LANDMARKS, torch.full((5, 2), math.nan)])
    signs = {}
    for side, z, sign in (("real", latents, 1), ("fake", prediction, -1)):
        crops = crop_regions(z[:1], LANDMARKS[None], 512)
        for name, discriminator in facial.discriminators.regions.items():
            signs[f"{name}_{side}"] = (sign * discriminator(crops[name])[1] > 0).float().mean().item()
    facial.train_discriminators(prediction, latents, landmarks)
    measured = {name: value.item() for name, value in facial.accuracy.items()}
    assert measured == pytest.approx({name: (fraction + 0.5) / 2 for name, fraction in signs.items()})


def test_discriminators_that_are_trained_get_it_right():
    """Latents of another mean are told apart after a few steps."""
    facial = make_facial()
    latents, landmarks = random_latents(4, 2), LANDMARKS.expand(4, 5, 2)
    for _ in range(20):
        facial.train_discriminators(latents + 1, latents, landmarks)
    assert all(value > 0.9 for value in facial.accuracy.values())


def test_gradient_reaches_the_prediction_in_the_boxes_only():
    """Through z0_hat = (z_t - sqrt(1 - a) e) / sqrt(a): the noise's gradient is -sqrt((1 - a) / a) times z0_hat's."""
    facial, scheduler = make_facial(), DDPMScheduler()
    latents, noise = random_latents(2, 1).requires_grad_(), random_latents(2, 2)
    timesteps = torch.tensor([200, 600])
    noisy_latents = scheduler.add_noise(latents.detach(), noise, timesteps)
    model_pred = (noise + 0.3 * random_latents(2, 3)).requires_grad_()
    prediction = pred_original_sample(scheduler, model_pred, timesteps, noisy_latents)
    prediction.retain_grad()
    sum(facial(prediction, latents, LANDMARKS.expand(2, 5, 2))).sum().backward()
    assert latents.grad is None
    assert all(parameter.grad is None for parameter in facial.discriminators.parameters())
    alpha = scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    torch.testing.assert_close(model_pred.grad, -((1 - alpha) / alpha).sqrt() * prediction.grad)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    for rows, columns in (
        (slice(25, 35), slice(18, 28)),
        (slice(26, 36), slice(36, 46)),
        (slice(40, 56), slice(24, 39)),
    ):
        inside[rows, columns] = True
    touched = (model_pred.grad != 0).any(dim=1)
    assert (touched == inside).all()


def test_no_weight_no_gradient():
    """Where w(t) is 0 no gradient reaches the prediction; elsewhere one does."""
    prediction = random_latents(2, 1).requires_grad_()
    adversarial, style = make_facial()(prediction, random_latents(2, 2), LANDMARKS.expand(2, 5, 2))
    facial_loss(torch.tensor([1.0, 0.0]), adversarial, style).backward()
    assert prediction.grad[0].abs().sum() > 0 and prediction.grad[1].abs().sum() == 0
    assert adversarial[1] > 0


def test_a_face_without_landmarks_costs_nothing_and_teaches_nothing():
    landmarks, latents = torch.stack([LANDMARKS, torch.full((5, 2), math.nan)]), random_latents(2, 2)
    prediction = random_latents(2, 1).requires_grad_()
    parts = make_facial()(prediction, latents, landmarks)
    sum(parts).sum().backward()
    alone = make_facial()(prediction[:1], latents[:1], landmarks[:1])
    for part, other in zip(parts, alone, strict=True):
        torch.testing.assert_close(part[0], other[0])
        assert part[1] == 0
    assert prediction.grad[1].abs().sum() == 0 and prediction.grad.isfinite().all()

    facial, before = make_facial(), make_facial()
    loss = facial.train_discriminators(prediction[1:], latents[1:], landmarks[1:])
    assert loss.tolist() == [0]
    for parameter, other in zip(facial.discriminators.parameters(), before.discriminators.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_discriminators_learn_to_tell_clean_from_pale_latents():
    """Three regions begin near 2 ln 2 each; the loss of the discriminators does not touch the prediction."""
    facial, landmarks = make_facial(learning_rate=0.02), LANDMARKS.expand(2, 5, 2)
    losses = []
    for step in range(10):
        latents = random_latents(2, step)
        prediction = (latents / 3).requires_grad_()
        losses.append(facial.train_discriminators(prediction, latents, landmarks).mean().item())
        assert prediction.grad is None
    assert losses[0] == pytest.approx(6 * math.log(2), rel=0.1)
    assert losses[-1] < losses[0] / 4
    unseen = random_latents(2, 99)
    for name, discriminator in facial.discriminators.regions.items():
        real, fake = (discriminator(crop_regions(z, landmarks, 512)[name])[1].mean() for z in (unseen, unseen / 3))
        assert real > 1 and fake < -1


def test_micro_batches_make_one_step():
    """Two micro-batches of one face change the discriminators as a batch of two does, with the second one."""
    prediction, latents, landmarks = random_latents(2, 1), random_latents(2, 2), LANDMARKS.expand(2, 5, 2)
    whole = make_facial()
    whole.train_discriminators(prediction, latents, landmarks)
    halves = make_facial(accumulation=2)
    start = {name: p.detach().clone() for name, p in halves.discriminators.named_parameters()}
    for i in range(2):
        for name, parameter in halves.discriminators.named_parameters():
            assert torch.equal(parameter, start[name])
        with halves.accelerator.accumulate(halves.discriminators):
            assert halves.accelerator.sync_gradients == (i == 1)
            halves.train_discriminators(prediction[i : i + 1], latents[i : i + 1], landmarks[i : i + 1])
    for name, parameter in whole.discriminators.named_parameters():
        assert (parameter - start[name]).abs().max() > 1e-4
        state, other = (f.optimizer.state[dict(f.discriminators.named_parameters())[name]] for f in (whole, halves))
        torch.testing.assert_close(other["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-7)


def test_loss_is_float32_under_autocast():
    facial, landmarks, weight = make_facial(), LANDMARKS.expand(2, 5, 2), torch.tensor([0.5, 1.0])
    prediction, latents = random_latents(2, 1), random_latents(2, 2)
    expected = facial_loss(weight, *facial(prediction, latents, landmarks))
    with torch.autocast("cpu", torch.bfloat16):
        loss = facial_loss(weight, *facial(prediction, latents, landmarks))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


class Finder:
    """Finds landmarks at fixed places, none in grey images, and breaks down at a given call."""

    def __init__(self, break_at=None):
        self.calls, self.break_at = 0, break_at

    def __call__(self, image):
        if self.calls == self.break_at:
            raise KeyboardInterrupt
        self.calls += 1
        return None if image.getpixel((0, 0)) == (128, 128, 128) else torch.arange(10.0).view(5, 2)


def test_landmarks_are_found_once_and_scaled(tmp_path):
    """64 x 32 pixels to 128: pixel centre 0 in x, 1/2 from the edge, is 1 from it, so .5; 1 in y: 1.5 times 4 - .5."""
    paths = []
    for i, color in enumerate(("red", (128, 128, 128), "blue", "green")):
        paths.append(tmp_path / "faces" / f"{i}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 32), color).save(paths[-1])
    output, accelerator = tmp_path / "out", make_accelerator("cpu")
    with pytest.raises(KeyboardInterrupt):
        find_landmarks(paths, output, 128, accelerator, Finder(break_at=2))
    with open(next(output.glob("landmarks.*.jsonl")), "a") as file:
        file.write('{"image": "2.p')  # torn
    rest = Finder()
    landmarks = find_landmarks(paths, output, 128, accelerator, rest)
    assert rest.calls == 2
    assert landmarks[0, 0].tolist() == [0.5, 5.5]
    assert landmarks[3, 4].tolist() == [16.5, 37.5]
    assert landmarks[1].isnan().all() and without_landmarks(paths, landmarks) == ["1.png"]
    text = (output / LANDMARKS_FILE).read_text()
    assert [json.loads(line)["image"] for line in text.splitlines()] == ["0.png", "1.png", "2.png", "3.png"]
    assert [path.name for path in output.iterdir()] == [LANDMARKS_FILE]
    torch.testing.assert_close(
        find_landmarks(paths, output, 128, accelerator, Finder(break_at=0)), landmarks, equal_nan=True
    )


def test_one_image_that_fails_is_named_and_the_rest_is_searched(tmp_path, caplog):
    """A bug ends the search."""
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    paths[0].write_bytes(b"damaged")
    Image.new("RGB", (32, 32)).save(paths[1])
    accelerator = make_accelerator("cpu")
    landmarks = find_landmarks(paths, tmp_path / "out", 128, accelerator, lambda image: torch.full((5, 2), 3.0))
    assert landmarks[0].isnan().all() and landmarks[1].isfinite().all()
    assert "0.png: no landmarks: " in caplog.text
    with pytest.raises(IndexError):
        find_landmarks(paths[1:], tmp_path / "bug", 128, accelerator, lambda image: [][0])

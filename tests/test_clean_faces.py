"""Clean faces, degraded as they are loaded: mirrored with all that belongs to them, and with cached latents."""

import numpy as np
import pytest
import torch
from PIL import Image

from faceprior import tiny
from faceprior.clean_faces import FLIPPED, CleanFaces, DegradedPair, clean_latents, mirror_landmarks, readable_images
from faceprior.degrade import DegradationConfig
from faceprior.diffusion import encode_latents
from faceprior.training import collate, make_accelerator, sample_generators

NEUTRAL = DegradationConfig(blur_sigma=(0.0, 0.0), downsample=(1.0, 1.0), noise=(0.0, 0.0), jpeg=None)
LANDMARKS = torch.tensor([[20.0, 30], [44, 31], [33, 40], [24, 50], [40, 52]])


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "torn.png").write_bytes(b"")
    return tmp_path


def test_what_cannot_be_read_is_named(folder):
    paths, problems = readable_images(folder)
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png"]
    assert [name.rsplit("/", 1)[1] for name, _ in problems] == ["torn.png"]
    for path in paths:
        path.unlink()
    with pytest.raises(ValueError, match=r"no image in .* can be read; the first: .*torn.png"):
        readable_images(folder)


def test_landmarks_of_a_mirrored_face_by_hand():
    """x -> 63 - x, and left and right change places; twice is the face itself."""
    mirrored = mirror_landmarks(LANDMARKS, 64)
    assert mirrored.tolist() == [[19, 31], [43, 30], [30, 40], [23, 52], [39, 50]]
    assert torch.equal(mirror_landmarks(mirrored, 64), LANDMARKS)
    assert mirror_landmarks(torch.full((5, 2), torch.nan), 64).isnan().all()


def test_a_mirrored_pair_has_both_sides_and_the_landmarks_mirrored(folder):
    faces = CleanFaces(readable_images(folder)[0], 64, LANDMARKS.expand(3, 5, 2))
    plain = DegradedPair(NEUTRAL)(faces[0], np.random.default_rng(0))
    mirrored = DegradedPair(NEUTRAL, flip_prob=1.0)(faces[0], np.random.default_rng(0))
    for side in ("pixel_values", "controlnet_cond"):
        assert torch.equal(mirrored[side], plain[side].flip(-1))
    assert torch.equal(mirrored["landmarks"], mirror_landmarks(LANDMARKS, 64))
    drawn = [DegradedPair(NEUTRAL, 0.5)(faces[0], np.random.default_rng(seed)) for seed in range(40)]
    flips = sum(torch.equal(sample["pixel_values"], mirrored["pixel_values"]) for sample in drawn)
    assert 10 <= flips <= 30  # 20, and 3 standard deviations of sqrt(10)


@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_cached_latents_are_those_of_training_without(folder, tmp_path_factory, flip_prob):
    """From the same generators, bit for bit; the files are used again, and the VAE is back where it was."""
    prior, accelerator = tiny.tiny_sdxl(), make_accelerator("cpu")
    prior.vae.enable_slicing()
    faces, cache = CleanFaces(readable_images(folder)[0], 64), tmp_path_factory.mktemp("cache")
    cached = faces.cached(cache, prior, accelerator, batch_size=2, flips=flip_prob > 0)
    pair = DegradedPair(NEUTRAL, flip_prob)
    batch = collate([pair(cached[index], np.random.default_rng(index)) for index in range(3)])
    assert not [key for key in batch if key.startswith(FLIPPED)]
    latents = clean_latents(prior.vae, batch, sample_generators(0, range(3)))
    expected = encode_latents(prior.vae, batch["pixel_values"], sample_generators(0, range(3)))
    assert torch.equal(latents, expected)
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(files) == 3
    faces.cached(cache, prior, accelerator, flips=flip_prob > 0)
    assert files == {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}

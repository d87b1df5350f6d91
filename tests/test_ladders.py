"""Ladders of faces: in order by how they are made."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoints.tiny_models.damage import PHOTOMETRIC
from checkpoints.tiny_models.judge import WAYS, crop_face, make_rungs
from checkpoints.tiny_models.ladders import (
    DEGRADATIONS,
    RUNGS,
    Person,
    View,
    degradation_ladder,
    draw_aligned,
    framed,
    in_order,
    jitter,
    ladder_loss,
    mirrored_and_lit,
    mixed_ladder,
    spoil,
    strength_ladder,
    weaker,
)
from faceprior.degrade import Degradation
from faceprior.procedural import draw_portrait


@pytest.fixture(scope="module")
def view():
    drawing = draw_portrait(5, 128)
    return View(drawing.image, drawing.box)


def flat(level: int, box=(20, 20, 90, 100)) -> View:
    return View(np.full((128, 128, 3), level, np.uint8), box)


def test_ladder_loss_by_hand():
    """Three rungs, 2 ln 3, ln 3 and 0: margins ln 3, ln 9, ln 3, so sigmoids 3/4, 9/10, 3/4."""
    scores = math.log(3) * torch.tensor([[2.0, 1.0, 0.0]])
    torch.testing.assert_close(ladder_loss(scores), -torch.tensor([0.75, 0.9, 0.75]).log().mean())
    # with steepness 2, 1 and 2: ln 9, ln 9, ln 9, of which the first and the last count half; or only the middle counts
    steep = torch.tensor([[2.0, 1.0, 2.0]])
    torch.testing.assert_close(ladder_loss(scores, steep), -torch.tensor(0.9).log() * 2 / 3)
    torch.testing.assert_close(ladder_loss(scores, steep, torch.tensor([[0.0, 1.0, 0.0]])), -torch.tensor(0.9).log())
    assert in_order(scores) == 1 and in_order(-scores) == 0
    assert in_order(torch.tensor([[2.0, 0.0, 1.0]])).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", sorted(set(DEGRADATIONS)))
def test_every_degradation_takes_a_face_further_away(view, kind):
    """The first rung is the face itself, and each of the others lies further from it than the one before."""
    before = view.image.copy()
    for seed in range(5):
        rungs = degradation_ladder(view, np.random.default_rng(seed), kind)
        assert len(rungs) == RUNGS and (rungs[0] == view.image).all()
        distances = [np.abs(rung.astype(float) - view.image).mean() for rung in rungs]
        assert distances == sorted(distances) and distances[-1] > distances[0], (seed, distances)
    assert (view.image == before).all()


def test_a_weaker_degradation():
    """All of it is itself, none of it is nothing, and half has every strength halved."""
    worst = Degradation(41, (4.0, 2.0), 0.5, 3.0, 10.0, 60, (10.0, -20.0, 0.0), True)
    assert weaker(worst, 1) == worst
    none = weaker(worst, 0)
    assert none.blur_sigma == (0, 0) and none.downsample == 1 and none.noise == 0 and none.jpeg == 100
    assert not any(none.jitter) and not none.gray
    half = replace(
        worst, blur_sigma=(2.0, 1.0), downsample=2.0, noise=5.0, jpeg=80, jitter=(5.0, -10.0, 0.0), gray=False
    )
    assert weaker(worst, 0.5) == half
    assert weaker(replace(worst, jpeg=None), 0.5).jpeg is None


def test_rungs_stand_in_the_order_of_their_strength(view):
    """Rungs are grey levels 0, 10, 20 ...: a ladder picks four that rise, a mixed one a good and a bad one."""
    strengths = (0.04, 0.3, 0.5, 0.7, 0.9)
    person = Person(view, view, [flat(10 * step) for step in range(5)], strengths)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        levels = [int(image[0, 0, 0]) for image in strength_ladder(person, rng)]
        assert levels == sorted(set(levels)) and len(levels) == RUNGS
        good, good_blurred, bad, bad_blurred = (int(image[0, 0, 0]) for image in mixed_ladder(person, rng))
        assert good == good_blurred in (0, 10) and bad == bad_blurred in (30, 40)  # a flat image has nothing to blur


def test_a_mild_blur_is_on_one_of_two_like_sides(view):
    other = View(view.image[::-1].copy(), view.box)
    person = Person(view, view, [view, view, view, other, other], (0.04, 0.3, 0.5, 0.7, 0.9))
    good, good_blurred, bad, bad_blurred = mixed_ladder(person, np.random.default_rng(0))
    assert (good == view.image).all() and (bad == other.image).all()
    assert 0 < np.abs(good_blurred.astype(float) - good).mean() < np.abs(bad.astype(float) - good).mean()
    assert (bad_blurred != bad).any()


def test_faces_are_seen_whole_and_in_their_box(view):
    """Half in the whole image; the others in the face's box, moved by a tenth at most."""
    boxes = [framed(view, np.random.default_rng(seed)) for seed in range(60)]
    whole = [box == [0, 0, 128, 128] for box in boxes]
    assert 15 < sum(whole) < 45
    width, height = view.box[2] - view.box[0], view.box[3] - view.box[1]
    for box, is_whole in zip(boxes, whole, strict=True):
        if not is_whole:
            moved = np.abs(np.array(box) - view.box) / (width, height, width, height)
            assert moved.max() <= 0.1 + 1e-6
    assert jitter((0, 0, 128, 128), 128, np.random.default_rng(0))[0] >= 0


def test_spoiled_faces(view):
    """Every damage paints its strength: it rises, or the four are clean, lightly veiled, broken, veiled and broken."""

    def paint(image, landmarks, strength, rng):
        return np.full_like(image, round(100 * strength))

    damages, kinds = dict.fromkeys((*PHOTOMETRIC, "warp", "erase"), paint), set()
    for seed in range(30):
        rungs, kind = spoil(view, np.zeros((5, 2)), damages, np.random.default_rng(seed))
        painted = [int(rung[0, 0, 0]) for rung in rungs if (rung == rung[0, 0, 0]).all()]
        kinds.add(kind)
        if kind == "blurred":
            veiled, broken, both = painted
            assert veiled == both <= 25 < 40 <= broken and (rungs[0] == view.image).all()
        else:
            assert painted == sorted({*painted}) and {*painted} <= {20, 40, 60, 80, 100}
            assert len(painted) == RUNGS or (len(painted) == RUNGS - 1 and (rungs[0] == view.image).all())
    assert kinds == {"broken", "degraded", "blurred"}


def test_what_the_judge_sees(view):
    """Four squares of every way down; rungs that are grey levels stay in order whatever happens to all of them."""
    person = Person(view, view, [flat(10 + 40 * step, view.box) for step in range(5)], (0.04, 0.3, 0.5, 0.7, 0.9))
    landmarks = np.array(draw_portrait(5, 128).landmarks, np.float32)
    sample = {"person": person, "portrait": view, "landmarks": landmarks}
    for way in WAYS:
        rungs = make_rungs(sample, np.random.default_rng(1), way)["rungs"]
        assert rungs.shape == (RUNGS, 3, 128, 128) and (rungs[0] != rungs[-1]).any(), way
    for seed in range(10):
        levels = make_rungs(sample, np.random.default_rng(seed), "strength")["rungs"].mean(dim=(1, 2, 3)).tolist()
        assert levels == sorted(levels)


def test_a_mirrored_box_follows_its_face():
    """A white face on black is still in its box after the flip."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[30:60, 10:40] = 200
    for seed in range(10):
        (changed, same), box = mirrored_and_lit([image, image], (10, 30, 40, 60), np.random.default_rng(seed))
        x0, y0, x1, y1 = (round(edge) for edge in box)
        assert (changed == same).all() and changed[y0:y1, x0:x1].min() > 150 and changed.astype(bool).sum() == 2700


def test_an_aligned_face_and_its_box():
    """Eyes to chin fill most of FFHQ's frame; the box is where the drawing's own box went."""
    image, (x0, y0, x1, y1) = draw_aligned(7)
    assert image.shape == (128, 128, 3)
    assert 50 < x1 - x0 < 110 and x0 < 64 < x1 and y0 < 60 < 100 < y1


def test_the_judge_s_crop():
    """A square around the box, larger than it, that stays inside of the image; pixels in [-1, 1]."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[40:80, 50:80] = 255  # 40 high: the square of 48 has a margin of 4 above and below, 9 at the sides
    crop = crop_face(image, (50, 40, 80, 80))
    assert crop.shape == (3, 128, 128) and crop.min() >= -1.2 and crop.max() <= 1.2
    assert (crop > 0).float().mean().item() == pytest.approx(30 * 40 / 48**2, rel=0.05)
    assert (crop_face(np.full((128, 128, 3), 255, np.uint8), (0, 0, 128, 128)) == 1).all()

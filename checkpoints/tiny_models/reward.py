"""The pretraining of the tiny reward model, which takes ImageReward's place: ladders of drawn faces, the best first.

A ladder is a face and three worse copies of it: spoiled, inpainted by stage 1, taken through the base at growing
strength, or degraded; or four people, each taken through the base at more strength than the one before. Where a broken
face is at stake, all rungs went through the same autoencoder or none did, or the better one twice, the better and the
worse face stand there with and without the same mild blur, and all rungs get the same blur, resampling and JPEG: so
sharpness cannot tell a broken face, though a blurred face is worse than a sharp one. None of this is in the paper.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from checkpoints.tiny_models.damage import DAMAGES, TRAINING_ONLY, UNSEEN
from checkpoints.tiny_models.data import Drawings, save_arrays, tidy_configs, write_info
from checkpoints.tiny_models.ladders import (
    RUNGS,
    People,
    View,
    alike,
    as_images,
    degradation_ladder,
    framed,
    in_order,
    jitter,
    ladder_loss,
    mirrored_and_lit,
    mixed_ladder,
    spoil,
    strength_ladder,
    with_blurred,
)
from faceprior import tiny
from faceprior.detect import face_square
from faceprior.images import as_array, load_image, to_pil, to_pixel_values
from faceprior.pairs import gather_pairs
from faceprior.scorer import FaceScorer
from faceprior.training import TrainingRun, make_accelerator, make_optimizer

# The ways down a ladder, and how often each is taken. Only strangers tell whose face is better in absolute terms.
WAYS = {"inpainted": 0.26, "spoiled": 0.22, "strength": 0.15, "strangers": 0.1, "mixed": 0.08, "degraded": 0.19}
# A degradation has to show in the score, a broken face has to weigh more: with equal margins blur would outweigh it.
STEEP = 8.0  # steepness of the loss where two rungs differ in a degradation
STEEPNESS = {
    "degraded": (STEEP,) * 6,
    "blurred": (STEEP, 1.0, 1.0, 1.0, 1.0, STEEP),  # good, good blurred, bad, bad blurred
    "broken": (1.0,) * 6,
}
# In the same order: that a good face under a mild blur is above the sharp bad one is the order that is lost soonest.
WEIGHTS = {"degraded": (1.0,) * 6, "blurred": (3.0, 1.0, 1.0, 3.0, 1.0, 3.0), "broken": (1.0,) * 6}
DRAWN = 3000  # most drawings of a split that are used
BATCH = 8  # ladders
SEEN = {**{name: damage for name, damage in DAMAGES.items() if name not in UNSEEN}, **TRAINING_ONLY}


class DrawnFaces(Dataset):
    """Drawn portraits: {"images": [drawn, once more through the VAE], "landmarks", "box", "pair", "person", "people"}.

    "pair" holds the sides of a pair of stage 1, see `pair_views`, "person" is one of the "people" on the ladders of the
    base; all show others than the portrait, and are None without `pairs` and without `people`.
    """

    def __init__(
        self, work: Path, split: str, vae: AutoencoderKL, pairs: Path | None = None, people: People | None = None
    ):
        drawings = Drawings(work, split)
        self.images = (drawings.images, round_trip(vae, drawings.images[:DRAWN], work / f"round_trip_{split}.npz"))
        self.pairs, self.people = pair_views(vae, pairs, work / "round_trip_pairs.npz") if pairs else [], people
        self.faces = [record["faces"][0] for record in drawings.records]
        kinds = [record["kind"] for record in drawings.records[:DRAWN]]
        self.portraits = [i for i, kind in enumerate(kinds) if kind == "portrait"]

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict:
        number = self.portraits[index]
        face = self.faces[number]
        landmarks = np.array(face["landmarks"], np.float32)
        images = [images[number] for images in self.images]
        return {
            "images": images,
            "landmarks": landmarks,
            "box": face["box"],
            "pair": self.pairs[index % len(self.pairs)] if self.pairs else None,
            "person": self.people[index % len(self.people)] if self.people else None,
            "people": self.people,
        }


def pair_views(vae: AutoencoderKL, folder: Path, kept: Path) -> list[tuple[View, View, View]]:
    """Return the squares around the faces of stage 1's pairs: good, bad, and good once more through the autoencoder."""
    views = []
    for pair in gather_pairs(folder)[0]:
        good, bad = (load_image(path) for path in (pair.good, pair.bad))
        x0, y0, x1, y1 = face_square(good.size, pair.box, tiny.RESOLUTION)
        scale = tiny.RESOLUTION / (x1 - x0)
        box = ((np.array(pair.box) - (x0, y0, x0, y0)) * scale).tolist()
        sides = (side.crop((x0, y0, x1, y1)).resize((tiny.RESOLUTION,) * 2) for side in (good, bad))
        views.append([View(as_array(side), box) for side in sides])
    again = round_trip(vae, np.stack([good.image for good, _ in views]), kept) if views else []
    return [(good, bad, View(image, good.box)) for (good, bad), image in zip(views, again, strict=True)]


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: np.ndarray, kept: Path) -> np.ndarray:
    """Return images (N, R, R, 3) uint8 as the autoencoder reconstructs them; kept in a file while N stays the same."""
    if not kept.is_file() or len(np.load(kept)["images"]) != len(images):
        decoded = []
        for batch in tqdm(np.array_split(images, -(-len(images) // 32)), desc="round trip", unit="batch"):
            pixels = to_pixel_values(list(batch)).to(vae.device)
            decoded += to_pil(vae.decode(vae.encode(pixels).latent_dist.mode()).sample.cpu())
        save_arrays(kept, images=np.stack([np.asarray(image) for image in decoded]))
    return np.load(kept)["images"]


class FaceLadder:
    """Makes a ladder of a sample of `DrawnFaces`, see `make_ladder`.

    "rungs", (4, 3, 224, 224), as the scorer preprocesses faces; "steepness" and "weights", (6,), see `ladder_loss`.
    """

    def __init__(self, scorer: FaceScorer):
        self.preprocess = scorer.preprocess

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict:
        images, boxes, kind = make_ladder(sample, rng)
        return {
            "rungs": self.preprocess(as_images(images), boxes),
            "steepness": torch.tensor(STEEPNESS[kind]),
            "weights": torch.tensor(WEIGHTS[kind]),
        }


def make_ladder(sample: dict, rng: np.random.Generator, way: str | None = None) -> tuple[list[np.ndarray], list, str]:
    """Return four images, the best first, the box to score in each, and a key of STEEPNESS.

    way: a key of WAYS, chosen at random if None; one that the sample lacks a pair or people for becomes "spoiled".
    """
    way = str(rng.choice(list(WAYS), p=list(WAYS.values()))) if way is None else way
    portrait, person = View(sample["images"][rng.integers(2)], sample["box"]), sample["person"]
    if way == "strangers" and person:
        return *strangers_ladder(sample["people"], rng), "broken"
    if way == "degraded":
        view = (portrait, portrait, person.aligned, person.rungs[0])[rng.integers(4)] if person else portrait
        images, box = mirrored_and_lit(degradation_ladder(view, rng), framed(view, rng), rng)
        kind = "degraded"
    elif way == "strength" and person:
        images, box = alike(strength_ladder(person, rng), framed(person.portrait, rng), rng)
        kind = "broken"
    elif way == "mixed" and person:
        images, box = alike(mixed_ladder(person, rng), framed(person.portrait, rng), rng)
        kind = "blurred"
    elif way == "inpainted" and sample["pair"]:
        good, bad, again = sample["pair"]
        good = (good, again)[rng.integers(2)]
        images, box = alike(with_blurred(good, bad, rng), jitter(good.box, good.image.shape[1], rng), rng)
        kind = "blurred"
    else:
        images, kind = spoil(portrait, sample["landmarks"], SEEN, rng)
        images, box = alike(images, jitter(portrait.box, portrait.image.shape[1], rng), rng)
    return images, [box] * RUNGS, kind


def strangers_ladder(people: People, rng: np.random.Generator) -> tuple[list[np.ndarray], list]:
    """Return a rung of each of four people, in rising strength, treated alike, and the four boxes."""
    chosen = [people[int(i)] for i in rng.choice(len(people), RUNGS, replace=len(people) < RUNGS)]
    steps = np.sort(rng.choice(len(chosen[0].rungs), RUNGS, replace=False))
    treatment, images, boxes = int(rng.integers(2**31)), [], []
    for person, step in zip(chosen, steps, strict=True):
        view = person.rungs[step]
        box = jitter(view.box, view.image.shape[1], rng)
        (image,), box = alike([view.image], box, np.random.default_rng(treatment))
        images.append(image)
        boxes.append(box)
    return images, boxes


def train_reward(config, work: Path) -> None:
    """Pretrain the BLIP reward model, and write its moving average to checkpoints/tiny/reward in float16."""
    output = work / "reward"
    if (output / "done.json").is_file():
        return

    # ---- data, model and run
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    folder = tiny.tiny_folder() / "reward"
    scorer = FaceScorer.from_pretrained(folder, dtype=torch.float32) if config.go_on else tiny.tiny_scorer()
    accelerator = make_accelerator(config.device, config.mixed_precision)
    training = DrawnFaces(work, "train", vae, work / "reward_pairs", People(work, "sd15"))
    held_out = DrawnFaces(work, "validation", vae)
    optimizer = make_optimizer(scorer.parameters(), "adamw", config.reward_learning_rate, 1e-2)
    model, optimizer = accelerator.prepare(scorer.eval(), optimizer)  # without dropout: its noise would hide the signal
    run = TrainingRun(
        output,
        config.reward_steps,
        accelerator,
        {"scorer": model},
        {"scorer": optimizer},
        100,
        warmup_steps=100,
        schedule="cosine",
        ema_decay=config.ema_decay,
    )
    make_rungs = FaceLadder(scorer)

    for batch in run.batches(training, BATCH, seed=0, augment=make_rungs):
        # ---- the ranking loss (Face Score, Eq. 5), with a pull towards small margins around zero
        with accelerator.autocast():
            rewards = model(batch["rungs"].flatten(0, 1)).float().unflatten(0, (-1, RUNGS))  # (B, L)
        loss = ladder_loss(rewards, batch["steepness"], batch["weights"]) + 2e-3 * rewards.square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, accuracy=in_order(rewards), margin=(rewards[:, 0] - rewards[:, -1]).mean())

    # ---- the average's accuracy on held-out faces, then its weights in float16: it forgets less than the last step's
    run.use_final_weights()
    accuracy = measure_order(scorer.eval(), held_out, make_rungs)
    scorer.to(torch.float16).save_pretrained(folder)
    tidy_configs(folder)
    write_info(folder, run.steps)
    run.finish(validation_accuracy=accuracy)


@torch.no_grad()
def measure_order(scorer: FaceScorer, faces: DrawnFaces, make_rungs: Callable) -> float:
    """Return the fraction of the pairs of rungs, on ladders of held-out faces, that are in order."""
    correct = []
    for index in range(len(faces)):
        rungs = make_rungs(faces[index], np.random.default_rng([1, index]))["rungs"]
        correct.append(float(in_order(scorer(rungs.to(scorer.device))[None])))
    return float(np.mean(correct))

"""The pretraining of the tiny reward model, which takes ImageReward's place: drawn faces against spoiled copies.

Both sides of a pair went through the same autoencoder or neither did, and both get the same mild blur, resampling,
JPEG, flip and light, so that neither sharpness nor traces of the autoencoder tell them apart. None of this is in the
paper.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from checkpoints.tiny_models.damage import DAMAGES, LEVELS, PHOTOMETRIC, TRAINING_ONLY, UNSEEN
from checkpoints.tiny_models.data import Drawings, save_arrays, tidy_configs, write_info
from checkpoints.tiny_models.vae import pixel_batches
from faceprior import tiny
from faceprior.detect import face_square
from faceprior.images import as_array, cv2, load_image, to_pil
from faceprior.losses import pairwise_ranking_loss
from faceprior.pairs import gather_pairs
from faceprior.scorer import FaceScorer
from faceprior.training import TrainingRun, make_accelerator, make_optimizer

INPAINTED = 0.6  # fraction of the samples that are pairs of stage 1
DRAWN = 3000  # most drawings of a split that are used
SEEN = {**{name: damage for name, damage in DAMAGES.items() if name not in UNSEEN}, **TRAINING_ONLY}
STRUCTURAL = tuple(name for name in SEEN if name not in PHOTOMETRIC)
HARD = ("warp", "eye_shift", "nose_shift", "stretch", "shear")  # moved features: chosen three times as often
CHOSEN = (*PHOTOMETRIC, *STRUCTURAL, *HARD, *HARD)


class DrawnFaces(Dataset):
    """Drawn portraits: {"images": [as drawn, as the autoencoder reconstructs it], "landmarks", "box", "pair"}.

    "pair" is a function that reads good, bad and box of a pair of stage 1 (of other portraits), None without `pairs`.
    """

    def __init__(self, work: Path, split: str, vae: AutoencoderKL, pairs: Path | None = None):
        self.pairs = gather_pairs(pairs)[0] if pairs else []
        drawings = Drawings(work, split)
        path = work / f"round_trip_{split}.npz"
        if not path.is_file():
            save_arrays(path, images=round_trip(vae, drawings))
        self.images = (drawings.images, np.load(path)["images"])
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
        pair = partial(self._pair, index) if self.pairs else None
        return {"images": images, "landmarks": landmarks, "box": face["box"], "pair": pair}

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
        pair = self.pairs[index % len(self.pairs)]
        good, bad = (load_image(path) for path in (pair.good, pair.bad))
        square = face_square(good.size, pair.box, tiny.RESOLUTION)
        corner = np.array([*square[:2], *square[:2]])
        return as_array(good.crop(square)), as_array(bad.crop(square)), (pair.box - corner).tolist()


@torch.no_grad()
def round_trip(vae: AutoencoderKL, drawings: Drawings) -> np.ndarray:
    """Return the first drawings as the autoencoder reconstructs them, (N, R, R, 3) uint8."""
    images, count = [], min(DRAWN, len(drawings))
    for pixels in tqdm(pixel_batches(drawings, count), desc="round trip", total=-(-count // 32)):
        decoded = vae.decode(vae.encode(pixels.to(vae.device)).latent_dist.mode()).sample
        images += [np.asarray(image) for image in to_pil(decoded.cpu())]
    return np.stack(images)


class SpoiledPair:
    """Makes a pair of a drawn face: `good` and `bad`, (3, 224, 224) each, normalised by CLIP's mean and deviation."""

    def __init__(self, scorer: FaceScorer):
        self.preprocess = scorer.preprocess

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict:
        image, landmarks, box = sample["images"][rng.integers(2)], sample["landmarks"], sample["box"]
        good, bad = spoil(image, landmarks, rng)
        if sample["pair"] and rng.random() < INPAINTED:
            good, bad, box = sample["pair"]()
        both = alike((good, bad), rng)
        box = jitter(box, good.shape[1], rng)
        sides = self.preprocess([Image.fromarray(side) for side in both], [box, box])
        return {"good": sides[0], "bad": sides[1]}


def spoil(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a face and a worse one: one damage in two strengths, or a light photometric against a structural one."""
    seed = int(rng.integers(2**31))

    def damaged(image: np.ndarray, name: str, strength: float) -> np.ndarray:
        if strength == 0:
            return image
        return SEEN[name](image, landmarks, strength, np.random.default_rng(seed))

    if rng.random() < 0.6:
        name = str(rng.choice(CHOSEN))
        weak, strong = sorted(rng.choice((0.0, *LEVELS), 2, replace=False))
        weak = weak if rng.random() < 0.5 else 0.0
        return damaged(image, name, weak), damaged(image, name, strong)
    name, strength = str(rng.choice(CHOSEN[len(PHOTOMETRIC) :])), rng.uniform(0.4, 1.0)
    veiled = damaged(image, str(rng.choice(PHOTOMETRIC)), rng.uniform(0.05, 0.25))
    return veiled, damaged(veiled if rng.random() < 0.4 else image, name, strength)


def alike(sides: tuple[np.ndarray, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Apply the same mild blur, resampling, JPEG, light and flip to all sides."""
    width = sides[0].shape[1]
    sigma, size = rng.uniform(0, 1.1) * (rng.random() < 0.4) * width / 128, round(width * rng.uniform(0.5, 1))
    quality, gain = int(rng.integers(40, 96)), rng.uniform(0.8, 1.2)
    resampled, compressed, flipped = rng.random() < 0.3, rng.random() < 0.4, rng.random() < 0.5
    result = []
    for side in sides:
        if sigma > 0.1:
            side = cv2.GaussianBlur(side, (0, 0), sigma)
        if resampled:
            shape = side.shape[1::-1]
            side = cv2.resize(
                cv2.resize(side, (size, size), interpolation=cv2.INTER_AREA), shape, interpolation=cv2.INTER_CUBIC
            )
        if compressed:
            side = cv2.imdecode(cv2.imencode(".jpg", side, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
        side = (side * gain).clip(0, 255).astype(np.uint8)
        result.append(np.ascontiguousarray(side[:, ::-1]) if flipped else side)
    return result


def jitter(box: list[float], side: int, rng: np.random.Generator) -> list[float]:
    """Move each edge by up to a tenth of the box in a square image, since detectors do not agree on them."""
    width, height = box[2] - box[0], box[3] - box[1]
    moved = np.array(box) + rng.uniform(-0.1, 0.1, 4) * (width, height, width, height)
    return moved.clip(0, side).tolist()


def train_reward(config, work: Path) -> None:
    """Pretrain the BLIP reward model, and write it to checkpoints/tiny/reward in float16."""
    output = work / "reward"
    if (output / "done.json").is_file():
        return

    # ---- data, model and run
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    folder = tiny.tiny_folder() / "reward"
    scorer = FaceScorer.from_pretrained(folder, dtype=torch.float32) if config.go_on else tiny.tiny_scorer()
    accelerator = make_accelerator(config.device, config.mixed_precision)
    training = DrawnFaces(work, "train", vae, work / "reward_pairs")
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
    )
    make_pair = SpoiledPair(scorer)

    for batch in run.batches(training, batch_size=16, seed=0, augment=make_pair):
        # ---- the ranking loss (Face Score, Eq. 5), with a pull towards small margins around zero
        with accelerator.autocast():
            good, bad = model(torch.cat([batch["good"], batch["bad"]])).float().chunk(2)  # (B,) each
        loss = pairwise_ranking_loss(good, bad) + 1e-3 * (good**2 + bad**2).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, accuracy=(good > bad).float().mean(), margin=(good - bad).mean())

    # ---- accuracy on held-out faces, then the weights in float16
    accuracy = measure_order(scorer.eval(), held_out, make_pair)
    scorer.to(torch.float16).save_pretrained(folder)
    tidy_configs(folder)
    write_info(folder, run.steps)
    run.finish(validation_accuracy=accuracy)


@torch.no_grad()
def measure_order(scorer: FaceScorer, faces: DrawnFaces, make_pair: SpoiledPair) -> float:
    """Return the fraction of the held-out faces that score above their spoiled copies."""
    correct = []
    for index in range(len(faces)):
        pair = make_pair(faces[index], np.random.default_rng([1, index]))
        good, bad = scorer(torch.stack([pair["good"], pair["bad"]]).to(scorer.device))
        correct.append(bool(good > bad))
    return float(np.mean(correct))

"""The judge: a small ConvNet that orders faces, for measuring only. Nothing is trained with it or towards it.

Its architecture, the people it sees and the base whose ladders it climbs are not the scorer's, and it sees no pairs. So
it can tell whether the scorer, or a model tuned by it, is better or only better at pleasing the scorer. What both learn
alike is what a spoiled and a degraded drawing looks like.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ConvNextConfig, ConvNextForImageClassification

from checkpoints.tiny_models.damage import DAMAGES, TRAINING_ONLY
from checkpoints.tiny_models.data import Drawings, tidy_configs, write_info
from checkpoints.tiny_models.ladders import (
    People,
    View,
    alike,
    degradation_ladder,
    framed,
    in_order,
    jitter,
    ladder_loss,
    mirrored_and_lit,
    mixed_ladder,
    spoil,
    strength_ladder,
)
from faceprior import tiny
from faceprior.images import as_array, cv2
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, seeded

SEED = 1  # every other tiny model has the seed 0
WIDER = (1.2, 1.1, 1.3)  # side of the square that the judge sees, in units of the box's larger side; first: in training
BATCH = 12  # ladders
SHARE = 1 / 3  # of the drawings, from the last: of 9000 the reward model, its pairs and its ladders see only others
# The ways down a ladder, and how often each is taken, as for the reward model, without pairs.
WAYS = {"strength": 0.4, "mixed": 0.1, "spoiled": 0.3, "degraded": 0.2}


class FaceJudge(nn.Module):
    """A ConvNeXt with one output: how good a face is, without unit; only differences have a meaning.

    model: `ConvNextForImageClassification` with one label, whose input is (B, 3, R, R) in [-1, 1], R = tiny.RESOLUTION.
    """

    def __init__(self, model: ConvNextForImageClassification):
        super().__init__()
        self.model = model

    @classmethod
    def untrained(cls) -> "FaceJudge":
        """Build the judge from torch's random numbers: 0.4 M parameters."""
        # the published layer scale of 1e-6 is for deep networks: this one would learn nothing
        sizes = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "layer_scale_init_value": 1.0}
        return cls(ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=1)))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FaceJudge":
        """Load the judge in float32, for evaluation."""
        return cls(ConvNextForImageClassification.from_pretrained(folder, dtype=torch.float32)).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `ConvNextForImageClassification.from_pretrained` loads, with weights in float16."""
        weights = {key: value.half() for key, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16"}, indent=2) + "\n")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Faces (B, 3, R, R) in [-1, 1], as `crop_face` cuts them -> (B,)."""
        return self.model(pixel_values).logits[:, 0].float()

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], boxes: Sequence[Sequence[float]]) -> list[float]:
        """Judge one face in each image: the mean over three sizes of its box, each as it is and mirrored.

        boxes: xyxy in pixels, for an aligned face the whole image.
        """
        device, scores = next(self.parameters()).device, []
        for image, box in zip(images, boxes, strict=True):
            crops = torch.stack([crop_face(as_array(image), box, wider) for wider in WIDER]).to(device)
            scores.append(self(torch.cat([crops, crops.flip(-1)])).mean().item())
        return scores


def crop_face(image: np.ndarray, box: Sequence[float], wider: float = WIDER[0]) -> Tensor:
    """Cut a square around the box, as far as the image reaches, resize it -> (3, R, R) in [-1, 1]."""
    height, width = image.shape[:2]
    side = min(wider * max(box[2] - box[0], box[3] - box[1]), height, width)
    x0 = np.clip((box[0] + box[2] - side) / 2, 0, width - side)
    y0 = np.clip((box[1] + box[3] - side) / 2, 0, height - side)
    square = image[round(y0) : round(y0 + side), round(x0) : round(x0 + side)]
    shrinks = square.shape[0] > tiny.RESOLUTION
    resized = cv2.resize(square, (tiny.RESOLUTION,) * 2, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return torch.from_numpy(resized).permute(2, 0, 1).float() / 127.5 - 1


class JudgedFaces(Dataset):
    """What the judge learns from: {"person": on the SDXL type base's ladders, "portrait": drawn, "landmarks"}."""

    def __init__(self, work: Path):
        self.people, drawings = People(work, "sdxl"), Drawings(work, "train")
        first = round(len(drawings) * (1 - SHARE))
        self.portraits = [
            (View(drawings.images[index], face["box"]), np.array(face["landmarks"], np.float32))
            for index, record in enumerate(drawings.records)
            if record["kind"] == "portrait" and index >= first
            for face in record["faces"]
        ]

    def __len__(self) -> int:
        return max(len(self.people), len(self.portraits))

    def __getitem__(self, index: int) -> dict:
        portrait, landmarks = self.portraits[index % len(self.portraits)]
        return {"person": self.people[index % len(self.people)], "portrait": portrait, "landmarks": landmarks}


def make_rungs(sample: dict, rng: np.random.Generator, way: str | None = None) -> dict[str, Tensor]:
    """Return one of a face's ladders: "rungs", (4, 3, R, R), the best first.

    way: a key of WAYS, chosen at random if None. Only a degradation is judged in the whole image, too.
    """
    way = str(rng.choice(list(WAYS), p=list(WAYS.values()))) if way is None else way
    person, portrait = sample["person"], sample["portrait"]
    if way == "degraded":
        view = (person.portrait, person.aligned, person.aligned, person.rungs[0])[rng.integers(4)]
        images, box = mirrored_and_lit(degradation_ladder(view, rng), framed(view, rng), rng)
    elif way == "spoiled":
        images, _ = spoil(portrait, sample["landmarks"], {**DAMAGES, **TRAINING_ONLY}, rng)
        images, box = alike(images, jitter(portrait.box, portrait.image.shape[1], rng), rng)
    else:
        images = (strength_ladder if way == "strength" else mixed_ladder)(person, rng)
        images, box = alike(images, jitter(person.portrait.box, person.portrait.image.shape[1], rng), rng)
    return {"rungs": torch.stack([crop_face(image, box) for image in images])}


def train_judge(config, work: Path) -> None:
    """Train the judge on the SDXL type base's ladders and on degradations, and put it into checkpoints/tiny/judge."""
    output = work / "judge"
    if (output / "done.json").is_file():
        return

    # ---- the network, the people that only it knows, and the run
    folder = tiny.tiny_folder() / "judge"
    with seeded(SEED, "judge"):
        judge = FaceJudge.from_pretrained(folder) if config.go_on else FaceJudge.untrained()
    faces = JudgedFaces(work)
    accelerator = make_accelerator(config.device, config.mixed_precision)
    optimizer = make_optimizer(judge.parameters(), "adamw", config.judge_learning_rate, 0.05)
    model, optimizer = accelerator.prepare(judge.train(), optimizer)
    run = TrainingRun(
        output,
        config.judge_steps,
        accelerator,
        {"judge": model},
        {"judge": optimizer},
        save_every=200,
        warmup_steps=50,
        schedule="cosine",
    )

    for batch in run.batches(faces, BATCH, seed=SEED, augment=make_rungs):
        # ---- every upper rung above every lower one, with a pull towards small scores
        with accelerator.autocast():
            scores = model(batch["rungs"].flatten(0, 1)).unflatten(0, (-1, batch["rungs"].shape[1]))  # (B, L)
        loss = ladder_loss(scores) + 1e-3 * scores.square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, in_order=in_order(scores))

    # ---- the weights in float16
    judge.save_pretrained(folder)
    tidy_configs(folder)
    write_info(folder, run.steps, SEED)
    run.finish()

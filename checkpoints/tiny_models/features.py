"""The training of the tiny feature network: tags and landmarks of drawn portraits, also of imperfect ones."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from checkpoints.tiny_models.data import Drawings, write_info
from faceprior import tiny
from faceprior.degrade import DegradationConfig, degrade
from faceprior.features import FeatureNetwork
from faceprior.images import cv2
from faceprior.procedural.people import CHOICES
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, seeded

PREDICTED = (
    "sex", "age_group", "expression", "hair_color", "hair_style", "glasses", "beard", "skin_tone",
    "light_side", "light_hardness", "color_temperature", "background",
)  # fmt: skip
TAGS = {name: CHOICES[name] for name in PREDICTED}
HIDES_HAIR = ("bald", "head scarf", "knit cap", "hat", "cap")  # too little hair is visible to tell its colour
IGNORED = -100  # target of a tag that cannot be seen, as in F.cross_entropy
BATCH = 32
LANDMARK_WEIGHT, MAP_WEIGHT = 20.0, 0.2  # weights beside the mean cross entropy of the tags
MIRROR = (1, 0, 2, 4, 3)  # order of the landmarks after a flip: left is the side of the image
FLIPPED = {"light_side": {"left": "right", "right": "left"}}  # values that change sides
MOST_ZOOM = 1.5  # scale of an aligned face crop against a drawn portrait
# As imperfect as samples and restorations of 128 pixels are: the face has to stay recognisable.
MILD = DegradationConfig(
    blur_kernel=9, blur_sigma=(0.1, 1.0), downsample=(1.0, 1.7), noise=(0.0, 8.0), jpeg=(50, 100), jitter_prob=0.0
)


class Portraits(Dataset):
    """The portraits of a split: {"image": (R, R, 3) uint8, "landmarks": (5, 2) pixels, "tags": tag -> value}."""

    def __init__(self, drawings: Drawings):
        chosen = [i for i, record in enumerate(drawings.records) if record["kind"] == "portrait"]
        self.images = [drawings.images[i] for i in chosen]
        self.faces = [drawings.records[i]["faces"][0] for i in chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        face = self.faces[index]
        tags = {name: face["tags"][name] for name in PREDICTED}
        return {"image": self.images[index], "landmarks": np.array(face["landmarks"], np.float32), "tags": tags}


def to_tensors(sample: dict) -> dict[str, Tensor]:
    """Return pixel_values (3, R, R) in [-1, 1], landmarks (5, 2) in fractions of the side, targets (tags,) int64."""
    image, tags = sample["image"], dict(sample["tags"])
    targets = [TAGS[name].index(tags[name]) for name in PREDICTED]
    if tags["hair_style"] in HIDES_HAIR:
        targets[PREDICTED.index("hair_color")] = IGNORED
    return {
        "pixel_values": torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 127.5 - 1,
        "landmarks": torch.from_numpy(sample["landmarks"] / image.shape[1]).float(),
        "targets": torch.tensor(targets),
    }


def augment(sample: dict, rng: np.random.Generator) -> dict[str, Tensor]:
    """Flip, move, zoom and degrade a sample at random, with its landmarks and tags, and convert it to tensors."""
    if rng.random() < 0.5:
        sample = flip(sample)
    if rng.random() < 0.8:
        zoom = np.exp(rng.uniform(0, np.log(MOST_ZOOM))) if rng.random() < 0.5 else rng.uniform(0.95, 1.08)
        sample = move(sample, float(zoom), rng.uniform(-0.05, 0.05, 2))
    image = sample["image"]
    if rng.random() < 0.5:
        image = degrade(image, MILD, rng)
    if rng.random() < 0.5:
        gain, offset = rng.uniform(0.85, 1.15), rng.uniform(-12, 12)
        image = (image.astype(np.float32) * gain + offset).clip(0, 255).astype(np.uint8)
    return to_tensors({**sample, "image": image})


def flip(sample: dict) -> dict:
    """Mirror a sample: the landmarks swap sides, and the light comes from the other one."""
    landmarks = sample["landmarks"][list(MIRROR)].copy()
    landmarks[:, 0] = sample["image"].shape[1] - landmarks[:, 0]
    tags = {name: FLIPPED.get(name, {}).get(value, value) for name, value in sample["tags"].items()}
    return {"image": sample["image"][:, ::-1].copy(), "landmarks": landmarks, "tags": tags}


def move(sample: dict, zoom: float, shift: np.ndarray) -> dict:
    """Zoom a sample around its face and shift it by fractions of its side; beyond the edge the image is mirrored.

    The larger the zoom, the closer the face gets to the middle, so that it stays in the image.
    """
    image, landmarks = sample["image"], sample["landmarks"]
    side, centre = image.shape[1], landmarks.mean(axis=0)
    pull = np.clip((zoom - 1) / (MOST_ZOOM - 1), 0, 1)
    place = centre + pull * (0.5 * side - centre) + shift * side
    offset = place - zoom * centre
    # (0, 0) is the corner of the image; OpenCV counts from the first pixel's centre
    matrix = np.array([[zoom, 0, offset[0] + 0.5 * zoom - 0.5], [0, zoom, offset[1] + 0.5 * zoom - 0.5]])
    moved = cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return {**sample, "image": moved, "landmarks": (zoom * landmarks + offset).astype(np.float32)}


class LandmarkMaps(nn.Module):
    """A linear map from the last layer's patch tokens to five maps of the landmarks; dropped after training.

    It trains the patch tokens, which images are compared by: the head reads [CLS] only, so no other loss would reach
    those of the last layer.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 5)

    def loss(self, tokens: Tensor, landmarks: Tensor) -> Tensor:
        """Return the mean cross entropy over the patches.

        tokens: (B, 1 + h * w, D), [CLS] first; landmarks: (B, 5, 2) in fractions of the side.
        """
        logits = self.linear(tokens[:, 1:]).float().transpose(1, 2)  # (B, 5, h * w)
        side = round(logits.shape[-1] ** 0.5)
        column, row = (landmarks * side).long().clamp(0, side - 1).unbind(dim=-1)
        return F.cross_entropy(logits.flatten(0, 1), (row * side + column).flatten())


def features_loss(network: FeatureNetwork, outputs: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
    """Return mean cross entropy of the tags, and smooth L1 distance of the landmarks in fractions of the side."""
    logits = network.tag_logits(outputs)
    tags = [
        F.cross_entropy(logits[name], batch["targets"][:, i], ignore_index=IGNORED) for i, name in enumerate(PREDICTED)
    ]
    # a batch without any visible hair has no mean
    tags = torch.stack([loss for loss in tags if bool(loss.isfinite())]).mean()
    return tags, F.smooth_l1_loss(network.landmark_fractions(outputs), batch["landmarks"], beta=0.01)


def mean_landmarks(portraits: Portraits) -> Tensor:
    """Return the mean landmarks, (5, 2) in fractions of the side."""
    landmarks = [
        np.array(face["landmarks"]) / len(image) for face, image in zip(portraits.faces, portraits.images, strict=True)
    ]
    return torch.from_numpy(np.mean(landmarks, axis=0)).float()


def train_features(config, work: Path) -> None:
    """Train the feature network on drawn portraits and put it into checkpoints/tiny/features."""
    output = work / "features"
    if (output / "done.json").is_file():
        return

    # ---- network, data and run
    with seeded(0, "features"):
        network = FeatureNetwork.from_tags(TAGS)
        maps = LandmarkMaps(network.model.config.hidden_size)
    portraits = Portraits(Drawings(work, "train"))
    with torch.no_grad():  # landmarks start at their mean: only the difference of a face has to be learnt
        network.model.classifier.bias[network.landmark_outputs] = mean_landmarks(portraits).flatten()
    accelerator = make_accelerator(config.device, config.mixed_precision)
    parts = nn.ModuleDict({"network": network, "maps": maps}).train().to(accelerator.device)
    optimizer = make_optimizer(parts.parameters(), "adamw", config.feature_learning_rate, 0.05)
    parts, optimizer = accelerator.prepare(parts, optimizer)
    run = TrainingRun(
        output,
        config.feature_steps,
        accelerator,
        {"parts": parts},
        {"parts": optimizer},
        save_every=250,
        warmup_steps=100,
        schedule="cosine",
    )

    for batch in run.batches(portraits, BATCH, seed=0, augment=augment):
        # ---- tags and landmarks from [CLS], maps of the landmarks from the patches
        with accelerator.autocast():
            tokens = network.tokens(batch["pixel_values"])  # (B, 1 + h * w, D)
            outputs = network.model.classifier(tokens[:, 0]).float()
            map_loss = maps.loss(tokens, batch["landmarks"])
        tag_loss, landmark_loss = features_loss(network, outputs, batch)
        loss = tag_loss + LANDMARK_WEIGHT * landmark_loss + MAP_WEIGHT * map_loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, tags=tag_loss, landmarks=landmark_loss, maps=map_loss)

    # ---- the network without the maps, and its accuracy on validation portraits
    folder = tiny.tiny_folder() / "features"
    network.save_pretrained(folder)
    write_info(folder, run.steps)
    report = measure(FeatureNetwork.from_pretrained(folder), Portraits(Drawings(work, "validation")))
    print(", ".join(f"{name} {value:.3f}" for name, value in report.items()))
    run.finish(**report)


@torch.no_grad()
def measure(network: FeatureNetwork, portraits: Portraits) -> dict[str, float]:
    """Return each tag's accuracy, and the landmarks' mean error as a fraction of the distance between the eyes."""
    samples = [to_tensors(portraits[i]) for i in range(len(portraits))]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    outputs = torch.cat([network(pixels.to(network.device)).cpu() for pixels in batch["pixel_values"].split(BATCH)])
    report = {}
    for i, (name, logits) in enumerate(network.tag_logits(outputs).items()):
        seen = batch["targets"][:, i] != IGNORED
        report[name] = float((logits.argmax(dim=1) == batch["targets"][:, i])[seen].float().mean())
    distances = (network.landmark_fractions(outputs) - batch["landmarks"]).norm(dim=-1)
    between_eyes = (batch["landmarks"][:, 1] - batch["landmarks"][:, 0]).norm(dim=-1)
    report["landmark_error"] = float((distances.mean(dim=1) / between_eyes).mean())
    return report

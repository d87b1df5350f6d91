"""`FeatureNetwork`: a small vision transformer that tells tags and landmarks of drawn portraits, and compares pictures.

network = FeatureNetwork.from_pretrained("checkpoints/tiny/features")
network.tags("portrait.png")["glasses"]               # Tag(value="round", probability=0.97)
network.perceptual_distance(restored, original)       # the smaller, the more alike

Offline it stands where Inception (FID), LPIPS and DINO stand with a network. It has seen drawn portraits only, so its
numbers compare with each other and with no published ones. The face scorer is never trained with it: it can judge it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from faceprior.images import ImageSource, as_array, to_pixel_values

logger = logging.getLogger(__name__)
LANDMARK_OUTPUTS = tuple(f"landmark_{number}_{axis}" for number in range(5) for axis in "xy")
PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Tag:
    """What a picture shows, such as "round" for glasses, and the probability that the network gives it, [0, 1]."""

    value: str
    probability: float


class FeatureNetwork(nn.Module):
    """A vision transformer whose features compare pictures; with a head that names its outputs it tells tags, too.

    model: `ViTForImageClassification`, whose config.id2label names the outputs "tag=value" (one softmax for each tag)
    and "landmark_0_x" .. "landmark_4_y" (shares of the picture's width and height), or a bare `ViTModel` such as DINO,
    which has features only. image_mean, image_std: how the model takes pixels in [0, 1].

    Every picture is brought to the model's size first, so a face has to stand in it as in the pictures of training:
    for the shipped network a portrait from the shoulders up, or a face crop that is not much tighter.
    """

    def __init__(
        self,
        model: ViTForImageClassification | ViTModel,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.model = model
        # not saved: they belong to the pixels, as a processor's do
        self.register_buffer("mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        self.groups: dict[str, dict[str, int]] = {}  # tag -> value -> number of the output
        named = self._has_head and model.config.id2label
        for number, label in sorted(named.items()) if named else ():
            name, equals, value = label.partition("=")
            if equals:
                self.groups.setdefault(name, {})[value] = number
        places = {label: number for number, label in named.items()} if named else {}
        self.landmark_outputs = [places[name] for name in LANDMARK_OUTPUTS if name in places]

    @classmethod
    def from_tags(
        cls,
        tags: Mapping[str, Sequence[str]],
        image_size: int = 128,
        patch_size: int = 16,
        hidden_size: int = 128,
        layers: int = 5,
        heads: int = 4,
    ) -> FeatureNetwork:
        """Build an untrained network that tells `tags` (tag -> its values) and five landmarks: 1.1 M parameters."""
        labels = [f"{name}={value}" for name, values in tags.items() for value in values] + list(LANDMARK_OUTPUTS)
        config = ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden_size,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        return cls(ViTForImageClassification(config))

    @classmethod
    def from_pretrained(cls, name: str | Path) -> FeatureNetwork:
        """Load a folder that `save_pretrained` wrote, or any ViT of transformers from a folder or by its hub id.

        Weights arrive in float32, on the CPU, for evaluation. FileNotFoundError when there is no such model, ValueError
        when it is not a vision transformer or not whole.
        """
        folder = _find_folder(name)
        try:
            config = json.loads((folder / "config.json").read_text())
            if config.get("model_type") != "vit":
                raise ValueError(f"its `model_type` has to be vit but is {config.get('model_type')!r}")
            headed = "ViTForImageClassification" in (config.get("architectures") or [])
            model_class, options = (
                (ViTForImageClassification, {}) if headed else (ViTModel, {"add_pooling_layer": False})
            )
            model, notes = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
            if notes["missing_keys"]:
                raise ValueError(f"its weights lack {', '.join(sorted(notes['missing_keys'])[:3])}")
            processor = _read_processor(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the feature network in {folder} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        return cls(model, **processor).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `ViTForImageClassification.from_pretrained` loads, weights in float16."""
        folder = Path(folder)
        weights = {key: value.half() for key, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=2) + "\n")
        side = self.image_size
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": side, "width": side},
            "image_mean": self.mean.flatten().tolist(),
            "image_std": self.std.flatten().tolist(),
        }
        (folder / PROCESSOR_FILE).write_text(json.dumps(processor, indent=2) + "\n")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def image_size(self) -> int:
        """The side in pixels to which every picture is brought."""
        return self.model.config.image_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> the head's outputs (B, outputs), in the order of config.id2label."""
        if not self._has_head:
            raise ValueError("this network has no head: it gives features, but neither tags nor landmarks")
        return self.model(self._prepare(pixel_values)).logits.float()

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> the last layer's tokens (B, 1 + h * w, D), normed, [CLS] first."""
        return self._encoder(self._prepare(pixel_values)).last_hidden_state.float()

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, D): the last layer's [CLS] token.

        It is what the head reads and what a bare DINO was trained by; the mean of the patch tokens would forget where
        in the picture things are.
        """
        return self.tokens(pixel_values)[:, 0]

    def patch_features(self, pixel_values: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> the patch tokens (B, D, h, w) after each layer."""
        states = self._encoder(self._prepare(pixel_values), output_hidden_states=True).hidden_states
        side = self.image_size // self.model.config.patch_size
        return [state[:, 1:].float().transpose(1, 2).unflatten(2, (side, side)) for state in states[1:]]

    def perceptual_distance(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        """How different two pictures look to the network -> (B,), 0 for equal ones, 4 at most.

        As in LPIPS (arXiv 1801.03924, Eq. 1) features are scaled to unit length and their squared differences summed
        over the channels and averaged over space; unlike there layers and channels all weigh the same, and the average
        over the layers is taken. a, b: (B, 3, H, W) in [-1, 1]. mask: (B, 1, H, W) in [0, 1], such as eyes and mouth:
        patches count by the share of them that it covers. Gradients reach both pictures.
        """
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"`a` and `b` need the same number of pictures but have {a.shape[0]} and {b.shape[0]}")
        layers = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1, keepdim=True)
            for x, y in zip(self.patch_features(a), self.patch_features(b), strict=True)
        ]
        distance = torch.stack(layers).mean(dim=0)  # (B, 1, h, w)
        if mask is None:
            return distance.mean(dim=(1, 2, 3))
        if mask.ndim != 4 or mask.shape[:2] != (a.shape[0], 1):
            raise ValueError(f"`mask` has to be ({a.shape[0]}, 1, H, W) but is {tuple(mask.shape)}")
        weight = F.interpolate(mask.to(distance), size=distance.shape[-2:], mode="area")
        if not bool((weight.sum(dim=(1, 2, 3)) > 0).all()):
            raise ValueError("`mask` is empty for one of the pictures: there is nothing to compare")
        return (weight * distance).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))

    def tag_logits(self, outputs: Tensor) -> dict[str, Tensor]:
        """Outputs of `forward` (B, outputs) -> for each tag (B, values), in the order of `groups[tag]`."""
        return {name: outputs[:, list(values.values())] for name, values in self.groups.items()}

    def landmark_shares(self, outputs: Tensor) -> Tensor:
        """Outputs of `forward` (B, outputs) -> (B, 5, 2): x and y as shares of the picture's width and height."""
        if len(self.landmark_outputs) != len(LANDMARK_OUTPUTS):
            raise ValueError("this network names no landmarks among its outputs")
        return outputs[:, self.landmark_outputs].unflatten(1, (5, 2))

    @torch.no_grad()
    def tags(self, image: ImageSource) -> dict[str, Tag]:
        """What a portrait shows: tag -> its most likely value and the probability of it."""
        outputs = self(to_pixel_values(image).to(self.device))
        told = {}
        for name, logits in self.tag_logits(outputs).items():
            probability, index = logits[0].softmax(dim=0).max(dim=0)
            told[name] = Tag(list(self.groups[name])[int(index)], float(probability))
        return told

    @torch.no_grad()
    def landmarks(self, image: ImageSource) -> np.ndarray:
        """The five landmarks of a portrait: (5, 2) float32 pixels, in the order of `faceprior.detect.LANDMARK_NAMES`.

        Told by a network that sees the picture at `image_size`, and that always gives five points, face or not.
        """
        height, width = as_array(image).shape[:2]
        shares = self.landmark_shares(self(to_pixel_values(image).to(self.device)))[0].cpu().numpy()
        return shares * np.array([width, height], np.float32)

    @property
    def _has_head(self) -> bool:
        return hasattr(self.model, "classifier")

    @property
    def _encoder(self) -> ViTModel:
        return self.model.vit if self._has_head else self.model

    def _prepare(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the model's size and normalisation; aspect ratios are not kept."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` has to be (B, 3, H, W) but is {tuple(pixel_values.shape)}")
        pixels, side = pixel_values.float(), self.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return (0.5 * pixels + 0.5 - self.mean) / self.std


def tiny_fid_extractor(network: FeatureNetwork) -> Callable[[Tensor], Tensor]:
    """Return the `extractor` of `metrics.fid` for the TINY FID: this network's features in place of Inception's.

    Pixels (B, 3, H, W) in 0..255 -> (B, D). The number is no FID of the literature: it compares sets of drawn and
    generated portraits with each other.
    """

    @torch.no_grad()
    def extract(pixels: Tensor) -> Tensor:
        return network.features(pixels.to(network.device) / 127.5 - 1)

    return extract


def _find_folder(name: str | Path) -> Path:
    """Return the folder of a model by its path, or from the hub's cache or the hub by its id."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) or str(name).startswith("checkpoints/"):
        raise FileNotFoundError(
            f"no feature network in {folder}: a folder with config.json and model.safetensors is expected; "
            "`python -m checkpoints.tiny_models.make_tiny --only features` trains one"
        )
    options = {"allow_patterns": ["config.json", PROCESSOR_FILE, "*.safetensors"]}
    try:
        return Path(snapshot_download(str(name), local_files_only=True, **options))
    except (OSError, ValueError):
        logger.debug("%s is not in the hub's cache", name)
    try:
        return Path(snapshot_download(str(name), **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no feature network {str(name)!r}: there is no such folder here, and the hub did not give it (offline, "
            f"gated, or a wrong id). Download it where there is a network (`hf download {name} --local-dir FOLDER`) "
            "and give the folder"
        ) from error


def _read_processor(folder: Path) -> dict[str, Sequence[float]]:
    """The pixels' mean and deviation; ViT's 0.5 where the folder does not say."""
    path = folder / PROCESSOR_FILE
    values = json.loads(path.read_text()) if path.is_file() else {}
    return {name: values[name] for name in ("image_mean", "image_std") if name in values}

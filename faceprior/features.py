"""`FeatureNetwork`: a small vision transformer that predicts tags and landmarks of drawn portraits and compares images.

network = FeatureNetwork.from_pretrained("checkpoints/tiny/features")
network.tags("portrait.png")["glasses"]               # Tag(value="round", probability=0.97)
network.perceptual_distance(restored, original)       # 0 for equal images

Offline it replaces Inception (FID), LPIPS and DINO. It has seen drawn portraits only, so its numbers compare with each
other, not with published ones. The face scorer is never trained with it, so it can evaluate the scorer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from faceprior.images import ImageSource, as_array, to_pixel_values
from faceprior.models import MODEL_FILES, first_line, resolve_model

LANDMARK_OUTPUTS = tuple(f"landmark_{number}_{axis}" for number in range(5) for axis in "xy")
DINO_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 8}
PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Tag:
    """A predicted value of a tag, such as "round" for glasses, and its probability, [0, 1]."""

    value: str
    probability: float


class FeatureNetwork(nn.Module):
    """A vision transformer whose features compare images; with a head that names its outputs it predicts tags, too.

    model: `ViTForImageClassification`, whose config.id2label names the outputs "tag=value" (one softmax per tag) and
    "landmark_0_x" .. "landmark_4_y" (fractions of the image's width and height), or a bare `ViTModel` such as DINO,
    which has features only. image_mean, image_std: the normalisation of pixels in [0, 1].

    Every image is resized to the model's size first, so a face has to be framed as in the training images: for the
    shipped network a portrait from the shoulders up, or a face crop that is not much tighter.
    """

    def __init__(
        self,
        model: ViTForImageClassification | ViTModel,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.model = model
        # saved as a processor's file, not as weights
        self.register_buffer("mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        labels = model.config.id2label if self._has_head else {}
        self.groups: dict[str, dict[str, int]] = {}  # tag -> value -> index of the output
        for index, label in sorted(labels.items()):
            name, equals, value = label.partition("=")
            if equals:
                self.groups.setdefault(name, {})[value] = index
        indices = {label: index for index, label in labels.items()}
        self.landmark_outputs = [indices[name] for name in LANDMARK_OUTPUTS if name in indices]

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
        """Build an untrained network that predicts `tags` (tag -> its values) and five landmarks: 1.1 M parameters."""
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
        """Load a folder that `save_pretrained` wrote, or any ViT of transformers by its folder or hub id.

        Weights arrive in float32, on the CPU, for evaluation. Raises FileNotFoundError if there is no such model,
        ValueError if it is not a vision transformer or damaged.
        """
        hint = "`python -m checkpoints.tiny_models.make_tiny --only features` trains one"
        # DINO's oldest repositories have no safetensors; transformers reads such a file with `weights_only=True`
        folder = resolve_model(name, "feature network", hint, patterns=(*MODEL_FILES, "pytorch_model.bin"))
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
            raise ValueError(f"the feature network in {folder} cannot be loaded: {first_line(error)}") from error
        return cls(model, **processor).eval()

    @classmethod
    def from_config(cls, name: str | Path) -> FeatureNetwork:
        """Build an untrained network of the sizes of a ViT's folder, or else of DINO's ViT-S/8, to plan with."""
        file = Path(name) / "config.json"
        sizes = json.loads(file.read_text()) if file.is_file() else DINO_SMALL
        return cls(ViTModel(ViTConfig(**sizes), add_pooling_layer=False)).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `ViTForImageClassification.from_pretrained` loads, with weights in float16."""
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
        """The side in pixels to which every image is resized."""
        return self.model.config.image_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the head's outputs (B, outputs), in the order of config.id2label."""
        if not self._has_head:
            raise ValueError("this network has no head: it has features, but no tags and no landmarks")
        return self.model(self._prepare(pixel_values)).logits.float()

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the last layer's tokens (B, 1 + h * w, D), normalised, [CLS] first."""
        return self._encoder(self._prepare(pixel_values)).last_hidden_state.float()

    def features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, D): the last layer's [CLS] token.

        The head reads it, and a bare DINO was trained by it; the mean of the patch tokens would lose where things are.
        """
        return self.tokens(pixel_values)[:, 0]

    def patch_features(self, pixel_values: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the patch tokens (B, D, h, w) after each layer."""
        states = self._encoder(self._prepare(pixel_values), output_hidden_states=True).hidden_states
        side = self.image_size // self.model.config.patch_size
        return [state[:, 1:].float().transpose(1, 2).unflatten(2, (side, side)) for state in states[1:]]

    def perceptual_distance(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how different two images look to the network -> (B,) in [0, 4], 0 for equal ones.

        LPIPS (arXiv 1801.03924, Eq. 1) with equal weights: features are scaled to unit length, their squared
        differences summed over the channels, averaged over space and, unlike there, over the layers.

        a, b: (B, 3, H, W) in [-1, 1]. mask: (B, 1, H, W) in [0, 1], such as eyes and mouth: each patch counts by the
        fraction of it that the mask covers. Gradients reach both images.
        """
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"`a` and `b` need the same number of images but have {a.shape[0]} and {b.shape[0]}")
        layers = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1, keepdim=True)
            for x, y in zip(self.patch_features(a), self.patch_features(b), strict=True)
        ]
        distance = torch.stack(layers).mean(dim=0)  # (B, 1, h, w)
        if mask is None:
            return distance.mean(dim=(1, 2, 3))
        if mask.ndim != 4 or mask.shape[:2] != (a.shape[0], 1):
            raise ValueError(f"`mask` has to be ({a.shape[0]}, 1, H, W) but is {tuple(mask.shape)}")
        weight = F.interpolate(mask.to(distance), size=distance.shape[-2:], mode="area")  # (B, 1, h, w)
        if not bool((weight.sum(dim=(1, 2, 3)) > 0).all()):
            raise ValueError("`mask` is empty for one of the images: there is nothing to compare")
        return (weight * distance).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))

    def tag_logits(self, outputs: Tensor) -> dict[str, Tensor]:
        """Outputs of `forward` (B, outputs) -> for each tag its logits (B, values), in the order of `groups[tag]`."""
        return {name: outputs[:, list(values.values())] for name, values in self.groups.items()}

    def landmark_fractions(self, outputs: Tensor) -> Tensor:
        """Outputs of `forward` (B, outputs) -> (B, 5, 2): x and y as fractions of the image's width and height."""
        if len(self.landmark_outputs) != len(LANDMARK_OUTPUTS):
            raise ValueError("this network names no landmarks among its outputs")
        return outputs[:, self.landmark_outputs].unflatten(1, (5, 2))

    @torch.no_grad()
    def tags(self, image: ImageSource) -> dict[str, Tag]:
        """Predict what a portrait shows: tag -> its most likely value, with its probability."""
        outputs = self(to_pixel_values(image).to(self.device))
        predicted = {}
        for name, logits in self.tag_logits(outputs).items():
            probability, index = logits[0].softmax(dim=0).max(dim=0)
            predicted[name] = Tag(list(self.groups[name])[int(index)], float(probability))
        return predicted

    @torch.no_grad()
    def landmarks(self, image: ImageSource) -> np.ndarray:
        """Predict the five landmarks of a portrait: (5, 2) float32 pixels, in the order of `detect.LANDMARK_NAMES`.

        The network sees the image at `image_size` and always predicts five points, even without a face.
        """
        height, width = as_array(image).shape[:2]
        fractions = self.landmark_fractions(self(to_pixel_values(image).to(self.device)))[0].cpu().numpy()
        return fractions * np.array([width, height], np.float32)

    @property
    def _has_head(self) -> bool:
        return hasattr(self.model, "classifier")

    @property
    def _encoder(self) -> ViTModel:
        return self.model.vit if self._has_head else self.model

    def _prepare(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, image_size, image_size), normalised; the aspect ratio is not kept."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` has to be (B, 3, H, W) but is {tuple(pixel_values.shape)}")
        pixels, side = pixel_values.float(), self.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return (0.5 * pixels + 0.5 - self.mean) / self.std


def tiny_fid_extractor(network: FeatureNetwork) -> Callable[[Tensor], Tensor]:
    """Return the `extractor` of `metrics.fid` for the TINY FID: this network's features instead of Inception's.

    Pixels (B, 3, H, W) in 0..255 -> (B, D). The TINY FID compares sets of drawn and generated portraits with each
    other; it is not comparable with an FID of the literature.
    """

    @torch.no_grad()
    def extract(pixels: Tensor) -> Tensor:
        return network.features(pixels.to(network.device) / 127.5 - 1)

    return extract


def _read_processor(folder: Path) -> dict[str, Sequence[float]]:
    """Return the pixels' mean and standard deviation; nothing, so ViT's 0.5, if the folder does not have them."""
    path = folder / PROCESSOR_FILE
    values = json.loads(path.read_text()) if path.is_file() else {}
    return {name: values[name] for name in ("image_mean", "image_std") if name in values}

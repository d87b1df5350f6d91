"""
How fast images are scored: the official way and ours, side by side, with the same weights, detector and boxes.

    python tests/benchmarks/score.py                                        # ViT-L on the CPU, some minutes
    python tests/benchmarks/score.py --device cuda --images 200
    python tests/benchmarks/score.py --size tiny --images 60 --faces 1
"""

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from transformers import BlipTextModel, BlipVisionModel

from faceprior.blip import CLIP_MEAN, CLIP_STD, MAX_PROMPT_TOKENS
from faceprior.detect import crop_bounds, detect_faces
from faceprior.images import save_image
from faceprior.procedural import draw_portrait
from faceprior.scorer import FaceScorer
from faceprior.tiny import tiny_scorer

VIT_B = {"vision_hidden_size": 768, "vision_layers": 12, "vision_heads": 12, "vision_intermediate": 3072}
SIZES = {"tiny": tiny_scorer, "base": lambda: FaceScorer(**VIT_B), "large": FaceScorer}
DETECTOR = "mtcnn"
FACE = 256  # pixels, side of each of the portraits that stand beside each other in an image


class OfficialWay(nn.Module):
    """The official code as `FaceScorer`'s documentation describes it, on the library's modules and the same tensors.

    One path at a time: read, detect, crop, one pass for all faces of the image, a prompt padded to 35 tokens,
    float32, autograd left on.
    """

    def __init__(self, scorer: FaceScorer):
        super().__init__()
        with init_empty_weights(include_buffers=False):
            self.vision_model = BlipVisionModel(scorer.vision_model.config)
            self.text_model = BlipTextModel(scorer.text_model.config, add_pooling_layer=False)
        self.vision_model.load_state_dict(scorer.vision_model.state_dict(keep_vars=True), assign=True)
        self.text_model.load_state_dict(scorer.text_model.state_dict(keep_vars=True), assign=True)
        self.mlp = scorer.mlp
        size = scorer.config.image_size
        self.transform = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(CLIP_MEAN, CLIP_STD),
            ]
        )
        prompt = torch.tensor(scorer.config.prompt_token_ids)
        self.input_ids = nn.functional.pad(prompt, (0, MAX_PROMPT_TOKENS - len(prompt)))[None].to(scorer.device)
        self.attention_mask = (torch.arange(MAX_PROMPT_TOKENS) < len(prompt)).long()[None].to(scorer.device)
        self.to(scorer.device).eval()

    def score(self, path: Path) -> list[float]:
        """One image's rewards by box, from left to right."""
        image = Image.open(path).convert("RGB")
        faces = sorted(detect_faces(np.array(image), DETECTOR), key=lambda face: face.box)
        if not faces:
            return []
        crops = [image.crop(crop_bounds(face.box, *image.size)) for face in faces]
        return self(torch.stack([self.transform(crop) for crop in crops]).to(self.input_ids.device)).tolist()

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.text_model(
            input_ids=self.input_ids.expand(len(pixel_values), -1),
            attention_mask=self.attention_mask.expand(len(pixel_values), -1),
            encoder_hidden_states=self.vision_model(pixel_values).last_hidden_state,
        ).last_hidden_state[:, 0]
        return self.mlp(features)[:, 0]


def main() -> None:
    options = parse()
    scorer = random_weights(SIZES[options.size]()).to(options.device)
    official, half = OfficialWay(scorer), copy.deepcopy(scorer).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            draw(Path(folder, f"{i}.jpg"), range(i * options.faces, (i + 1) * options.faces))
            for i in range(options.images)
        ]
        ways = {
            "official, float32": lambda some: [official.score(path) for path in some],
            "ours, float32": lambda some: ours(scorer, some),
            "ours, bfloat16": lambda some: ours(half, some),
            "products, float32": lambda some: products_alone(scorer, options.faces * len(some)),
            "products, bfloat16": lambda some: products_alone(half, options.faces * len(some)),
        }
        seconds, rewards = measure(ways, paths, options.repeats)
    report(options, seconds, rewards)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large", help="of the scorer (default: the published one's)")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--faces", type=int, default=2, help="in each image")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the best of each way counts")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def random_weights(scorer: FaceScorer) -> FaceScorer:
    """Weights so large that the rewards differ from face to face."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                parameter.normal_(std=1.2 / math.sqrt(parameter[0].numel()), generator=generator)
    return scorer.eval()


def draw(path: Path, seeds: range) -> Path:
    return save_image(np.concatenate([draw_portrait(seed, FACE).image for seed in seeds], axis=1), path)


def ours(scorer: FaceScorer, paths: list[Path]) -> list[list[float]]:
    """What the command line does as well; each image's rewards by box, from left to right."""
    found = scorer.score(paths, detector=DETECTOR)
    return [[face.score for face in sorted(faces, key=lambda face: face.box)] for faces in found]


@torch.no_grad()
def products_alone(scorer: FaceScorer, faces: int) -> list:
    """Nothing but the linear layers of the vision tower, on as many tokens as the faces have: a bound for any way."""
    vision = scorer.vision_model
    tokens = faces * (1 + (scorer.config.image_size // vision.config.patch_size) ** 2)
    layers = [module for module in vision.encoder.modules() if isinstance(module, nn.Linear)]
    inputs = {layer.in_features: torch.randn(tokens, layer.in_features).to(layer.weight) for layer in layers}
    for layer in layers:
        layer(inputs[layer.in_features])
    return []


def measure(ways: dict[str, Callable], paths: list[Path], repeats: int) -> tuple[dict, dict]:
    """The best (clock, processor) seconds of each way, and what it found; each in every round, one after the other."""
    seconds, rewards = dict.fromkeys(ways, (math.inf, math.inf)), {}
    for way in ways.values():
        way(paths[:1])  # loads the detector, warms the device up
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            found = way(paths)
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            seconds[name] = tuple(map(min, seconds[name], spent))
            rewards[name] = np.array([reward for image in found for reward in image])
    return seconds, rewards


def report(
    options: argparse.Namespace, seconds: dict[str, tuple[float, float]], rewards: dict[str, np.ndarray]
) -> None:
    first = next(iter(seconds))
    reference = rewards[first]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(
        f"{options.size}, {options.images} images, {len(reference)} faces, {options.device} ({device}), "
        f"torch {torch.__version__}; rewards from {reference.min():.3f} to {reference.max():.3f}"
    )
    print(f"{'':18}  {'s/image':>9}  {'as fast':>7}  {'CPU s':>9}  {'as little':>9}  {'largest difference':>18}")
    for name, (clock, processor) in seconds.items():
        difference = f"{np.abs(rewards[name] - reference).max():18.1e}" if len(rewards[name]) else f"{'':18}"
        print(
            f"{name:18}  {clock / options.images:9.3f}  {seconds[first][0] / clock:6.2f}x  "
            f"{processor / options.images:9.3f}  {seconds[first][1] / processor:8.2f}x  {difference}"
        )


if __name__ == "__main__":
    main()

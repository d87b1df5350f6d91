"""What several figures share: the models, the drawn test images and the samples of the bases.

Images that take a network to make are kept below results/tiny, and made once for each model and its settings.
"""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from checkpoints.tiny_models.judge import FaceJudge
from checkpoints.tiny_models.ladders import half_precision
from checkpoints.tiny_models.stages import run
from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.diffusion import decode_latents, encode_latents, sample_images
from faceprior.features import FeatureNetwork
from faceprior.files import atomic_write
from faceprior.images import contact_sheet, load_image, save_image, to_pil, to_pixel_values
from faceprior.metrics import MetricUnavailable
from faceprior.models import load_part, resolve_device
from faceprior.procedural import TEST_SEEDS, Drawing, draw_portrait
from faceprior.scorer import FaceScorer

SHIPPED = ("sd15", "sdxl", "scorer", "guided", "restorer", "features", "judge")  # others: in the work folder
SAMPLED_BY = ("scheduler_config.json", "restorer_config.json")  # the settings of a model that its images depend on
BATCH = 16
MAKE_TINY = "python -m checkpoints.tiny_models.make_tiny"

drawn_portrait = cache(lambda index, size: draw_portrait(TEST_SEEDS + index, size))


class Bench:
    """The models to measure and the images to measure them on. config: the one of figures.py."""

    def __init__(self, config):
        self.config, self.work, self.output = config, Path(config.work), Path(config.output)
        self.models = Path(config.models) if config.models else tiny.tiny_folder()
        self.device = resolve_device(config.device)

    # --- models ---

    def folder(self, kind: str) -> Path:
        """Return the folder of a finished model, shipped or in the work folder, or raise MetricUnavailable."""
        if kind in SHIPPED:
            folder = self.models / kind
            info, command = tiny.info(folder), f"`{MAKE_TINY} --only {kind}`"
            if info is None:
                raise MetricUnavailable(f"{folder} does not exist: {command} trains it")
            if not (info.get("trained") or self.config.untrained):
                raise MetricUnavailable(f"{folder} is untrained: {command} trains it")
            return folder
        return self.finished(kind)

    def finished(self, name: str) -> Path:
        """Return a finished run's folder in the work folder."""
        folder = self.work / name
        if not (folder / "done.json").is_file():
            raise MetricUnavailable(f"no finished run in {folder}: `{MAKE_TINY} --only {name}` makes one")
        return folder

    def digest(self, kind: str) -> str | None:
        """Return a digest of a model's weights, None where the model does not exist."""
        try:
            return digest_of(self.folder(kind))
        except MetricUnavailable:
            return None

    @cached_property
    def scorer(self) -> FaceScorer:
        return FaceScorer.from_pretrained(self.folder("scorer"), dtype=torch.float32).to(self.device)

    @cached_property
    def features(self) -> FeatureNetwork:
        return FeatureNetwork.from_pretrained(self.folder("features")).to(self.device)

    @cached_property
    def judge(self) -> FaceJudge:
        return FaceJudge.from_pretrained(self.folder("judge")).to(self.device)

    @cached_property
    def vae(self) -> AutoencoderKL:
        return load_part(AutoencoderKL, str(self.folder("sd15") / "vae"), "VAE").to(self.device)

    @torch.no_grad()
    def round_trip(self, images: list[Image.Image]) -> list[Image.Image]:
        """Return images of one size as the autoencoder reconstructs them."""
        decoded = []
        for start in range(0, len(images), BATCH):
            pixels = to_pixel_values(images[start : start + BATCH])
            decoded += to_pil(decode_latents(self.vae, encode_latents(self.vae, pixels)))
        return decoded

    def score(self, images: list[Image.Image], boxes: list) -> list[float]:
        """Return the Face Score of one known face in each image."""
        return [found[0].score for found in self.scorer.score(images, faces=[[box] for box in boxes])]

    @torch.no_grad()
    def outputs(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the feature network's outputs for images of one size, (B, outputs) on the CPU."""
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return torch.cat([self.features(to_pixel_values(batch).to(self.device)).cpu() for batch in batches])

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the feature network's features of images of one size, (B, D) on the CPU."""
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return torch.cat([self.features.features(to_pixel_values(batch).to(self.device)).cpu() for batch in batches])

    def predict_tags(self, images: list[Image.Image]) -> list[dict[str, str]]:
        """Return the tags that the feature network predicts for each image: tag -> value."""
        chosen = {}
        for name, logits in self.features.tag_logits(self.outputs(images)).items():
            values = list(self.features.groups[name])
            chosen[name] = [values[index] for index in logits.argmax(dim=1).tolist()]
        return [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]

    # --- drawn test portraits ---

    def portraits(self, count: int) -> list[Drawing]:
        """Return the first test portraits, drawn at the models' resolution."""
        return [drawn_portrait(index, tiny.RESOLUTION) for index in range(count)]

    # --- samples ---

    def samples(self, name: str, load: Callable[[], DiffusionPipeline] | None = None) -> list[Image.Image]:
        """Return the samples of a base: image i has the caption of test portrait i as its prompt, and the seed i.

        name: sd15, sdxl or a model in the work folder, which `load` loads. Samples are kept, and made where missing.
        """
        config, source = self.config, self.folder(name)
        settings = {key: getattr(config, key) for key in ("sample_steps", "guidance_scale", "mixed_precision")}
        prompts = [drawing.caption() for drawing in self.portraits(config.num_samples)]
        folder = self.fresh(f"samples/{name}", {**settings, "model": digest_of(source), "drawings": drawing_digest()})
        missing = [index for index in range(config.num_samples) if not image_path(folder, index).is_file()]
        if missing:
            pipeline = (load() if load else load_pipeline(source)).to(self.device)
            with self.half_precision(pipeline.unet):
                for start in tqdm(range(0, len(missing), BATCH), desc=f"sampling {name}", unit="batch"):
                    batch = missing[start : start + BATCH]
                    options = (tiny.RESOLUTION, config.sample_steps, config.guidance_scale)
                    images = sample_images(pipeline, [prompts[i] for i in batch], batch, *options)
                    for index, image in zip(batch, images, strict=True):
                        save_image(image, image_path(folder, index))
        return [load_image(image_path(folder, index)) for index in range(config.num_samples)]

    @contextmanager
    def half_precision(self, *networks: torch.nn.Module) -> Iterator[None]:
        """Run the networks' matrix products in bfloat16, if so configured; all else stays float32, the VAE too."""
        with half_precision(self.config.mixed_precision, self.device.type, *networks):
            yield

    def fresh(self, name: str, key: dict) -> Path:
        """Return the folder `name` below the results for images of that key; images of another key are deleted."""
        folder = self.output / name
        file = folder.with_name(folder.name + ".key.json")
        if not file.is_file() or json.loads(file.read_text()) != key:
            shutil.rmtree(folder, ignore_errors=True)
            with atomic_write(file, "w") as stream:
                json.dump(key, stream)
        return folder

    def sheet(self, name: str, images: list[Image.Image], columns: int) -> None:
        """Write a contact sheet of images of one size."""
        if images:
            arrays = [np.asarray(image.convert("RGB")) for image in images]
            save_image(contact_sheet(arrays, columns), self.output / "sheets" / f"{name}.png")

    def train(self, stage: str, name: str, like: str, **changes) -> Path:
        """Return the model `name` in the work folder, trained by a stage as `like` was, except for the changes."""
        source, output = self.finished(like), self.work / name
        key, stamp = digest_of(source), self.work / f"{name}.key.json"
        if stamp.is_file() and json.loads(stamp.read_text()) != key:
            raise MetricUnavailable(f"{output} was trained for another {source}: delete it and {stamp}")
        if not (output / "done.json").is_file():
            words = " ".join(f"--{option} {value}" for option, value in changes.items())
            command = f"python stages/{stage}.py --config {source / 'config.yaml'} --output {output} {words}"
            if not self.config.train_ablations:
                raise MetricUnavailable(f"{output} does not exist: `{command}` trains it")
            stamp.write_text(json.dumps(key))
            try:
                run(stage, output, config=source / "config.yaml", **changes)
            except subprocess.CalledProcessError as error:
                raise MetricUnavailable(f"`{command}` failed (exit code {error.returncode})") from error
        return output


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def digest_of(folder: Path) -> str:
    """Return a digest of a model's weights and of how it is sampled; other files in its folder do not count."""
    digest = hashlib.sha256()
    for path in sorted(path for name in ("*.safetensors", *SAMPLED_BY) for path in folder.rglob(name)):
        if "resume" not in path.parts:
            digest.update(path.relative_to(folder).as_posix().encode() + content_of(path))
    return digest.hexdigest()[:16]


def content_of(path: Path) -> bytes:
    """Return the content of a file; of a configuration all but the version of the library that wrote it."""
    if path.suffix != ".json":
        return path.read_bytes()
    values = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_version")}
    return json.dumps(values, sort_keys=True).encode()


@cache
def drawing_digest() -> str:
    """Return a digest of one test portrait, which figures are kept with: they depend on how people are drawn."""
    return hashlib.sha256(drawn_portrait(0, tiny.RESOLUTION).image.tobytes()).hexdigest()[:16]

"""
Train the tiny models of the embedded default, from nothing, by seeds.

    python checkpoints/make_tiny.py                        # every step, one after the other
    python checkpoints/make_tiny.py --only vae             # one step

Every step goes on where it was stopped. Writes its work below `work` and the finished parts into checkpoints/tiny.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.config import run_stage
from faceprior.diffusion import noise_like
from faceprior.losses import noise_loss
from faceprior.metrics import psnr
from faceprior.procedural import TRAIN_SEEDS, VALIDATION_SEEDS, draw_portrait, draw_scene
from faceprior.training import (
    TrainingRun,
    drop_prompts,
    make_accelerator,
    make_optimizer,
    quiet_libraries,
    sample_timesteps,
    seeded,
)

CHUNK = 200  # drawings in a file
SCENE_EVERY = 5  # of the drawings; the others are portraits
SCENE_SEEDS = 5_000  # scenes take the upper half of the training seeds


@dataclass
class Config:
    work: str = "data/tiny"  # folder for drawings, latents and runs in progress
    only: Literal["all", "draw", "vae", "base"] = "all"  # the step to do
    num_drawn: int = 6000  # training pictures, [200, 9999]
    resolution: int = 128  # pixels, [64, 256]
    vae_steps: int = 4000  # of batch 8, [1, inf)
    vae_learning_rate: float = 1.5e-3  # of AdamW, (0, 1)
    base_steps: int = 2600  # of batch 32, [1, inf)
    base_learning_rate: float = 1e-3  # of AdamW, (0, 1)
    ema_decay: float = 0.998  # of the weights that are kept, [0, 1)
    mixed_precision: Literal["no", "bf16"] = "bf16"  # bf16 is 1.4 to 2 times as fast on a CPU that has it
    shard: int = 0  # which half of the drawings to draw, to use two processes, [0, 1]
    num_shards: int = 1  # processes that draw, [1, 2]
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def main(config: Config) -> None:
    quiet_libraries()
    work = Path(config.work)
    steps = {"draw": draw, "vae": train_vae, "base": train_base}
    for name, step in steps.items():
        if config.only in ("all", name):
            step(config, work)


def draw(config: Config, work: Path) -> None:
    """Draw the training pictures (four portraits, then a scene) and 200 validation portraits."""
    jobs = [("train", first) for first in range(0, config.num_drawn, CHUNK)] + [("validation", 0)]
    for split, first in tqdm(jobs[config.shard :: config.num_shards], desc="drawing", unit="file"):
        path = work / split / f"{first:06d}.npz"
        if not path.is_file():
            images, captions = zip(*(draw_one(config, split, first + i) for i in range(CHUNK)), strict=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part.npz")
            np.savez(temporary, images=np.stack(images), captions=np.array(captions))
            temporary.replace(path)


def draw_one(config: Config, split: str, index: int) -> tuple[np.ndarray, str]:
    if split == "validation":
        drawing = draw_portrait(VALIDATION_SEEDS + index, config.resolution)
    elif index % SCENE_EVERY:
        drawing = draw_portrait(TRAIN_SEEDS + index, config.resolution)
    else:
        drawing = draw_scene(TRAIN_SEEDS + SCENE_SEEDS + index // SCENE_EVERY, config.resolution, area_bin=2)
    return drawing.image, drawing.caption()


class Drawings(Dataset):
    """The drawn pictures of a split: {"pixel_values": (3, R, R) in [-1, 1], "caption"}."""

    def __init__(self, work: Path, split: str):
        files = [np.load(path) for path in sorted((work / split).glob("0*.npz"))]
        if not files:
            raise FileNotFoundError(f"no drawings in {work / split}: `python checkpoints/make_tiny.py --only draw`")
        self.images = np.concatenate([file["images"] for file in files])
        self.captions = np.concatenate([file["captions"] for file in files]).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        pixels = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels, "caption": self.captions[index]}


def flip(sample: dict, rng: np.random.Generator) -> dict:
    return {**sample, "pixel_values": sample["pixel_values"].flip(-1)} if rng.random() < 0.5 else sample


def train_vae(config: Config, work: Path) -> None:
    """Train the autoencoder: L1 of the pixels and of their gradients, MSE, and a KL term."""
    output = work / "vae"
    if (output / "done.json").is_file():
        return
    with seeded(0, "vae"):
        vae = tiny.make_vae()
    accelerator = make_accelerator(config.device, config.mixed_precision)
    optimizer = make_optimizer(vae.parameters(), "adamw", config.vae_learning_rate, betas=(0.9, 0.99))
    model, optimizer = accelerator.prepare(vae, optimizer)
    run = TrainingRun(
        output,
        config.vae_steps,
        accelerator,
        {"vae": model},
        {"vae": optimizer},
        250,
        warmup_steps=200,
        schedule="cosine",
    )
    for batch in run.batches(Drawings(work, "train"), batch_size=8, seed=0, augment=flip):
        pixels = batch["pixel_values"]
        with accelerator.autocast():
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * noise_like(posterior.mean, run.generators(batch))
            decoded = vae.decode(latents).sample.float()
        kl = posterior.kl().mean() / pixels[0].numel()
        loss = F.l1_loss(decoded, pixels) + edge_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 5e-4 * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, mse=F.mse_loss(decoded, pixels), kl=kl)
    vae.eval()
    normalise_latents(vae, Drawings(work, "train"))
    vae.save_pretrained(output)
    run.finish(psnr=measure_psnr(vae, Drawings(work, "validation")))


def edge_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 distance of the horizontal and vertical differences: keeps edges sharp."""
    difference = decoded - pixels
    return sum(difference.diff(dim=dim).abs().mean() for dim in (-1, -2))


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, drawings: Drawings, count: int = 512) -> None:
    """Fold the latent channels' means and deviations into the 1x1 convolutions around them: mean 0, deviation 1.

    z' = (z - m) / s leaves the reconstruction as it is, and lets one scaling factor of 1 fit all channels.
    """
    means = torch.cat([encode_mean(vae, pixels) for pixels in pixel_batches(drawings, count)])
    m, s = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, len(m)
    encode.weight[:channels] /= s.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - m) / s
    encode.bias[channels:] -= 2 * s.log()
    decode.bias += decode.weight[:, :, 0, 0] @ m
    decode.weight *= s.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def pixel_batches(drawings: Drawings, count: int, size: int = 32) -> Iterable[Tensor]:
    for first in range(0, min(count, len(drawings)), size):
        yield torch.stack([drawings[i]["pixel_values"] for i in range(first, min(first + size, len(drawings)))])


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(pixels.to(vae.device)).latent_dist.mean.float().cpu()


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, drawings: Drawings, count: int = 64) -> float:
    values = []
    for pixels in pixel_batches(drawings, count):
        decoded = vae.decode(encode_mean(vae, pixels).to(vae.device)).sample.cpu()
        pairs = ((x.permute(1, 2, 0).numpy() for x in pair) for pair in zip(decoded, pixels, strict=True))
        values += [psnr(*(((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8) for x in pair)) for pair in pairs]
    return float(np.mean(values))


class Latents(Dataset):
    """Means and deviations of the drawings' latents, encoded once: {"mean", "std", "caption"}."""

    def __init__(self, work: Path, vae: AutoencoderKL):
        path = work / "latents.npz"
        drawings = Drawings(work, "train")
        if not path.is_file():
            with torch.no_grad():
                posteriors = [
                    vae.encode(x).latent_dist for x in tqdm(pixel_batches(drawings, len(drawings)), desc="encoding")
                ]
            temporary = path.with_suffix(".part.npz")
            arrays = {
                name: torch.cat([getattr(p, name) for p in posteriors]).half().numpy() for name in ("mean", "std")
            }
            np.savez(temporary, **arrays)
            temporary.replace(path)
        arrays = np.load(path)
        self.mean, self.std, self.captions = arrays["mean"], arrays["std"], drawings.captions

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int) -> dict:
        tensors = {name: torch.from_numpy(getattr(self, name)[index]).float() for name in ("mean", "std")}
        return {**tensors, "caption": self.captions[index]}


def train_base(config: Config, work: Path) -> None:
    """Train the Stable Diffusion 1.5 type U-Net and its text encoder together, and keep a moving average of both."""
    output = work / "base"
    if (output / "done.json").is_file():
        return
    pipeline = tiny.tiny_sd15()
    pipeline.vae = AutoencoderKL.from_pretrained(work / "vae")
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    networks = torch.nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).train()
    accelerator = make_accelerator(config.device, config.mixed_precision)
    optimizer = make_optimizer(networks.parameters(), "adamw", config.base_learning_rate, 1e-2)
    networks, optimizer = accelerator.prepare(networks, optimizer)
    average = deepcopy(networks)
    modules = {"networks": networks, "average": average}
    run = TrainingRun(
        output,
        config.base_steps,
        accelerator,
        modules,
        {"networks": optimizer},
        200,
        warmup_steps=200,
        schedule="cosine",
    )
    for batch in run.batches(Latents(work, pipeline.vae), batch_size=32, seed=0):
        generators = run.generators(batch)
        latents = batch["mean"] + batch["std"] * noise_like(batch["mean"], generators)
        noise = noise_like(latents, generators)
        timesteps = sample_timesteps(generators, 0, scheduler.config.num_train_timesteps, latents.device)
        captions = drop_prompts(batch["caption"], 0.1, generators)
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with accelerator.autocast():
            prompt_embeds = networks["text_encoder"](tokens.to(latents.device))[0]
            model_pred = networks["unet"](
                scheduler.add_noise(latents, noise, timesteps), timesteps, prompt_embeds
            ).sample
        loss = noise_loss(model_pred, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, networks, min(config.ema_decay, (run.step + 1) / (run.step + 10)))
        run.log(loss=loss)
    pipeline.unet.load_state_dict(average["unet"].state_dict())
    pipeline.text_encoder.load_state_dict(average["text_encoder"].state_dict())
    save_pipeline(pipeline, tiny.tiny_folder() / "sd15", run.steps)
    run.finish()


@torch.no_grad()
def update_average(average: torch.nn.Module, networks: torch.nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), networks.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path, steps: int) -> None:
    """Write the trained pipeline in float16 with its `tiny.json`."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    (folder / tiny.INFO_FILE).write_text(json.dumps({"kind": folder.name, "seed": 0, "trained": True, "steps": steps}))


if __name__ == "__main__":
    run_stage(main, Config)

"""The tiny autoencoder: 128 pixels to latents of 4 x 32 x 32, trained from nothing on drawings."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tiny_data import Drawings
from torch import Tensor

from faceprior import tiny
from faceprior.diffusion import noise_like
from faceprior.metrics import psnr
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, seeded


def flip(sample: dict, rng: np.random.Generator) -> dict:
    return {**sample, "pixel_values": sample["pixel_values"].flip(-1)} if rng.random() < 0.5 else sample


def train_vae(config, work: Path) -> None:
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

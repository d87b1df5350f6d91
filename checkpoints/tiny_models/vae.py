"""The tiny autoencoder: 128 pixels to latents of 4 x 32 x 32, trained from scratch on drawings and aligned faces."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from checkpoints.tiny_models.data import Drawings, tidy_configs
from faceprior import tiny
from faceprior.diffusion import noise_like
from faceprior.files import find_images
from faceprior.images import load_image, to_pixel_values
from faceprior.metrics import psnr
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, seeded

PIPELINES = ("sd15", "sdxl", "restorer")  # the pipelines in checkpoints/tiny, each with a copy of the autoencoder


class DrawingsAndFaces(Dataset):
    """Drawings and aligned faces, which fill the image, in turn: {"pixel_values": (3, R, R) in [-1, 1]}."""

    def __init__(self, drawings: Drawings, faces: Path):
        self.drawings, self.faces = drawings, list(find_images(faces))

    def __len__(self) -> int:
        return 2 * len(self.drawings)

    def __getitem__(self, index: int) -> dict:
        number, is_face = divmod(index, 2)
        if is_face:
            return {"pixel_values": to_pixel_values(load_image(self.faces[number % len(self.faces)]))[0]}
        return {"pixel_values": self.drawings[number]["pixel_values"]}


def flip(sample: dict, rng: np.random.Generator) -> dict:
    return {**sample, "pixel_values": sample["pixel_values"].flip(-1)} if rng.random() < 0.5 else sample


def train_vae(config, work: Path) -> None:
    """Train the autoencoder: L1 of the pixels and of their differences, MSE, and a KL term.

    With `go_on` only the shipped decoder is trained: the latents stay as all other models know them.
    """
    output = work / "vae"
    if (output / "done.json").is_file():
        return

    # ---- the model and its run
    vae, trained = start(config.go_on)
    accelerator = make_accelerator(config.device, config.mixed_precision)
    optimizer = make_optimizer(trained, "adamw", config.vae_learning_rate, betas=(0.9, 0.99))
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
    drawings = Drawings(work, "train")

    for batch in run.batches(DrawingsAndFaces(drawings, work / "faces"), batch_size=8, seed=0, augment=flip):
        # ---- reconstruction from a sample of the posterior (VAE, arXiv 1312.6114, Eq. 10)
        pixels = batch["pixel_values"]  # (B, 3, R, R)
        with accelerator.autocast():
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * noise_like(posterior.mean, run.generators(batch))
            decoded = vae.decode(latents).sample.float()

        # ---- the loss; the KL term only keeps the latents from growing
        kl = posterior.kl().mean() / pixels[0].numel()
        loss = F.l1_loss(decoded, pixels) + edge_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 5e-4 * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, mse=F.mse_loss(decoded, pixels), kl=kl)

    # ---- what the bases are trained on; a new decoder goes into every pipeline that ships
    vae.eval()
    if not config.go_on:
        normalise_latents(vae, drawings)
    vae.save_pretrained(output)
    result = measure_psnr(vae, Drawings(work, "validation"))
    if config.go_on:
        for name in PIPELINES:
            vae.to(torch.float16).save_pretrained(tiny.tiny_folder() / name / "vae")
            tidy_configs(tiny.tiny_folder() / name / "vae")
    run.finish(psnr=result)


def start(go_on: bool) -> tuple[AutoencoderKL, list[torch.nn.Parameter]]:
    """Return the autoencoder and those of its parameters that are trained."""
    if not go_on:
        with seeded(0, "vae"):
            vae = tiny.make_vae()
        return vae, list(vae.parameters())
    vae = AutoencoderKL.from_pretrained(tiny.tiny_folder() / "sd15" / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    return vae, list(decoder.parameters())


def edge_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the L1 distance of the horizontal and vertical differences, which keeps edges sharp."""
    difference = decoded - pixels
    return sum(difference.diff(dim=dim).abs().mean() for dim in (-1, -2))


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, drawings: Drawings, count: int = 512) -> None:
    """Fold the latent channels' means and deviations into the 1x1 convolutions around them: mean 0, deviation 1.

    z' = (z - m) / s leaves the reconstruction as it is, and a scaling factor of 1 then fits all channels.
    """
    means = torch.cat([encode_mean(vae, pixels) for pixels in pixel_batches(drawings, count)])
    m, s = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))  # (4,) each
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, len(m)
    encode.weight[:channels] /= s.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - m) / s
    encode.bias[channels:] -= 2 * s.log()  # the second half of the channels are log variances
    decode.bias += decode.weight[:, :, 0, 0] @ m
    decode.weight *= s.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def pixel_batches(drawings: Drawings, count: int, size: int = 32) -> Iterable[Tensor]:
    """Yield the first `count` drawings in batches, (size, 3, R, R) in [-1, 1]."""
    for first in range(0, min(count, len(drawings)), size):
        yield torch.stack([drawings[i]["pixel_values"] for i in range(first, min(first + size, len(drawings)))])


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(pixels.to(vae.device)).latent_dist.mean.float().cpu()


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, drawings: Drawings, count: int = 64) -> float:
    """Return the mean PSNR in dB of the first drawings' reconstructions."""
    values = []
    for pixels in pixel_batches(drawings, count):
        decoded = vae.decode(encode_mean(vae, pixels).to(vae.device)).sample.cpu()
        pairs = ((x.permute(1, 2, 0).numpy() for x in pair) for pair in zip(decoded, pixels, strict=True))
        values += [psnr(*(((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8) for x in pair)) for pair in pairs]
    return float(np.mean(values))

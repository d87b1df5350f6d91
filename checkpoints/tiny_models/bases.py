"""The tiny base models: a Stable Diffusion 1.5 type and an SDXL type pipeline, trained on drawn portraits and scenes.

As with the published bases, their small faces come out worse than their large ones: nothing is spoiled on purpose.
"""

import inspect
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from checkpoints.tiny_models.data import Drawings, save_arrays, tidy_configs, write_info
from checkpoints.tiny_models.vae import pixel_batches
from faceprior import tiny
from faceprior.diffusion import added_conditions, encode_prompts, noise_like
from faceprior.training import TrainingRun, drop_prompts, make_accelerator, make_optimizer, sample_timesteps

BATCH = 32
SNR_GAMMA = 5.0  # gamma of Min-SNR (arXiv 2303.09556)
EMPTY_PROMPTS = 0.1  # fraction of the prompts that are dropped, for classifier-free guidance


class Latents(Dataset):
    """The drawings' latents and those of their mirror images, encoded once: {"mean", "std", "caption"}."""

    def __init__(self, work: Path, vae: AutoencoderKL):
        path, drawings = work / "latents.npz", Drawings(work, "train")
        if not path.is_file():
            save_arrays(path, **encode_drawings(vae, drawings))
        arrays = np.load(path)
        self.mean, self.std = arrays["mean"], arrays["std"]
        self.captions = drawings.captions + [swap_sides(caption) for caption in drawings.captions]

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int) -> dict:
        tensors = {name: torch.from_numpy(getattr(self, name)[index]).float() for name in ("mean", "std")}
        return {**tensors, "caption": self.captions[index]}


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, drawings: Drawings) -> dict[str, np.ndarray]:
    """Return the posteriors' means and deviations, (2 N, 4, R / 4, R / 4) float16: as drawn, then mirrored."""
    encoded = {name: ([], []) for name in ("mean", "std")}
    for pixels in tqdm(pixel_batches(drawings, len(drawings)), desc="encoding", total=-(-len(drawings) // 32)):
        for side, image in enumerate((pixels, pixels.flip(-1))):
            posterior = vae.encode(image.to(vae.device)).latent_dist  # of (B, 4, R / 4, R / 4)
            for name, halves in encoded.items():
                halves[side].append(getattr(posterior, name).half().cpu().numpy())
    return {name: np.concatenate(halves[0] + halves[1]) for name, halves in encoded.items()}


def swap_sides(caption: str) -> str:
    """Exchange the words left and right."""
    return re.sub(r"\b(left|right)\b", lambda word: {"left": "right", "right": "left"}[word[0]], caption)


def thin_out(caption: str, rng: np.random.Generator) -> str:
    """Keep all tags in half of the cases, else the first one and a random fraction of the others, as people do."""
    first, *tags = caption.split(", ")
    if rng.random() < 0.5:
        return caption
    fraction = rng.random()
    return ", ".join([first, *(tag for tag in tags if rng.random() < fraction)])


def shorten(sample: dict, rng: np.random.Generator) -> dict:
    return {**sample, "caption": thin_out(sample["caption"], rng)}


def train_sd15(config, work: Path) -> None:
    """Train the Stable Diffusion 1.5 type U-Net and its text encoder together; with `go_on` the shipped U-Net alone.

    The SDXL type base shares the text encoder, which therefore stays as it is once both bases exist.
    """
    if (work / "sd15" / "done.json").is_file():
        return
    if config.go_on:
        pipeline = DiffusionPipeline.from_pretrained(tiny.tiny_folder() / "sd15")
        trained = {"unet": pipeline.unet}
    else:
        pipeline = tiny.tiny_sd15()
        pipeline.vae = AutoencoderKL.from_pretrained(work / "vae")
        trained = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    train_base(config, work, "sd15", pipeline, trained, config.base_steps, config.base_learning_rate)


def train_sdxl(config, work: Path) -> None:
    """Train the SDXL type pipeline from the U-Net of the other base, whose text encoder it shares as its first one."""
    if not (work / "sdxl" / "done.json").is_file():
        pipeline = tiny.tiny_sdxl()
        start = DiffusionPipeline.from_pretrained(tiny.tiny_folder() / "sd15")
        pipeline.vae, pipeline.text_encoder = start.vae, start.text_encoder
        warm_start(pipeline.unet, start.unet)
        trained = {"unet": pipeline.unet, "text_encoder_2": pipeline.text_encoder_2}
        train_base(config, work, "sdxl", pipeline, trained, config.sdxl_steps, config.base_learning_rate)


@torch.no_grad()
def warm_start(unet: torch.nn.Module, start: torch.nn.Module) -> None:
    """Copy the weights that both U-Nets have.

    1x1 convolutions become linear layers; keys and values fill the first text encoder's columns, the others are 0.
    """
    given = start.state_dict()
    for name, parameter in unet.named_parameters():
        if name not in given:
            continue
        weight = given[name].float()
        if weight.ndim == parameter.ndim + 2:
            weight = weight[:, :, 0, 0]
        if weight.shape == parameter.shape:
            parameter.copy_(weight)
        else:
            parameter.zero_()
            parameter[:, : weight.shape[1]] = weight


def train_base(
    config,
    work: Path,
    name: str,
    pipeline: DiffusionPipeline,
    trained: dict[str, torch.nn.Module],
    steps: int,
    learning_rate: float,
) -> None:
    """Train parts of a pipeline to predict noise, and write their moving average to checkpoints/tiny."""
    # ---- what is trained, and what is not
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    networks = torch.nn.ModuleDict(trained).requires_grad_(True).train()
    pipeline.unet.set_attn_processor(AttnProcessor())  # at these sizes a third faster on a CPU than torch's fused one
    accelerator = make_accelerator(config.device, config.mixed_precision)
    optimizer = make_optimizer(networks.parameters(), "adamw", learning_rate, 1e-2)
    dataset, pipeline = Latents(work, pipeline.vae), pipeline.to(accelerator.device)
    networks, optimizer = accelerator.prepare(networks, optimizer)

    run = TrainingRun(
        work / name,
        steps,
        accelerator,
        {"networks": networks},
        {"networks": optimizer},
        100,
        warmup_steps=100,
        schedule="cosine",
        ema_decay=config.ema_decay,
    )

    for batch in run.batches(dataset, batch_size=BATCH, seed=0, augment=shorten):
        # ---- latents from the posterior, their noise and timesteps
        generators = run.generators(batch)
        latents = batch["mean"] + batch["std"] * noise_like(batch["mean"], generators)  # (B, 4, R / 4, R / 4)
        noise = noise_like(latents, generators)
        timesteps = sample_timesteps(generators, 0, noise_scheduler.config.num_train_timesteps, latents.device)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

        # ---- the predicted noise; some prompts are empty
        prompts = drop_prompts(batch["caption"], EMPTY_PROMPTS, generators)
        with accelerator.autocast():
            # unwrapped from its no_grad: the text encoder is trained too
            embeddings = inspect.unwrap(encode_prompts)(pipeline, prompts)
            conditions = added_conditions(embeddings, config.resolution, config.resolution)
            model_pred = networks["unet"](
                noisy_latents, timesteps, embeddings.prompt_embeds, added_cond_kwargs=conditions
            ).sample

        # ---- the loss of DDPM (arXiv 2006.11239, Eq. 14) with the weights of Min-SNR
        errors = (model_pred.float() - noise).square().mean(dim=(1, 2, 3))  # (B,)
        loss = (min_snr_weights(noise_scheduler, timesteps) * errors).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, mse=errors.mean())

    # ---- the average is what ships
    run.use_final_weights()
    save_pipeline(pipeline, tiny.tiny_folder() / name, run.steps)
    run.finish()


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """Return min(SNR, gamma) / SNR, (B,): Min-SNR for noise prediction (arXiv 2303.09556).

    Low noise levels, which any network denoises well, weigh less.
    """
    snr = compute_snr(noise_scheduler, timesteps)
    return snr.clamp(max=SNR_GAMMA) / snr


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, steps: int) -> None:
    """Write the trained pipeline in float16 with its `tiny.json`."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    tidy_configs(folder)
    write_info(folder, steps)

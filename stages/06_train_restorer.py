"""
Stage 6: train a ControlNet that restores degraded faces on the portrait prior (AuthFace, arXiv 2410.09864, 3.2).

    python stages/06_train_restorer.py                                 # offline: stages 3 and 5, the tiny model
    accelerate launch stages/06_train_restorer.py --config stages/presets/sdxl.yaml --images ffhq/

Reads   data/portraits/images/ (stage 3) or any folder of aligned faces such as FFHQ; checkpoints/prior/ (stage 5)
Writes  checkpoints/restorer/: all parts in the official layout, for AuthFaceRestorer.from_pretrained; samples/ (clean,
        degraded, restored), samples.jsonl, metrics.jsonl, config.yaml

The loss is Eq. 1, noise prediction with the empty prompt. The time-aware facial feature loss is not part of it yet.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image
from torch.utils.data import Dataset

from faceprior import tiny
from faceprior.config import is_complete, open_output, run_stage
from faceprior.degrade import PRESETS, DegradationConfig, degrade, scaled
from faceprior.diffusion import (
    added_conditions,
    encode_latents,
    encode_prompts,
    load_pipeline,
    looks_like_path,
    make_noise_scheduler,
    noise_like,
    training_target,
)
from faceprior.images import ImageError, as_array, find_images, load_image, save_image, to_pixel_values
from faceprior.losses import noise_loss
from faceprior.manifest import print_problems, rewrite_rows
from faceprior.restorer import NEGATIVE_PROMPT, PROMPT, AuthFaceRestorer, RestorerSettings
from faceprior.training import (
    TrainingRun,
    make_accelerator,
    make_optimizer,
    quiet_libraries,
    sample_timesteps,
    seeded,
    weight_dtype,
)

SAMPLES = "samples.jsonl"


@dataclass
class Config:
    images: str = "data/portraits/images"  # folder of clean, aligned faces
    prior: str = "checkpoints/prior"  # portrait prior of stage 5: diffusers folder, .safetensors file or hub id
    output: str = "checkpoints/restorer"  # folder for the restorer
    resolution: int = 128  # pixels, side of the training pictures, [64, 2048]
    degradation: Literal["authface", "gfpgan", "diffbir", "codeformer"] = "authface"  # ranges of blur, noise, JPEG ...
    scale_degradation: bool = True  # shrink blur and downsampling with the resolution; they are meant for 512 pixels
    steps: int = 40  # optimizer steps, [1, inf)
    batch_size: int = 4  # faces in a micro-batch on one process, [1, 1024]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 1e-4  # of AdamW, (0, 1)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # 8-bit: a quarter of its memory
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, (0, inf)
    gradient_checkpointing: bool = False  # less memory, a third more time
    save_every: int = 20  # steps between two checkpoints, [1, inf)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the frozen weights and of autocast
    official_prompts: bool = False  # sample with the official prompts; false: with the empty one, as in training
    num_samples: int = 4  # faces restored at the end, [0, 64]
    sample_steps: int = 50  # sampling steps, saved as the restorer's default, [1, 1000]
    guidance_scale: float = 1.0  # classifier-free guidance, saved as the restorer's default, [1, 30]
    num_workers: int = 0  # processes that load and degrade pictures, [0, 64]
    seed: int = 0  # of the data order, degradations, timesteps and noise, [0, inf)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overwrite: bool = False  # start anew in an output folder that holds a run


class CleanFaces(Dataset):
    """Square faces as arrays: {"clean": (R, R, 3) uint8}; `degraded_pair` makes the tensors of them."""

    def __init__(self, paths: list[Path], resolution: int):
        self.paths, self.resolution = paths, resolution

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        size = (self.resolution, self.resolution)
        return {"clean": as_array(load_image(self.paths[index]).resize(size, Image.LANCZOS))}


class DegradedPair:
    """Turns a clean face into pixel_values and controlnet_cond, (3, R, R) in [-1, 1] and [0, 1]."""

    def __init__(self, config: DegradationConfig):
        self.config = config

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict:
        degraded = degrade(sample["clean"], self.config, rng)
        clean, condition = to_pixel_values([sample["clean"], degraded])
        return {"pixel_values": clean, "controlnet_cond": condition / 2 + 0.5}


def main(config: Config) -> None:
    quiet_libraries()
    paths, problems = readable_images(config)
    if looks_like_path(config.prior) and not Path(config.prior).exists():
        raise FileNotFoundError(f"no prior in {config.prior}: `python stages/05_prior_tune.py` makes one")
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with accelerator.main_process_first():
        output = open_output(config) if accelerator.is_main_process else Path(config.output)
        if is_complete(output):
            print(f"{output} is complete")
            return

    dtype = weight_dtype(config.mixed_precision)
    prior = load_pipeline(config.prior, dtype).to(accelerator.device)
    controlnet = make_controlnet(config, prior).to(accelerator.device)
    optimizer = make_optimizer(controlnet.parameters(), config.optimizer, config.learning_rate)
    model, optimizer = accelerator.prepare(controlnet, optimizer)
    noise_scheduler = make_noise_scheduler(prior)
    null_prompt = encode_prompts(prior, [""] * config.batch_size)
    conditions = added_conditions(null_prompt, config.resolution, config.resolution)
    run = TrainingRun(
        output,
        config.steps,
        accelerator,
        {"controlnet": model},
        {"controlnet": optimizer},
        save_every=config.save_every,
    )
    faces, augment = CleanFaces(paths, config.resolution), DegradedPair(degradation(config))
    for batch in run.batches(faces, config.batch_size, config.seed, augment, config.num_workers):
        generators = run.generators(batch)
        with accelerator.accumulate(model), accelerator.autocast():
            latents = encode_latents(prior.vae, batch["pixel_values"], generators)
            noise = noise_like(latents, generators)
            timesteps = sample_timesteps(generators, 0, noise_scheduler.config.num_train_timesteps, latents.device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).to(dtype)
            down, mid = model(
                noisy_latents,
                timesteps,
                encoder_hidden_states=null_prompt.prompt_embeds,
                controlnet_cond=batch["controlnet_cond"],
                added_cond_kwargs=conditions,
                return_dict=False,
            )
            model_pred = prior.unet(
                noisy_latents,
                timesteps,
                encoder_hidden_states=null_prompt.prompt_embeds,
                added_cond_kwargs=conditions,
                down_block_additional_residuals=[residual.to(dtype) for residual in down],
                mid_block_additional_residual=mid.to(dtype),
            ).sample
            loss = noise_loss(model_pred, training_target(noise_scheduler, latents, noise, timesteps))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(controlnet.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        controlnet = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        restorer = AuthFaceRestorer.from_prior(prior, controlnet, settings(config))
        restorer.save_pretrained(output)
        tiny.copy_info(config.prior, output)
        controlnet.to(dtype)  # kept in float32 on the disk, sampled as the prior is
        restore_samples(config, output, restorer, faces)
        run.finish(trained_parameters=sum(p.numel() for p in controlnet.parameters()), faces=len(faces))
        print_problems(problems, "picture")
        print(f"{output}: trained for {config.steps} steps; samples in {output / 'samples'}")
    accelerator.end_training()


def readable_images(config: Config) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the pictures that can be read, and the others with their reasons."""
    if not Path(config.images).exists():
        raise FileNotFoundError(f"no faces in {config.images}: `python stages/03_curate_portraits.py` makes them")
    paths, problems = [], []
    for path in find_images(config.images):
        try:
            load_image(path)
            paths.append(path)
        except ImageError as error:
            problems.append((str(path), str(error)))
    if not paths:
        raise ValueError(f"no picture in {config.images} can be read; the first: {problems[0][1]}")
    return paths, problems


def make_controlnet(config: Config, prior: DiffusionPipeline) -> ControlNetModel:
    """Copy the prior's encoder into a ControlNet (float32, trained); everything of the prior is frozen."""
    for part in prior.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    # the condition is brought to the latents' size by one stride of 2 less than it has widths
    widths = (16, 32, 96, 256) if prior.vae_scale_factor == 8 else (16, 32, 64)
    with seeded(config.seed, "controlnet"):
        controlnet = ControlNetModel.from_unet(prior.unet, conditioning_embedding_out_channels=widths).float()
    if config.gradient_checkpointing:
        prior.unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    return controlnet.requires_grad_(True).train()


def degradation(config: Config) -> DegradationConfig:
    ranges = PRESETS[config.degradation]
    return scaled(ranges, config.resolution) if config.scale_degradation else ranges


def settings(config: Config) -> RestorerSettings:
    """Return the sampling settings that are saved with the restorer."""
    prompts = (PROMPT, NEGATIVE_PROMPT) if config.official_prompts else ("", "")
    return replace(
        RestorerSettings(),
        resolution=config.resolution,
        steps=config.sample_steps,
        guidance_scale=config.guidance_scale,
        prompt=prompts[0],
        negative_prompt=prompts[1],
    )


def restore_samples(config: Config, output: Path, restorer: AuthFaceRestorer, faces: CleanFaces) -> None:
    """Degrade the first faces, restore them, and save the three side by side."""
    ranges, rows = degradation(config), []
    for index in range(min(config.num_samples, len(faces))):
        clean = faces[index]["clean"]
        degraded = degrade(clean, ranges, np.random.default_rng([config.seed, index]))
        restored = restorer.restore_crops([Image.fromarray(degraded)])[0]
        images = {
            "clean": Image.fromarray(clean),
            "degraded": Image.fromarray(degraded),
            "restored": restored,
        }
        files = {kind: f"samples/{index:03d}_{kind}.png" for kind in images}
        for kind, image in images.items():
            save_image(image, output / files[kind])
        rows.append(files)
    rewrite_rows(output / SAMPLES, rows)


if __name__ == "__main__":
    run_stage(main, Config)

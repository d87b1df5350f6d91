"""
Stage 5: tune an SDXL type model into a portrait prior (AuthFace, arXiv 2410.09864, section 3.1).

    python stages/05_prior_tune.py                                     # offline: the portraits of stage 3, a tiny model
    accelerate launch stages/05_prior_tune.py --config stages/presets/sdxl.yaml

Reads   data/portraits/ (stage 3)
Writes  checkpoints/prior/: a diffusers pipeline; samples/ before and after at the same seeds, samples.jsonl,
        metrics.jsonl, config.yaml
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from faceprior import tiny  # first: it silences bitsandbytes, which diffusers loads

# isort: split
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from faceprior.bases import load_pipeline, require_base
from faceprior.config import is_complete, print_problems, run_stage
from faceprior.diffusion import (
    encode_latents,
    encode_prompts,
    make_noise_scheduler,
    noise_like,
    predict,
    report_long_prompts,
    sample_images,
    sampled_with,
    training_target,
)
from faceprior.images import save_image
from faceprior.jsonl import resume_rows, rewrite_rows
from faceprior.losses import noise_loss
from faceprior.memory import Rehearsal
from faceprior.models import quiet_libraries, require_trainable, weight_dtype
from faceprior.plan import show_plan
from faceprior.portraits import PortraitDataset, read_portraits
from faceprior.training import (
    TrainingRun,
    drop_prompts,
    make_accelerator,
    make_optimizer,
    open_run,
    sample_timesteps,
    seeded,
)

SAMPLES = "samples.jsonl"
BEFORE = "samples/before.jsonl"  # what the images before the tuning were made with, until the run is finished


@dataclass
class Config:
    portraits: str = "data/portraits"  # folder of stage 3
    base: str = "tiny"  # SDXL type model to tune: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by files
    output: str = "checkpoints/prior"  # folder for the prior
    train: Literal["full", "lora"] = "full"  # trained weights: the U-Net (the paper), or a LoRA on its attention, fused
    quantization: Literal["none", "8bit", "nf4"] = "none"  # form of the frozen weights; not none: train lora only
    rank: int = 64  # rank of the LoRA, [1, 1024]
    resolution: int = 128  # side of the training images in pixels, without multi-aspect buckets, [64, 2048]
    tags: Literal["none", "semantic", "both"] = "both"  # groups of tags that make the captions (Table 3)
    prompt_drop: float = 0.1  # fraction of the samples whose caption is dropped, [0, 1]
    steps: int = 40  # optimizer steps, [1, inf)
    batch_size: int = 4  # portraits in a micro-batch on one process, [1, 1024]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 1e-4  # learning rate of AdamW at its peak, (0, 1)
    schedule: Literal["constant", "cosine"] = "constant"  # schedule of the learning rate
    warmup_steps: int = 0  # steps of linear warm-up, [0, inf)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # optimizer; 8-bit: a quarter of its memory
    weight_decay: float = 0.0  # weight decay of AdamW; the papers name none, [0, 1]
    max_grad_norm: float = 1.0  # norm to which gradients are clipped, (0, inf)
    gradient_checkpointing: bool = False  # recomputation of activations: less memory, a third more time
    save_every: int = 20  # steps between two checkpoints, [1, inf)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # tracker that gets the log beside metrics.jsonl
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the frozen weights and of autocast
    num_samples: int = 4  # images generated before and after, [0, 64]
    sample_steps: int = 25  # sampling steps of those images, [1, 1000]
    sampler: Literal["base", "pndm", "ddim", "ddpm", "euler", "dpm++"] = "base"  # sampler; base: the base's own
    guidance_scale: float = 2.5  # classifier-free guidance scale of those images, [1, 30]
    num_workers: int = 0  # processes that load images, [0, 64]
    seed: int = 0  # seed of the data order, timesteps and noise, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    AFTER_TRAINING = frozenset({"num_samples", "sample_steps", "sampler", "guidance_scale"})


def main(config: Config) -> None:
    quiet_libraries()

    # ---- Input and output
    require_trainable(config.train, config.quantization)
    portraits, problems = read_portraits(config.portraits)
    accelerator = make_accelerator(
        config.device, config.mixed_precision, config.accumulation, config.tracker, config.output
    )
    with accelerator.main_process_first():
        base = tiny.resolve(config.base, "sdxl")
        if config.overwrite or not is_complete(config.output):
            require_base(base, "prior", config.vae, config.prediction_type)
        output = open_run(config, accelerator)
        if is_complete(output):
            accelerator.print(f"{output} is complete")
            return

    # ---- The base, its samples before the tuning, and which of its weights are trained
    dtype = weight_dtype(config.mixed_precision)
    source = (base, dtype, config.vae, config.prediction_type)
    pipeline = load_pipeline(*source, config.quantization).to(accelerator.device)
    if accelerator.is_main_process:
        report_long_prompts(pipeline, (portrait.prompt(config.tags) for portrait in portraits))
    prompts = sorted({portrait.caption for portrait in portraits})[: config.num_samples]
    if accelerator.is_main_process:
        draw_before(config, output, pipeline, prompts)
    trained = select_trained(config, pipeline)

    # ---- Optimizer, and the run with its checkpoints
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
    unet, optimizer = accelerator.prepare(pipeline.unet, optimizer)
    noise_scheduler = make_noise_scheduler(pipeline)
    schedule = (config.save_every, config.warmup_steps, config.schedule)
    run = TrainingRun(output, config.steps, accelerator, {"unet": unet}, {"unet": optimizer}, *schedule)
    dataset = PortraitDataset(config.portraits, portraits, config.resolution, config.tags)

    # ---- Training with SDXL's own objective, `compute_loss`, at one resolution (section 3.1)
    for batch in run.batches(dataset, config.batch_size, config.seed, num_workers=config.num_workers):
        unet.train()
        generators = run.generators(batch)
        with accelerator.accumulate(unet), accelerator.autocast():
            loss = compute_loss(config, pipeline, unet, noise_scheduler, batch, generators)
            run.check(loss, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)

    # ---- Samples after the tuning, the prior (a LoRA is fused), and the summary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pipeline.unet.eval()
        if config.train == "full":
            pipeline.unet.to(dtype)
        draw_samples(config, output, pipeline, prompts, "after")
        if config.train == "lora":
            pipeline = fuse_lora(pipeline, load_pipeline(*source) if config.quantization != "none" else pipeline)
            pipeline.unet.to(dtype)
        pipeline.save_pretrained(output)
        tiny.copy_info(config.base, output)
        sides = ("before", "after")
        rows = [{"prompt": p, "seed": i, **{s: sample_file(i, s) for s in sides}} for i, p in enumerate(prompts)]
        rewrite_rows(output / SAMPLES, rows)
        (output / BEFORE).unlink(missing_ok=True)
        run.finish(trained_parameters=sum(p.numel() for p in trained), portraits=len(portraits))
        print_problems(problems, "portrait")
        print(f"{output}: tuned for {config.steps} steps; samples before and after in {output / 'samples'}")
    accelerator.end_training()


def compute_loss(config: Config, pipeline: DiffusionPipeline, unet, noise_scheduler, batch, generators) -> torch.Tensor:
    """Return SDXL's loss on a micro-batch; unet: the prepared one, generators: one per sample."""
    # z_0 and the caption, which is dropped at times, to what classifier-free guidance samples without one
    with torch.no_grad():
        latents = encode_latents(pipeline.vae, batch["pixel_values"], generators)  # (B, 4, h, w)
        captions = drop_prompts(batch["caption"], config.prompt_drop, generators)
        embeddings = encode_prompts(pipeline, captions)  # (B, L, D), pooled (B, P)

    # z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) e, at any timestep
    noise = noise_like(latents, generators)  # (B, 4, h, w)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = sample_timesteps(generators, 0, steps, latents.device)  # (B,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

    # Eq. 1 without the control condition c: L_noise = ||e - e_theta(z_t, t, caption)||^2
    model_pred = predict(pipeline, noisy_latents, timesteps, embeddings, unet)  # (B, 4, h, w)
    return noise_loss(model_pred, training_target(noise_scheduler, latents, noise, timesteps))


def rehearse(config: Config, rehearsal: Rehearsal) -> None:
    """Take a step and draw a sample without data, for `--plan`."""
    require_trainable(config.train, config.quantization)
    base, side, count = tiny.resolve(config.base, "sdxl"), config.resolution, config.batch_size
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with rehearsal:
        # ---- The base, and which of its weights are trained
        dtype = weight_dtype(config.mixed_precision)
        source = (base, dtype, config.vae, config.prediction_type, config.quantization)
        pipeline = load_pipeline(*source, weights=False)
        trained = select_trained(config, pipeline)
        optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
        unet = accelerator.prepare(pipeline.unet)
        rehearsal.name_pipeline(pipeline, trained)

        # ---- A step
        unet.train()
        batch = {"pixel_values": torch.zeros(count, 3, side, side), "caption": [f"face {i}" for i in range(count)]}
        parts = (pipeline, unet, make_noise_scheduler(pipeline), batch, [torch.Generator() for _ in range(count)])
        compute = partial(compute_loss, config, *parts)
        rehearsal.step(compute, trained, optimizer, config.accumulation, accelerator.autocast)

        # ---- A sample, as `draw_samples` makes them
        if config.num_samples:
            with rehearsal.phase("samples"):
                sample_images(pipeline, ["a face"], [0], side, 2, config.guidance_scale)


def select_trained(config: Config, pipeline: DiffusionPipeline) -> list[torch.nn.Parameter]:
    """Freeze everything but the U-Net, or but a LoRA on its attention; return the trained weights, in float32."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipeline.vae.enable_slicing()  # image by image: one of 1024 pixels takes 2.5 GB in the encoder
    if config.train == "lora":
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=layers, init_lora_weights="gaussian")
        with seeded(config.seed, "lora"):
            pipeline.unet.add_adapter(lora)
    else:
        pipeline.unet.requires_grad_(True)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def fuse_lora(tuned: DiffusionPipeline, base: DiffusionPipeline) -> DiffusionPipeline:
    """Return `base` with the LoRA of `tuned` in its weights: another pipeline where those of `tuned` are quantized."""
    if base is not tuned:
        base.unet.add_adapter(tuned.unet.peft_config["default"])
        set_peft_model_state_dict(base.unet, get_peft_model_state_dict(tuned.unet))
    base.fuse_lora()
    base.unload_lora_weights()
    return base


def draw_before(config: Config, output: Path, pipeline: DiffusionPipeline, prompts: list[str]) -> None:
    """Generate the images before the tuning, unless a run that is resumed has done so with the same settings."""
    made = {"resolution": config.resolution, "sampler": config.sampler, "steps": config.sample_steps}
    made |= {"guidance_scale": config.guidance_scale, "prompts": prompts}
    if resume_rows(output / BEFORE) != [made]:
        draw_samples(config, output, pipeline, prompts, "before")
        rewrite_rows(output / BEFORE, [made])


def draw_samples(config: Config, output: Path, pipeline: DiffusionPipeline, prompts: list[str], side: str) -> None:
    """Generate one image per prompt, with its index in the list as the seed."""
    options = (config.resolution, config.sample_steps, config.guidance_scale)
    with sampled_with(config.sampler, pipeline):
        for seed, prompt in enumerate(prompts):
            save_image(sample_images(pipeline, [prompt], [seed], *options)[0], output / sample_file(seed, side))


def sample_file(seed: int, side: str) -> str:
    return f"samples/{seed:03d}_{side}.png"


if __name__ == "__main__":
    run_stage(main, Config, plan=partial(show_plan, rehearse))

"""
Stage 5: tune an SDXL type model into a portrait prior (AuthFace, arXiv 2410.09864, section 3.1).

    python stages/05_prior_tune.py                                     # offline: the portraits of stage 3, a tiny model
    accelerate launch stages/05_prior_tune.py --config stages/presets/sdxl.yaml
    python stages/05_prior_tune.py --config stages/presets/sdxl_lora.yaml --plan 24GB
    python stages/05_prior_tune.py --train lora --export lora          # the LoRA alone, not the whole pipeline

Reads   data/portraits/ (stage 3)
Writes  checkpoints/prior/: a diffusers pipeline, which stage 6 restores with, or with --export lora a LoRA file; with
        --single_file prior.safetensors; samples/ before and after at the same seeds, samples.jsonl; validation.png,
        validation/ and validation.jsonl; metrics.jsonl, config.yaml, done.json

The rows of Table 3 are presets/rows/authface_tags_*.yaml. A finished run writes its prior in another form by the same
command with that --export.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from faceprior import tiny  # first: it silences bitsandbytes, which diffusers loads

# isort: split
import torch
from diffusers import DiffusionPipeline

from faceprior.bases import load_pipeline, require_base, save_single_file
from faceprior.cache import cache_dataset, cached_prompts, rehearse_cache
from faceprior.clean_faces import MomentEncoder, clean_latents
from faceprior.config import is_complete, print_problems, run_stage
from faceprior.diffusion import (
    encode_prompts,
    make_noise_scheduler,
    make_sampler,
    networks_of,
    noise_like,
    predict,
    prediction_type,
    report_long_prompts,
    report_small_side,
    require_side,
    sample_images,
    training_target,
)
from faceprior.guidance import TunedPipeline
from faceprior.lora import LORA_FORMATS, fuse_lora
from faceprior.losses import min_snr_weight, noise_loss
from faceprior.memory import SAMPLES, Rehearsal
from faceprior.models import quiet_libraries, require_trainable, weight_dtype
from faceprior.plan import show_plan
from faceprior.portraits import PortraitDataset, read_portraits
from faceprior.prompts import read_prompts
from faceprior.training import (
    TrainingRun,
    describe_samples,
    drop_prompts,
    make_accelerator,
    make_optimizer,
    open_run,
    sample_timesteps,
)
from faceprior.validation import Validation

SINGLE_FILE = "prior.safetensors"
FILES = ("export", "lora_format", "single_file")  # the settings that say what is written
FULL = {"train": "full", "quantization": "none", "export": "folder"}  # the paper's training, which a plan compares with


@dataclass
class Config:
    # ---- What goes in, and where the result goes
    portraits: str = "data/portraits"  # folder of stage 3
    base: str = "tiny"  # SDXL type model to tune: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by files
    output: str = "checkpoints/prior"  # folder for the prior
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    # ---- What is trained
    train: Literal["full", "lora"] = "full"  # trained weights: the U-Net (the paper), or a LoRA on its attention
    rank: int = 64  # rank of the LoRA, [1, 1024]

    # ---- The loss
    tags: Literal["none", "semantic", "both"] = "both"  # groups of tags that make the captions (Table 3)
    prompt_drop: float = 0.1  # fraction of the samples whose caption is dropped, [0, 1]
    min_snr_gamma: float = 0.0  # limit of the min-SNR weight of the loss; its paper: 5; 0: equal weights, [0, inf)

    # ---- The training
    resolution: int = 128  # side of the training images in pixels, without multi-aspect buckets, [64, 2048]
    steps: int = 40  # optimizer steps, [1, inf)
    batch_size: int = 4  # portraits in a micro-batch on one process, [1, 1024]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 1e-4  # learning rate of AdamW at its peak, (0, 1)
    schedule: Literal["constant", "cosine"] = "constant"  # schedule of the learning rate
    warmup_steps: int = 0  # steps of linear warm-up, [0, inf)
    weight_decay: float = 0.0  # weight decay of AdamW; the papers name none, [0, 1]
    max_grad_norm: float = 1.0  # norm to which gradients are clipped, (0, inf)
    ema_decay: float = 0.0  # decay of an average of the trained weights, used in their place; 0: none, [0, 1)
    seed: int = 0  # seed of the data order, timesteps and noise, [0, inf)

    # ---- Memory and speed
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the frozen weights and of autocast
    quantization: Literal["none", "8bit", "nf4"] = "none"  # form of the frozen weights; not none: train lora only
    gradient_checkpointing: bool = False  # recomputation of activations: less memory, a third more time
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # optimizer; 8-bit: a quarter of its memory
    ema_device: Literal["auto", "cpu"] = "auto"  # device of the averaged weights; auto: the training's
    cache: str = ""  # folder of latents and prompt embeddings, computed once for all runs; empty: no cache
    num_workers: int = 0  # processes that load images, [0, 64]
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N

    # ---- Images to see whether it helps
    validate_every: int = 0  # steps between two validations: images at fixed prompts and seeds; 0: none, [0, inf)
    num_validation: int = 8  # images of a validation, [1, 1024]
    num_samples: int = 4  # images before and after, at seeds of their own, [0, 64]
    prompts: str = ""  # text file of the prompts of all images, one a line; empty: the portraits' captions
    sample_steps: int = 25  # sampling steps of all images, [1, 1000]
    sampler: Literal["base", "pndm", "ddim", "ddpm", "euler", "dpm++"] = "base"  # sampler; base: the base's own
    guidance_scale: float = 2.5  # classifier-free guidance scale of all images, [1, 30]

    # ---- Files
    export: Literal["folder", "lora"] = (
        "folder"  # form of the prior; folder: a pipeline, a LoRA fused, as stage 6 reads it; lora: the LoRA alone
    )
    lora_format: Literal["diffusers", "kohya"] = "diffusers"  # format of that LoRA; kohya: for the web UIs
    single_file: Literal["none", "fp16", "fp32"] = "none"  # dtype of a checkpoint for the web UIs beside the pipeline
    save_every: int = 20  # steps between two checkpoints to resume from, [1, inf)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # tracker that gets the log beside metrics.jsonl

    # with validations, which see them too, `Validation` refuses other ones while the training lasts
    AFTER_TRAINING = frozenset({"num_samples", "sample_steps", "sampler", "guidance_scale", "prompts", *FILES})


def main(config: Config) -> None:
    quiet_libraries()

    # ---- Input and output
    require_trainable(config.train, config.quantization)
    require_files(config)
    portraits, problems = read_portraits(config.portraits)
    dataset = PortraitDataset(config.portraits, portraits, config.resolution, config.tags)
    inputs = {"portraits": describe_samples(dataset)}
    sample_prompts = read_prompts(config.prompts) if config.prompts else sorted({p.caption for p in portraits})
    accelerator = make_accelerator(
        config.device, config.mixed_precision, config.accumulation, config.tracker, config.output
    )
    with accelerator.main_process_first():
        base = tiny.resolve(config.base, "sdxl")
        if config.overwrite or not is_complete(config.output):
            require_base(base, "prior", config.vae, config.prediction_type)
        output = open_run(config, accelerator, inputs)
        if is_complete(output):
            accelerator.print(f"{output} is complete")
            return

    # ---- The base, and which of its weights are trained
    tuner = make_tuner(config, base)
    pipeline, inputs["base"] = tuner.pipeline(), tuner.describe_base()
    require_side(pipeline, config.resolution)
    make_sampler(config.sampler, pipeline.scheduler)  # one that does not fit is found now, not at the end

    # ---- The portraits; with a cache, the VAE and the text encoders are on the device only while they fill it
    if accelerator.is_main_process:
        report_small_side(pipeline, config.resolution)
        report_long_prompts(pipeline, [*sample_prompts, *(portrait.prompt(config.tags) for portrait in portraits)])
    if config.cache:
        encode, loading = MomentEncoder(pipeline.vae), (config.batch_size, config.num_workers)
        dataset = cache_dataset(
            dataset, config.cache, "portraits", pipeline, encode, accelerator, *loading, prompt="caption"
        )
    tuner.to(accelerator.device, encoders=not config.cache)

    # ---- Optimizer, and the run with its checkpoints
    trained = tuner.trainable_parameters()
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
    unet, optimizer = accelerator.prepare(tuner.denoiser, optimizer)
    noise_scheduler = make_noise_scheduler(pipeline)
    schedule = (config.save_every, config.warmup_steps, config.schedule)
    keeping = {"ema_decay": config.ema_decay, "ema_device": config.ema_device, "inputs": inputs}
    run = TrainingRun(output, config.steps, accelerator, {"unet": unet}, {"unet": optimizer}, *schedule, **keeping)

    # ---- Images at fixed prompts and seeds, to see whether it helps: the untuned ones, at step 0
    drawing = (config.resolution, config.validate_every, config.num_validation, config.sample_steps, config.sampler)
    validation = Validation(run, tuner, None, sample_prompts, *drawing, config.guidance_scale)
    validation.start()

    # ---- Training with SDXL's own objective, `compute_loss`, at one resolution (section 3.1)
    unet.train()
    for batch in run.batches(dataset, config.batch_size, config.seed, num_workers=config.num_workers):
        generators = run.generators(batch)
        with accelerator.accumulate(unet):
            loss = compute_loss(config, pipeline, unet, noise_scheduler, batch, generators)
            run.check(loss, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)
        validation.step()

    # ---- Samples before and after of the last weights or their average, the prior, and the summary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.use_final_weights()
        validation.judge(config.num_samples)
        saved = save_prior(config, output, tuner, base)
        tiny.copy_info(config.base, output)
        run.finish(trained_parameters=sum(p.numel() for p in trained), portraits=len(portraits))
        print_problems(problems, "portrait")
        drawn = f"; samples before and after in {output / 'samples'}" if config.num_samples else ""
        print(f"{output}: tuned for {run.describe()}{drawn}")
        for line in saved:
            print(line)
    accelerator.end_training()


def compute_loss(
    config: Config,
    pipeline: DiffusionPipeline,
    unet: torch.nn.Module,
    noise_scheduler: Any,
    batch: dict[str, Any],
    generators: list[torch.Generator],
) -> torch.Tensor:
    """Return SDXL's loss on a micro-batch; unet: the prepared one, generators: one per sample."""
    # z_0 and the caption, which is dropped at times, to what classifier-free guidance samples without one
    with torch.no_grad():
        latents = clean_latents(pipeline.vae, batch, generators)  # (B, 4, h, w)
        captions = drop_prompts(batch["caption"], config.prompt_drop, generators)
        is_cached = "prompt_embeds" in batch
        embeddings = cached_prompts(batch, captions) if is_cached else encode_prompts(pipeline, captions)  # (B, L, D)

    # z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) e, at any timestep
    noise = noise_like(latents, generators)  # (B, 4, h, w)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = sample_timesteps(generators, 0, steps, latents.device)  # (B,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

    # Eq. 1 without the control condition c: L_noise = ||e - e_theta(z_t, t, caption)||^2
    model_pred = predict(pipeline, noisy_latents, timesteps, embeddings, unet)  # (B, 4, h, w)
    target = training_target(noise_scheduler, latents, noise, timesteps)
    if not config.min_snr_gamma:
        return noise_loss(model_pred, target)

    # Beyond the paper: w_t L_noise, so that timesteps of little noise weigh less (min-SNR)
    alpha_bar = noise_scheduler.alphas_cumprod.to(latents.device)[timesteps]  # (B,)
    weight = min_snr_weight(alpha_bar, prediction_type(noise_scheduler), config.min_snr_gamma)  # (B,)
    return noise_loss(model_pred, target, weight)


def make_tuner(config: Config, base: str, weights: bool = True) -> TunedPipeline:
    """Return the base with the part of it that is trained; `weights` as in `load_pipeline`."""
    tuner = TunedPipeline.from_pretrained(
        base,
        weight_dtype(config.mixed_precision),
        config.vae,
        config.prediction_type,
        config.quantization,
        weights,
        train=config.train,
        rank=config.rank,
        lora_targets="attention",
        seed=config.seed,
        original_device="cpu",  # only the images before the tuning need the original weights
    )
    tuner.pipeline().vae.enable_slicing()  # image by image: one of 1024 pixels takes 2.5 GB in the encoder
    if config.gradient_checkpointing:
        tuner.denoiser.enable_gradient_checkpointing()
    return tuner


def require_files(config: Config) -> None:
    """Raise ValueError, before anything is trained, for files that could not be written of what is trained."""
    if config.export == "lora" and config.train != "lora":
        raise ValueError(
            f"`export` is lora, but `train` is {config.train}, which makes none: give folder, or train lora"
        )
    if config.export == "lora" and config.single_file != "none":
        raise ValueError("`single_file` is a whole checkpoint, but `export` is lora: give none, or export folder")


def save_prior(config: Config, output: Path, tuner: TunedPipeline, base: str) -> list[str]:
    """Write the prior in the form that is asked for -> a line about each file.

    What an earlier end of this run wrote in another form goes.
    """
    pipeline, lora_file = tuner.pipeline(), LORA_FORMATS[config.lora_format]
    for file in ("model_index.json", SINGLE_FILE, *LORA_FORMATS.values()):
        (output / file).unlink(missing_ok=True)
    for part in pipeline.components:
        shutil.rmtree(output / part, ignore_errors=True)

    # ---- The LoRA alone, to load beside its base
    if config.export == "lora":
        tuner.save_lora(output, config.lora_format)
        return [f"LoRA on {config.base}: {output / lora_file}; a restorer needs the whole prior: --export folder"]

    # ---- The pipeline, with the LoRA in its weights, in the dtype of the training's frozen weights
    dtype = weight_dtype(config.mixed_precision)
    if config.train == "lora":
        is_quantized = config.quantization != "none"
        full = load_pipeline(base, dtype, config.vae, config.prediction_type) if is_quantized else pipeline
        pipeline = fuse_lora(pipeline, full)
    pipeline.unet.to(dtype)
    loaded = "" if config.mixed_precision == "no" else f"(..., dtype={dtype})"
    lines = [f"whole model, for `DiffusionPipeline.from_pretrained{loaded}` and stage 6: {output}"]
    if config.single_file != "none":
        kind = torch.float16 if config.single_file == "fp16" else torch.float32
        save_single_file(pipeline, output / SINGLE_FILE, kind)
        lines.append(f"single-file checkpoint: {output / SINGLE_FILE}")
    pipeline.save_pretrained(output)
    return lines


def rehearse(config: Config, rehearsal: Rehearsal) -> None:
    """Fill the cache, take a step and draw images without data, for `--plan`."""
    require_files(config)
    base, side, count = tiny.resolve(config.base, "sdxl"), config.resolution, config.batch_size
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with rehearsal:
        # ---- The base, and which of its weights are trained
        tuner = make_tuner(config, base, weights=False)
        pipeline, trained = tuner.pipeline(), tuner.trainable_parameters()
        require_side(pipeline, side)
        make_sampler(config.sampler, pipeline.scheduler)
        rehearsal.name_pipeline(pipeline, trained)
        rehearsal.leave_rest()  # the original weights of what is trained

        # ---- The portraits; with a cache, the VAE and the text encoders are away afterwards
        batch = {"pixel_values": torch.zeros(count, 3, side, side), "caption": [f"face {i}" for i in range(count)]}
        encode, unused = MomentEncoder(pipeline.vae), []
        if config.cache:
            batch = rehearse_cache(rehearsal, pipeline, encode, batch, accelerator.device, prompt="caption")
            unused = [network for network in networks_of(pipeline) if network is not tuner.denoiser]
        rehearsal.name_rest("batch")

        # ---- A step
        with rehearsal.away(*unused):
            optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
            unet, optimizer = accelerator.prepare(tuner.denoiser, optimizer)
            averaging = {"ema_decay": config.ema_decay, "ema_device": config.ema_device}
            run = TrainingRun(None, 1, accelerator, {"unet": unet}, {"unet": optimizer}, **averaging)
            if config.ema_device == "cpu":
                rehearsal.leave_rest()
            rehearsal.name_rest("averaged weights")
            unet.train()
            generators = [torch.Generator() for _ in range(count)]
            parts = (pipeline, unet, make_noise_scheduler(pipeline), batch, generators)
            rehearsal.step(partial(compute_loss, config, *parts), trained, optimizer, config.accumulation)

        # ---- An image, as `Validation` draws them one by one, with the VAE and the text encoders
        for drawn, weights in ((config.validate_every, tuner.sampling), (config.num_samples, tuner.untuned)):
            if drawn:
                with run.averaged(), weights() as drawing:
                    rehearsal.leave_rest()  # the trained weights that others stand for meanwhile
                    with rehearsal.phase(SAMPLES):
                        sample_images(drawing, ["a face"], [0], side, 2, config.guidance_scale)


if __name__ == "__main__":
    run_stage(main, Config, plan=partial(show_plan, rehearse, beside=FULL))

"""
Stage 4: tune a Stable Diffusion checkpoint with the guidance loss on face pairs (Face Score, arXiv 2406.17100, 5).

    python stages/04_guidance_tune.py                                  # offline: the pairs of stage 1, the tiny model
    python stages/04_guidance_tune.py --config stages/presets/sd15_lora.yaml --base my_model.safetensors
    accelerate launch stages/04_guidance_tune.py --config stages/presets/sd15.yaml

Reads   data/pairs/ (stage 1)
Writes  checkpoints/guided/: a diffusers pipeline, or with --train lora a LoRA file; samples/ before and after at the
        same seeds, samples.jsonl, metrics.jsonl, config.yaml
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from faceprior import tiny
from faceprior.bases import require_base
from faceprior.config import is_complete, print_problems, run_stage
from faceprior.diffusion import noise_like, report_long_prompts, sample_images, sampled_with
from faceprior.features import FeatureNetwork
from faceprior.guidance import GuidanceTuner, dino_distance
from faceprior.images import save_image
from faceprior.jsonl import rewrite_rows
from faceprior.losses import guidance_loss
from faceprior.memory import Rehearsal
from faceprior.models import quiet_libraries, resolve_device, weight_dtype
from faceprior.pairs import PairDataset, gather_pairs
from faceprior.plan import show_plan
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, open_run

SAMPLES = "samples.jsonl"


@dataclass
class Config:
    pairs: str = "data/pairs"  # folder of stage 1, or several, separated by commas
    base: str = "tiny"  # model to tune: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by files
    output: str = "checkpoints/guided"  # folder for the tuned model
    train: Literal["self_attention", "lora", "full"] = "self_attention"  # trained weights; the paper: self_attention
    rank: int = 16  # rank of the LoRA, [1, 1024]
    alpha: int = 16  # alpha of the LoRA, whose weight is alpha / rank, [1, 4096]
    objective: Literal["guidance", "denoising"] = "guidance"  # loss; denoising: plain fine-tuning on good, a baseline
    t_end: float = 0.5  # fraction of the schedule, from its start, that guidance draws timesteps from, (0, 1]
    distance: Literal["l2", "dino"] = "l2"  # distance of guidance: of masked latents, or of decoded features (Eq. 7)
    feature_network: str = "tiny"  # network of the dino distance: folder or hub id (facebook/dino-vits8), or tiny
    prompt_drop: float = 0.2  # fraction of the samples whose prompt is dropped, [0, 1]
    resolution: int = 128  # side of the training images in pixels, [64, 2048]
    steps: int = 60  # optimizer steps, [1, inf)
    batch_size: int = 4  # pairs in a micro-batch on one process, [1, 1024]
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
    overwrite: bool = False  # start over in an output folder that holds a run

    AFTER_TRAINING = frozenset({"num_samples", "sample_steps", "sampler", "guidance_scale"})


def main(config: Config) -> None:
    quiet_libraries()

    # ---- Input and output
    pairs, problems = gather_pairs(config.pairs)
    accelerator = make_accelerator(
        config.device, config.mixed_precision, config.accumulation, config.tracker, config.output
    )
    with accelerator.main_process_first():
        base = tiny.resolve(config.base, "sd15")
        if config.overwrite or not is_complete(config.output):
            require_base(base, "tune", config.vae, config.prediction_type)
        output = open_run(config, accelerator)
        if is_complete(output):
            accelerator.print(f"{output} is complete")
            return

    # ---- The base, and which of its weights are trained
    tuner = make_tuner(config, base).to(accelerator.device)

    # ---- Optimizer, and the run with its checkpoints
    trained = tuner.trainable_parameters()
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
    denoiser, optimizer = accelerator.prepare(tuner.denoiser, optimizer)
    schedule = (config.save_every, config.warmup_steps, config.schedule)
    run = TrainingRun(output, config.steps, accelerator, {"unet": denoiser}, {"unet": optimizer}, *schedule)
    dataset = PairDataset(pairs, config.resolution)
    if accelerator.is_main_process:
        report_long_prompts(tuner.pipeline(), (pair.prompt for pair in pairs))

    # ---- Training: Algorithm 1 of the paper, or in its place another objective of the tuner's
    for batch in run.batches(dataset, config.batch_size, config.seed, num_workers=config.num_workers):
        denoiser.train()
        generators = run.generators(batch)
        with accelerator.accumulate(denoiser):
            if config.objective == "denoising":
                loss = tuner.denoising_loss(batch, generators, denoiser)
            else:
                # Line 1: E(x_g) and E(x_b), the latents of both sides, and the face's mask m on their grid
                good, bad, mask = tuner.encode_pairs(batch)  # (B, C, h, w) twice, (B, 1, h, w)

                # Line 4: t ~ U[1, T_end], where details appear and not the layout; ONE noise for both sides
                timesteps = tuner.sample_timesteps(generators, config.t_end)  # (B,)
                noise = noise_like(good, generators)  # (B, C, h, w)

                # Line 5: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) e
                noisy_good = tuner.add_noise(good, noise, timesteps)  # (B, C, h, w)
                noisy_bad = tuner.add_noise(bad, noise, timesteps)  # (B, C, h, w)

                # The prompt p, dropped for a fraction of the samples (section 6.1)
                prompts = tuner.encode_prompts(batch, generators)

                # Line 6, Eq. 6: z_g, the target, is the good side's x_0 as the ORIGINAL model predicts it
                with torch.no_grad(), tuner.original() as original:
                    target = tuner.predict_x0(original, noisy_good, timesteps, prompts)  # (B, C, h, w)

                # Line 7, Eq. 6: z_b is the bad side's x_0 as the trained model predicts it, with gradients
                prediction = tuner.predict_x0(denoiser, noisy_bad, timesteps, prompts)  # (B, C, h, w)

                # Line 8, Eq. 7: L_guidance = d(m o z_g, m o z_b), on the face only
                loss = guidance_loss(target, prediction, mask, tuner.distance)

            # Line 9: one step down the gradient, after `accumulation` micro-batches
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)

    # ---- The tuned model, samples before and after, and the summary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tuner.save_pretrained(output)
        tiny.copy_info(config.base, output)
        largest_first = sorted(pairs, key=lambda pair: (-pair.area_ratio, pair.id))
        draw_samples(config, output, tuner, [pair.prompt for pair in largest_first])
        run.finish(trained_parameters=sum(p.numel() for p in trained), pairs=len(pairs))
        print_problems(problems, "pair")
        print(f"{output}: tuned for {config.steps} steps; samples before and after in {output / 'samples'}")
    accelerator.end_training()


def make_tuner(config: Config, base: str, weights: bool = True) -> GuidanceTuner:
    """Return the base with the part of it that is trained, and what the loss needs; `weights` as in `load_pipeline`."""
    tuner = GuidanceTuner.from_pretrained(
        base,
        weight_dtype(config.mixed_precision),
        config.vae,
        config.prediction_type,
        weights=weights,
        train=config.train,
        rank=config.rank,
        alpha=config.alpha,
        t_end=config.t_end,
        prompt_drop=config.prompt_drop,
    )
    if config.distance == "dino":
        tuner.distance = dino_distance(tuner.pipeline().vae, load_features(config.feature_network, weights))
    if config.gradient_checkpointing:
        tuner.denoiser.enable_gradient_checkpointing()
    return tuner


def load_features(name: str, weights: bool = True) -> FeatureNetwork:
    """Load the network of the dino distance; `tiny` is never built untrained, as its features would mean nothing."""
    folder = tiny.tiny_folder() / "features" if name == tiny.NAME else name
    return FeatureNetwork.from_pretrained(folder) if weights else FeatureNetwork.from_config(folder)


def rehearse(config: Config, rehearsal: Rehearsal) -> None:
    """Take a step and draw the samples without data, for `--plan`."""
    base, side, count = tiny.resolve(config.base, "sd15"), config.resolution, config.batch_size
    device = resolve_device(config.device)
    with rehearsal:
        # ---- The base, and which of its weights are trained
        tuner = make_tuner(config, base, weights=False).to(device)
        trained = tuner.trainable_parameters()
        rehearsal.name_pipeline(tuner.pipeline(), trained)
        rehearsal.name_rest("other weights")  # the originals of what is trained, the feature network
        optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)

        # ---- A step
        tuner.denoiser.train()
        batch = {name: torch.zeros(count, 3, side, side, device=device) for name in ("good", "bad")}
        batch["mask"] = torch.zeros(count, 1, side, side, device=device)
        batch["prompt"] = [f"face {number}" for number in range(count)]
        generators = [torch.Generator() for _ in range(count)]
        compute = {"guidance": tuner.loss, "denoising": tuner.denoising_loss}[config.objective]
        rehearsal.step(partial(compute, batch, generators), trained, optimizer, config.accumulation)

        # ---- The samples, as `draw_samples` makes them
        prompts = [f"face {number}" for number in range(config.num_samples)]
        if prompts:
            with rehearsal.phase("samples"), tuner.untuned() as original:
                sample_images(original, prompts, range(len(prompts)), side, 1, config.guidance_scale)


def draw_samples(config: Config, output: Path, tuner: GuidanceTuner, prompts: list[str]) -> None:
    """Generate images of the first prompts, at the same seeds with the original and with the tuned weights."""
    chosen = list(dict.fromkeys(prompts))[: config.num_samples]
    if not chosen:
        return
    options = (range(len(chosen)), config.resolution, config.sample_steps, config.guidance_scale)
    with sampled_with(config.sampler, tuner.pipeline()) as tuned:
        with tuner.untuned() as original:
            before = sample_images(original, chosen, *options)
        after = sample_images(tuned, chosen, *options)
    rows = []
    for seed, (prompt, *images) in enumerate(zip(chosen, before, after, strict=True)):
        files = {side: f"samples/{seed:03d}_{side}.png" for side in ("before", "after")}
        for file, image in zip(files.values(), images, strict=True):
            save_image(image, output / file)
        rows.append({"prompt": prompt, "seed": seed, **files})
    rewrite_rows(output / SAMPLES, rows)


if __name__ == "__main__":
    run_stage(main, Config, plan=partial(show_plan, rehearse))

"""
Stage 4: tune a Stable Diffusion checkpoint with the guidance loss on face pairs (Face Score, arXiv 2406.17100, 5).

    python stages/04_guidance_tune.py                                  # offline: the pairs of stage 1, the tiny model
    python stages/04_guidance_tune.py --config stages/presets/sd15_lora.yaml --base my_model.safetensors
    accelerate launch stages/04_guidance_tune.py --config stages/presets/sd15.yaml
    python stages/04_guidance_tune.py --objective guidance_reward --reward_scorer checkpoints/scorer

Reads   data/pairs/ (stage 1)
Writes  checkpoints/guided/: a diffusers pipeline, or with --train lora a LoRA file; with --extract_lora lora/, and
        with --single_file guided.safetensors; samples/ before and after at the same seeds (of the tiny base by the
        shipped LoRA too) and samples.jsonl; validation/, validation.jsonl; metrics.jsonl, config.yaml, done.json

The last line says whether the faces of the samples are better than without the tuning, not better, or too few to tell.
A run that --patience ended is trained further by the same command with a larger --patience, or with more --steps.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from faceprior import tiny
from faceprior.bases import BaseInfo, describe_base, require_base, require_single_file
from faceprior.bases.parts import SD1, SD2, SDXL
from faceprior.cache import rehearse_cache
from faceprior.config import is_complete, print_problems, run_stage
from faceprior.detect import Face, resolve_detector
from faceprior.diffusion import (
    make_sampler,
    noise_like,
    report_long_prompts,
    report_small_side,
    require_side,
    sample_images,
)
from faceprior.dino import dino_distance
from faceprior.features import FeatureNetwork
from faceprior.guidance import GuidanceTuner, load_tuned
from faceprior.lora import LORA_FORMATS, require_lora_format
from faceprior.losses import guidance_loss
from faceprior.memory import SAMPLES, Rehearsal
from faceprior.models import quiet_libraries, require_trainable, weight_dtype
from faceprior.pairs import PairDataset, gather_pairs, prompts_by_size
from faceprior.plan import show_plan
from faceprior.prompts import read_prompts
from faceprior.reward_tuning import FaceReward
from faceprior.scorer import FaceScorer, empty_scorer
from faceprior.training import TrainingRun, describe_samples, make_accelerator, make_optimizer, open_run
from faceprior.validation import Validation, require_scores

EXTRACTED, SINGLE_FILE = "lora", "guided.safetensors"
FILES = ("lora_format", "extract_lora", "single_file")  # the settings that say what is written


@dataclass
class Config:
    # ---- What goes in, and where the result goes
    pairs: str = "data/pairs"  # folder of stage 1, or several, separated by commas
    base: str = "tiny"  # model to tune: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by its files
    output: str = "checkpoints/guided"  # folder for the tuned model
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    # ---- What is trained
    train: Literal["self_attention", "lora", "full"] = (
        "self_attention"  # trained weights; the paper: self_attention; of Stable Diffusion 3 and FLUX: lora only
    )
    rank: int = 16  # rank of the LoRA, [1, 1024]
    alpha: int = 16  # alpha of the LoRA, whose weight is alpha / rank, [1, 4096]
    lora_targets: str = "self_attention"  # layers of the LoRA: self_attention, attention, all, or names, by commas
    lora_variant: Literal["plain", "rslora", "dora"] = (
        "plain"  # kind of LoRA; rslora: its weight is alpha / sqrt(rank); dora: the lengths of the weights beside it
    )

    # ---- The loss
    objective: Literal["guidance", "denoising", "dpo", "reward", "guidance_reward"] = (
        "guidance"  # loss; guidance: the paper's; denoising: plain fine-tuning on the good images; dpo: Diffusion-DPO
        # on the pairs; reward: Face Score of images drawn from the prompts; guidance_reward: both
    )
    t_end: float = (
        0.5  # fraction of the schedule, from its start, that guidance draws timesteps from, (0, 1]; for Stable
        # Diffusion 3 and FLUX the level of noise there in Stable Diffusion's schedule: 0.5 is s = 0.62
    )
    prompt_drop: float = 0.2  # fraction of the samples whose prompt is dropped, [0, 1]
    distance: Literal["l2", "dino"] = "l2"  # distance of guidance: of masked latents, or of decoded features (Eq. 7)
    feature_network: str = "tiny"  # network of the dino distance: folder or hub id (facebook/dino-vits8), or tiny
    dpo_beta: float = 2000.0  # strength of dpo's pull to the base; its paper: 2000, for SDXL 5000, (0, inf)
    reward_scorer: str = "tiny"  # scorer of the reward: folder of stage 2, hub id (OPPOer/FaceScore), or tiny
    reward_weight: float = 1.0  # weight of the reward in the loss, (0, inf)
    reward_steps: int = 25  # sampling steps of an image that is rewarded, [1, 1000]
    reward_last: int = 1  # number of the last of these steps that the gradient flows through, [1, 1000]
    reward_guidance: float = 2.5  # classifier-free guidance scale of the images that are rewarded, [1, 30]
    reward_watch: int = 10  # steps between two looks for reward hacking, at what the reward does not see, [1, inf)

    # ---- The training
    resolution: int = 128  # side of the training images in pixels, [64, 2048]
    steps: int = 60  # optimizer steps, [1, inf)
    batch_size: int = 4  # pairs in a micro-batch on one process, [1, 1024]
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
    quantization: Literal["none", "8bit", "nf4"] = "none"  # form of the frozen weights; not none: with train lora only
    gradient_checkpointing: bool = False  # recomputation of activations: less memory, a third more time
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # optimizer; 8-bit: a quarter of its memory
    ema_device: Literal["auto", "cpu"] = "auto"  # device of the averaged weights; auto: the training's
    cache: str = ""  # folder of latents and prompt embeddings, computed once for all runs; empty: no cache
    num_workers: int = 0  # processes that load images, [0, 64]
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N

    # ---- Images to see whether it helps
    validate_every: int = 0  # steps between two validations: images at fixed prompts and seeds; 0: none, [0, inf)
    num_validation: int = 8  # images of a validation, [1, 1024]
    keep_best: bool = False  # choice of the weights whose validation has the best Face Score, in place of the last
    patience: int = 0  # validations without a better Face Score after which the training ends; 0: never, [0, inf)
    num_samples: int = 8  # images before and after, at seeds of their own, to judge the result by, [0, 1024]
    prompts: str = (
        ""  # prompts of all images: people, general, or a file (text: one a line); empty: of the largest faces
    )
    sample_steps: int = 25  # sampling steps of all images, [1, 1000]
    sampler: Literal["base", "pndm", "ddim", "ddpm", "euler", "dpm++"] = "base"  # sampler; base: the base's own
    guidance_scale: float = 2.5  # classifier-free guidance scale of all images, [1, 30]
    scorer: str = "auto"  # scorer of images: folder, hub id, tiny or none; auto: stage 2's, or tiny beside a tiny base
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector of both scorers; auto: without a download

    # ---- Files
    lora_format: Literal["diffusers", "kohya"] = "diffusers"  # format of the LoRA; kohya: for the web UIs, of U-Nets
    extract_lora: int = 0  # rank of a LoRA that is extracted from trained self-attention; 0: none, [0, 1024]
    single_file: Literal["none", "fp16", "fp32"] = "none"  # dtype of a checkpoint for the web UIs beside the pipeline
    save_every: int = 20  # steps between two checkpoints to resume from, [1, inf)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # tracker that gets the log beside metrics.jsonl

    # with validations, which see them too, `Validation` refuses other ones while the training lasts
    AFTER_TRAINING = frozenset(
        {"num_samples", "sample_steps", "sampler", "guidance_scale", "prompts", "scorer", "patience", *FILES}
    )


def main(config: Config) -> None:
    quiet_libraries()

    # ---- Input and output
    require_trainable(config.train, config.quantization)
    pairs, problems = gather_pairs(config.pairs)
    dataset = PairDataset(pairs, config.resolution)
    inputs = {"pairs": describe_samples(dataset)}
    sample_prompts = read_prompts(config.prompts) if config.prompts else prompts_by_size(pairs)
    accelerator = make_accelerator(
        config.device, config.mixed_precision, config.accumulation, config.tracker, config.output
    )
    with accelerator.main_process_first():
        base = tiny.resolve(config.base, "sd15")
        if config.overwrite or not is_complete(config.output):
            require_files(config, require_base(base, "tune", config.vae, config.prediction_type, config.train))
            require_scores(config, find_scorer(config.scorer, base), config.validate_every)
        output = open_run(config, accelerator, inputs)
        if is_complete(output):
            accelerator.print(f"{output} is complete")
            return
        scorer = load_scorer(config.scorer, base)
        if scorer or "reward" in config.objective:
            resolve_detector(config.detector)  # one that cannot be had is found now, not after the cache is filled

    # ---- The base, and which of its weights are trained
    tuner = make_tuner(config, base)
    inputs["base"] = tuner.describe_base()
    require_side(tuner.pipeline(), config.resolution)
    make_sampler(config.sampler, tuner.pipeline().scheduler)  # one that does not fit is found now, not at the end

    # ---- The pairs; with a cache, the VAE and the text encoders are on the device only while they fill it
    if accelerator.is_main_process:
        report_small_side(tuner.pipeline(), config.resolution)
        report_long_prompts(tuner.pipeline(), [*sample_prompts, *(pair.prompt for pair in pairs)])
    if config.cache:
        dataset = tuner.cached(dataset, config.cache, accelerator, config.batch_size, config.num_workers)
    tuner.to(accelerator.device, encoders=not config.cache)

    # ---- Optimizer, and the run with its checkpoints
    trained = tuner.trainable_parameters()
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
    denoiser, optimizer = accelerator.prepare(tuner.denoiser, optimizer)
    schedule = (config.save_every, config.warmup_steps, config.schedule)
    keeping = {key: getattr(config, key) for key in ("ema_decay", "ema_device", "keep_best", "patience")}
    keeping["inputs"] = inputs
    run = TrainingRun(output, config.steps, accelerator, {"unet": denoiser}, {"unet": optimizer}, *schedule, **keeping)

    # ---- Images at fixed prompts and seeds, to see whether it helps: the untuned ones, at step 0
    drawing = (config.resolution, config.validate_every, config.num_validation, config.sample_steps, config.sampler)
    validation = Validation(run, tuner, scorer, sample_prompts, *drawing, config.guidance_scale, config.detector)
    validation.start()

    # ---- Training: Algorithm 1 of the paper, or in its place another objective of the tuner's
    denoiser.train()
    for batch in run.batches(dataset, config.batch_size, config.seed, num_workers=config.num_workers):
        generators = run.generators(batch)
        with accelerator.accumulate(denoiser):
            if config.objective != "guidance":
                loss = tuner.objective_loss(config.objective, batch, generators, denoiser)
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
            run.check(loss, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss, **tuner.measures)

        # From time to time: does the Face Score rise because of better faces, and do new images show it?
        if tuner.reward and run.every(config.reward_watch):
            history = run.state.setdefault("reward_watch", [])
            run.log(**tuner.watch_reward(batch, run.generators(batch, "watch"), history))
        validation.step()

    # ---- The tuned model (the last weights, their average, or the best), samples before and after, and the verdict
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.use_final_weights()
        saved = save_tuned(config, output, tuner)
        tiny.copy_info(config.base, output)
        verdict = validation.judge(config.num_samples, load_shipped(config, accelerator.device))
        run.finish(trained_parameters=sum(p.numel() for p in trained), pairs=len(pairs), verdict=verdict.to_dict())
        print_problems(problems, "pair")
        drawn = f"; samples before and after in {output / 'samples'}" if config.num_samples else ""
        print(f"{output}: tuned for {run.describe()}{drawn}")
        for line in saved:
            print(line)
        print(f"Face Score, tuned against untuned: {verdict}")
        if tuner.reward:
            print("That Face Score was trained for: look at the samples, and at the other measures in metrics.jsonl")
    accelerator.end_training()


def make_tuner(config: Config, base: str, weights: bool = True) -> GuidanceTuner:
    """Return the base with the part of it that is trained, and what the loss needs; `weights` as in `load_pipeline`."""
    tuner = GuidanceTuner.from_pretrained(
        base,
        weight_dtype(config.mixed_precision),
        config.vae,
        config.prediction_type,
        config.quantization,
        weights,
        train=config.train,
        rank=config.rank,
        alpha=config.alpha,
        lora_targets=config.lora_targets,
        lora_variant=config.lora_variant,
        t_end=config.t_end,
        prompt_drop=config.prompt_drop,
        dpo_beta=config.dpo_beta,
    )
    if config.distance == "dino":
        tuner.distance = dino_distance(tuner.pipeline().vae, load_features(config.feature_network, weights))
    if "reward" in config.objective:
        tuner.reward = load_reward(config, weights)
    if config.gradient_checkpointing:
        tuner.denoiser.enable_gradient_checkpointing()
    return tuner


def require_files(config: Config, base: BaseInfo) -> None:
    """Raise ValueError, before anything is trained, for files that could not be written of what is trained."""
    if config.train == "lora":
        require_lora_format(config.lora_format, config.lora_variant, is_unet=base.architecture in (SD1, SD2, SDXL))
    if config.extract_lora and config.train != "self_attention":
        raise ValueError(f"`extract_lora` is of trained self-attention, but `train` is {config.train}: give 0")
    if config.single_file != "none":
        if config.train == "lora":
            raise ValueError(
                "`single_file` is a whole checkpoint, but `train` is lora, whose file is the LoRA: give none"
            )
        require_single_file(base.architecture)


def save_tuned(config: Config, output: Path, tuner: GuidanceTuner) -> list[str]:
    """Write the tuned weights in the forms that are asked for -> a line about each, and by what it is loaded.

    What an earlier end of this run wrote besides, goes.
    """
    written, lora_file = set(), LORA_FORMATS[config.lora_format]
    reader = "`load_lora_weights` of diffusers" + (" and the web UIs" if config.lora_format == "kohya" else "")
    if config.train == "lora":
        tuner.save_lora(output, config.lora_format)
        written.add(output / lora_file)
        lines = [f"LoRA, for {reader}: {output / lora_file}"]
    else:
        tuner.save_pretrained(output)
        lines = [f"whole model, for `DiffusionPipeline.from_pretrained`: {output}"]
    if config.extract_lora:
        lora = tuner.save_lora(output / EXTRACTED, config.lora_format, config.extract_lora)
        written.add(output / EXTRACTED / lora_file)
        lines.append(f"extracted LoRA, for {reader}: {output / EXTRACTED / lora_file}; {lora.loss()}")
    if config.single_file != "none":
        tuner.save_single_file(output / SINGLE_FILE, {"fp16": torch.float16, "fp32": torch.float32}[config.single_file])
        written.add(output / SINGLE_FILE)
        lines.append(f"single-file checkpoint: {output / SINGLE_FILE}")
    files = [folder / file for folder in (output, output / EXTRACTED) for file in LORA_FORMATS.values()]
    for old in {*files, output / SINGLE_FILE} - written:
        old.unlink(missing_ok=True)
    return lines


def load_shipped(config: Config, device: torch.device):
    """Return a pipeline of the tiny base with the LoRA that ships; None for any other base, and without samples."""
    folder = tiny.tiny_folder() / "guided"
    if config.base != tiny.NAME or config.vae or not config.num_samples or tiny.info(folder) is None:
        return None
    return load_tuned(folder, tiny.resolve(config.base, "sd15")).to(device)


def load_features(name: str, weights: bool = True) -> FeatureNetwork:
    """Load the network of the dino distance; `tiny` is never built untrained, as its features would mean nothing."""
    folder = tiny.tiny_folder() / "features" if name == tiny.NAME else name
    return FeatureNetwork.from_pretrained(folder) if weights else FeatureNetwork.from_config(folder)


def rehearse(config: Config, rehearsal: Rehearsal) -> None:
    """Fill the cache, take a step, draw and score an image without data, for `--plan`."""
    base, side, count = tiny.resolve(config.base, "sd15"), config.resolution, config.batch_size
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with rehearsal:
        # ---- The base, and which of its weights are trained
        tuner = make_tuner(config, base, weights=False)
        pipeline, trained = tuner.pipeline(), tuner.trainable_parameters()
        require_files(config, describe_base(pipeline))  # refuse what the training refuses, and do not advise it
        require_side(pipeline, side)
        make_sampler(config.sampler, pipeline.scheduler)
        require_scores(config, find_scorer(config.scorer, base), config.validate_every)
        rehearsal.name_pipeline(pipeline, trained)
        if tuner.reward:
            rehearsal.name("scorer", tuner.reward.scorer)
        rehearsal.name_rest("other weights")  # the originals of what is trained, the feature network

        # ---- The pairs; with a cache, the VAE and the text encoders are away afterwards
        batch = {name: torch.zeros(count, 3, side, side, device=accelerator.device) for name in ("good", "bad")}
        batch["mask"] = torch.zeros(count, 1, side, side, device=accelerator.device)
        batch["prompt"] = [f"face {number}" for number in range(count)]
        unused = []
        if config.cache:
            batch = rehearse_cache(rehearsal, pipeline, tuner.encode_entries, batch, accelerator.device)
            decodes = config.distance == "dino" or tuner.reward
            unused = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
            unused = [p for p in unused if p is not tuner.denoiser and not (p is pipeline.vae and decodes)]
        tuner.to(accelerator.device, encoders=not config.cache)
        rehearsal.name_rest("batch")

        # ---- A step
        with rehearsal.away(*unused):
            optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
            denoiser, optimizer = accelerator.prepare(tuner.denoiser, optimizer)
            keeping = {"ema_decay": config.ema_decay, "ema_device": config.ema_device}
            run = TrainingRun(None, 1, accelerator, {"unet": denoiser}, {"unet": optimizer}, **keeping)
            if config.ema_device == "cpu":
                rehearsal.leave_rest()
            rehearsal.name_rest("averaged weights")
            denoiser.train()
            generators = [torch.Generator() for _ in range(count)]
            compute = partial(tuner.objective_loss, config.objective, batch, generators, denoiser)
            rehearsal.step(compute, trained, optimizer, config.accumulation)

        # ---- An image, as `Validation` draws them one by one, with the VAE and the text encoders, and its score
        drawn = (["a face"], [0], side, 2, config.guidance_scale)
        if config.validate_every:
            with run.averaged(), tuner.sampling() as tuned:
                rehearsal.leave_rest()  # the weights that the average stands for meanwhile
                with rehearsal.phase(SAMPLES):
                    sample_images(tuned, *drawn)
        if config.num_samples:
            with tuner.untuned() as original:
                rehearsal.leave_rest()  # the tuned weights
                with rehearsal.phase(SAMPLES):
                    sample_images(original, *drawn)
        if config.validate_every or config.num_samples:
            with rehearsal.away(*unused):
                scorer = load_scorer(config.scorer, base, weights=False)
                if scorer:
                    rehearsal.name("scorer", scorer.to(accelerator.device))
                    with rehearsal.phase("scores"):
                        scorer.score(Image.new("RGB", (side, side)), faces=[whole_image(side)])


def whole_image(side: int) -> Face:
    """Return a face as large as its image, the one that is found where there is no data."""
    return Face((0, 0, side, side), None, 1.0)


def load_reward(config: Config, weights: bool = True) -> FaceReward:
    """Load the scorer of the reward; without its weights, every image has a face and two steps stand for the first."""
    name, steps, last = tiny.resolve(config.reward_scorer, "scorer"), config.reward_steps, config.reward_last
    rest = (config.reward_guidance, config.reward_weight)
    if weights:
        return FaceReward(FaceScorer.from_pretrained(name), config.detector, steps, last, *rest)
    return FaceReward(empty_scorer(name), lambda image: [whole_image(len(image))], min(steps, last + 2), last, *rest)


def find_scorer(name: str, base: str) -> str | None:
    """Return which scorer the images get; `auto` takes one that is here, a tiny one for a tiny base."""
    if name == "auto":
        stage_2, is_tiny = Path("checkpoints/scorer"), tiny.info(base) is not None
        fits = (stage_2 / FaceScorer.config_name).is_file() and (tiny.info(stage_2) is not None) == is_tiny
        name = str(stage_2) if fits else tiny.NAME if is_tiny else "none"
    return None if name == "none" else name


def load_scorer(name: str, base: str, weights: bool = True) -> FaceScorer | None:
    """Load the scorer of the images, or build it only."""
    name = find_scorer(name, base)
    if name is None:
        return None
    return (FaceScorer.from_pretrained if weights else empty_scorer)(tiny.resolve(name, "scorer"))


if __name__ == "__main__":
    run_stage(main, Config, plan=partial(show_plan, rehearse))

"""
Stage 6: train a ControlNet that restores degraded faces on the portrait prior (AuthFace, arXiv 2410.09864, 3.2).

    python stages/06_train_restorer.py                                 # offline: stages 3 and 5, the tiny model
    accelerate launch stages/06_train_restorer.py --config stages/presets/sdxl.yaml --images ffhq/

Reads   data/portraits/images/ (stage 3) or any folder of aligned faces such as FFHQ; checkpoints/prior/ (stage 5)
Writes  checkpoints/restorer/: all parts in the official layout, for AuthFaceRestorer.from_pretrained; samples/ (clean,
        degraded, restored), samples.jsonl, landmarks.jsonl (of the faces), metrics.jsonl, config.yaml; with
        --time_m auto also confidence.json, .jsonl and .svg

The loss is Eq. 1, noise prediction with the empty prompt, and the time-aware latent facial feature loss: discriminators
of eyes and mouth are trained in turn with the ControlNet. The rows of Tables 2 and 4 are presets/rows/authface_*.yaml.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from faceprior import tiny  # first: it silences bitsandbytes, which diffusers loads

# isort: split
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, DDPMScheduler, DiffusionPipeline
from PIL import Image

from faceprior.bases import load_pipeline, require_base
from faceprior.cache import rehearse_cache, text_encoders
from faceprior.clean_faces import CleanFaces, DegradedPair, MomentEncoder, clean_latents, readable_images, save_samples
from faceprior.confidence import auto_time_m
from faceprior.config import is_complete, print_problems, run_stage
from faceprior.degrade import ranges_of
from faceprior.diffusion import (
    added_conditions,
    encode_prompts,
    make_noise_scheduler,
    networks_of,
    noise_like,
    pred_original_sample,
    require_side,
    training_target,
)
from faceprior.facial import (
    FacialDiscriminators,
    FacialFeatureLoss,
    find_landmarks,
    largest_landmarks,
    without_landmarks,
)
from faceprior.files import printable
from faceprior.lora import find_lora
from faceprior.losses import facial_loss, noise_loss, normalized_time, step_weights
from faceprior.memory import ENCODING, Rehearsal
from faceprior.models import load_part, looks_like_path, placed, quantize, quiet_libraries, weight_dtype
from faceprior.plan import show_plan
from faceprior.restoration_reward import RestorationReward
from faceprior.restorer import NEGATIVE_PROMPT, PROMPT, AuthFaceRestorer, RestorerSettings
from faceprior.reward_tuning import FaceReward
from faceprior.scorer import FaceScorer, empty_scorer
from faceprior.training import (
    TrainingRun,
    describe_samples,
    describe_weights,
    make_accelerator,
    make_optimizer,
    open_run,
    sample_timesteps,
    seeded,
)


@dataclass
class Config:
    # ---- What goes in, and where the result goes
    images: str = "data/portraits/images"  # folder of clean, aligned faces
    prior: str = "checkpoints/prior"  # portrait prior of stage 5: diffusers folder, .safetensors file, hub id, or tiny
    init: str = "tiny"  # restorer whose ControlNet is trained on: folder, hub id, or tiny; empty: the prior's encoder
    output: str = "checkpoints/restorer"  # folder for the restorer
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    # ---- The degraded faces; a range is two numbers, for a face of 512 pixels, and empty it is the preset's
    degradation: Literal["authface", "gfpgan", "diffbir", "codeformer"] = "authface"  # preset of the ranges below
    scale_degradation: bool = True  # blur and downsampling scaled with the resolution, as they are meant for 512 pixels
    blur_kernel: int | None = None  # side of the blur's kernel in pixels, odd, [1, 255]
    blur_sigma: tuple[float, ...] = ()  # range of the blur's standard deviation in pixels; 0 0: none, [0, inf)
    isotropic_prob: float | None = None  # probability of a round blur, [0, 1]
    downsample: tuple[float, ...] = ()  # range of the downsampling factor; 1 1: none, [0.001, inf)
    noise: tuple[float, ...] = ()  # range of the noise's standard deviation, of 255; 0 0: none, [0, inf)
    jpeg: tuple[int, ...] = ()  # range of the JPEG quality; 0 0: no JPEG, [0, 100]
    jitter_prob: float | None = None  # probability of a colour shift (GFP-GAN: 0.3), [0, 1]
    jitter_shift: float | None = None  # largest shift of a colour channel, of 255 (GFP-GAN: 20), [0, 255]
    gray_prob: float | None = None  # probability that the degraded face is grey (GFP-GAN: 0.01), [0, 1]
    flip_prob: float = 0.0  # probability that a face is mirrored, the clean one too (GFP-GAN: 0.5), [0, 1]

    # ---- The facial feature loss
    facial_loss: Literal["time_aware", "constant", "none"] = "time_aware"  # weight of the facial feature loss over time
    time_m: float | Literal["auto"] = (
        -0.5  # peak of w(t), at t = sigmoid(m), t from 0 (clean) to 1, (-inf, inf); auto: by the noise at which a
        # detector loses these faces, as the paper found it (appendix B)
    )
    time_s: float = 1.0  # width of w(t) on the logit of t, (0, inf)
    time_faces: int = 64  # number of faces that auto is measured on, [2, inf)
    lambda_d: float = 0.01  # weight of the adversarial part (GFP-GAN: 1; the paper does not say), [0, inf)
    lambda_s: float = 100.0  # weight of the style part (GFP-GAN: 200; the paper does not say), [0, inf)
    discriminator_learning_rate: float = 2e-3  # learning rate of the discriminators' Adam, (0, 1)
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # detector of eyes and mouth; auto never downloads

    # ---- The reward, which is not AuthFace's (DiffusionReward, arXiv 2505.17910)
    reward_weight: float = 0.0  # weight of the Face Score of the predicted faces in the loss; 0: none, [0, inf)
    reward_scorer: str = "tiny"  # scorer of the reward: folder of stage 2, hub id (OPPOer/FaceScore), or tiny
    reward_t_end: float = 0.3  # t below which predicted faces are rewarded, (0, 1]
    reward_structure: float = 10.0  # weight of the structural distance from the clean face in the reward, [0, inf)
    reward_watch: int = 10  # steps between two looks for reward hacking, at what the reward does not see, [1, inf)

    # ---- The training
    resolution: int = 128  # side of the training images in pixels, [64, 2048]
    steps: int = 40  # optimizer steps, [1, inf)
    batch_size: int = 4  # faces in a micro-batch on one process, [1, 1024]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 1e-4  # learning rate of AdamW at its peak, (0, 1)
    schedule: Literal["constant", "cosine"] = "constant"  # schedule of both learning rates
    warmup_steps: int = 0  # steps of linear warm-up, [0, inf)
    weight_decay: float = 0.0  # weight decay of AdamW; the papers name none, [0, 1]
    max_grad_norm: float = 1.0  # norm to which gradients are clipped, (0, inf)
    seed: int = 0  # seed of the data order, degradations, timesteps and noise, [0, inf)

    # ---- Memory and speed
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the frozen weights and of autocast
    quantization: Literal["none", "8bit", "nf4"] = "none"  # form of the frozen U-Net's weights in the training
    gradient_checkpointing: bool = False  # recomputation of activations: less memory, a third more time
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # optimizer; 8-bit: a quarter of its memory
    cache: str = ""  # folder of the clean faces' latents, computed once for all runs; empty: no cache
    num_workers: int = 0  # processes that load and degrade images, [0, 64]
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N

    # ---- The restorer's own settings, and samples
    official_prompts: bool = False  # official prompts for sampling; false: the empty one, as in training
    num_samples: int = 4  # faces restored at the end, [0, 64]
    sample_steps: int = 50  # sampling steps, saved as the restorer's default, [1, 1000]
    guidance_scale: float = 1.0  # classifier-free guidance scale, saved as the restorer's default, [1, 30]
    start: Literal["noise", "degraded"] = (
        "degraded"  # start of sampling, saved as the default; the official code: noise
    )

    # ---- Files
    save_every: int = 20  # steps between two checkpoints, [1, inf)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # tracker that gets the log beside metrics.jsonl

    AFTER_TRAINING = frozenset({"official_prompts", "num_samples", "sample_steps", "guidance_scale", "start"})


@dataclass
class Networks:
    """The frozen prior, the trained ControlNet, prepared, the noise, and what `null_prompt` returns."""

    prior: DiffusionPipeline
    controlnet: torch.nn.Module
    noise_scheduler: DDPMScheduler
    prompt: dict[str, Any]


def main(config: Config) -> None:
    quiet_libraries()

    # ---- Input and output
    if not Path(config.images).exists():
        raise FileNotFoundError(f"no faces in {config.images}: `python stages/03_curate_portraits.py` makes them")
    ranges = ranges_of(config, config.resolution)
    paths, problems = readable_images(config.images)
    inputs = {"images": describe_samples(CleanFaces(paths, config.resolution))}
    folder = Path(config.prior)
    if looks_like_path(config.prior) and not folder.exists():
        raise FileNotFoundError(f"no prior in {config.prior}: `python stages/05_prior_tune.py` makes one")
    if folder.is_dir() and not (folder / "model_index.json").is_file() and find_lora(folder):
        raise ValueError(
            f"{folder} holds a LoRA alone, and a restorer needs the whole prior: the command of stage 5 that made it "
            "writes that with `--export folder`"
        )
    accelerator = make_accelerator(
        config.device, config.mixed_precision, config.accumulation, config.tracker, config.output
    )
    with accelerator.main_process_first():
        base = tiny.resolve(config.prior, "sdxl")
        if config.overwrite or not is_complete(config.output):
            require_base(base, "restore")
        output = open_run(config, accelerator, inputs)
        if is_complete(output):
            accelerator.print(f"{output} is complete")
            return

    # ---- Clean faces, with the places of eyes and mouth, and their degradation
    landmarks = None
    if config.facial_loss != "none":
        find = partial(largest_landmarks, detector=config.detector)
        landmarks = find_landmarks(paths, output, config.resolution, accelerator, find)  # (N, 5, 2)
    faces, augment = CleanFaces(paths, config.resolution, landmarks), DegradedPair(ranges, config.flip_prob)

    # ---- The frozen prior with the null prompt, whose encoders then leave the device, and the trained ControlNet
    dtype = weight_dtype(config.mixed_precision)
    prior = load_pipeline(base, dtype)
    inputs["prior"] = describe_weights(p for network in networks_of(prior) for p in network.parameters())
    require_side(prior, config.resolution)
    controlnet = make_controlnet(config, prior)
    quantize(prior.unet, config.quantization)  # after the ControlNet was made, which may start from its encoder
    with placed(text_encoders(prior), accelerator.device):
        prompt = null_prompt(config, prior)
    if config.facial_loss != "none" and config.time_m == "auto":
        with accelerator.main_process_first(), placed([prior.vae], accelerator.device):
            measured = (config.resolution, output, config.detector)
            config = replace(config, time_m=auto_time_m(prior, paths[: config.time_faces], *measured))
    if config.cache:
        loading = (config.batch_size, config.num_workers, config.flip_prob > 0)
        faces = faces.cached(config.cache, prior, accelerator, *loading)
    if not config.cache or config.reward_weight:
        prior.vae.to(accelerator.device)
    prior.unet.to(accelerator.device)
    controlnet.to(accelerator.device)

    # ---- Optimizers, and the run with its checkpoints
    optimizer = make_optimizer(controlnet.parameters(), config.optimizer, config.learning_rate, config.weight_decay)
    model, optimizer = accelerator.prepare(controlnet, optimizer)
    modules, optimizers = {"controlnet": model}, {"controlnet": optimizer}
    facial, reward = make_facial(config, prior, accelerator), make_reward(config, prior)
    if facial:
        modules["discriminators"], optimizers["discriminators"] = facial.discriminators, facial.optimizer
    schedule = (config.save_every, config.warmup_steps, config.schedule)
    run = TrainingRun(output, config.steps, accelerator, modules, optimizers, *schedule, inputs=inputs)

    # ---- Training with `compute_loss` (section 3.2)
    networks = Networks(prior, model, make_noise_scheduler(prior), prompt)
    for batch in run.batches(faces, config.batch_size, config.seed, augment, config.num_workers):
        generators = run.generators(batch)
        with accelerator.accumulate(model), accelerator.autocast():
            loss, parts, prediction, latents = compute_loss(config, networks, batch, generators, facial, reward)
            run.check(loss, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(controlnet.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            # The discriminators, on the same latents: cross-entropy of z_0 as real and z0_hat as fake
            if facial:
                parts["discriminator"] = facial.train_discriminators(prediction, latents, batch["landmarks"]).mean()
                parts |= facial.accuracy
        run.log(loss=loss, **parts)

        # From time to time: does the Face Score rise because of better faces?
        if reward and run.every(config.reward_watch):
            with torch.no_grad(), accelerator.autocast():
                seen = predict_clean(networks, batch, run.generators(batch, "watch"), config.reward_t_end)
            run.log(**reward.watch(seen["prediction"], seen["latents"], run.state.setdefault("reward_watch", [])))

    # ---- The restorer, restored samples, and the summary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        controlnet = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        prior.to(accelerator.device)
        restorer = AuthFaceRestorer.from_prior(prior, controlnet, settings(config))
        saved = restorer
        if config.quantization != "none":  # the prior is saved with the weights that it came with
            saved = AuthFaceRestorer.from_prior(load_pipeline(base, dtype), controlnet, settings(config))
        saved.save_pretrained(output)
        tiny.copy_info(config.prior, output)
        controlnet.to(dtype)  # saved in float32, sampled in the prior's dtype
        save_samples(output, faces, ranges, restorer.restore_crops, config.num_samples, config.seed)
        measured = {"time_m": config.time_m} if facial else {}
        run.finish(trained_parameters=sum(p.numel() for p in controlnet.parameters()), faces=len(faces), **measured)
        print_problems(problems, "image")
        if facial and (missing := without_landmarks(paths, landmarks)):
            names = printable(", ".join(missing), sys.stdout.encoding)
            print(f"trained with the noise loss only, no face found in {len(missing)}: {names}")
        print(f"{output}: trained for {config.steps} steps; samples in {output / 'samples'}")
    accelerator.end_training()


def predict_clean(
    networks: Networks, batch: dict[str, torch.Tensor], generators: list[torch.Generator], t_end: float = 1.0
) -> dict[str, torch.Tensor]:
    """Return latents z_0, prediction z0_hat, model_pred and its target, (B, 4, h, w) each, and timesteps (B,).

    generators: one per sample; t_end: end of the timesteps that are drawn, as a fraction of all.
    """
    prior, noise_scheduler, prompt = networks.prior, networks.noise_scheduler, networks.prompt

    # z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) e, at any timestep
    num_train_timesteps, dtype = noise_scheduler.config.num_train_timesteps, prior.unet.dtype
    latents = clean_latents(prior.vae, batch, generators)  # (B, 4, h, w)
    noise = noise_like(latents, generators)  # (B, 4, h, w)
    timesteps = sample_timesteps(generators, 0, max(1, int(t_end * num_train_timesteps)), latents.device)  # (B,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).to(dtype)

    # e_theta(z_t, t, [""], c): the ControlNet sees the degraded face c, the frozen U-Net its residuals
    condition = batch["controlnet_cond"]  # (B, 3, H, W)
    down, mid = networks.controlnet(noisy_latents, timesteps, controlnet_cond=condition, return_dict=False, **prompt)
    model_pred = prior.unet(
        noisy_latents,
        timesteps,
        down_block_additional_residuals=[residual.to(dtype) for residual in down],
        mid_block_additional_residual=mid.to(dtype),
        **prompt,
    ).sample  # (B, 4, h, w)

    target = training_target(noise_scheduler, latents, noise, timesteps)
    prediction = pred_original_sample(noise_scheduler, model_pred, timesteps, noisy_latents)
    found = {"latents": latents, "prediction": prediction, "model_pred": model_pred, "target": target}
    return {**found, "timesteps": timesteps}


def compute_loss(
    config: Config,
    networks: Networks,
    batch: dict[str, torch.Tensor],
    generators: list[torch.Generator],
    facial: FacialFeatureLoss | None,
    reward: RestorationReward | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the loss of a micro-batch, its parts, z0_hat and z_0, (B, 4, h, w) each; generators: one per sample."""
    step = predict_clean(networks, batch, generators)
    prediction, latents, timesteps = step["prediction"], step["latents"], step["timesteps"]
    num_train_timesteps, parts = networks.noise_scheduler.config.num_train_timesteps, {}

    # Eq. 1: L_noise = ||e - e_theta(z_t, t, [""], c)||^2
    loss = noise_loss(step["model_pred"], step["target"])
    if facial or reward:
        parts["noise"] = loss

    # Eqs. 2 to 5, reconstructed; w(t) is Eq. 3. z0_hat is what the model's output says of z_0:
    # L_facial = w(t) sum over eyes and mouth of [lambda_d softplus(-D(z0_hat)) + lambda_s style(z0_hat, z_0)]
    if facial:
        is_constant = config.facial_loss == "constant"
        weights = step_weights(num_train_timesteps, config.time_m, config.time_s, is_constant).to(latents.device)
        adversarial, style = facial(prediction, latents, batch["landmarks"])  # (B,) each
        added = facial_loss(weights[timesteps], adversarial, style, config.lambda_d, config.lambda_s)
        parts |= {"facial": added, "adversarial": adversarial.mean(), "style": style.mean()}
        loss = loss + added

    # Beyond the paper: the Face Score of D(z0_hat) at small t, with a structural term
    if reward:
        parts["reward"] = reward(prediction, latents, normalized_time(timesteps, num_train_timesteps))
        loss = loss + parts["reward"]
        parts |= reward.measures
    return loss, parts, prediction, latents


def null_prompt(config: Config, prior: DiffusionPipeline) -> dict[str, Any]:
    """Return the embeddings of the empty prompt for a micro-batch, as U-Net and ControlNet take them."""
    embeddings = encode_prompts(prior, [""] * config.batch_size)
    conditions = added_conditions(embeddings, config.resolution, config.resolution)
    return {"encoder_hidden_states": embeddings.prompt_embeds, "added_cond_kwargs": conditions}


def rehearse(config: Config, rehearsal: Rehearsal) -> None:
    """Fill the cache, take a step and restore a face without data, for `--plan`."""
    side, count = config.resolution, config.batch_size
    config = replace(config, time_m=0.0) if config.time_m == "auto" else config
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with rehearsal:
        # ---- The frozen prior and the ControlNet, here always of the sizes of the prior's encoder
        base = tiny.resolve(config.prior, "sdxl")
        prior = load_pipeline(base, weight_dtype(config.mixed_precision), weights=False)
        require_side(prior, side)
        controlnet = make_controlnet(replace(config, init=""), prior)
        quantize(prior.unet, config.quantization)
        rehearsal.name_pipeline(prior, controlnet.parameters())
        with rehearsal.away(prior.unet, prior.vae, controlnet), rehearsal.phase(ENCODING):
            prompt = null_prompt(config, prior)

        # ---- The faces; with a cache, the VAE is away afterwards, as the text encoders are
        batch = {name: torch.zeros(count, 3, side, side) for name in ("pixel_values", "controlnet_cond")}
        batch["landmarks"] = torch.zeros(count, 5, 2)
        away = text_encoders(prior)
        if config.cache:
            encode = MomentEncoder(prior.vae, config.flip_prob > 0)
            with rehearsal.away(controlnet):
                batch |= rehearse_cache(rehearsal, prior, encode, batch, accelerator.device, prompt=None)
            away += [] if config.reward_weight else [prior.vae]

        # ---- A step, also of the discriminators, whose optimizer has its state from the start
        with rehearsal.away(*away):
            reward = make_reward(config, prior, weights=False)
            if reward:
                rehearsal.name("scorer", reward.reward.scorer)
            optimizer = make_optimizer(
                controlnet.parameters(), config.optimizer, config.learning_rate, config.weight_decay
            )
            model, facial = accelerator.prepare(controlnet), make_facial(config, prior, accelerator)
            networks = Networks(prior, model, make_noise_scheduler(prior), prompt)
            generators = [torch.Generator() for _ in range(count)]
            latents = clean_latents(prior.vae, batch, generators)
            if facial:
                rehearsal.name("discriminators", facial.discriminators)
                facial.train_discriminators(latents, latents, batch["landmarks"])
                rehearsal.name_state(facial.optimizer)
            rehearsal.step(
                lambda: compute_loss(config, networks, batch, generators, facial, reward)[0],
                controlnet.parameters(),
                optimizer,
                config.accumulation,
                accelerator.autocast,
            )
            if facial:
                with rehearsal.phase("training"):
                    facial.train_discriminators(latents, latents, batch["landmarks"])

        # ---- A face, as `save_samples` restores them
        if config.num_samples:
            controlnet = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval().to(prior.unet.dtype)
            rehearsal.name("trained weights", controlnet)
            restorer = AuthFaceRestorer.from_prior(prior, controlnet, settings(config))
            with rehearsal.phase("samples"):
                restorer.restore_crops(
                    [Image.new("RGB", (side, side))], num_inference_steps=1, prompt="", negative_prompt=""
                )


def make_controlnet(config: Config, prior: DiffusionPipeline) -> ControlNetModel:
    """Return the ControlNet to train, in float32, and freeze the whole prior."""
    for part in prior.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    prior.vae.enable_slicing()  # image by image: one of 1024 pixels takes 2.5 GB in the encoder
    if config.init:  # not in the paper, which starts from the prior's encoder
        controlnet = load_part(
            ControlNetModel, tiny.resolve(config.init, "restorer"), "ControlNet", subfolder="controlnet"
        )
        if list(controlnet.config.block_out_channels) != list(prior.unet.config.block_out_channels):
            raise ValueError(f"the ControlNet of {config.init} does not fit the prior {config.prior}: give `--init ''`")
    else:
        # the condition is brought to the latents' size by strides of 2, one less than there are widths
        widths = (16, 32, 96, 256) if prior.vae_scale_factor == 8 else (16, 32, 64)
        with seeded(config.seed, "controlnet"):
            controlnet = ControlNetModel.from_unet(prior.unet, conditioning_embedding_out_channels=widths).float()
    if config.gradient_checkpointing:
        prior.unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    return controlnet.requires_grad_(True).train()


def make_facial(config: Config, prior: DiffusionPipeline, accelerator: Accelerator) -> FacialFeatureLoss | None:
    """Return the discriminators of eyes and mouth with their part of the loss, or None without it."""
    if config.facial_loss == "none":
        return None
    with seeded(config.seed, "discriminators"):
        discriminators = FacialDiscriminators(prior.vae.config.latent_channels).to(accelerator.device)
    return FacialFeatureLoss(discriminators, accelerator, config.resolution, config.discriminator_learning_rate)


def make_reward(config: Config, prior: DiffusionPipeline, weights: bool = True) -> RestorationReward | None:
    """Return the reward of predicted faces, or None without it; `weights` False: with a scorer that has none."""
    if not config.reward_weight:
        return None
    scorer = (FaceScorer.from_pretrained if weights else empty_scorer)(tiny.resolve(config.reward_scorer, "scorer"))
    reward = FaceReward(scorer, config.detector, weight=config.reward_weight)
    return RestorationReward(reward, prior.vae, config.reward_t_end, config.reward_structure)


def settings(config: Config) -> RestorerSettings:
    """Return the sampling settings that are saved with the restorer."""
    prompts = (PROMPT, NEGATIVE_PROMPT) if config.official_prompts else ("", "")
    return RestorerSettings(
        resolution=config.resolution,
        num_inference_steps=config.sample_steps,
        guidance_scale=config.guidance_scale,
        prompt=prompts[0],
        negative_prompt=prompts[1],
        start=config.start,
    )


if __name__ == "__main__":
    run_stage(main, Config, plan=partial(show_plan, rehearse))

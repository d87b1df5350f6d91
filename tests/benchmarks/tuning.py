"""
Training samples per second of guidance tuning: a straightforward script beside stage 4's way.

    python tests/benchmarks/tuning.py                                           # the tiny base on a CPU
    python tests/benchmarks/tuning.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution 512 \
        --device cuda --mixed_precision bf16 --batch_size 2 --steps 20

The straightforward script has two U-Nets, encodes both images and the prompts in every step, and runs in float32.
Stage 4's way is `GuidanceTuner`, without a cache and with one, and with --mixed_precision. All train the same weights
(--train, a LoRA as in the preset sd15_lora) with the same pairs and random numbers, in turns; so their losses are equal
but for rounding, which is checked where ours runs in float32, too. Aims: 2 times as fast on a GPU, 1.5 times on a CPU
at tiny size.
"""

import argparse
import copy
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.detect import box_mask
from faceprior.guidance import GuidanceTuner
from faceprior.images import save_image
from faceprior.models import quiet_libraries, resolve_device, weight_dtype
from faceprior.pairs import FacePair, PairDataset
from faceprior.procedural import draw_portrait
from faceprior.training import (
    SampleStream,
    TrainingRun,
    collate,
    make_accelerator,
    make_optimizer,
    sample_generators,
    seeded,
)

NAIVE, UNCACHED, OURS = "straightforward", "ours, no cache", "ours"
RANK, T_END, PROMPT_DROP, LEARNING_RATE, MAX_GRAD_NORM = 16, 0.5, 0.2, 1e-4, 1.0  # as in sd15_lora
TOLERANCE = 1e-3  # of a loss, in float32: sums in another order


def main() -> None:
    options = parse()
    quiet_libraries()
    base = tiny.resolve(options.base, "sd15")
    with tempfile.TemporaryDirectory() as folder:
        dataset = PairDataset(make_pairs(Path(folder, "pairs"), options.pairs, options.resolution), options.resolution)
        filling: list[float] = []
        ways = {
            NAIVE: straightforward(base, dataset, options),
            UNCACHED: ours(base, dataset, options, Path(folder, "uncached")),
            OURS: ours(base, dataset, options, Path(folder, "cached"), filling),
        }
        seconds, losses = measure(ways, options)
        report(options, seconds, losses, filling[0])
        if torch.cuda.is_available():
            print("waits for the GPU in a step: " + ", ".join(f"{name} {waits(way)}" for name, way in ways.items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="diffusers folder, .safetensors file, hub id, or tiny")
    parser.add_argument("--train", default="lora", choices=("lora", "self_attention"), help="weights that are trained")
    parser.add_argument("--resolution", type=int, default=128, help="pixels, sides of the images")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs in a step")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in the training set")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="times that all ways are run; the medians count")
    parser.add_argument("--num_workers", type=int, default=0, help="processes of each way that load samples")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"), help="of ours")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"), help="of ours")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in ours, as sd15_lora has it")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def make_pairs(folder: Path, count: int, resolution: int) -> list[FacePair]:
    """Draw portraits; the bad side of each is blurred under the mask."""
    pairs = []
    for number in range(count):
        drawing = draw_portrait(number, resolution)
        good, mask = Image.fromarray(drawing.image), box_mask((resolution, resolution), drawing.box)
        bad = Image.composite(good.filter(ImageFilter.BoxBlur(resolution // 32)), good, mask)
        files = {side: str(folder / f"{number}_{side}.png") for side in ("good", "bad", "mask")}
        for file, image in zip(files.values(), (good, bad, mask), strict=True):
            save_image(image, file)
        pairs.append(
            FacePair(
                id=str(number),
                photograph=f"{number}.png",
                **files,
                box=[float(edge) for edge in drawing.box],
                landmarks=None,
                confidence=1.0,
                area_ratio=0.2,
                strength=0.2,
                prompt=drawing.caption(),
                seed=number,
                base="drawn",
                difference=9.0,
            )  # fmt: skip
        )
    return pairs


# ---- the ways: each gives the loss of one step after the other


def straightforward(base: str, dataset: PairDataset, options: argparse.Namespace) -> Iterator[float]:
    """A script as one writes it with diffusers and peft from the paper's Algorithm 1."""
    device, pipeline = resolve_device(options.device), load_pipeline(base)
    if not isinstance(pipeline, StableDiffusionPipeline) or pipeline.scheduler.config.prediction_type != "epsilon":
        raise SystemExit(f"`base` has to be a Stable Diffusion 1 or 2 that predicts the noise but is {base}")
    pipeline.to(device)
    vae, text_encoder, tokenizer, unet = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet
    for part in (vae, text_encoder, unet):
        part.requires_grad_(False).eval()
    original = copy.deepcopy(unet)
    if options.train == "lora":
        layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
        with seeded(0, "lora"):
            unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights="gaussian"))
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".attn1." in name)
    unet.train()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)
    last = int(T_END * noise_scheduler.config.num_train_timesteps)

    loader = DataLoader(
        SampleStream(dataset, seed=0),
        batch_sampler=[
            range(i * options.batch_size, (i + 1) * options.batch_size) for i in range(number_of_steps(options))
        ],
        num_workers=options.num_workers,
        collate_fn=collate,
    )
    for batch in loader:
        good, bad, mask = (batch[side].to(device) for side in ("good", "bad", "mask"))
        generators = sample_generators(0, batch["position"])
        with torch.no_grad():
            good, bad = (vae.encode(side).latent_dist.mode() * vae.config.scaling_factor for side in (good, bad))
            mask = F.adaptive_max_pool2d(mask, good.shape[-2:])
            timesteps = torch.cat([torch.randint(0, last, (1,), generator=g) for g in generators]).to(device)
            noise = torch.stack([torch.randn(good.shape[1:], generator=g) for g in generators]).to(device)
            kept = [torch.rand((), generator=g) >= PROMPT_DROP for g in generators]
            texts = [prompt if keep else "" for prompt, keep in zip(batch["prompt"], kept, strict=True)]
            padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            prompt_embeds = text_encoder(tokenizer(texts, **padding).input_ids.to(device))[0]

        def predict_x0(network, latents, noise=noise, timesteps=timesteps, prompt_embeds=prompt_embeds):
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            model_pred = network(noisy_latents, timesteps, prompt_embeds).sample
            return (noisy_latents - (1 - alpha_bar).sqrt() * model_pred) / alpha_bar.sqrt()

        with torch.no_grad():
            target = predict_x0(original, good)
        loss = F.mse_loss(mask * predict_x0(unet, bad), mask * target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def ours(
    base: str, dataset: PairDataset, options: argparse.Namespace, output: Path, filling: list[float] | None = None
) -> Iterator[torch.Tensor]:
    """Stage 4's loop. filling: takes the seconds in which the cache was filled; None: no cache."""
    accelerator = make_accelerator(options.device, options.mixed_precision)
    tuner = GuidanceTuner.from_pretrained(
        base,
        weight_dtype(options.mixed_precision),
        train=options.train,
        rank=RANK,
        t_end=T_END,
        prompt_drop=PROMPT_DROP,
    )
    if options.gradient_checkpointing:
        tuner.denoiser.enable_gradient_checkpointing()
    if filling is not None:
        start = time.perf_counter()
        dataset = tuner.cached(dataset, output / "cache", accelerator, options.batch_size, options.num_workers)
        filling.append(time.perf_counter() - start)
    tuner.to(accelerator.device, encoders=filling is None)
    trained = tuner.trainable_parameters()
    optimizer = make_optimizer(trained, options.optimizer, LEARNING_RATE)
    unet, optimizer = accelerator.prepare(tuner.denoiser, optimizer)
    output.mkdir(exist_ok=True)
    steps = number_of_steps(options)
    run = TrainingRun(
        output, steps, accelerator, {"unet": unet}, {"unet": optimizer}, save_every=steps + 1, progress=False
    )
    unet.train()
    for batch in run.batches(dataset, options.batch_size, num_workers=options.num_workers):
        with accelerator.accumulate(unet):
            loss = tuner.loss(batch, run.generators(batch), unet)
            run.check(loss, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)
        yield loss.detach()


def number_of_steps(options: argparse.Namespace) -> int:
    return 1 + options.rounds * options.steps + 2  # one warms up, two are left: the last one writes a checkpoint


# ---- measuring


def measure(ways: dict[str, Iterator], options: argparse.Namespace) -> tuple[dict, dict]:
    """Each way's (clock, processor) seconds a step in every round, and its losses; its first step is not timed."""
    losses = {name: [next(way)] for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            losses[name] += [next(way) for _ in range(options.steps)]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            seconds[name].append([value / options.steps for value in spent])
    return seconds, losses


def waits(way: Iterator) -> int:
    """Count how often the program waits for the GPU in a step: the fewer, the further it can prepare ahead."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        next(way)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def report(options: argparse.Namespace, seconds: dict, losses: dict, filling: float) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(
        f"{options.base}, {options.resolution} px, batch {options.batch_size}, {options.device} ({device}), ours in "
        f"{weight_dtype(options.mixed_precision)}, torch {torch.__version__}; {options.rounds} rounds of "
        f"{options.steps} steps"
    )
    medians = {name: np.median(values, axis=0) for name, values in seconds.items()}
    losses = {name: np.array([float(loss) for loss in values]) for name, values in losses.items()}
    reference = losses[NAIVE]
    print(f"{'':15}  {'samples/s':>9}  {'as fast':>7}  {'CPU s/step':>10}  {'as little':>9}  {'loss differs by':>15}")
    differences = {}
    for name, (clock, processor) in medians.items():
        fast, little = medians[NAIVE] / (clock, processor)
        differences[name] = float(np.max(np.abs(losses[name] - reference) / reference))
        print(
            f"{name:15}  {options.batch_size / clock:9.2f}  {fast:6.2f}x  {processor:10.4f}  {little:8.2f}x  "
            f"{differences[name]:15.1e}"
        )
    print(f"losses from {reference.min():.3g} to {reference.max():.3g}")
    saved = {name: medians[name][0] - medians[OURS][0] for name in (NAIVE, UNCACHED)}
    print(
        f"filling the cache took {filling:.2f} s, {1000 * filling / options.pairs:.0f} ms a pair; it is won back after "
        + " and ".join(f"{math.ceil(filling / s)} steps against {name}" for name, s in saved.items() if s > 0)
    )
    if options.mixed_precision == "no" and options.optimizer == "adamw" and max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the losses differ by more than {TOLERANCE} of themselves: these are not the same trainings")


if __name__ == "__main__":
    main()

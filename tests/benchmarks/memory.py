"""
What training takes of a graphics card's memory: planned, measured, and beside the straightforward script.

    python tests/benchmarks/memory.py presets                    # the plan of every preset, a table in Markdown
    python tests/benchmarks/memory.py ratio                      # by plan: the straightforward script / ours
    python tests/benchmarks/memory.py measure                    # on a GPU: planned beside what PyTorch allocated
"""

import argparse
import copy
import dataclasses
import importlib.util
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from transformers.initialization import no_init_weights

from faceprior.bases import load_pipeline
from faceprior.config import load_section, make_config
from faceprior.diffusion import encode_latents, encode_prompts, make_noise_scheduler, pred_original_sample, predict
from faceprior.memory import Rehearsal
from faceprior.models import quiet_libraries
from faceprior.plan import GIB, Plan, command_options, make_plan, text
from faceprior.restorer.rehearsal import RestoringConfig
from faceprior.restorer.rehearsal import rehearse as rehearse_restoring

STAGES = Path(__file__).resolve().parents[2] / "stages"
SCORER, GUIDANCE, PRIOR, RESTORER = "02_train_scorer", "04_guidance_tune", "05_prior_tune", "06_train_restorer"
SDXL, SD15 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"


def load_stage(name: str) -> ModuleType:
    """Import a stage by its file's name, which begins with a digit, so that `import` cannot."""
    spec = importlib.util.spec_from_file_location(f"stage_{name}", STAGES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the presets


def presets() -> None:
    """Print what each preset's stages need, and restoring. A restorer's prior is the base that stage 5 tunes.

    Without `common`, which is not run by itself, and the rows of the papers' tables, which change a setting of the
    preset that they extend.
    """
    print("| preset | stage | options | tensors | on the card | highest in |")
    print("|---|---|---|---|---|---|")
    for path in sorted((STAGES / "presets").glob("*.yaml")):
        if path.stem == "common" or "_table" in path.stem:
            continue
        for name in (SCORER, GUIDANCE, PRIOR, RESTORER):
            stage = load_stage(name)
            try:
                values = load_section(path, name, stage.Config)
            except ValueError:
                continue  # the preset is for other stages
            if not OWN[name] & values.keys():
                continue  # there is only what all presets share, without a base
            if name == RESTORER:
                values |= {"prior": SDXL}
            config = make_config(stage.Config, values)
            plan = make_plan(stage.rehearse, config)
            highest = max(plan.phases, key=lambda phase: sum(plan.phases[phase].values()))
            sizes = f"{text(plan.peak)} | {text(plan.needed)} | {highest}"
            print(f"| `{path.stem}` | {name[:2]} | {described(config)} | {sizes} |", flush=True)
    for options in RESTORING:
        config = RestoringConfig(dtype="bfloat16", **options)
        plan = make_plan(rehearse_restoring, config)
        highest = max(plan.phases, key=lambda phase: sum(plan.phases[phase].values()))
        words = " ".join(filter(None, ["--dtype bfloat16", command_options(options, "-")]))
        print(f"| `faceprior restore` | | {words} | {text(plan.peak)} | {text(plan.needed)} | {highest} |", flush=True)


# rows of the restorer at SDXL's size, 4 faces of 512 pixels at once
RESTORING = (
    {},
    {"quantization": "8bit"},
    {"quantization": "nf4"},
    {"quantization": "nf4", "vae_tiling": True},
    {"offload": "model", "vae_tiling": True},
    {"offload": "sequential", "vae_tiling": True},
)

OWN = {SCORER: {"vae"}, GUIDANCE: {"base"}, PRIOR: {"base"}, RESTORER: {"images"}}  # what only a real preset has


def described(config: Any) -> str:
    """Name the settings that decide about the memory."""
    values = dataclasses.asdict(config)
    words = [values.get("train", ""), {"no": "float32"}.get(config.mixed_precision, config.mixed_precision)]
    words += [values.get("quantization", "none").replace("none", ""), "cache" if values.get("cache") else ""]
    words += ["8-bit Adam" if "8bit" in config.optimizer else "Adam"]
    words += ["checkpointing" if config.gradient_checkpointing else "", f"batch {config.batch_size}"]
    words += [f"{values['resolution']} px" if "resolution" in values else ""]
    return ", ".join(filter(None, words))


# ---- the straightforward script


def straightforward(resolution: int, batch_size: int, rehearsal: Rehearsal) -> None:
    """Algorithm 1 of Face Score as one would first write it.

    A second U-Net for the targets, VAE and text encoder at work in every step, float32, AdamW, no checkpointing.
    """
    with rehearsal:
        pipeline = load_pipeline(SD15, weights=False)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.requires_grad_(False)
        original = copy.deepcopy(pipeline.unet)
        trained = [p for name, p in pipeline.unet.named_parameters() if ".attn1." in name]
        for parameter in trained:
            parameter.requires_grad_(True)
        rehearsal.name_pipeline(pipeline, trained)
        rehearsal.name("second U-Net", original)
        scheduler = make_noise_scheduler(pipeline)
        good, bad = (torch.zeros(batch_size, 3, resolution, resolution) for _ in range(2))

        def compute_loss() -> torch.Tensor:
            timesteps = torch.zeros(batch_size, dtype=torch.long)
            prompts = encode_prompts(pipeline, [f"face {number}" for number in range(batch_size)])
            with torch.no_grad():
                latents = encode_latents(pipeline.vae, torch.cat([good, bad]))
                noisy_good, noisy_bad = scheduler.add_noise(
                    latents, torch.randn_like(latents), timesteps.repeat(2)
                ).chunk(2)
                output = predict(pipeline, noisy_good, timesteps, prompts, original)
                target = pred_original_sample(scheduler, output, timesteps, noisy_good)
            output = predict(pipeline, noisy_bad, timesteps, prompts)
            return F.mse_loss(pred_original_sample(scheduler, output, timesteps, noisy_bad), target)

        rehearsal.step(compute_loss, trained, torch.optim.AdamW(trained))


def ratio(resolution: int, batch_size: int) -> None:
    """Print the plans of a step on Stable Diffusion 1.5, and the straightforward script's peak over ours.

    Ours is the preset `sd15_lora` as it is, and with gradient checkpointing.
    """
    rehearsal = Rehearsal("cuda")
    straightforward(resolution, batch_size, rehearsal)
    plain = Plan(rehearsal.peaks, "cuda")
    stage = load_stage(GUIDANCE)
    values = load_section(STAGES / "presets" / "sd15_lora.yaml", GUIDANCE, stage.Config)
    values |= {"resolution": resolution, "batch_size": batch_size, "num_samples": 0}
    print(f"straightforward\n{plain}")
    for checkpointing in (False, True):
        values["gradient_checkpointing"] = checkpointing
        ours = make_plan(stage.rehearse, make_config(stage.Config, values))
        name = f"sd15_lora, batch {batch_size}" + (", gradient checkpointing" if checkpointing else "")
        ratios = f"{plain.peak / ours.peak:.2f} (tensors), {plain.needed / ours.needed:.2f} (all)"
        print(f"\nours ({name})\n{ours}\nstraightforward / ours: {ratios}")


# ---- measured


def measure() -> None:
    """Print planned beside measured peaks of stage 4's step, for real on a GPU with random weights.

    Measured: `torch.cuda.max_memory_allocated` of everything since the networks were built, samples included; reserved
    is what the allocator took for it, fragmentation included.
    """
    if not torch.cuda.is_available():
        raise SystemExit("memory.py measure: error: it needs a CUDA GPU, and this machine has none")
    print(torch.cuda.get_device_name())
    print(f"{'run':58} {'planned':>10} {'measured':>10} {'ratio':>6} {'reserved':>10}")
    stage = load_stage(GUIDANCE)
    common = {"batch_size": 2, "guidance_scale": 7.5, "num_samples": 2}
    small = {"base": SD15, "resolution": 512, **common}
    large = {"base": SDXL, "resolution": 1024, **common, "batch_size": 1}
    lora = {"train": "lora", "optimizer": "adamw8bit", "mixed_precision": "bf16"}
    runs = [
        {**small, "mixed_precision": "no"},
        {**small, "mixed_precision": "bf16"},
        {**small, **lora},
        {**small, **lora, "gradient_checkpointing": True},
        {**large, **lora, "gradient_checkpointing": True},
    ]
    if "quantization" in stage.Config.__dataclass_fields__:
        runs += [{**runs[-1], "quantization": kind} for kind in ("8bit", "nf4")]
    for values in runs:
        config = make_config(stage.Config, values)
        planned = make_plan(stage.rehearse, config).peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with no_init_weights():  # minutes on a CPU, and the values do not matter
            stage.rehearse(replace(config, device="cuda"), Rehearsal("cuda", fake=False))
        measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        shown = [str(value) for key, value in values.items() if key not in (*common, "base")]
        name = f"{'sdxl' if values['base'] == SDXL else 'sd15'} {' '.join(shown)}"
        sizes = f"{planned / GIB:10.2f} {measured / GIB:10.2f} {measured / planned:6.2f} {reserved / GIB:10.2f}"
        print(f"{name:58} {sizes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("presets", "ratio", "measure"))
    parser.add_argument("--resolution", type=int, default=512, help="of `ratio`: side of the images in pixels")
    parser.add_argument("--batch_size", type=int, default=2, help="of `ratio`: pairs in a step")
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(format="%(message)s")
    commands = {"presets": presets, "ratio": partial(ratio, options.resolution, options.batch_size), "measure": measure}
    commands[options.what]()


if __name__ == "__main__":
    main()

"""
Stage 2: train the face scorer on (good, bad) pairs (Face Score, arXiv 2406.17100, section 4.4).

    python stages/02_train_scorer.py                                   # offline: the pairs of stage 1, the tiny model
    accelerate launch stages/02_train_scorer.py --config stages/presets/sd15.yaml

Reads   data/pairs/ (stage 1)
Writes  checkpoints/scorer/: the scorer with the best validation accuracy, for FaceScorer.from_pretrained, with
        reference.json, by which its scores get percentiles; scores.jsonl (both scores of every validation pair);
        report.json (accuracy, calibration, histograms, shortcut tests); metrics.jsonl, config.yaml
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from faceprior import tiny
from faceprior.config import is_complete, open_output, print_problems, run_stage
from faceprior.degrade import degrade_alike
from faceprior.images import atomic_write
from faceprior.jsonl import read_rows, rewrite_rows
from faceprior.losses import pairwise_ranking_loss
from faceprior.models import load_part, quiet_libraries, weight_dtype
from faceprior.pairs import FaceCrops, FacePair, gather_pairs
from faceprior.prefix_cache import PrefixCache, prefix_key
from faceprior.scorer import FaceScorer, ScoreReference
from faceprior.scorer_checks import REPORT_FILE, accuracy_by_area, describe, measure_shortcuts, report_scores
from faceprior.training import TrainingRun, collate, make_accelerator, make_optimizer, seeded, stable_seed

SCORES = "scores.jsonl"


@dataclass
class Config:
    pairs: str = "data/pairs"  # folder of stage 1, or several, separated by commas
    init: str = "tiny"  # weights to start from: folder (ours, ImageReward, FaceScore), hub id, or tiny
    output: str = "checkpoints/scorer"  # folder for the scorer
    augment: bool = True  # the same flip, blur, resampling and JPEG on both sides, in training; not in the paper
    frozen: float = 0.7  # share of the transformer layers, from the first, that keep their weights, [0, 1]
    cache_prefix: str = ""  # run the frozen vision layers once per crop: `memory`, or a folder; not with augment
    steps: int = 60  # optimizer steps, [1, inf)
    batch_size: int = 16  # pairs in a micro-batch on one process, [1, 4096]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 3e-4  # of Adam at its peak, (0, 1)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # without weight decay: Adam
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, which the paper's recipe does not, (0, inf)
    gradient_checkpointing: bool = False  # of the vision tower: less memory, a third more time
    schedule: Literal["constant", "cosine"] = "cosine"  # of the learning rate
    warmup_steps: int = 0  # steps of linear warm-up, [0, inf)
    validation: float = 0.2  # share of the photographs whose pairs are held out, (0, 1)
    vae: str = "tiny"  # of the shortcut test: folder (of a pipeline, too) or hub id of a VAE, tiny, or empty for none
    eval_every: int = 20  # steps between two validations, [1, inf)
    save_every: int = 20  # steps between two checkpoints, [1, inf)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # autocast of the forward pass
    num_workers: int = 0  # processes that load pictures, [0, 64]
    seed: int = 0  # of the data order, the split and dropout, [0, inf)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overwrite: bool = False  # start anew in an output folder that holds a run


def to_pixel_values(
    scorer: FaceScorer, augment: bool, sample: dict[str, np.ndarray], rng: np.random.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Bring both crops to the scorer's size and range, (3, 224, 224) each, after the same augmentation or none."""
    if augment:
        sample = degrade_alike(sample, rng)
    return {side: scorer.preprocess(crop)[0].cpu() for side, crop in sample.items()}


def how_to_read(scorer: FaceScorer, crops: FaceCrops | PrefixCache, augment: bool = False) -> tuple[str, Callable]:
    """Return the scorer's argument that a sample is for, and what brings a sample into its form."""
    if isinstance(crops, PrefixCache):
        return "vision_prefix", as_it_is
    return "pixel_values", partial(to_pixel_values, scorer, augment)


def as_it_is(sample: dict[str, torch.Tensor], rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
    return sample


def main(config: Config) -> None:
    quiet_libraries()
    if config.cache_prefix and (config.augment or config.frozen == 0):
        raise ValueError(
            "`cache_prefix` keeps what frozen layers make of crops that never change, but "
            + ("`augment` changes them: add `--no-augment`" if config.augment else "`frozen` is 0: freeze some layers")
            + ", or leave out `cache_prefix`"
        )
    pairs, problems = gather_pairs(config.pairs)
    training, validation = split(config, pairs)
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with accelerator.main_process_first():
        output = open_output(config) if accelerator.is_main_process else Path(config.output)
        if is_complete(output):
            print(f"{output} is complete")
            return
        init, vae = tiny.resolve(config.init, "reward"), load_vae(config.vae)

    scorer = FaceScorer.from_pretrained(init)
    scorer.register_to_config(reward_mean=0.0, reward_std=1.0)  # ImageReward's, which Face Score does not apply
    scorer.freeze(config.frozen)
    if config.gradient_checkpointing:
        scorer.enable_gradient_checkpointing()
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate)
    model, optimizer = accelerator.prepare(scorer, optimizer)
    run = TrainingRun(
        output,
        config.steps,
        accelerator,
        {"scorer": model},
        {"scorer": optimizer},
        config.save_every,
        config.warmup_steps,
        config.schedule,
    )
    crops, held_out = FaceCrops(training), FaceCrops(validation)
    if config.cache_prefix:
        crops, held_out = cache_prefixes(config, run, scorer, crops), cache_prefixes(config, run, scorer, held_out)
    reads, prepare = how_to_read(scorer, crops, config.augment)
    evaluate = partial(keep_best, run, output, validation, held_out, config)
    if run.step == 0:
        run.state["start"] = evaluate(scorer)
    else:  # the kept weights may be younger than the checkpoint: what they score counts
        del run.state["best"]
        evaluate(load_kept(run, output, config))
    for batch in run.batches(crops, config.batch_size, config.seed, prepare, config.num_workers):
        model.train()
        with accelerator.accumulate(model), seeded(config.seed, int(batch["position"][0]), "dropout"):
            good, bad = model(**{reads: torch.cat([batch["good"], batch["bad"]])}).chunk(2)
            loss = pairwise_ranking_loss(good, bad)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss, accuracy=(good > bad).float().mean(), margin=(good - bad).float().mean())
        if run.every(config.eval_every):
            run.log(**evaluate(scorer))

    if accelerator.is_main_process:
        report = write_report(run, output, validation, vae, config)
    start, best = run.state["start"]["validation_accuracy"], run.state["best"][0]
    run.finish(
        start_accuracy=start,
        accuracy=best,
        training_pairs=len(training),
        validation_pairs=len(validation),
        accuracy_by_area=run.state["by_area"],
    )
    print_problems(problems, "pair")
    print(f"{output}: {best:.1%} of {len(validation)} held-out pairs in the right order ({start:.1%} before training)")
    if accelerator.is_main_process:
        print(*describe(report), sep="\n")


def split(config: Config, pairs: list[FacePair]) -> tuple[list[FacePair], list[FacePair]]:
    """Hold out a share of the photographs, so that no picture is on both sides."""
    names = sorted({p.photograph for p in pairs}, key=lambda name: stable_seed(config.seed, name))
    if len(names) < 2:
        raise ValueError(f"{config.pairs} has pairs of {len(names)} photograph: two are needed to hold one out")
    held = set(names[: min(len(names) - 1, max(1, round(config.validation * len(names))))])
    return [p for p in pairs if p.photograph not in held], [p for p in pairs if p.photograph in held]


def keep_best(
    run: TrainingRun,
    output: Path,
    pairs: list[FacePair],
    crops: FaceCrops | PrefixCache,
    config: Config,
    scorer: FaceScorer,
) -> dict[str, float]:
    """Score the held-out pairs; keep the weights and scores if more are in order than ever (at a tie: a lower loss)."""
    good, bad = validate(run, scorer, crops, config.batch_size, config.num_workers)
    accuracy, loss = (good > bad).float().mean().item(), pairwise_ranking_loss(good, bad).item()
    if [accuracy, -loss] > run.state.get("best", [-1.0, 0.0]):
        run.state["best"] = [accuracy, -loss]
        run.state["by_area"] = accuracy_by_area(pairs, (good > bad).tolist())
        if run.accelerator.is_main_process:
            names = ", ".join(Path(name.strip()).name for name in config.pairs.split(","))
            scorer.reference = ScoreReference.from_scores(f"held-out pairs of {names}", good.tolist(), bad.tolist())
            scorer.save_pretrained(output / "new")
            for file in (output / "new").iterdir():  # each whole, whenever the run is killed
                os.replace(file, output / file.name)
            (output / "new").rmdir()
            sides = zip(pairs, good.tolist(), bad.tolist(), strict=True)
            rows = [{"id": p.id, "area_ratio": p.area_ratio, "good": g, "bad": b} for p, g, b in sides]
            rewrite_rows(output / SCORES, rows)
            tiny.copy_info(config.init, output)
    return {"validation_accuracy": accuracy, "validation_loss": loss}


def load_kept(run: TrainingRun, output: Path, config: Config) -> FaceScorer:
    scorer = FaceScorer.from_pretrained(output).to(run.accelerator.device)
    scorer.freeze(config.frozen)  # it reads what frozen layers made, too
    run.accelerator.wait_for_everyone()  # the main process writes the files again
    return scorer


@torch.no_grad()
def validate(
    run: TrainingRun, scorer: FaceScorer, crops: FaceCrops | PrefixCache, batch_size: int, num_workers: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rewards (N,) of the good and of the bad sides."""
    scorer.eval()
    rewards = []
    reads, prepare = how_to_read(scorer, crops)
    join = partial(collate_prepared, prepare)
    for batch in DataLoader(crops, batch_size, num_workers=num_workers, collate_fn=join):
        sides = torch.cat([batch["good"], batch["bad"]]).to(run.accelerator.device)
        with run.accelerator.autocast():
            rewards.append(scorer(**{reads: sides}).float().cpu().view(2, -1))
    good, bad = torch.cat(rewards, dim=1)
    return good, bad


def collate_prepared(prepare: Callable, samples: list[dict]) -> dict[str, torch.Tensor]:
    return collate([prepare(sample) for sample in samples])


def load_vae(name: str) -> AutoencoderKL | None:
    """Load the VAE of the shortcut test before the training, which may take days, and not after it."""
    if not name:
        return None
    folder = tiny.resolve(name, "sd15")
    subfolder = "vae" if (Path(folder) / "vae").is_dir() else None
    return load_part(AutoencoderKL, folder, "VAE", subfolder=subfolder)


def cache_prefixes(config: Config, run: TrainingRun, scorer: FaceScorer, crops: FaceCrops) -> PrefixCache:
    """Run the frozen vision layers on every crop, or find what an earlier run of the same weights kept of it."""
    dtype, accelerator = weight_dtype(config.mixed_precision), run.accelerator
    folder = None if config.cache_prefix == "memory" else config.cache_prefix
    cache = PrefixCache(crops, prefix_key(scorer, dtype), folder)

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return scorer.encode_prefix(pixel_values.to(accelerator.device)).to(dtype)

    _, prepare = how_to_read(scorer, crops)
    share = accelerator.process_index, accelerator.num_processes
    cache.fill(prepare, encode, config.batch_size, config.num_workers, share)
    accelerator.wait_for_everyone()
    return cache


def write_report(
    run: TrainingRun, output: Path, pairs: list[FacePair], vae: AutoencoderKL | None, config: Config
) -> dict:
    """Write report.json on the weights that were kept, and return what stands in it."""
    rows, _ = read_rows(output / SCORES)
    device = run.accelerator.device
    scorer, vae = FaceScorer.from_pretrained(output).to(device), vae and vae.to(device)

    def score(pairs: list[FacePair], *changes: Callable | None) -> list[list[float]]:
        return [side.tolist() for side in validate(run, scorer, FaceCrops(pairs, *changes), config.batch_size)]

    report = report_scores([row["good"] for row in rows], [row["bad"] for row in rows])
    report["accuracy_by_area"] = run.state["by_area"]
    report["shortcuts"] = measure_shortcuts(score, pairs, vae, Path(config.vae).name)
    with atomic_write(output / REPORT_FILE, "w") as file:
        json.dump(report, file, indent=1)
    return report


if __name__ == "__main__":
    run_stage(main, Config)

"""
Stage 2: train the face scorer on (good, bad) pairs (Face Score, arXiv 2406.17100, section 4.4).

    python stages/02_train_scorer.py                                   # offline: the pairs of stage 1, the tiny model
    accelerate launch stages/02_train_scorer.py --config stages/presets/sd15.yaml

Reads   data/pairs/ (stage 1)
Writes  checkpoints/scorer/: the scorer with the best validation accuracy, for FaceScorer.from_pretrained, with
        reference.json, which turns its scores into percentiles; scores.jsonl (both scores of every validation pair);
        report.json (accuracy, calibration, histograms, shortcut tests); metrics.jsonl, config.yaml
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from faceprior import tiny  # first: it silences bitsandbytes, which diffusers loads

# isort: split
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from faceprior.bases import empty_vae
from faceprior.config import is_complete, print_problems, run_stage
from faceprior.degrade import degrade_alike
from faceprior.files import atomic_write
from faceprior.jsonl import read_rows, rewrite_rows
from faceprior.losses import pairwise_ranking_loss
from faceprior.memory import Rehearsal
from faceprior.models import load_part, quiet_libraries
from faceprior.pairs import FaceCrops, FacePair, gather_pairs
from faceprior.plan import show_plan
from faceprior.scorer import FaceScorer, ScoreReference, empty_scorer
from faceprior.scorer_checks import REPORT_FILE, accuracy_by_area, describe, measure_shortcuts, report_scores
from faceprior.training import (
    TrainingRun,
    collate,
    describe_samples,
    describe_weights,
    make_accelerator,
    make_optimizer,
    open_run,
    seeded,
    stable_seed,
)

SCORES = "scores.jsonl"


@dataclass
class Config:
    pairs: str = "data/pairs"  # folder of stage 1, or several, separated by commas
    init: str = "tiny"  # weights to start from: folder (ours, ImageReward, FaceScore), hub id, or tiny
    output: str = "checkpoints/scorer"  # folder for the scorer
    augment: bool = True  # the same flip, blur, resampling and JPEG on both sides, in training; not in the paper
    frozen: float = 0.7  # fraction of the transformer layers, from the first, that keep their weights, [0, 1]
    steps: int = 60  # optimizer steps, [1, inf)
    batch_size: int = 16  # pairs in a micro-batch on one process, [1, 4096]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 3e-4  # learning rate of Adam at its peak, (0, 1)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # optimizer; 8-bit: a quarter of its memory
    weight_decay: float = 0.0  # weight decay; 0, as in the paper, makes AdamW Adam, [0, 1]
    max_grad_norm: float = 1.0  # norm to which gradients are clipped; the paper's recipe does not, (0, inf)
    gradient_checkpointing: bool = False  # recomputation in the vision tower: less memory, a third more time
    schedule: Literal["constant", "cosine"] = "cosine"  # schedule of the learning rate
    warmup_steps: int = 0  # steps of linear warm-up, [0, inf)
    validation: float = 0.2  # fraction of the photographs whose pairs are held out, (0, 1)
    vae: str = "tiny"  # VAE of the shortcut test: folder (of a pipeline, too), hub id, tiny, or empty for none
    eval_every: int = 20  # steps between two validations, [1, inf)
    save_every: int = 20  # steps between two checkpoints, [1, inf)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # tracker that gets the log beside metrics.jsonl
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of autocast in the forward pass
    num_workers: int = 0  # processes that load images, [0, 64]
    seed: int = 0  # seed of the data order, the split and dropout, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    AFTER_TRAINING = frozenset({"vae"})


def main(config: Config) -> None:
    quiet_libraries()

    # ---- Input and output
    pairs, problems = gather_pairs(config.pairs)
    training, held_out = split(config, pairs)
    inputs = {"pairs": describe_samples(FaceCrops(pairs))}
    accelerator = make_accelerator(
        config.device, config.mixed_precision, config.accumulation, config.tracker, config.output
    )
    with accelerator.main_process_first():
        output = open_run(config, accelerator, inputs)
        if is_complete(output):
            accelerator.print(f"{output} is complete")
            return
        init, vae = tiny.resolve(config.init, "reward"), load_vae(config.vae)

    # ---- The scorer, of which the first 70% of the layers keep their weights (section 4.4)
    scorer = FaceScorer.from_pretrained(init)
    inputs["init"] = describe_weights(scorer.parameters())
    scorer.register_to_config(reward_mean=0.0, reward_std=1.0)  # ImageReward's, which Face Score does not apply
    trained = select_trained(config, scorer)

    # ---- Optimizer, and the run with its checkpoints
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
    model, optimizer = accelerator.prepare(scorer, optimizer)
    schedule, networks = (config.save_every, config.warmup_steps, config.schedule), {"scorer": model}
    run = TrainingRun(output, config.steps, accelerator, networks, {"scorer": optimizer}, *schedule, inputs=inputs)
    prepare = partial(to_pixel_values, scorer, config.augment)

    # ---- The score to beat: of the untrained scorer, or of the weights kept before the run was resumed
    if run.step == 0:
        run.state["start"] = keep_best(config, run, scorer, held_out)
    else:
        measure_kept(config, run, held_out)

    # ---- Training with the ranking loss, `compute_loss`
    for batch in run.batches(FaceCrops(training), config.batch_size, config.seed, prepare, config.num_workers):
        model.train()
        with accelerator.accumulate(model), seeded(config.seed, int(batch["position"][0]), "dropout"):
            loss, good, bad = compute_loss(model, batch)
            run.check(loss, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss, accuracy=(good > bad).float().mean(), margin=(good - bad).float().mean())
        if run.every(config.eval_every):
            run.log(**keep_best(config, run, scorer, held_out))

    # ---- Report on the kept weights, and the summary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report = write_report(config, run, held_out, vae)
        start, best = run.state["start"]["validation_accuracy"], run.state["best"][0]
        run.finish(
            start_accuracy=start,
            accuracy=best,
            training_pairs=len(training),
            validation_pairs=len(held_out),
            accuracy_by_area=run.state["by_area"],
        )
        print_problems(problems, "pair")
        print(f"{output}: {best:.1%} of {len(held_out)} held-out pairs in correct order ({start:.1%} before training)")
        print(*describe(report), sep="\n")
    accelerator.end_training()


def split(config: Config, pairs: list[FacePair]) -> tuple[list[FacePair], list[FacePair]]:
    """Hold out a fraction of the photographs with all their pairs, so that no image is on both sides."""
    names = sorted({p.photograph for p in pairs}, key=lambda name: stable_seed(config.seed, name))
    if len(names) < 2:
        raise ValueError(f"{config.pairs} has pairs of {len(names)} photograph: two are needed to hold one out")
    held = set(names[: min(len(names) - 1, max(1, round(config.validation * len(names))))])
    return [p for p in pairs if p.photograph not in held], [p for p in pairs if p.photograph in held]


def load_vae(name: str) -> AutoencoderKL | None:
    """Load the VAE of the shortcut test before the training, which may take days: a wrong name is an error now."""
    if not name:
        return None
    folder = tiny.resolve(name, "sd15")
    subfolder = "vae" if (Path(folder) / "vae").is_dir() else None
    return load_part(AutoencoderKL, folder, "VAE", subfolder=subfolder)


def select_trained(config: Config, scorer: FaceScorer) -> list[torch.nn.Parameter]:
    """Freeze the first layers; return the weights that are trained."""
    scorer.freeze(config.frozen)
    if config.gradient_checkpointing:
        scorer.enable_gradient_checkpointing()
    return [parameter for parameter in scorer.parameters() if parameter.requires_grad]


def compute_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ranking loss of a micro-batch, and the rewards (B,) of both sides; model: the prepared scorer."""
    pixel_values = torch.cat([batch["good"], batch["bad"]])  # (2B, 3, 224, 224)
    good, bad = model(pixel_values).chunk(2)  # (B,) each
    return pairwise_ranking_loss(good, bad), good, bad  # Eq. 5: -log sigmoid(s(good) - s(bad))


def rehearse(config: Config, rehearsal: Rehearsal) -> None:
    """Take a step and score pairs for the report without data, for `--plan`."""
    name, vae = tiny.resolve(config.init, "reward"), tiny.resolve(config.vae, "sd15")
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with rehearsal:
        # ---- The scorer, and which of its weights are trained
        scorer = empty_scorer(name)
        trained = select_trained(config, scorer)
        optimizer = make_optimizer(trained, config.optimizer, config.learning_rate, config.weight_decay)
        model = accelerator.prepare(scorer)
        rehearsal.name("scorer", scorer)
        rehearsal.name("trained weights", *trained)

        # ---- A step
        model.train()
        size = (config.batch_size, 3, scorer.config.image_size, scorer.config.image_size)
        batch = {"good": torch.zeros(size), "bad": torch.zeros(size)}
        rehearsal.step(lambda: compute_loss(model, batch)[0], trained, optimizer, config.accumulation)

        # ---- The report, by a second scorer with the kept weights, and the VAE of its shortcut test
        kept = accelerator.prepare(empty_scorer(name))
        rehearsal.name("scorer", kept)
        with rehearsal.phase("report"), torch.no_grad():
            if config.vae:
                network = empty_vae(vae)
                rehearsal.name("VAE", network)
                side = network.config.sample_size
                network(torch.zeros(1, 3, side, side))
            compute_loss(kept, batch)


# ---- Samples


def to_pixel_values(
    scorer: FaceScorer, augment: bool, sample: dict[str, Any], rng: np.random.Generator | None = None
) -> dict[str, Any]:
    """Bring both crops to the scorer's size and range, (3, 224, 224) each, after the same augmentation or none."""
    sides = {side: sample[side] for side in ("good", "bad")}
    if augment:
        sides = degrade_alike(sides, rng)
    return sample | {side: scorer.preprocess(crop)[0].cpu() for side, crop in sides.items()}


def collate_plain(scorer: FaceScorer, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the crops as they are -> good, bad (B, 3, 224, 224)."""
    return collate([to_pixel_values(scorer, False, sample) for sample in samples])


# ---- Validation and the best weights


@torch.no_grad()
def validate(
    run: TrainingRun, scorer: FaceScorer, crops: FaceCrops, batch_size: int, num_workers: int = 0
) -> torch.Tensor:
    """Return the rewards (2, N) of the good and of the bad sides."""
    scorer.eval()
    rewards = []
    join = partial(collate_plain, scorer)
    for batch in DataLoader(crops, batch_size, num_workers=num_workers, collate_fn=join):
        sides = torch.cat([batch["good"], batch["bad"]]).to(run.accelerator.device)  # (2B, 3, 224, 224)
        with run.accelerator.autocast():
            rewards.append(scorer(sides).float().cpu().view(2, -1))
    return torch.cat(rewards, dim=1)


def keep_best(config: Config, run: TrainingRun, scorer: FaceScorer, held_out: list[FacePair]) -> dict[str, float]:
    """Score the held-out pairs; save weights and scores if more are in order than ever (at a tie: a lower loss)."""
    good, bad = validate(run, scorer, FaceCrops(held_out), config.batch_size, config.num_workers)
    accuracy, loss = (good > bad).float().mean().item(), pairwise_ranking_loss(good, bad).item()
    if [accuracy, -loss] > run.state.get("best", [-1.0, 0.0]):
        run.state["best"] = [accuracy, -loss]
        run.state["by_area"] = accuracy_by_area(held_out, (good > bad).tolist())
        if run.accelerator.is_main_process:
            save_scorer(config, run, scorer, held_out, good.tolist(), bad.tolist())
    return {"validation_accuracy": accuracy, "validation_loss": loss}


def measure_kept(config: Config, run: TrainingRun, held_out: list[FacePair]) -> None:
    """Score the weights on the disk, which may be younger than the checkpoint: the run has to beat these."""
    scorer = FaceScorer.from_pretrained(run.output).to(run.accelerator.device)
    run.accelerator.wait_for_everyone()  # the main process writes the files again
    del run.state["best"]
    keep_best(config, run, scorer, held_out)


def save_scorer(
    config: Config, run: TrainingRun, scorer: FaceScorer, held_out: list[FacePair], good: list[float], bad: list[float]
) -> None:
    """Write the scorer with its reference, and the scores of the held-out pairs."""
    names = ", ".join(Path(name.strip()).name for name in config.pairs.split(","))
    scorer.reference = ScoreReference.from_scores(f"held-out pairs of {names}", good, bad)

    # beside the old files, which are then replaced one by one: each is complete whenever the run is killed
    new = run.output / "new"
    scorer.save_pretrained(new)
    for file in new.iterdir():
        os.replace(file, run.output / file.name)
    new.rmdir()

    sides = zip(held_out, good, bad, strict=True)
    rows = [{"id": p.id, "area_ratio": p.area_ratio, "good": g, "bad": b} for p, g, b in sides]
    rewrite_rows(run.output / SCORES, rows)
    tiny.copy_info(config.init, run.output)


def write_report(config: Config, run: TrainingRun, held_out: list[FacePair], vae: AutoencoderKL | None) -> dict:
    """Write report.json on the kept weights, and return its contents."""
    device = run.accelerator.device
    scorer, vae = FaceScorer.from_pretrained(run.output).to(device), vae and vae.to(device)

    def score(pairs: list[FacePair], *changes: Callable | None) -> list[list[float]]:
        # without worker processes, which cannot take over a change that holds the VAE
        return validate(run, scorer, FaceCrops(pairs, *changes), config.batch_size).tolist()

    rows, _ = read_rows(run.output / SCORES)
    report = report_scores([row["good"] for row in rows], [row["bad"] for row in rows])
    report["accuracy_by_area"] = run.state["by_area"]
    report["shortcuts"] = measure_shortcuts(score, held_out, vae, Path(config.vae).name)
    with atomic_write(run.output / REPORT_FILE, "w") as file:
        json.dump(report, file, indent=1)
    return report


if __name__ == "__main__":
    run_stage(main, Config, plan=partial(show_plan, rehearse))

"""
Stage 2: train the face scorer on (good, bad) pairs (Face Score, arXiv 2406.17100, section 4.4).

    python stages/02_train_scorer.py                                   # offline: the pairs of stage 1, the tiny model
    accelerate launch stages/02_train_scorer.py --config stages/presets/sd15.yaml

Reads   data/pairs/ (stage 1)
Writes  checkpoints/scorer/: the scorer with the best validation accuracy, for FaceScorer.from_pretrained; scores.jsonl
        (both scores of every validation pair), metrics.jsonl, config.yaml
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from faceprior import tiny
from faceprior.config import is_complete, open_output, run_stage
from faceprior.images import load_image
from faceprior.losses import pairwise_ranking_loss
from faceprior.manifest import print_problems, rewrite_rows
from faceprior.pairs import FacePair, read_pairs
from faceprior.scorer import FaceScorer
from faceprior.training import (
    TrainingRun,
    make_accelerator,
    make_optimizer,
    quiet_libraries,
    seeded,
    stable_seed,
)

SCORES = "scores.jsonl"


@dataclass
class Config:
    pairs: str = "data/pairs"  # folder of stage 1
    init: str = "tiny"  # weights to start from: folder (ours, ImageReward, FaceScore), hub id, or tiny
    output: str = "checkpoints/scorer"  # folder for the scorer
    frozen: float = 0.7  # share of the transformer layers, from the first, that keep their weights, [0, 1]
    steps: int = 60  # optimizer steps, [1, inf)
    batch_size: int = 16  # pairs in a micro-batch on one process, [1, 4096]
    accumulation: int = 1  # micro-batches in a step, [1, 1024]
    learning_rate: float = 3e-4  # of Adam at its peak, (0, 1)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # without weight decay: Adam
    schedule: Literal["constant", "cosine"] = "cosine"  # of the learning rate
    warmup_steps: int = 0  # steps of linear warm-up, [0, inf)
    validation: float = 0.2  # share of the photographs whose pairs are held out, (0, 1)
    eval_every: int = 20  # steps between two validations, [1, inf)
    save_every: int = 20  # steps between two checkpoints, [1, inf)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # autocast of the forward pass
    num_workers: int = 0  # processes that load pictures, [0, 64]
    seed: int = 0  # of the data order, the split and dropout, [0, inf)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overwrite: bool = False  # start anew in an output folder that holds a run


class FaceCrops(Dataset):
    """The face crops of pairs, ready for the scorer: good and bad, each (3, 224, 224), CLIP-normalised."""

    def __init__(self, folder: Path, pairs: list[FacePair], scorer: FaceScorer):
        self.folder, self.pairs, self.preprocess = folder, pairs, scorer.preprocess

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        pair = self.pairs[index]
        sides = {"good": pair.good, "bad": pair.bad}
        return {
            side: self.preprocess(load_image(self.folder / name), [pair.box])[0].cpu() for side, name in sides.items()
        }


def main(config: Config) -> None:
    quiet_libraries()
    pairs, problems = read_pairs(config.pairs)
    training, validation = split(config, pairs)
    accelerator = make_accelerator(config.device, config.mixed_precision, config.accumulation)
    with accelerator.main_process_first():
        output = open_output(config) if accelerator.is_main_process else Path(config.output)
        if is_complete(output):
            print(f"{output} is complete")
            return
        init = tiny.resolve(config.init, "scorer")

    scorer = FaceScorer.from_pretrained(init)
    scorer.freeze(config.frozen)
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, config.optimizer, config.learning_rate)
    train_crops, validation_crops = (FaceCrops(Path(config.pairs), side, scorer) for side in (training, validation))
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
    evaluate = partial(keep_best, run, output, scorer, validation, validation_crops, config)
    if run.step == 0:
        run.state["start"] = evaluate()
    for batch in run.batches(train_crops, config.batch_size, config.seed, num_workers=config.num_workers):
        model.train()
        with accelerator.accumulate(model), seeded(config.seed, int(batch["position"][0]), "dropout"):
            good, bad = model(torch.cat([batch["good"], batch["bad"]])).chunk(2)
            loss = pairwise_ranking_loss(good, bad)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss, accuracy=(good > bad).float().mean(), margin=(good - bad).float().mean())
        if run.every(config.eval_every):
            run.log(**evaluate())

    start, best = run.state["start"]["validation_accuracy"], run.state["best"][0]
    run.finish(start_accuracy=start, accuracy=best, training_pairs=len(training), validation_pairs=len(validation))
    print_problems(problems, "pair")
    print(f"{output}: {best:.1%} of {len(validation)} held-out pairs in the right order ({start:.1%} before training)")


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
    scorer: FaceScorer,
    pairs: list[FacePair],
    crops: FaceCrops,
    config: Config,
) -> dict[str, float]:
    """Score the held-out pairs; keep the weights and scores if more are in order than ever (at a tie: a lower loss)."""
    good, bad = validate(run, scorer, crops, config.batch_size)
    accuracy, loss = (good > bad).float().mean().item(), pairwise_ranking_loss(good, bad).item()
    if [accuracy, -loss] > run.state.get("best", [-1.0, 0.0]):
        run.state["best"] = [accuracy, -loss]
        if run.accelerator.is_main_process:
            scorer.save_pretrained(output)
            sides = zip(pairs, good.tolist(), bad.tolist(), strict=True)
            rows = [{"id": p.id, "area_ratio": p.area_ratio, "good": g, "bad": b} for p, g, b in sides]
            rewrite_rows(output / SCORES, rows)
            tiny.copy_info(config.init, output)
    return {"validation_accuracy": accuracy, "validation_loss": loss}


@torch.no_grad()
def validate(
    run: TrainingRun, scorer: FaceScorer, crops: FaceCrops, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rewards (N,) of the good and of the bad sides."""
    scorer.eval()
    rewards = []
    for batch in DataLoader(crops, batch_size):
        sides = torch.cat([batch["good"], batch["bad"]]).to(run.accelerator.device)
        with run.accelerator.autocast():
            rewards.append(scorer(sides).float().cpu().view(2, -1))
    good, bad = torch.cat(rewards, dim=1)
    return good, bad


if __name__ == "__main__":
    run_stage(main, Config)

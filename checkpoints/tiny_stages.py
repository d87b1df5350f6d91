"""The steps of the tiny models' training that the stages do, called as a user would, and what they made in float16."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tiny_bases import tidy_configs

from faceprior import tiny
from faceprior.procedural import TRAIN_SEEDS, draw_folder
from faceprior.restorer import AuthFaceRestorer
from faceprior.scorer import FaceScorer

ROOT = Path(__file__).resolve().parent.parent
REWARD_SEEDS = TRAIN_SEEDS + 1000  # of the portraits behind the reward model's pairs


def run(stage: str, output: Path, **options) -> None:
    """Run a stage of the checkout; it goes on where it was, and returns at once when it is complete."""
    options = {"output": output, **options}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(ROOT / "stages" / f"{stage}.py"), *arguments], check=True)


def precision(config) -> dict[str, str]:
    return {"mixed_precision": config.mixed_precision, "device": config.device}


def make_reward_pairs(config, work: Path) -> None:
    """Stage 1 on other portraits than the later pairs': the reward model, too, has seen what generators do to faces."""
    seeds = range(REWARD_SEEDS, REWARD_SEEDS + config.num_reward_pairs)
    draw_folder(work / "reward_drawn", seeds, config.resolution)
    run("01_make_pairs", work / "reward_pairs", images=work / "reward_drawn", batch_size=16, **precision(config))


def make_pairs(config, work: Path) -> None:
    """Stage 1: pairs in all four bins of Table 8."""
    options = {"num_drawn": config.num_pairs, "num_scenes": config.num_pairs // 8}
    run("01_make_pairs", work / "pairs", **options, **precision(config))


def train_scorer(config, work: Path) -> None:
    """Stage 2: from the reward model, 70% of it frozen."""
    options = {"pairs": work / "pairs", "steps": config.scorer_steps, "learning_rate": 1e-3}
    run("02_train_scorer", work / "scorer", **options, **precision(config))
    if not shipped("scorer"):
        scorer = FaceScorer.from_pretrained(work / "scorer").to(torch.float16)
        ship("scorer", scorer.save_pretrained, config.scorer_steps)


def tune(config, work: Path) -> None:
    """Stage 4: the guidance loss on the pairs. The tuned model is measured, not shipped."""
    options = {"pairs": work / "pairs", "steps": config.guidance_steps, "batch_size": 16}
    run("04_guidance_tune", work / "guided", **options, **precision(config))


def train_prior(config, work: Path) -> None:
    """Stages 3 and 5: portraits, and the SDXL type model tuned on them."""
    run("03_curate_portraits", work / "portraits", num_drawn=config.num_portraits)
    options = {"portraits": work / "portraits", "steps": config.prior_steps, "batch_size": 16, "learning_rate": 2e-4}
    run("05_prior_tune", work / "prior", **options, **precision(config))


def train_restorer(config, work: Path) -> None:
    """Stage 6: the prior's ControlNet, with the time-aware facial loss."""
    options = {"images": work / "portraits/images", "prior": work / "prior", "init": ""}
    options |= {"steps": config.restorer_steps, "batch_size": 8, "learning_rate": 1e-3}
    run("06_train_restorer", work / "restorer", **options, **precision(config))
    if not shipped("restorer"):
        restorer = AuthFaceRestorer.from_pretrained(work / "restorer", torch.float16)
        restorer.pipeline.to(dtype=torch.float16)
        ship("restorer", restorer.save_pretrained, config.restorer_steps)


def shipped(kind: str) -> bool:
    return bool((tiny.info(tiny.tiny_folder() / kind) or {}).get("trained"))


def ship(kind: str, save, steps: int) -> None:
    """Write a trained model to checkpoints/tiny/`kind` with its `tiny.json`."""
    folder = tiny.tiny_folder() / kind
    shutil.rmtree(folder, ignore_errors=True)
    save(folder)
    tidy_configs(folder)
    (folder / tiny.INFO_FILE).write_text(json.dumps({"kind": kind, "seed": 0, "trained": True, "steps": steps}))

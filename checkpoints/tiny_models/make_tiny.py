"""
Train the tiny models of the embedded default, from scratch, by seeds.

    python -m checkpoints.tiny_models.make_tiny                # every step, in order
    python -m checkpoints.tiny_models.make_tiny --only vae     # one step
    python -m checkpoints.tiny_models.make_tiny --only reward --work data/more --go_on   # train what ships for longer

Reads   nothing: the images are drawn
Writes  drawings and runs in progress below `work`; finished models, their record and its README in checkpoints/tiny/

The same command resumes where it was stopped.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoints.tiny_models.bases import train_sd15, train_sdxl
from checkpoints.tiny_models.data import draw
from checkpoints.tiny_models.features import train_features
from checkpoints.tiny_models.judge import train_judge
from checkpoints.tiny_models.ladders import make_ladders
from checkpoints.tiny_models.readme import note_duration, write_readme
from checkpoints.tiny_models.reward import train_reward
from checkpoints.tiny_models.stages import (
    draw_faces,
    make_pairs,
    make_reward_pairs,
    train_prior,
    train_restorer,
    train_scorer,
    tune,
)
from checkpoints.tiny_models.vae import train_vae
from faceprior.config import run_stage
from faceprior.models import quiet_libraries

STEPS = {
    "draw": draw,
    "faces": draw_faces,
    "vae": train_vae,
    "features": train_features,
    "sd15": train_sd15,
    "sdxl": train_sdxl,
    "ladders": make_ladders,
    "judge": train_judge,
    "reward_pairs": make_reward_pairs,
    "reward": train_reward,
    "pairs": make_pairs,
    "scorer": train_scorer,
    "guided": tune,
    "prior": train_prior,
    "restorer": train_restorer,
}


@dataclass
class Config:
    work: str = "data/tiny"  # folder for drawings, latents and runs in progress
    only: str = "all"  # name of the one step to do, or all
    num_drawn: int = 9000  # number of training images, [200, 9999]
    resolution: int = 128  # side of the images in pixels, [64, 256]
    vae_steps: int = 5000  # training steps of the autoencoder, batch 8, [1, inf)
    vae_learning_rate: float = 1.5e-3  # learning rate of AdamW at its peak for the autoencoder, (0, 1)
    feature_steps: int = 5000  # training steps of the feature network, batch 32, [1, inf)
    feature_learning_rate: float = 1e-3  # learning rate of AdamW at its peak for the feature network, (0, 1)
    num_ladder_people: int = 512  # number of people that each base's ladders show, [1, 2000]
    judge_steps: int = 8000  # training steps of the judge, 12 ladders each, [1, inf)
    judge_learning_rate: float = 1e-3  # learning rate of AdamW at its peak for the judge, (0, 1)
    num_reward_portraits: int = 1200  # number of drawings that are inpainted for the reward model, [1, 4000]
    num_reward_scenes: int = 200  # number of scenes, with smaller faces, that are inpainted for it, [0, 1000]
    reward_steps: int = 16000  # training steps of the reward model, 8 ladders of 4 images each, [1, inf)
    reward_learning_rate: float = 5e-4  # learning rate of AdamW at its peak for the reward model, (0, 1)
    base_steps: int = 7300  # training steps of the Stable Diffusion type base, batch 32, [1, inf)
    sdxl_steps: int = 2500  # training steps of the SDXL type base, which starts from the other one, batch 32, [1, inf)
    base_learning_rate: float = 1e-3  # learning rate of AdamW at its peak for both bases, (0, 1)
    num_pairs: int = 600  # number of portraits for pairs, and a quarter as many scenes, [1, inf)
    scorer_steps: int = 200  # training steps of stage 2, [1, inf)
    guidance_steps: int = 60  # training steps of stage 4, 4 pairs and 4 rewarded images each, [1, inf)
    num_portraits: int = 300  # number of portraits drawn for stage 3, [1, inf)
    prior_steps: int = 150  # training steps of stage 5, [1, inf)
    num_faces: int = 1200  # number of aligned faces drawn for stage 6, [1, 8000]
    control_steps: int = 6600  # training steps of stage 6 without the facial loss, batch 8, [1, inf)
    restorer_steps: int = 400  # training steps of stage 6 with the facial loss, [1, inf)
    ema_decay: float = 0.998  # decay of the average of the bases' and the reward model's weights, which ships, [0, 1)
    mixed_precision: Literal["no", "bf16"] = "bf16"  # autocast of the forward pass; bf16: 1.4 to 2 times as fast
    go_on: bool = False  # start vae (its decoder), judge, reward, sd15 and restorer from the shipped weights
    shard: int = 0  # number of this process among those that draw, [0, 1]
    num_shards: int = 1  # number of processes that draw, [1, 2]
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N


def main(config: Config) -> None:
    quiet_libraries()
    if config.only not in ("all", *STEPS):
        raise ValueError(f"`only` has to be all or one of {', '.join(STEPS)} but is {config.only!r}")

    # ---- the steps, each of which resumes, or returns at once when it is complete
    work = Path(config.work)
    for name, step in STEPS.items():
        if config.only in ("all", name):
            start = time.perf_counter()
            try:
                step(config, work)
            finally:  # the time of a stopped run counts too
                note_duration(work, name, time.perf_counter() - start)

    # ---- the record beside the weights
    write_readme(config, work)


if __name__ == "__main__":
    run_stage(main, Config)

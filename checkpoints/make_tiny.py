"""
Train the tiny models of the embedded default, from nothing, by seeds.

    python checkpoints/make_tiny.py                        # every step, one after the other
    python checkpoints/make_tiny.py --only vae             # one step
    python checkpoints/make_tiny.py --only reward --work data/more --go_on   # more training for what is shipped

Every step goes on where it was stopped. Writes its work below `work` and the finished parts into checkpoints/tiny.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiny_bases import train_sd15, train_sdxl
from tiny_data import draw
from tiny_features import train_features
from tiny_readme import note_duration, write_readme
from tiny_reward import train_reward
from tiny_stages import draw_faces, make_pairs, make_reward_pairs, train_prior, train_restorer, train_scorer, tune
from tiny_vae import train_vae

from faceprior.config import run_stage
from faceprior.models import quiet_libraries

STEPS = {
    "draw": draw,
    "faces": draw_faces,
    "vae": train_vae,
    "features": train_features,
    "sd15": train_sd15,
    "sdxl": train_sdxl,
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
    only: str = "all"  # the step to do, by its name in STEPS
    num_drawn: int = 9000  # training pictures, [200, 9999]
    resolution: int = 128  # pixels, [64, 256]
    vae_steps: int = 5000  # of batch 8, [1, inf)
    vae_learning_rate: float = 1.5e-3  # of AdamW, (0, 1)
    feature_steps: int = 5000  # of batch 32, [1, inf)
    feature_learning_rate: float = 1e-3  # of AdamW, (0, 1)
    num_reward_portraits: int = 1200  # drawings, inpainted for the reward model, [1, 4000]
    num_reward_scenes: int = 200  # and scenes with smaller faces, [0, 1000]
    reward_steps: int = 16000  # of 16 pairs, [1, inf)
    reward_learning_rate: float = 5e-4  # of AdamW, (0, 1)
    base_steps: int = 7300  # of batch 32, [1, inf)
    sdxl_steps: int = 2500  # of batch 32, from the other base's weights, [1, inf)
    base_learning_rate: float = 1e-3  # of AdamW, (0, 1)
    num_pairs: int = 600  # portraits for pairs, and a quarter of it scenes, [1, inf)
    scorer_steps: int = 200  # of stage 2, [1, inf)
    guidance_steps: int = 400  # of stage 4, [1, inf)
    num_portraits: int = 300  # drawn for stage 3, [1, inf)
    prior_steps: int = 150  # of stage 5, [1, inf)
    num_faces: int = 1200  # aligned faces, drawn for stage 6, [1, 8000]
    control_steps: int = 6600  # of stage 6 without the facial loss, of batch 8, [1, inf)
    restorer_steps: int = 400  # of stage 6 with it, [1, inf)
    ema_decay: float = 0.998  # of the weights that are kept, [0, 1)
    mixed_precision: Literal["no", "bf16"] = "bf16"  # bf16 is 1.4 to 2 times as fast on a CPU that has it
    go_on: bool = False  # begin vae (its decoder), reward, sd15 and restorer from the shipped weights, not from nothing
    shard: int = 0  # which half of the drawings to draw, to use two processes, [0, 1]
    num_shards: int = 1  # processes that draw, [1, 2]
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def main(config: Config) -> None:
    quiet_libraries()
    if config.only not in ("all", *STEPS):
        raise ValueError(f"`only` has to be all or one of {', '.join(STEPS)} but is {config.only!r}")
    work = Path(config.work)
    for name, step in STEPS.items():
        if config.only in ("all", name):
            start = time.perf_counter()
            try:
                step(config, work)
            finally:
                note_duration(work, name, time.perf_counter() - start)
    write_readme(config, work)


if __name__ == "__main__":
    run_stage(main, Config)

"""A small training with all that a stage uses, and what the tests of training share."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from faceprior.training import TrainingRun, make_accelerator, make_optimizer, seeded

OPTIMIZERS = ["adamw", "adamw8bit", "paged_adamw8bit"]


class Points(Dataset):
    """Seven points on a line that a linear model can learn."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        x = torch.tensor([index / 7, 1.0, -index / 3])
        return {"x": x, "y": x.sum() * 2 + 1, "name": f"point {index}"}


def shake(sample, rng):
    return {**sample, "x": sample["x"] + torch.from_numpy(rng.normal(0, 0.1, 3)).float()}


class Stop(Exception):
    """Stands for whatever ends a run."""


def train(
    output,
    steps=6,
    stop_at=None,
    optimizer="adamw",
    batch_size=2,
    accumulation=1,
    workers=0,
    save_every=2,
    width=1,
    rate=0.05,
    break_at=None,
    tracker="none",
    validate_every=0,
    on_step=None,
    **options,
):
    """Train a small network on Points with all that a stage uses; return (run, network) with the weights to save.

    stop_at: the step that is broken off; break_at: the step whose loss is not finite; validate_every: steps between
    two validations, whose score is the error on Points; on_step: called with (run, network) before a step's log;
    options: of the TrainingRun.
    """
    accelerator = make_accelerator("cpu", "no", accumulation, tracker, output)
    with seeded(0):
        network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Dropout(0.1), torch.nn.Linear(5, width))
        network[0].bias.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    model, adam = accelerator.prepare(network, make_optimizer(trained, optimizer, rate))
    settings = {"schedule": "cosine", "progress": False, **options}
    run = TrainingRun(output, steps, accelerator, {"net": model}, {"net": adam}, save_every, 2, **settings)
    run.state.setdefault("seen", [])
    for batch in run.batches(Points(), batch_size, seed=3, augment=shake, num_workers=workers):
        if run.step == stop_at:
            raise Stop
        model.train()
        generators = run.generators(batch)
        noise = torch.stack([torch.randn(3, generator=g) for g in generators])
        with accelerator.accumulate(model), seeded(3, int(batch["position"][0]), "dropout"):
            loss = (model(batch["x"] + 0.1 * noise)[:, 0] - batch["y"]).pow(2).mean()
            if run.step == break_at:
                loss = loss * math.inf
            run.check(loss, batch)
            accelerator.backward(loss)
            adam.step()
            adam.zero_grad()
        run.log(loss=loss, noise=noise.mean())
        if run.every(3):
            run.state["seen"] = [*run.state["seen"], run.step]
        if run.every(validate_every):
            run.log(validation_score=validate(run, network))
        if on_step:
            on_step(run, network)
    accelerator.end_training()
    run.use_final_weights()
    return run, network


@torch.no_grad()
def validate(run, network):
    network.eval()
    with run.averaged():
        score = -sum((network(p["x"])[0] - p["y"]).pow(2).item() for p in (Points()[i] for i in range(7)))
    run.validated(score)
    return score


def train_until(output, step, **options):
    with pytest.raises(Stop):
        train(output, stop_at=step, **options)


def same_weights(module, other):
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


def metrics(folder):
    return (Path(folder) / "metrics.jsonl").read_bytes()

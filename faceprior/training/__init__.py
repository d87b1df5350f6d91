"""What every training stage needs around its loop: device, data order, optimizer, log, checkpoints, a graceful stop.

The loop itself is in the stage:

    run = TrainingRun(output, steps, accelerator, modules={"unet": unet}, optimizers={"unet": optimizer})
    for batch in run.batches(dataset, batch_size=4):
        with accelerator.accumulate(unet):
            loss = ...  # random numbers from run.generators(batch)
            run.check(loss, batch)  # ends the run at NaN, before the weights see it
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=loss)

In the order of a stage: `accelerator` makes it, `inputs` says what the run begins with, `output` opens the folder,
`optimizer` has the optimizers and their learning rate, `samples` the order of the data and its random numbers, `run`
the steps; behind them `weights` keeps the average and the best, and `checkpoint` is what a run resumes from.
"""

from faceprior.training.accelerator import make_accelerator
from faceprior.training.inputs import describe_samples, describe_weights
from faceprior.training.optimizer import make_optimizer
from faceprior.training.output import open_run
from faceprior.training.run import TrainingRun
from faceprior.training.samples import (
    SampleStream,
    collate,
    drop_prompts,
    sample_generators,
    sample_timesteps,
    seeded,
    stable_seed,
)

__all__ = [
    "SampleStream",
    "TrainingRun",
    "collate",
    "describe_samples",
    "describe_weights",
    "drop_prompts",
    "make_accelerator",
    "make_optimizer",
    "open_run",
    "sample_generators",
    "sample_timesteps",
    "seeded",
    "stable_seed",
]

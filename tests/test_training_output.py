"""The output folder of a training stage: which settings may differ when a run is resumed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from training_runs import Points, metrics, same_weights

from faceprior.config import finish, is_complete, open_output, saved_settings
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, open_run, seeded


def test_finish_replaces_what_a_kill_left(tmp_path):
    (tmp_path / "done.part").write_text("{")
    finish(tmp_path, rows=3)
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]


@dataclasses.dataclass
class Config:
    output: str = "out"
    steps: int = 6
    batch_size: int = 2
    accumulation: int = 2
    learning_rate: float = 0.05
    schedule: str = "constant"
    num_samples: int = 4
    overwrite: bool = False

    AFTER_TRAINING = frozenset({"num_samples"})


def open_at(config, step=0, samples=4, done=False, **changes):
    """Open a run that was saved at `step`, or is done, with other settings; returns those that are saved then."""
    output = Path(config.output)
    accelerator = make_accelerator("cpu")
    open_run(config, accelerator)
    if step:
        (output / "resume").mkdir()
        (output / "resume/state.json").write_text(json.dumps({"step": step, "samples_per_step": samples}))
    if done:
        finish(output, steps=config.steps, samples_per_step=samples)
    open_run(dataclasses.replace(config, **changes), accelerator)
    return saved_settings(config)


@pytest.mark.parametrize(
    ("state", "changes", "refused"),
    [
        ({}, {"batch_size": 7, "steps": 3, "num_samples": 0}, None),  # nothing was done yet
        ({}, {"learning_rate": 0.1, "schedule": "cosine"}, None),
        ({"step": 2}, {"learning_rate": 0.1}, "learning_rate (0.05 there, 0.1 now)"),
        ({"step": 2}, {"batch_size": 4, "accumulation": 1}, None),
        ({"step": 2}, {"batch_size": 4}, "with 4 samples a step, but `batch_size` 4 x `accumulation` 2 x 1 process"),
        ({"step": 2, "samples": 8}, {}, "holds a run with 8 samples a step"),  # of two processes
        ({"step": 2, "samples": 8}, {"batch_size": 4}, None),
        ({"step": 2}, {"num_samples": 9, "steps": 20}, None),
        ({"step": 2}, {"steps": 2}, None),
        ({"step": 2}, {"steps": 1}, "steps (6 there, 1 now)"),
        ({"step": 2}, {"schedule": "cosine", "steps": 20}, "schedule (constant there, cosine now), steps (6 there"),
        ({"step": 6, "done": True}, {"steps": 20, "num_samples": 9}, None),  # trained further
        ({"step": 6, "done": True}, {"num_samples": 9}, None),  # sampled again
        ({"done": True}, {"num_samples": 9}, "num_samples (4 there, 9 now)"),  # without a checkpoint
        ({"step": 6, "done": True}, {"batch_size": 1, "accumulation": 4}, None),
        ({"done": True}, {"steps": 20}, "was trained for 6 steps and its checkpoint"),
    ],
)  # fmt: skip
def test_what_may_differ_when_a_run_is_resumed(tmp_path, state, changes, refused):
    config = Config(output=str(tmp_path / "run"))
    if refused:
        with pytest.raises(FileExistsError) as error:
            open_at(config, **state, **changes)
        assert refused in str(error.value)
        saved = saved_settings(config)
        assert all(saved[key] == getattr(config, key) for key in changes)
    else:
        saved = open_at(config, **state, **changes)
        assert {key: saved[key] for key in changes} == changes
        goes_on = {"steps", "num_samples"} & changes.keys()
        assert is_complete(tmp_path / "run") == (state.get("done", False) and not goes_on)


@pytest.mark.parametrize("kill", ["before", "after"])
@pytest.mark.parametrize("changes", [{"steps": 20}, {"num_samples": 9}])
def test_killed_while_a_finished_run_is_opened_again(tmp_path, monkeypatch, kill, changes):
    """Before or after its new settings were saved, it is not taken for one that was made with them."""
    config = Config(output=str(tmp_path / "run"))
    open_at(config, step=6, done=True)

    def broken(*args):
        if kill == "after":
            open_output(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("faceprior.training.output.open_output", broken)
        open_run(dataclasses.replace(config, **changes), make_accelerator("cpu"))
    assert not is_complete(tmp_path / "run")
    open_run(dataclasses.replace(config, **changes), make_accelerator("cpu"))
    assert not is_complete(tmp_path / "run") and changes.items() <= saved_settings(config).items()


def test_what_a_kill_left_of_a_deleted_checkpoint_goes(tmp_path):
    """A finished run of another schedule has none: samples made again would resume from a part of it."""
    config = Config(output=str(tmp_path / "run"), schedule="cosine")
    with pytest.raises(FileExistsError, match=r"num_samples \(4 there, 9 now\)"):
        open_at(config, step=6, done=True, num_samples=9)
    assert is_complete(tmp_path / "run") and not (tmp_path / "run/resume").exists()


def test_steps_may_be_fewer_but_not_than_were_done(tmp_path):
    config = Config(output=str(tmp_path / "run"), steps=400)
    assert open_at(config, step=9, steps=11)["steps"] == 11
    with pytest.raises(FileExistsError, match=r"steps \(11 there, 8 now\)"):
        open_run(dataclasses.replace(config, steps=8), make_accelerator("cpu"))
    assert open_at(config, steps=9)["steps"] == 9


def test_the_steps_of_a_cosine_are_fixed_once_it_began(tmp_path):
    open_at(Config(output=str(tmp_path / "new"), schedule="cosine"), steps=20)
    with pytest.raises(FileExistsError, match=r"steps \(6 there, 20 now\)"):
        open_at(Config(output=str(tmp_path / "begun"), schedule="cosine"), step=2, steps=20)


def test_a_finished_run_of_constant_rate_is_trained_further(tmp_path):
    """Its checkpoint is kept; the longer run equals one that had the steps from the start."""

    def run(folder, steps):
        accelerator = make_accelerator("cpu")
        with seeded(0):
            network = torch.nn.Linear(3, 1)
        adam = make_optimizer(network.parameters(), learning_rate=0.05)
        training_run = TrainingRun(folder, steps, accelerator, {"net": network}, {"net": adam}, progress=False)
        for batch in training_run.batches(Points(), 2):
            loss = (network(batch["x"])[:, 0] - batch["y"]).pow(2).mean()
            loss.backward()
            adam.step()
            adam.zero_grad()
            training_run.log(loss=loss)
        training_run.finish()
        return network

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "parts", 3)
    assert same_weights(run(tmp_path / "parts", 5), whole)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")

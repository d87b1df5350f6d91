"""What a run began with: what counts as another data set or other weights, and that no run goes on with them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from test_training_output import Config, open_at
from training_runs import metrics, same_weights, train, train_until

from faceprior.config import finish, is_complete, saved_settings
from faceprior.training import describe_samples, describe_weights, make_accelerator, open_run
from faceprior.training.inputs import require_same_inputs


class Files:
    """A dataset of files with captions."""

    def __init__(self, folder: Path, **captions: str):
        self.folder, self.rows = folder, list(captions.items())

    def __len__(self):
        return len(self.rows)

    def source(self, index):
        name, caption = self.rows[index]
        return {"id": name, "caption": caption}, [self.folder / name, 64]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "faces").mkdir()
    for name, size in (("a", 10), ("b", 20)):
        (tmp_path / "faces" / name).write_bytes(bytes(size))
    return tmp_path / "faces"


def test_samples_are_their_captions_and_the_sizes_of_their_files(folder, tmp_path):
    """Neither where the files are nor when they were written."""
    before = describe_samples(Files(folder, a="a man", b="a woman"))
    assert before.startswith("2 samples (") and describe_samples(Files(folder, a="a man")).startswith("1 sample (")
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    os.utime(moved / "a", (1, 1))
    assert describe_samples(Files(moved, a="a man", b="a woman")) == before
    assert describe_samples(Files(folder, a="a man", b="a girl")) != before
    assert describe_samples(Files(folder, b="a woman", a="a man")) != before
    (folder / "b").write_bytes(bytes(21))
    assert describe_samples(Files(folder, a="a man", b="a woman")) != before
    assert describe_samples([{"prompt": "a man"}] * 3) == "3 samples"


def test_every_fine_tuning_shows_in_the_weights():
    """Of 1000 values every 15th counts, 64 at least; integers, as of quantized weights, do not."""
    tensors = [
        torch.arange(1000.0).reshape(10, 100),
        torch.ones(3, dtype=torch.bfloat16),
        torch.zeros(5).to(torch.int8),
    ]
    before = describe_weights(tensors)
    assert before.startswith("2 tensors (") and describe_weights(iter(tensors)) == before
    tensors[2] += 1
    assert describe_weights(tensors) == before
    assert describe_weights([tensors[0].reshape(100, 10), *tensors[1:]]) != before
    assert describe_weights([1.001 * tensors[0], *tensors[1:]]) != before
    tensors[1][2] = 2
    assert describe_weights(tensors) != before


def test_what_is_not_known_counts_as_the_same(tmp_path):
    require_same_inputs(tmp_path, {}, {"base": "1"})
    require_same_inputs(tmp_path, {"base": "1", "pairs": "2"}, {"base": "1"})
    with pytest.raises(
        FileExistsError, match=r"began with other input, base: 1 then, 3 now; seed: 0 then, 7 now\. Put"
    ):
        require_same_inputs(tmp_path, {"base": "1", "pairs": "2", "seed": 0}, {"base": "3", "pairs": "2", "seed": 7})


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path):
    """One of a version that did not keep it goes on with what is there now, and keeps that."""
    _, weights = train(tmp_path / "whole", inputs={"data": "7 samples"})
    cut = tmp_path / "cut"
    train_until(cut, 3)
    with_data = {"inputs": {"data": "7 samples"}}
    train_until(cut, 5, **with_data)
    with pytest.raises(FileExistsError, match=r"cut holds a run .* data: 7 samples then, 8 samples now"):
        train(cut, inputs={"data": "8 samples"})
    _, others = train(cut, **with_data)
    assert same_weights(weights, others) and metrics(tmp_path / "whole") == metrics(cut)


def test_a_finished_run_is_not_taken_for_one_on_other_data(tmp_path):
    """But other settings, which may be why the data are others, are named first; before a step all is free."""
    config, accelerator = Config(output=str(tmp_path / "run")), make_accelerator("cpu")
    open_at(config)
    open_run(config, accelerator, {"pairs": "8 samples"})
    finish(tmp_path / "run", steps=6, samples_per_step=4, inputs={"pairs": "7 samples"})
    open_run(config, accelerator, {"pairs": "7 samples"})
    with pytest.raises(FileExistsError, match="pairs: 7 samples then, 8 samples now"):
        open_run(config, accelerator, {"pairs": "8 samples"})
    with pytest.raises(FileExistsError, match="learning_rate"):
        open_run(Config(**{**vars(config), "learning_rate": 0.1}), accelerator, {"pairs": "8 samples"})
    assert saved_settings(config)["learning_rate"] == config.learning_rate
    open_run(Config(**{**vars(config), "overwrite": True}), accelerator, {"pairs": "8 samples"})


def test_a_finished_run_that_is_refused_stays_finished(tmp_path):
    """More steps on another base: the checkpoint says so late, when settings and `done.json` are already aside."""
    config, accelerator = Config(output=str(tmp_path / "run"), accumulation=1), make_accelerator("cpu")
    constant = {"schedule": "constant"}
    open_run(config, accelerator)
    run, _ = train(tmp_path / "run", config.steps, inputs={"base": "1"}, **constant)
    run.finish()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    longer = Config(**{**vars(config), "steps": config.steps + 2})
    open_run(longer, accelerator)
    assert not is_complete(tmp_path / "run")
    with pytest.raises(FileExistsError, match="base: 1 then, 2 now"):
        train(tmp_path / "run", longer.steps, inputs={"base": "2"}, **constant)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before
    open_run(longer, accelerator)
    run, _ = train(tmp_path / "run", longer.steps, inputs={"base": "1"}, **constant)
    run.finish()
    assert is_complete(tmp_path / "run") and saved_settings(config)["steps"] == longer.steps
    assert not [*(tmp_path / "run").glob("former*")]

"""Checkpoints: whole or not there at any moment, and refused where they do not fit."""

import resource
import shutil

import pytest
import torch
from training_runs import metrics, same_weights, train, train_until

from faceprior.errors import explain
from faceprior.training import TrainingRun, make_accelerator, make_optimizer


def test_killed_between_the_two_renames(tmp_path):
    """`resume` was renamed to `resume.old`, the new one not yet to `resume`: the old one is taken, and is kept safe.

    The next checkpoint must not delete it before it is whole itself.
    """
    _, weights = train(tmp_path / "whole")
    train_until(tmp_path / "cut", 3)
    cut = tmp_path / "cut"
    (cut / "resume").rename(cut / "resume.old")
    (cut / "resume.new").mkdir()
    (cut / "resume.new/state.json").write_text("{")
    train_until(cut, 3)
    assert (cut / "resume").is_dir() and not (cut / "resume.old").exists()
    run, others = train(cut)
    assert same_weights(weights, others) and metrics(tmp_path / "whole") == metrics(cut)
    assert sorted(path.name for path in cut.iterdir()) == ["metrics.jsonl", "resume"]


def test_what_a_kill_left_of_old_checkpoints_goes(tmp_path):
    """Killed in `save` after its second rename, at the last step: no later `save` would delete it."""
    train(tmp_path)
    for rest in ("resume.old", "resume.new"):
        (tmp_path / rest).mkdir()
        (tmp_path / rest / "parameters.safetensors").write_bytes(b"half")
    train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "resume"]


def test_killed_while_the_checkpoint_is_written(tmp_path):
    """Half of a new one beside the old one is ignored; so is what is left of a deleted one."""
    _, weights = train(tmp_path / "whole")
    cut = tmp_path / "cut"
    train_until(cut, 3)
    shutil.copytree(cut / "resume", cut / "resume.new")
    (cut / "resume.new/parameters.safetensors").write_bytes(b"torn")
    (cut / "resume.old").mkdir()
    _, others = train(cut)
    assert same_weights(weights, others)


@pytest.mark.parametrize("file", ["state.json", "parameters.safetensors", "net.optimizer.safetensors"])
@pytest.mark.parametrize("missing", [False, True])
def test_damaged_checkpoint_is_never_read_as_whole(tmp_path, file, missing):
    train_until(tmp_path, 3)
    path = tmp_path / "resume" / file
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="the checkpoint .*resume is damaged .*delete it to train from step 0"):
        train(tmp_path)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    train_until(tmp_path, 3)
    with pytest.raises(ValueError, match=r"made by another model: 2 parameters differ .* net\.2\.bias, net\.2\.weight"):
        train(tmp_path, width=2)
    accelerator = make_accelerator("cpu")
    network = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"made by another model: \d parameters differ .*net\.0\.weight"):
        TrainingRun(tmp_path, 6, accelerator, {"net": network}, {"net": make_optimizer(network.parameters())})


def test_frozen_parameters_are_not_in_the_checkpoint(tmp_path):
    from safetensors.torch import load_file

    train_until(tmp_path, 3)
    assert set(load_file(tmp_path / "resume/parameters.safetensors")) == {"net.0.weight", "net.2.weight", "net.2.bias"}


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path):
    """No file may grow as large as the checkpoint's largest one: one error says so; what was saved is resumed."""
    _, weights = train(tmp_path / "whole")
    cut, kept = tmp_path / "cut", tmp_path / "cut/resume/parameters.safetensors"
    train_until(cut, 3)
    before = kept.read_bytes()
    limit, largest = resource.getrlimit(resource.RLIMIT_FSIZE), max(p.stat().st_size for p in kept.parent.iterdir())
    assert largest > (tmp_path / "whole/metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limit[1]))
    try:
        with pytest.raises(OSError, match="the checkpoint of step 4 .* takes .* MB .* Free space .* at step 2") as full:
            train(cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert explain(full.value) == str(full.value)
    assert kept.read_bytes() == before and not (cut / "resume.new").exists()
    _, others = train(cut)
    assert same_weights(weights, others) and metrics(tmp_path / "whole") == metrics(cut)

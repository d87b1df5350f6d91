"""Training runs: the order of the data, random numbers, optimizers, and resuming after any stop."""

import dataclasses
import hashlib
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from torch.utils.data import Dataset

from faceprior import training
from faceprior.config import finish, is_complete, saved_settings
from faceprior.errors import explain
from faceprior.models import resolve_device, weight_dtype
from faceprior.training import (
    GracefulStop,
    SampleStream,
    TrainingRun,
    collate,
    drop_prompts,
    flatten_optimizer,
    learning_rate_factor,
    make_accelerator,
    make_optimizer,
    move,
    open_run,
    restore_optimizer,
    sample_generators,
    sample_timesteps,
    seeded,
    stable_seed,
)


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


# devices


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "mps", "meta", "cuda:99"])
def test_other_devices_are_refused(name):
    """`meta` and `mps` are devices of torch that a run would silently not use."""
    with pytest.raises(
        ValueError, match=f"`device` (has to be auto, cpu, cuda or cuda:N but is '{name}'|is {name} but)"
    ):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(ValueError, match="`device` is cuda but this machine has no CUDA device.*--device cpu"):
        make_accelerator("cuda")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="`mixed_precision` is fp16, which a CPU cannot train in: use bf16 or no"):
        make_accelerator("cpu", "fp16")


def test_the_environment_does_not_override_the_settings(monkeypatch):
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "7"), ("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "eager")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    accelerator = make_accelerator("cpu", "no", 2)
    assert accelerator.gradient_accumulation_steps == 2 and accelerator.mixed_precision == "no"
    network = torch.nn.Linear(1, 1)
    assert accelerator.prepare(network) is network  # not compiled


def test_one_process_may_train_twice_with_other_settings():
    """As a notebook does; accelerate alone refuses another precision."""
    for precision, accumulation in (("no", 3), ("bf16", 1), ("no", 2)):
        accelerator = make_accelerator("cpu", precision, accumulation)
        assert accelerator.mixed_precision == precision
        assert accelerator.gradient_accumulation_steps == accumulation
    assert weight_dtype("bf16") == torch.bfloat16 and weight_dtype("no") == torch.float32


# random numbers


def test_stable_seed_is_the_same_everywhere():
    """The first eight bytes of the SHA-256 of the parts as JSON, little endian, without the lowest bit."""
    digest = hashlib.sha256(b'[3, "a", 14]').digest()
    assert stable_seed(3, "a", 14) == int.from_bytes(digest[:8], "little") // 2
    assert 0 <= stable_seed("é") < 2**63
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1", 23), stable_seed("123")}) == 4


def test_seeded_puts_the_global_generator_back():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(1, "dropout"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(1, "dropout"):
        assert torch.equal(torch.rand(2), inside)


def test_generators_belong_to_the_sample_and_not_to_the_batch():
    together = [torch.rand(3, generator=g) for g in sample_generators(1, torch.tensor([4, 5, 6]))]
    alone = torch.rand(3, generator=sample_generators(1, [5])[0])
    assert torch.equal(together[1], alone)
    others = [sample_generators(2, [5]), sample_generators(1, [4]), sample_generators(1, [5], "other")]
    assert not any(torch.equal(torch.rand(3, generator=g[0]), alone) for g in others)


def test_timesteps_fill_their_range():
    timesteps = sample_timesteps(sample_generators(0, range(400)), 3, 7)
    assert timesteps.dtype == torch.int64 and set(timesteps.tolist()) == {3, 4, 5, 6}
    assert torch.equal(timesteps[10:12], sample_timesteps(sample_generators(0, [10, 11]), 3, 7))


def test_dropped_prompts():
    prompts = [f"prompt {i}" for i in range(400)]
    dropped = drop_prompts(prompts, 0.25, sample_generators(0, range(400)))
    assert all(kept in (None, prompt) for kept, prompt in zip(dropped, prompts, strict=True))
    assert 60 <= dropped.count(None) <= 140  # 100 expected, deviation 8.7
    assert drop_prompts(prompts[:3], 0, sample_generators(0, range(3))) == prompts[:3]
    assert drop_prompts(prompts[:3], 1, sample_generators(0, range(3))) == [None] * 3


# the order of the data


def test_every_epoch_is_the_whole_dataset_once_in_another_order():
    stream = SampleStream(Points(), seed=1)
    epochs = [[stream[7 * epoch + i]["name"] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == [f"point {i}" for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [SampleStream(Points(), seed=2)[i]["name"] for i in range(7)] != epochs[0]


def test_the_stream_is_entered_anywhere():
    walked = SampleStream(Points(), seed=1, augment=shake)
    for position in range(40):
        expected = walked[position]
    entered = SampleStream(Points(), seed=1, augment=shake)[39]
    assert entered["position"] == 39 and entered["name"] == expected["name"]
    assert torch.equal(entered["x"], expected["x"])


def test_augmentation_differs_between_epochs():
    changes = []
    for epoch in range(2):
        rows = [SampleStream(Points(), 1, shake)[7 * epoch + i] for i in range(7)]
        row = next(row for row in rows if row["name"] == "point 0")
        changes.append(row["x"] - Points()[0]["x"])
    assert not torch.equal(*changes)


def test_augmentation_may_not_change_the_dataset():
    class Kept(Points):
        samples = [Points()[i] for i in range(7)]

        def __getitem__(self, index):
            return self.samples[index]

    def rename(sample, rng):
        sample["name"] = "changed"
        return sample

    SampleStream(Kept(), 0, rename)[0]
    assert all(sample["name"].startswith("point") for sample in Kept.samples)


def test_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="the dataset is empty"):
        SampleStream([], seed=0)


def test_collate_and_move():
    batch = collate(
        [{"x": torch.ones(2), "position": 3, "name": "a"}, {"x": torch.zeros(2), "position": 4, "name": "b"}]
    )
    assert batch["x"].tolist() == [[1, 1], [0, 0]] and batch["name"] == ["a", "b"]
    assert batch["position"].tolist() == [3, 4]
    moved = move(batch, torch.device("meta"))
    assert moved["x"].is_meta and not moved["position"].is_meta and moved["name"] == ["a", "b"]


def test_two_processes_see_together_what_one_sees():
    """A step takes the next positions of the stream, whoever takes them: 2 processes x 2 micro-batches x 3 = 12."""

    class Process:
        def __init__(self, rank, world):
            self.process_index, self.num_processes = rank, world

    pair = [training._positions(5, 7, 6, 3, Process(rank, 2)) for rank in (0, 1)]
    alone = training._positions(5, 7, 12, 12, Process(0, 1))
    assert [list(batch) for batch in alone] == [list(range(60, 72)), list(range(72, 84))]
    for step in (0, 1):
        together = [p for batches in pair for batch in batches[2 * step : 2 * step + 2] for p in batch]
        assert sorted(together) == list(alone[step])


# learning rate and optimizers


def test_learning_rate_by_hand():
    """Warm-up over 3 steps: 1/4, 2/4, 3/4; cosine over 4: 1, (1 + cos pi/4) / 2, 1/2, (1 - cos pi/4) / 2."""
    half = (1 + math.sqrt(0.5)) / 2
    cosine = [learning_rate_factor(step, 7, 3, "cosine") for step in range(7)]
    assert cosine == pytest.approx([0.25, 0.5, 0.75, 1, half, 0.5, 1 - half])
    assert [learning_rate_factor(step, 5, 1) for step in range(5)] == [0.5, 1, 1, 1, 1]
    assert learning_rate_factor(2, 2, 5, "cosine") == 0.5  # a run that ends in its warm-up


def test_unknown_schedule_and_optimizer_are_named():
    with pytest.raises(ValueError, match="`schedule` has to be constant or cosine but is 'linear'"):
        learning_rate_factor(0, 1, schedule="linear")
    with pytest.raises(ValueError, match="`optimizer` has to be adamw, .* but is 'sgd'"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], "sgd")


OPTIMIZERS = ["adamw", "adamw8bit", "paged_adamw8bit"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_round_trip(name, tmp_path):
    """Continuing after the round trip equals not having been interrupted. 8-bit state begins at 4096 elements."""
    from safetensors.torch import load_file, save_file

    def make():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(80, 80)), torch.nn.Parameter(torch.randn(3))]
        return parameters, make_optimizer(parameters, name, 0.01, weight_decay=0.1)

    def step(parameters, optimizer, number):
        for parameter in parameters:
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    whole, first = make(), make()
    for number in range(6):
        step(*whole, number)
        if number < 3:
            step(*first, number)
    tensors, values = flatten_optimizer(first[1])
    save_file(tensors, tmp_path / "state.safetensors")
    second = make()
    for parameter, value in zip(second[0], first[0], strict=True):
        parameter.data.copy_(value)
    restore_optimizer(second[1], load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(values)))
    for number in range(3, 6):
        step(*second, number)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], second[0], strict=True))
    if name != "adamw":
        assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())


def test_restored_optimizer_keeps_its_own_settings():
    """The learning rate belongs to the settings of the run, not to the checkpoint."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    old = make_optimizer([parameter], learning_rate=0.5)
    old.step()
    new = make_optimizer([parameter], learning_rate=0.25)
    restore_optimizer(new, *flatten_optimizer(old))
    assert new.param_groups[0]["lr"] == 0.25 and new.state[parameter]["step"] == 1


# a run


def metrics(folder):
    return (Path(folder) / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stopped_in", [2, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer, stopped_in):
    """Weights, log and the caller's state, bit for bit; step 3 is not a multiple of `save_every` and is done again."""
    whole, weights = train(tmp_path / "whole", optimizer=optimizer)
    train_until(tmp_path / "cut", stopped_in, optimizer=optimizer)
    resumed, others = train(tmp_path / "cut", optimizer=optimizer)
    assert same_weights(weights, others)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert resumed.state == whole.state == {"seen": [2, 5]} and resumed.step == 6


def test_a_run_resumed_in_every_step_equals_an_uninterrupted_one(tmp_path):
    _, weights = train(tmp_path / "whole", accumulation=2, save_every=1)
    for step in range(1, 6):
        train_until(tmp_path / "cut", step, accumulation=2, save_every=1)
    _, others = train(tmp_path / "cut", accumulation=2, save_every=1)
    assert same_weights(weights, others) and metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_loading_processes_change_nothing(tmp_path):
    _, weights = train(tmp_path / "none")
    _, others = train(tmp_path / "two", workers=2)
    assert same_weights(weights, others) and metrics(tmp_path / "none") == metrics(tmp_path / "two")


def test_accumulated_micro_batches_equal_a_batch(tmp_path):
    """2 x 2 samples are 4: the same samples and random numbers; sums differ in their order only.

    Dropout is drawn per micro-batch and is left out.
    """

    def run(name, batch_size, accumulation):
        accelerator = make_accelerator("cpu", "no", accumulation)
        with seeded(0):
            network = torch.nn.Linear(3, 1)
        model, adam = accelerator.prepare(network, make_optimizer(network.parameters(), learning_rate=0.05))
        training_run = TrainingRun(tmp_path / name, 5, accelerator, {"net": model}, {"net": adam}, progress=False)
        syncs = []
        for batch in training_run.batches(Points(), batch_size, seed=3):
            noise = torch.stack([torch.randn(3, generator=g) for g in training_run.generators(batch)])
            with accelerator.accumulate(model):
                loss = (model(batch["x"] + noise)[:, 0] - batch["y"]).pow(2).mean()
                accelerator.backward(loss)
                adam.step()
                adam.zero_grad()
            training_run.log(loss=loss)
            syncs.append(training_run.every(5))
        rows = [json.loads(line) for line in metrics(tmp_path / name).splitlines()]
        return network, [row["loss"] for row in rows], syncs

    one, losses, at_ends = run("one", 4, 1)
    two, others, at_ends_of_two = run("two", 2, 2)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-5, atol=1e-6)
    assert losses == pytest.approx(others, rel=1e-5)
    assert at_ends == [False] * 4 + [True] and at_ends_of_two == [False] * 9 + [True]


def test_log_has_a_row_per_step_with_the_mean_of_its_micro_batches(tmp_path):
    accelerator = make_accelerator("cpu", "no", 2)
    network = torch.nn.Linear(3, 1)
    adam = make_optimizer(network.parameters(), learning_rate=0.5)
    run = TrainingRun(tmp_path, 2, accelerator, {"net": network}, {"net": adam}, warmup_steps=1, progress=False)
    for number, _ in enumerate(run.batches(Points(), 1)):
        run.log(value=number, tensor=torch.tensor(2.0 * number, requires_grad=True))
    rows = [json.loads(line) for line in metrics(tmp_path).splitlines()]
    assert rows == [
        {"step": 1, "value": 0.5, "tensor": 1.0, "learning_rate": 0.25},
        {"step": 2, "value": 2.5, "tensor": 5.0, "learning_rate": 0.5},
    ]


def test_a_run_without_output_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _ = train(None)
    run.finish(accuracy=1)
    assert run.step == 6 and not list(tmp_path.iterdir())


def test_finished_run_drops_its_checkpoint(tmp_path):
    run, _ = train(tmp_path)
    assert not is_complete(tmp_path) and (tmp_path / "resume").is_dir()
    run.finish(accuracy=0.5)
    done = {"steps": 6, "samples_per_step": 2, "accuracy": 0.5}
    assert is_complete(tmp_path) and json.loads((tmp_path / "done.json").read_text()) == done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done.json", "metrics.jsonl"]


def test_killed_after_the_last_step_only_the_end_is_left_to_do(tmp_path):
    """The last step is always saved: the loop has nothing to do, the weights are there for the files of the stage."""
    _, weights = train(tmp_path, steps=5, save_every=100)
    run, others = train(tmp_path, steps=5, save_every=100, break_at=0)
    assert run.step == 5 and same_weights(weights, others)


def test_finish_replaces_what_a_kill_left(tmp_path):
    (tmp_path / "done.part").write_text("{")
    finish(tmp_path, rows=3)
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]


# trackers


class Lines(GeneralTracker):
    """A tracker of accelerate's that keeps what is logged to it."""

    name, requires_logging_directory = "lines", False

    def __init__(self):
        super().__init__()
        self.rows, self.finished = [], False

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append({"step": step, **values})

    def finish(self):
        self.finished = True


def test_a_tracker_gets_the_rows_of_the_log(tmp_path):
    """At their steps, also when the run is resumed: step 3 is done, and logged, again."""
    first, second = Lines(), Lines()
    train_until(tmp_path, 3, tracker=first)
    train(tmp_path, tracker=second)
    lines = [json.loads(line) for line in metrics(tmp_path).splitlines()]
    assert first.rows == lines[:3] and second.rows == lines[2:]
    assert second.finished


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path, tracker):
    if tracker in get_available_trackers():
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(ImportError, match=f"`tracker` is {tracker}, which is not installed: `pip install {tracker}`"):
        make_accelerator("cpu", tracker=tracker, output=tmp_path)


def test_an_installed_tracker_is_accepted_by_its_name(tmp_path, monkeypatch):
    """accelerate lists trackers as members of an enum, which are not equal to their names."""
    monkeypatch.setattr(training, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    make_accelerator("cpu", tracker="tensorboard", output=tmp_path)
    with pytest.raises(ImportError, match="`tracker` is wandb"):
        make_accelerator("cpu", tracker="wandb", output=tmp_path)


def test_tensorboard_files_are_in_the_output_folder(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, tracker="tensorboard")
    assert any((tmp_path / "tensorboard").rglob("events.out.tfevents*"))


# checkpoints


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


def test_numbers_that_are_not_finite_end_the_run_and_leave_the_last_good_checkpoint(tmp_path):
    _, weights = train(tmp_path / "whole")
    message = (
        r"`loss` became (inf|nan) at step 4, in positions 6, 7; the last good checkpoint is .*cut/resume, of step 2"
    )
    with pytest.raises(ValueError, match=message + r"\. Start over with a lower `learning_rate`") as error:
        train(tmp_path / "cut", break_at=3)
    assert explain(error.value) == str(error.value)
    assert json.loads((tmp_path / "cut/resume/state.json").read_text())["step"] == 2
    assert len(metrics(tmp_path / "cut").splitlines()) == 3
    _, others = train(tmp_path / "cut")
    assert same_weights(weights, others) and metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_a_loss_that_is_not_finite_names_its_samples_and_leaves_the_weights(tmp_path):
    """The samples of the micro-batch by their ids; before the first checkpoint there is none to name."""
    accelerator = make_accelerator("cpu")
    network = torch.nn.Linear(3, 1)
    run = TrainingRun(tmp_path, 6, accelerator, {"net": network}, {"net": make_optimizer(network.parameters())})
    run.check(torch.tensor(1e30), {"id": ["a"]})
    batch = {"id": [f"pair_{i}" for i in range(10)], "position": torch.arange(10)}
    message = r"`loss` became nan at step 1, in samples pair_0, pair_1, .*pair_7 and 2 more; no checkpoint yet\. Start"
    with pytest.raises(ValueError, match=message):
        run.check(torch.tensor(math.nan, requires_grad=True), batch)


def test_the_losses_of_a_step_are_looked_at_together_before_the_weights_change(tmp_path):
    """The first of two micro-batches is at fault: it is the one named, after the second, and no weight has moved."""
    accelerator = make_accelerator("cpu", accumulation=2)
    network = torch.nn.Linear(3, 1)
    before = network.weight.detach().clone()
    model, adam = accelerator.prepare(network, make_optimizer(network.parameters()))
    run, seen = TrainingRun(tmp_path, 2, accelerator, {"net": model}, {"net": adam}, progress=False), []
    with pytest.raises(ValueError, match="`loss` became nan at step 1, in positions 0, 1; no checkpoint yet"):
        for batch in run.batches(Points(), 2):
            with accelerator.accumulate(model):
                loss = model(batch["x"]).mean() * (1.0 if seen else math.nan)
                seen.append(batch["position"].tolist())
                run.check(loss, batch)
                accelerator.backward(loss)
                adam.step()
                adam.zero_grad()
    assert seen == [[0, 1], [2, 3]] and torch.equal(network.weight, before)


def test_a_number_of_the_log_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="`ratio` became inf at step 3; the last good checkpoint is .*, of step 2"):
        train(tmp_path, on_step=lambda run, _: run.log(ratio=math.inf if run.step == 2 else 0.0))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """As a finite loss with an infinite gradient leaves them: the last checkpoint stays what it was."""

    def spoil(run, network):
        if run.step == 3:  # step 4 ends with a checkpoint
            network[2].weight.data[0, 0] = math.nan

    message = r"the parameter net\.2\.weight is not finite after step 4; the last good checkpoint is .*, of step 2"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, on_step=spoil)
    assert json.loads((tmp_path / "resume/state.json").read_text())["step"] == 2


@pytest.mark.parametrize("split", [(4, 1), (1, 4)])
def test_a_run_may_be_resumed_with_another_split_of_the_same_samples(tmp_path, monkeypatch, split):
    """Dropout is drawn per micro-batch and is left out."""
    monkeypatch.setattr(torch.nn, "Dropout", lambda p: torch.nn.Identity())
    _, weights = train(tmp_path / "whole", batch_size=2, accumulation=2)
    train_until(tmp_path / "cut", 3, batch_size=2, accumulation=2)
    _, others = train(tmp_path / "cut", batch_size=split[0], accumulation=split[1])
    for one, other in zip(weights.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_run_is_not_resumed_with_other_samples(tmp_path):
    train_until(tmp_path, 3, batch_size=2, accumulation=2)
    message = "4 samples a step, but `batch_size` 2 x `accumulation` 1 x 1 process is 2: give values whose product is 4"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, batch_size=2)


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


# the average of the weights, the best ones, and an early end


def collected(weights):
    """Return what collects a copy of the weights after every step."""
    return lambda run, network: weights.append({k: v.clone() for k, v in network.state_dict().items()})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_average_by_hand(tmp_path, accumulation):
    """a_1 = w_1, then a_n = d a_(n-1) + (1 - d) w_n with d = min(decay, n / (n + 9)): 2/11, 3/12, .3 at 0.3, .3, .3."""
    weights = []
    _, network = train(tmp_path, accumulation=accumulation, ema_decay=0.3, on_step=collected(weights))
    weights = weights[accumulation - 1 :: accumulation]
    for key, averaged in network.state_dict().items():
        expected = weights[0][key].double()
        for decay, after in zip((2 / 11, 3 / 12, 0.3, 0.3, 0.3), weights[1:], strict=True):
            expected = decay * expected + (1 - decay) * after[key]
        torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(network[2].weight, weights[-1]["2.weight"])


def test_the_average_holds_what_is_trained_and_gives_the_weights_back(tmp_path):
    from safetensors.torch import load_file

    def look(run, network):
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with pytest.raises(Stop), run.averaged():
            if run.step:
                assert not torch.equal(network[2].weight, before["2.weight"])
            raise Stop
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    train(tmp_path / "look", ema_decay=0.9, ema_device="cpu", on_step=look)
    train(tmp_path / "not")
    assert metrics(tmp_path / "look") == metrics(tmp_path / "not")  # the training does not see the average
    parameters, average = (
        load_file(tmp_path / f"look/resume/{name}.safetensors") for name in ("parameters", "average")
    )
    assert {k: v.shape for k, v in parameters.items()} == {k: v.shape for k, v in average.items()}
    assert all(tensor.dtype == torch.float32 for tensor in average.values())


def test_a_checkpoint_of_another_decay_is_refused(tmp_path):
    train_until(tmp_path, 3, ema_decay=0.9)
    for options in ({}, {"ema_decay": 0.5}):
        with pytest.raises(ValueError, match=r"made with `ema_decay` 0\.9 but it is 0\.[05]: give that, or another"):
            train(tmp_path, **options)
    with pytest.raises(ValueError, match=r"`ema_decay` has to be in \[0, 1\) but is 1"):
        train(tmp_path, ema_decay=1)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
@pytest.mark.parametrize("stopped_in", [1, 3, 4, 5])
def test_a_resumed_run_keeps_its_best_weights(tmp_path, ema_decay, stopped_in):
    """Validated after every step, saved after every second: step 3 stops between validation and checkpoint."""
    options = {"validate_every": 1, "keep_best": True, "ema_decay": ema_decay, "rate": 0.7}
    whole, weights = train(tmp_path / "whole", **options)
    train_until(tmp_path / "cut", stopped_in, **options)
    resumed, others = train(tmp_path / "cut", **options)
    assert same_weights(weights, others) and whole.best == resumed.best
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_best_weights_are_those_of_the_best_score(tmp_path, ema_decay):
    seen, options = {}, {"validate_every": 1, "rate": 0.7, "ema_decay": ema_decay, "keep_best": True}

    def collect(run, network):
        with run.averaged():
            seen[run.step + 1] = {key: value.clone() for key, value in network.state_dict().items()}

    run, network = train(tmp_path, on_step=collect, **options)
    scores = {row["step"]: row["validation_score"] for row in map(json.loads, metrics(tmp_path).splitlines())}
    best = max(scores, key=scores.get)
    assert 0 < best < 6  # a test that the last weights would not pass
    assert run.best == {"step": best, "score": pytest.approx(scores[best]), "since": 6 - best}
    assert all(torch.equal(value, seen[best][key]) for key, value in network.state_dict().items())
    run.finish()
    assert json.loads((tmp_path / "done.json").read_text())["best_step"] == best


def test_the_weights_to_save_without_best_and_average_are_the_last(tmp_path):
    weights = []
    _, network = train(tmp_path, validate_every=2, on_step=collected(weights))
    assert all(torch.equal(value, weights[-1][key]) for key, value in network.state_dict().items())


def scored(scores):
    """Return what gives the run the score of each of its steps."""
    return lambda run, network: run.validated(scores[run.step])


def test_patience_ends_the_run_and_more_steps_train_it_further(tmp_path):
    """Best at step 1, two worse ones: the end, after step 3. More patience, or more steps than were set, go on."""
    scores = [2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 3.0, 0.0, 1.0]
    options = {"schedule": "constant", "on_step": scored(scores), "keep_best": True, "save_every": 100}
    for folder in ("steps", "patience"):
        run, _ = train(tmp_path / folder, patience=2, **options)
        assert (run.step, run.stopped_early, run.best["step"]) == (3, True, 1)
        again, _ = train(tmp_path / folder, patience=2, **options)  # the loop has nothing to do
        assert (again.step, again.stopped_early) == (3, True)
    again.finish()
    done = json.loads((tmp_path / "patience/done.json").read_text())
    assert done == {"steps": 3, "samples_per_step": 2, "best_step": 1, "stopped_early": True}

    more, _ = train(tmp_path / "patience", patience=5, **options)
    assert (more.step, more.stopped_early, more.best["since"]) == (6, False, 5)
    more, _ = train(tmp_path / "steps", patience=2, steps=8, **options)
    assert (more.step, more.stopped_early, more.best) == (5, True, {"step": 1, "score": 2.0, "since": 2})
    more, _ = train(tmp_path / "steps", patience=2, steps=9, **options)
    assert (more.step, more.best) == (9, {"step": 7, "score": 3.0, "since": 2})


# the output folder of a training stage


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


# signals


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with GracefulStop() as stop:
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.signal is None


def test_first_signal_is_a_request_and_the_second_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), GracefulStop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_ends_the_run_after_its_step(tmp_path):
    """In a notebook it stays a KeyboardInterrupt; the step in progress is kept."""
    _, weights = train(tmp_path / "whole", save_every=100)
    accelerator = make_accelerator("cpu")
    network = torch.nn.Linear(3, 1)
    adam = make_optimizer(network.parameters())
    run = TrainingRun(tmp_path / "cut", 6, accelerator, {"net": network}, {"net": adam}, 100, progress=False)
    with pytest.raises(KeyboardInterrupt):
        for _ in run.batches(Points(), 2):
            if run.step == 2:
                signal.raise_signal(signal.SIGINT)
    assert run.step == 3
    assert json.loads((tmp_path / "cut/resume/state.json").read_text())["step"] == 3


def run_killed(folder, number, workers=0):
    """Run `train` in a process of its own that gets a signal while it computes step 4."""
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_training\n"
        "from test_training import TrainingRun, train\n"
        "class Run(TrainingRun):\n"
        "    def generators(self, batch):\n"
        "        if self.step == 3 and not os.path.exists('killed'):\n"
        "            open('killed', 'w').close()\n"
        f"            {'os.killpg(0, ' if workers else 'os.kill(os.getpid(), '}{int(number)})\n"
        "        return super().generators(batch)\n"
        "test_training.TrainingRun = Run\n"
        f"run, _ = train('run', save_every=100, workers={workers})\n"
        "run.finish()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240, start_new_session=True
    )


def test_sigterm_keeps_the_last_step_and_the_same_command_finishes(tmp_path):
    """With loading processes, which a scheduler's signal to the whole group reaches, too."""
    _, weights = train(tmp_path / "whole", save_every=100)
    stopped = run_killed(tmp_path, signal.SIGTERM, workers=2)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "stopped after step 4; the same command resumes" in stopped.stdout
    assert json.loads((tmp_path / "run/resume/state.json").read_text())["step"] == 4
    _, others = train(tmp_path / "run", save_every=100)
    assert same_weights(weights, others) and metrics(tmp_path / "whole") == metrics(tmp_path / "run")

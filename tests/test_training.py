"""Training runs: resuming after any stop, the log, numbers that are not finite, signals."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import OPTIMIZERS, Points, metrics, same_weights, train, train_until

from faceprior.config import is_complete
from faceprior.errors import explain
from faceprior.training import TrainingRun, make_accelerator, make_optimizer, seeded
from faceprior.training.run import GracefulStop


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


# numbers that are not finite


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
    with pytest.raises(ValueError, match=r"is not finite after step 4; no checkpoint yet"):
        train(None, on_step=spoil)  # nor are they what a run without a folder ends with


# other numbers of samples


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
        "import training_runs\n"
        "from training_runs import TrainingRun, train\n"
        "class Run(TrainingRun):\n"
        "    def generators(self, batch):\n"
        "        if self.step == 3 and not os.path.exists('killed'):\n"
        "            open('killed', 'w').close()\n"
        f"            {'os.killpg(0, ' if workers else 'os.kill(os.getpid(), '}{int(number)})\n"
        "        return super().generators(batch)\n"
        "training_runs.TrainingRun = Run\n"
        f"run, _ = train('run', save_every=100, workers={workers})\n"
        "run.finish()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=1200, start_new_session=True
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` has to be a whole number of at least 1 but is 0"),
        ({"steps": 1.5}, "`steps` has to be a whole number of at least 1 but is 1.5"),
        ({"save_every": 0}, "`save_every` has to be a whole number of at least 1 but is 0"),
        ({"batch_size": 0}, "`batch_size` has to be a whole number of at least 1 but is 0"),
        ({"accumulation": -1}, "`accumulation` has to be a whole number of at least 1 but is -1"),
    ],
)
def test_numbers_with_which_nothing_is_trained(options, message):
    with pytest.raises(ValueError, match=message):
        train(None, **options)

"""The average of the weights, the best ones, and an early end."""

import json

import pytest
import torch
from training_runs import Stop, metrics, same_weights, train, train_until


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

"""Learning rates by hand, optimizers, and their state in a checkpoint."""

import json
import math

import pytest
import torch
from training_runs import OPTIMIZERS

from faceprior.training import make_optimizer
from faceprior.training.optimizer import flatten_optimizer, learning_rate_factor, restore_optimizer

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

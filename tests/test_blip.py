"""The attention of the scorer's towers against the library's own."""

import pytest
import torch
from transformers import BlipTextModel, BlipVisionModel

from faceprior.scorer import FaceScorer
from faceprior.tiny import tiny_scorer


@pytest.fixture(scope="module")
def scorer():
    return FaceScorer.from_config(tiny_scorer().config, text_dropout=0.1).double().train()


def library_twin(tower):
    """The library's model of the same class and weights."""
    options = {"add_pooling_layer": False} if isinstance(tower, BlipTextModel) else {}
    twin = type(tower)(tower.config, **options).double().train()
    twin.load_state_dict(tower.state_dict())  # strictly: the names are the library's
    return twin


def run(tower, inputs, **fixed):
    """The output and every gradient; dropout by a fixed seed."""
    torch.manual_seed(0)
    output = tower(**inputs, **fixed).last_hidden_state
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    wanted = [*tower.parameters(), *(x for x in inputs.values() if x.requires_grad)]
    return output, torch.autograd.grad((weights * output).sum(), wanted, allow_unused=True)


def assert_same(tower, inputs, **fixed):
    output, gradients = run(tower, inputs, **fixed)
    expected, wanted = run(library_twin(tower), inputs, **fixed)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_vision_tower_equals_the_librarys(scorer):
    size = scorer.config.image_size
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert isinstance(scorer.vision_model, BlipVisionModel)
    assert_same(scorer.vision_model, {"pixel_values": pixels.requires_grad_()})


def test_the_text_tower_equals_the_librarys_with_dropout_and_padding(scorer):
    """Dropout leaves weights that do not add up to 1, which the values' bias has to follow."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 17, scorer.config.vision_hidden_size, dtype=torch.float64, generator=generator)
    ids = torch.tensor([[*scorer.config.prompt_token_ids, 0, 0]]).expand(2, -1)
    with torch.no_grad():
        for layer in scorer.text_model.encoder.layer:  # initial biases are 0
            for part in (layer.crossattention.self.key, layer.crossattention.self.value):
                part.bias.copy_(torch.linspace(-1, 1, len(part.bias)))
    assert_same(
        scorer.text_model,
        {"encoder_hidden_states": patches.requires_grad_()},
        input_ids=ids,
        attention_mask=(ids != 0).long(),
    )

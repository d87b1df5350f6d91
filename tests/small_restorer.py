"""A restorer of 64 pixels with random weights, whose ControlNet has an effect, for several test files."""

import torch

from faceprior import tiny
from faceprior.restorer import AuthFaceRestorer, RestorerSettings


def small_restorer() -> AuthFaceRestorer:
    made = tiny.tiny_restorer()
    make_effective(made.pipeline.controlnet)
    settings = RestorerSettings(resolution=64, guidance_scale=1.0, prompt="", negative_prompt="")
    return AuthFaceRestorer(made.pipeline, settings)


@torch.no_grad()
def make_effective(controlnet) -> None:
    """Change what is initialised with zeros, as training would."""
    generator = torch.Generator().manual_seed(0)
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        layer.weight.add_(0.5 * torch.randn(layer.weight.shape, generator=generator))
    last = controlnet.controlnet_cond_embedding.conv_out
    last.weight.add_(torch.randn(last.weight.shape, generator=generator))

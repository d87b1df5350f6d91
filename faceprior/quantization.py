"""bitsandbytes' linear layers of 8-bit and 4-bit weights, as a frozen network needs them, on a CPU and a GPU alike.

Unlike bitsandbytes' own they follow autocast, as `nn.Linear` does, and keep no inputs for the backward pass, which
needs the weights only: so gradient checkpointing saves as much memory as without quantization.
"""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn

OUTLIER = 6.0  # inputs from here on are multiplied in 16 bits, as LLM.int8() does and every loader by default


def quantized(linear: nn.Linear, quantization: str) -> nn.Linear:
    """Return a frozen layer with the weights of `linear` in `8bit` or `nf4`, on the same device.

    A GPU does the arithmetic if there is one. The bias stays as it is.
    """
    place = linear.weight.device
    worker = "cuda" if torch.cuda.is_available() else place
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    if quantization == "8bit":
        layer = Linear8bit(*sizes, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        weight = Int8Params(linear.weight.data.cpu(), requires_grad=False)
        layer.weight = weight.to(worker).to(place)
        layer.init_8bit_state()
    else:
        options = {"compress_statistics": True, "quant_type": "nf4"}
        layer = Linear4bit(*sizes, compute_dtype=linear.weight.dtype, **options, device="meta")
        layer.weight = Params4bit(linear.weight.data, requires_grad=False, **options).to(worker).to(place)
        layer.quant_state = layer.weight.quant_state
    layer.bias = linear.bias
    return layer.requires_grad_(False).train(linear.training)


def quantized_bytes(linear: nn.Linear, quantization: str) -> int:
    """Return the bytes that the weights of `linear`, N in R rows, take in `8bit` or `nf4`, without its bias.

    8bit: a byte each, and a float32 scale for each row (LLM.int8(), arXiv 2208.07339). nf4: half a byte each, and a
    scale for each block of 64; the scales less their mean, a float32, are in turn a byte each, with a float32 scale for
    each block of 256; two tables, of 16 and 256 float32 values (QLoRA, arXiv 2305.14314, "double quantization").
    """
    count, rows = linear.weight.numel(), linear.out_features
    if quantization == "8bit":
        return count + 4 * rows
    scales = math.ceil(count / 64)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


class Linear8bit(bitsandbytes.nn.Linear8bitLt):
    """LLM.int8(): inputs in 8 bits with one scale a row, but for those above OUTLIER."""

    def forward(self, x: Tensor) -> Tensor:
        x = _in_autocast(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)
        return super().forward(x)

    def init_8bit_state(self) -> None:
        # on a CPU peft's DoRA puts a new weight in the place of the old one, without scales
        scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        super().init_8bit_state()
        self.state.SCB = scales

    def _apply(self, fn, recurse: bool = True) -> Linear8bit:
        # a model's `.to` moves parameters, and the scales are none
        super()._apply(fn, recurse)
        self.state.CB, self.state.SCB = self.weight.data, self.state.SCB.to(self.weight.device)
        return self


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """QLoRA's layer: the weights are brought to the inputs' dtype for each product."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # else the weights are packed anew in eval(), in a layout without gradients that not every size has
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_in_autocast(x))


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b with gradients to x alone: dL/dx = dL/dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear8bit) -> Tensor:
        ctx.state, ctx.dtype = layer.state, x.dtype
        return bitsandbytes.nn.Linear8bitLt.forward(layer, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scales = (ctx.state.SCB / 127).to(gradient.dtype)
        weight = ctx.state.CB.to(gradient.dtype) * scales[:, None]  # (out, in)
        return (gradient @ weight).to(ctx.dtype), None


def _in_autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

"""
The parts of a BLIP reward model: two towers of the transformers library, and ImageReward's head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel


def vision_tower(sizes: Any) -> BlipVisionModel:
    """The ViT, untrained; sizes: the configuration of a `FaceScorer`."""
    tower = BlipVisionModel(_vision_config(sizes))
    for layer in tower.encoder.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
    return tower


class FusedAttention(nn.Module):
    """The self-attention of a BLIP vision layer in one kernel: its (B, heads, L, L) weights never reach the memory.

    The library's own multiplies, scales and normalises them one after the other. Same parameters, same names.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv = attention.qkv
        self.projection = attention.projection

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, L, width) -> (B, L, width), and no weights."""
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, width / heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value)
        return self.projection(context.transpose(1, 2).flatten(2)), None


def _vision_config(sizes: Any) -> BlipVisionConfig:
    return BlipVisionConfig(
        hidden_size=sizes.vision_hidden_size,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_intermediate,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act="gelu",  # with erf
        layer_norm_eps=1e-6,
        initializer_range=0.02,  # the library's default, 1e-10, is for loading only
    )


def text_tower(sizes: Any) -> BlipTextModel:
    """The BERT with cross attention, untrained; sizes: the configuration of a `FaceScorer`."""
    tower = BlipTextModel(_text_config(sizes), add_pooling_layer=False)
    for layer in tower.encoder.layer:
        layer.crossattention.self = FoldedCrossAttention(layer.crossattention.self)
    return tower


class FoldedCrossAttention(nn.Module):
    """The cross attention of a BLIP text layer, with keys and values on the side of the few words.

    The library's own brings every patch to keys and values, 197 times two projections at full size, for a handful of
    words that look at them. Per head q (E K)^T = (q K^T) E^T and p (E V) = (p E) V: the same numbers and gradients
    from a tenth of the work. Same parameters, same names.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.num_heads = attention.num_attention_heads
        self.query = attention.query
        self.key = attention.key
        self.value = attention.value
        self.dropout = attention.dropout

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """words (B, L, text width), patches (B, N, vision width) -> (B, L, text width), and no weights."""
        query = self.query(hidden_states).unflatten(-1, (self.num_heads, -1))  # (B, L, heads, width / heads)
        query = query * query.shape[-1] ** -0.5  # before the sums, which half precision holds the better
        (key, key_bias), (value, value_bias) = map(self._per_head, (self.key, self.value))
        words = torch.einsum("blhd,hdc->bhlc", query, key)
        offsets = torch.einsum("blhd,hd->bhl", query, key_bias)
        scores = words.flatten(1, 2) @ encoder_hidden_states.mT + offsets.flatten(1)[..., None]  # (B, heads * L, N)
        weights = self.dropout(scores.softmax(-1))
        seen = (weights @ encoder_hidden_states).view_as(words)
        context = torch.einsum("bhlc,hdc->blhd", seen, value)
        share = weights.sum(-1).view_as(words[..., 0]).mT[..., None]  # 1 without dropout: (B, L, heads, 1)
        return (context + share * value_bias).flatten(2), None

    def _per_head(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        return linear.weight.unflatten(0, (self.num_heads, -1)), linear.bias.unflatten(0, (self.num_heads, -1))


def _text_config(sizes: Any) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.text_hidden_size,
        encoder_hidden_size=sizes.vision_hidden_size,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        intermediate_size=sizes.text_intermediate,
        max_position_embeddings=sizes.max_positions,
        hidden_act="gelu",
        layer_norm_eps=sizes.text_layer_norm_eps,
        hidden_dropout_prob=sizes.text_dropout,
        attention_probs_dropout_prob=sizes.text_dropout,
        is_decoder=True,  # builds the cross attention; `forward` calls it as an encoder
        bos_token_id=None,
        sep_token_id=None,
    )


def reward_head(input_size: int) -> nn.Sequential:
    """ImageReward's MLP: linear layers without activations, weights from N(0, (1 / (input_size + 1))^2)."""
    head = nn.Sequential(
        nn.Linear(input_size, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / (input_size + 1))
            nn.init.zeros_(layer.bias)
    return head


def apply_head(head: nn.Sequential, features: Tensor) -> Tensor:
    """Features (B, D) -> rewards (B,), in float32 at least: in the eight bits of bfloat16 close faces would tie."""
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        reward = features.to(wide)
        for layer in head:
            is_linear = isinstance(layer, nn.Linear)
            reward = F.linear(reward, layer.weight.to(wide), layer.bias.to(wide)) if is_linear else layer(reward)
    return reward.squeeze(-1)


def check_config(config: Any) -> None:
    """Raise a ValueError unless the sizes of a `FaceScorer` fit one another."""
    if config.image_size % config.patch_size:
        raise ValueError(
            f"`image_size` ({config.image_size}) has to be a multiple of `patch_size` ({config.patch_size})"
        )
    require_known(config.prompt_token_ids, config, config.prompt)
    if config.reward_std <= 0:
        raise ValueError(f"`reward_std` has to be positive but is {config.reward_std}")


def require_known(token_ids: Sequence[int], config: Any, prompt: str) -> None:
    """Raise a ValueError unless the text tower has every token of the prompt, and as many positions."""
    if not token_ids or max(token_ids) >= config.vocab_size or len(token_ids) > config.max_positions:
        raise ValueError(
            f"the prompt {prompt!r} has the tokens {list(token_ids)}, but this scorer reads one at least, at "
            f"most {config.max_positions}, each below {config.vocab_size}: use another prompt"
        )

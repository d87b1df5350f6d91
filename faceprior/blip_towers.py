"""
The parts that a BLIP reward model is built from: the configurations of its two towers, its head, and their rules.

`sizes` is everywhere the configuration of a `FaceScorer`.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig


def vision_config(sizes: Any) -> BlipVisionConfig:
    """The ViT with exact GELU and BLIP's epsilon, neither of which is the library's default."""
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


def text_config(sizes: Any) -> BlipTextConfig:
    """The BERT with cross attention to the ViT's last hidden state."""
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


def check_config(sizes: Any) -> None:
    """Raise a ValueError unless the sizes fit one another."""
    if sizes.image_size % sizes.patch_size:
        raise ValueError(f"`image_size` ({sizes.image_size}) has to be a multiple of `patch_size` ({sizes.patch_size})")
    require_known(sizes.prompt_token_ids, sizes, sizes.prompt)
    if sizes.reward_std <= 0:
        raise ValueError(f"`reward_std` has to be positive but is {sizes.reward_std}")


def require_known(token_ids: Sequence[int], sizes: Any, prompt: str) -> None:
    """Raise a ValueError unless the text tower has every token of the prompt, and as many positions."""
    if not token_ids or max(token_ids) >= sizes.vocab_size or len(token_ids) > sizes.max_positions:
        raise ValueError(
            f"the prompt {prompt!r} has the tokens {list(token_ids)}, but this scorer reads one at least, at "
            f"most {sizes.max_positions}, each below {sizes.vocab_size}: use another prompt"
        )

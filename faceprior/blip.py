"""The parts of a BLIP reward model: preprocessing and prompt, two towers of transformers, and ImageReward's head."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from faceprior.detect import crop_bounds
from faceprior.images import load_image
from faceprior.models import DEFAULT_PROMPT, resolve_model

# ---- what the towers read: pixels and tokens


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# of an image longer than this many times its short side only the middle is resized: the rest is cropped
_MAX_ASPECT = 16
TOKENIZER = "bert-base-uncased"
_VOCABULARIES = ("tokenizer.json", "vocab.txt")
_TOKENIZER_FILES = ("config.json", "tokenizer*.json", "vocab.txt")
MAX_PROMPT_TOKENS = 35  # the official code cuts prompts here


def preprocess(images: Any, size: int, boxes: Sequence[Sequence[float]] | None = None) -> Tensor:
    """Crop, resize the shorter side to `size`, crop the centre, normalise; see `FaceScorer.preprocess`.

    images: an image or a list of B, or a tensor (B, 3, H, W) or (3, H, W) in [-1, 1]. boxes: one (x0, y0, x1, y1) in
    pixels per image, or None. Returns (B, 3, size, size) float32.
    """
    if isinstance(images, Tensor):
        batch = _as_batch(images)
        bounds = _bounds(boxes, [(pixels.shape[2], pixels.shape[1]) for pixels in batch])
        rows = [
            _resize_tensor(pixels[:, y0:y1, x0:x1], size)
            for pixels, (x0, y0, x1, y1) in zip(batch, bounds, strict=True)
        ]
    else:
        loaded = [load_image(image) for image in _as_list(images)]
        bounds = _bounds(boxes, [image.size for image in loaded])
        rows = [_resize_pil(image.crop(box), size) for image, box in zip(loaded, bounds, strict=True)]
    return normalise(torch.stack(rows))  # (B, 3, size, size)


def face_pixels(image: Image.Image, boxes: Sequence[Sequence[float]], size: int) -> Tensor:
    """The part of `preprocess` that PIL does, for the faces of an image: (number of boxes, 3, size, size) uint8.

    `normalise` does the rest, for the faces of many images at once and on the network's device.
    """
    rows = [_resize_pil(image.crop(crop_bounds(box, *image.size)), size) for box in boxes]
    return torch.stack(rows) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8)


def normalise(pixels: Tensor) -> Tensor:
    """Normalise (B, 3, H, W), uint8 or floats in [0, 1], by CLIP's mean and std -> floats."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def tokenize_prompt(prompt: str, tokenizer: str | Path = TOKENIZER) -> list[int]:
    """Tokens of a prompt, [CLS] first and [SEP] last, at most 35 as in the official code.

    tokenizer: a local folder or a hub id. Raises FileNotFoundError if there is no tokenizer of that name.
    """
    ids = _load_tokenizer(str(tokenizer))(prompt, truncation=True, max_length=MAX_PROMPT_TOKENS)["input_ids"]
    return list(ids)


@lru_cache(maxsize=4)
def _load_tokenizer(name: str) -> Any:
    hint = (
        f"a prompt other than {DEFAULT_PROMPT!r} needs the tokenizer (`hf download {TOKENIZER}`); or pass `input_ids` "
        "to the scorer itself"
    )
    folder = resolve_model(name, "tokenizer", hint, required=_VOCABULARIES, patterns=_TOKENIZER_FILES)
    return BertTokenizer.from_pretrained(folder, local_files_only=True)


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _as_batch(pixels: Tensor) -> Tensor:
    batch = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
        raise ValueError(
            f"a tensor has to be (B, 3, H, W) or (3, H, W), floats in [-1, 1], but is {tuple(pixels.shape)} "
            f"{pixels.dtype}: `to_pixel_values` makes one from images"
        )
    return batch


def _bounds(boxes: Sequence[Sequence[float]] | None, sizes: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """The pixels to crop of each image; sizes: (width, height) of each."""
    if len(sizes) == 0:
        raise ValueError("`images` is empty: there is nothing to preprocess")
    if boxes is None:
        return [(0, 0, *size) for size in sizes]
    if len(boxes) != len(sizes):
        raise ValueError(f"`boxes` has to have one box per image: {len(boxes)} for {len(sizes)} images")
    return [crop_bounds(box, *size) for box, size in zip(boxes, sizes, strict=True)]


def _resize_plan(width: int, height: int, size: int) -> tuple[tuple[int, ...], tuple[int, int], tuple[int, int]]:
    """torchvision's Resize and CenterCrop: (box that is resized), (new width, height), (left, top of the crop)."""
    short = min(width, height)
    wide, high = min(width, _MAX_ASPECT * short), min(height, _MAX_ASPECT * short)
    x0, y0 = (width - wide) // 2, (height - high) // 2
    new = (max(size, int(size * wide / short)), max(size, int(size * high / short)))
    left, top = (int(round((side - size) / 2)) for side in new)
    return (x0, y0, x0 + wide, y0 + high), new, (left, top)


def _resize_pil(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8; the reference.

    Rows first, then columns, as Pillow did in one call until version 12; from 13 on it reverses the order for some
    tall images, which would make a score depend on the installed version.
    """
    bounds, (width, height), (left, top) = _resize_plan(*image.size, size)
    if bounds != (0, 0, *image.size):
        image = image.crop(bounds)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resize_tensor(pixels: Tensor, size: int) -> Tensor:
    """(3, H, W) in [-1, 1] -> (3, size, size) float32 in [0, 1].

    In two passes, clamped after each, like PIL: overshoot of the first pass is removed before the second.
    """
    height, width = pixels.shape[1:]
    (x0, y0, x1, y1), (new_width, new_height), (left, top) = _resize_plan(width, height, size)
    pixels = ((pixels[None, :, y0:y1, x0:x1].float() + 1) / 2).clamp(0, 1)
    for shape in ((y1 - y0, new_width), (new_height, new_width)):
        pixels = F.interpolate(pixels, shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return pixels[0, :, top : top + size, left : left + size]


def check_config(config: Any) -> None:
    """Raise a ValueError unless the sizes of a `FaceScorer` are consistent."""
    if config.image_size % config.patch_size:
        raise ValueError(
            f"`image_size` ({config.image_size}) has to be a multiple of `patch_size` ({config.patch_size})"
        )
    require_known(config.prompt_token_ids, config, config.prompt)
    if config.reward_std <= 0:
        raise ValueError(f"`reward_std` has to be positive but is {config.reward_std}")


def require_known(token_ids: Sequence[int], config: Any, prompt: str) -> None:
    """Raise a ValueError unless the text tower has every token of the prompt, and enough positions."""
    if not token_ids or max(token_ids) >= config.vocab_size or len(token_ids) > config.max_positions:
        raise ValueError(
            f"the prompt {prompt!r} has the tokens {list(token_ids)}, but this scorer reads one at least, at "
            f"most {config.max_positions}, each below {config.vocab_size}: use another prompt"
        )


# ---- the towers


def vision_tower(sizes: Any) -> BlipVisionModel:
    """The ViT, with random weights; sizes: the configuration of a `FaceScorer`."""
    tower = BlipVisionModel(_vision_config(sizes))
    for layer in tower.encoder.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
    return tower


class FusedAttention(nn.Module):
    """The self-attention of a BLIP vision layer in one kernel, which never stores its (B, heads, L, L) weights.

    The library's own attention multiplies, scales and normalises them one after the other. Same parameters and names.
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
    """The BERT with cross attention, with random weights; sizes: the configuration of a `FaceScorer`."""
    tower = BlipTextModel(_text_config(sizes), add_pooling_layer=False)
    for layer in tower.encoder.layer:
        layer.crossattention.self = FoldedCrossAttention(layer.crossattention.self)
    return tower


class FoldedCrossAttention(nn.Module):
    """The cross attention of a BLIP text layer, with the projections of keys and values applied to the few words.

    The library's own attention projects every patch to keys and values, 197 times two projections at full size, for a
    handful of words. Per head q (E K)^T = (q K^T) E^T and p (E V) = (p E) V: the same numbers and gradients for a
    tenth of the work. Same parameters and names.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.num_heads = attention.num_attention_heads
        self.query = attention.query
        self.key = attention.key
        self.value = attention.value
        self.dropout = attention.dropout

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Words (B, L, text width), patches (B, N, vision width) -> (B, L, text width), and no weights."""
        query = self.query(hidden_states).unflatten(-1, (self.num_heads, -1))  # (B, L, heads, width / heads)
        query = query * query.shape[-1] ** -0.5  # before the sums, for the sake of half precision
        (key, key_bias), (value, value_bias) = map(self._per_head, (self.key, self.value))
        words = torch.einsum("blhd,hdc->bhlc", query, key)  # (B, heads, L, vision width)
        offsets = torch.einsum("blhd,hd->bhl", query, key_bias)
        scores = words.flatten(1, 2) @ encoder_hidden_states.mT + offsets.flatten(1)[..., None]  # (B, heads * L, N)
        weights = self.dropout(scores.softmax(-1))
        seen = (weights @ encoder_hidden_states).view_as(words)  # (B, heads, L, vision width)
        context = torch.einsum("bhlc,hdc->blhd", seen, value)
        total = weights.sum(-1).view_as(words[..., 0]).mT[..., None]  # (B, L, heads, 1), 1 without dropout
        return (context + total * value_bias).flatten(2), None

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


# ---- the head


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
    """Features (B, D) -> rewards (B,), in float32 at least: with the 8 bits of bfloat16, close faces would tie."""
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        reward = features.to(wide)
        for layer in head:
            is_linear = isinstance(layer, nn.Linear)
            reward = F.linear(reward, layer.weight.to(wide), layer.bias.to(wide)) if is_linear else layer(reward)
    return reward.squeeze(-1)

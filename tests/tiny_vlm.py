"""Tiny random vision-language models of real classes, with processor and tokenizer, built offline."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
WORDS = ("semantic", "photographic", ":", ",", "young", "woman", "man", "hair", "soft", "light", "tags", "user")
HEAD = "{% for m in messages %}user : {% for c in m['content'] %}"
TAIL = "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "llava": HEAD + "{% if c['type'] == 'image' %}<image>" + TAIL,
    "qwen2_vl": HEAD + "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>" + TAIL,
}


def save_tiny_vlm(folder: Path, kind: str = "llava") -> Path:
    """Save a model of LLaVA's or Qwen2-VL's class, of random weights, as `from_pretrained` loads it."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    {"llava": _save_llava, "qwen2_vl": _save_qwen2_vl}[kind](folder, tokenizer)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = [token for token in SPECIAL if token not in names.values()]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra, **names)


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _save_llava(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16,
        projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_sizes(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATES["llava"],
    )  # fmt: skip
    processor.save_pretrained(folder)


def _save_qwen2_vl(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token)
           for kind, token in {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
                               "vision_end": "<|vision_end|>"}.items()}  # fmt: skip
    config = Qwen2VLConfig(
        text_config={**_sizes(tokenizer), "rope_parameters": {
            "rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 14,
                       "spatial_merge_size": 2, "mlp_ratio": 1},
        **ids,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATES["qwen2_vl"]).save_pretrained(
        folder
    )

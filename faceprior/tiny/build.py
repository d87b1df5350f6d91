"""Build the tiny models from a seed.

python -m faceprior.tiny            # writes those that do not exist to checkpoints/tiny
"""

import json
import tempfile
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faceprior.restorer import AuthFaceRestorer, RestorerSettings
from faceprior.scorer import FaceScorer
from faceprior.tiny import INFO_FILE, KINDS, RESOLUTION
from faceprior.training import seeded

# The words of the captions and prompts, each one token; any other word becomes several.
WORDS = """
a an and the of in on with without one two three four five six face portrait photo photograph person man woman boy
girl people group young adult middle aged old elderly smiling smile laughing neutral serious look surprised closed
open mouth teeth eyes brown dark light black blond blonde red auburn gray grey white blue green hazel hair short
long straight wavy curly afro bob buzz cut bald receding tied back ponytail side part parted hat knit cap head scarf
glasses aviator sunglasses full beard goatee moustache mustache stubble clean shaven make up makeup lipstick
freckles ear rings earrings skin pale tan deep texture pores wrinkles soft hard rim lit lighting from left right
front above warm cool tones color studio background plain gradient foliage street lights night room indoor outdoor
bokeh blurred depth field sharp focus close shoulders looking turned tilted down camera jacket shirt suit sweater
collar high low quality natural key bad deformed poorly drawn mutated ugly anatomy brimmed fedora sun straw baseball
visor hoop stud drop wearing beret turban child
""".split()  # noqa: SIM905


def tiny_sd15(seed: int = 0) -> StableDiffusionPipeline:
    """Build the Stable Diffusion 1.5 type pipeline: images of 128 px, latents of 4 x 32 x 32."""
    with seeded(seed):
        unet = UNet2DConditionModel(
            **_UNET, cross_attention_dim=64, transformer_layers_per_block=1, attention_head_dim=(2, 2, 3)
        )
        return StableDiffusionPipeline(
            vae=make_vae(),
            text_encoder=CLIPTextModel(_text_config(64)),
            tokenizer=_tokenizer(),
            unet=unet,
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Build the SDXL type pipeline, with two text encoders and SDXL's size conditions."""
    with seeded(seed):
        unet = UNet2DConditionModel(
            **_UNET,
            cross_attention_dim=64 + 64,
            transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(2, 2, 3),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 64,
        )
        return StableDiffusionXLPipeline(
            vae=make_vae(),
            text_encoder=CLIPTextModel(_text_config(64)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(64)),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=unet,
            scheduler=_scheduler(),
            force_zeros_for_empty_prompt=False,  # for guidance it is trained with the empty prompt instead
            add_watermarker=False,
        )


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """Build the ControlNet of a U-Net from its encoder, as at full size (zero-initialised outputs)."""
    with seeded(seed):
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))


def tiny_scorer(seed: int = 0) -> FaceScorer:
    """Build the BLIP reward model; like the real one it reads faces of 224 x 224 pixels."""
    with seeded(seed):
        scorer = FaceScorer(
            vision_hidden_size=96,
            vision_layers=6,
            vision_heads=3,
            vision_intermediate=384,
            text_hidden_size=96,
            text_layers=3,
            text_heads=3,
            text_intermediate=384,
            text_dropout=0.0,
            vocab_size=2304,
        )
        # BLIP's and ImageReward's own initialisation is for large pretrained towers: towers of this size would learn
        # nothing from it
        for module in scorer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
        return scorer


def tiny_restorer(seed: int = 0) -> AuthFaceRestorer:
    """Build the restorer of 128 px faces on the SDXL type pipeline; it is sampled without prompts and without CFG."""
    prior = tiny_sdxl(seed)
    settings = RestorerSettings(resolution=RESOLUTION, guidance_scale=1.0, prompt="", negative_prompt="")
    return AuthFaceRestorer.from_prior(prior, tiny_controlnet(prior.unet, seed), settings)


_BUILDERS = {
    "sd15": tiny_sd15,
    "sdxl": tiny_sdxl,
    "reward": tiny_scorer,
    "scorer": tiny_scorer,
    "restorer": tiny_restorer,
}


def write(folder: Path, kind: str, seed: int = 0) -> None:
    """Build one kind of model and write it to `folder`, complete or not at all; an old model there is replaced."""
    if kind not in KINDS:
        raise ValueError(f"`kind` has to be one of {', '.join(KINDS)} but is {kind!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / kind
        _BUILDERS[kind](seed).save_pretrained(made)
        (made / INFO_FILE).write_text(json.dumps({"kind": kind, "seed": seed, "trained": False}))
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        made.rename(folder)


_UNET = {
    "sample_size": RESOLUTION // 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (48, 80, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
}


def make_vae() -> AutoencoderKL:
    """Build the autoencoder of both pipelines: images of 128 px to latents of 4 x 32 x 32."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
    )


def _scheduler() -> DDPMScheduler:
    """Build the sampler: ancestral, since without fresh noise at each step small networks' colours drift."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=_tokenizer().vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _tokenizer() -> CLIPTokenizer:
    """Build CLIP's tokenizer with byte pairs that make one token of every word in WORDS."""
    letters = sorted(ByteLevel.alphabet())
    merges = _byte_pairs(tuple(WORDS))
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(letter + _END for letter in letters),
        *map("".join, merges),
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


_END = "</w>"


@lru_cache(maxsize=1)
def _byte_pairs(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Join the most frequent pair of neighbours until every word is one token; ties in alphabetical order.

    Unlike the trainer of the library `tokenizers`, the result is the same every time.
    """
    pieces, merges = [[*word[:-1], word[-1] + _END] for word in words], []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        pieces = [_join(word, merges[-1]) for word in pieces]
    return tuple(merges)


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined

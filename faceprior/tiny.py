"""Small models of the real classes, built from a seed: the embedded default where there is no GPU and no hub.

They have the architecture of their big siblings and load with stock diffusers and transformers, so a preset changes
sizes and ids only, never the path through the code. What is tiny says so: their folders carry `tiny.json`, which also
tells whether the weights were trained.

    python -m faceprior.tiny            # writes checkpoints/tiny
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import faceprior
from faceprior.scorer import FaceScorer
from faceprior.training import seeded

logger = logging.getLogger(__name__)
NAME = "tiny"
KINDS = ("sd15", "sdxl", "scorer")
RESOLUTION = 128  # pixels; latents are a quarter of it
INFO_FILE = "tiny.json"
NOTICE = (
    "the tiny embedded model: small, for drawn portraits and for trying the tools out, not the published one"
)

# The words of the captions; any other word is read letter by letter.
WORDS = """a an and the of in on with without face portrait photo photograph person man woman boy girl people group
young adult middle aged old elderly smiling smile laughing neutral serious surprised closed open mouth teeth eyes
brown dark light black blond blonde red auburn gray grey white blue green hazel hair short long straight wavy curly
bob buzz cut bald receding tied back ponytail side part hat head scarf glasses sunglasses beard moustache mustache
stubble clean shaven make up makeup lipstick freckles ear rings earrings skin pale tan deep texture pores wrinkles
soft hard rim light lit lighting from left right front above warm cool neutral tones color studio background plain
gradient foliage street lights night room indoor outdoor bokeh blurred depth field sharp focus close head shoulders
looking turned tilted up down camera jacket shirt suit sweater collar high quality natural key""".split()


def tiny_sd15(seed: int = 0) -> StableDiffusionPipeline:
    """Build the Stable Diffusion 1.5 type pipeline: 128 px, latents of 4 x 32 x 32."""
    with seeded(seed):
        unet = UNet2DConditionModel(
            **_UNET, cross_attention_dim=64, transformer_layers_per_block=1, attention_head_dim=(2, 4, 6)
        )
        return StableDiffusionPipeline(
            vae=_vae(),
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
            attention_head_dim=(2, 4, 6),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 64,
        )
        return StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(64)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(64)),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=unet,
            scheduler=_scheduler(),
            add_watermarker=False,
        )


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """Build the ControlNet of a U-Net from its encoder, as for the full size (zero-initialised outputs)."""
    with seeded(seed):
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))


def tiny_scorer(seed: int = 0) -> FaceScorer:
    """Build the BLIP reward model; like the real one it reads faces of 224 x 224 pixels."""
    with seeded(seed):
        return FaceScorer(
            vision_hidden_size=128,
            vision_layers=6,
            vision_heads=2,
            vision_intermediate=512,
            text_hidden_size=128,
            text_layers=4,
            text_heads=2,
            text_intermediate=512,
            vocab_size=2304,
        )


def resolve(name: str, kind: str) -> str:
    """Return the folder of the tiny model of that `kind` for the name `tiny`; any other name comes back as it is.

    kind: sd15, sdxl or scorer. The shipped weights are taken where there are any; else untrained ones are built from
    the seed once, with a warning.
    """
    if name != NAME:
        return name
    folder = tiny_folder() / kind
    if not (folder / INFO_FILE).is_file():
        logger.warning("%s: building it from a seed, UNTRAINED", folder)
        write(folder, kind)
    return str(folder)


def tiny_folder() -> Path:
    """Return `checkpoints/tiny` of the checkout, or a cache folder when the package stands alone."""
    checkout = Path(faceprior.__file__).resolve().parent.parent / "checkpoints"
    return checkout / NAME if checkout.is_dir() else Path.home() / ".cache" / "faceprior" / NAME


def write(folder: Path, kind: str, seed: int = 0) -> None:
    """Build one kind of model and put it in `folder`, whole or not at all."""
    build = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "scorer": tiny_scorer}[kind]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / kind
        build(seed).save_pretrained(made)
        (made / INFO_FILE).write_text(json.dumps({"kind": kind, "seed": seed, "trained": False}))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def info(folder: str | Path) -> dict | None:
    """Return what `tiny.json` says of a model's folder ({kind, seed, trained}), None if the model is not tiny."""
    path = Path(folder) / INFO_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def copy_info(source: str, folder: str | Path) -> None:
    """Mark a model that was made from a tiny one (the name `tiny`, or a folder with `tiny.json`) as tiny, too."""
    origin = next((info(tiny_folder() / kind) for kind in KINDS if source == NAME), info(source))
    if origin is not None:
        (Path(folder) / INFO_FILE).write_text(json.dumps(origin))


_UNET = {
    "sample_size": RESOLUTION // 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
}


def _vae() -> AutoencoderKL:
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


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
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
    """Return a byte-pair tokenizer that was trained until every caption word is one token."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=[chr(c) for c in range(33, 127)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), " ".join(chr(c) for c in range(33, 127))], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=77)


def main() -> None:
    """Write all tiny models that are not there yet."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for kind in KINDS:
        print(resolve(NAME, kind))


if __name__ == "__main__":
    main()

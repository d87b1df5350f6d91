"""Tiny random pipelines of every kind of base, of the real classes and with the settings of the published ones.

Images have 32 pixels; their latents 4 x 8 x 8 for the U-Nets, and 16 x 16 x 16 for the transformers.
"""

from collections.abc import Callable
from functools import cache

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from faceprior.diffusion import denoiser_of
from faceprior.tiny import WORDS, tiny_sd15
from faceprior.training import seeded

SIZE = 32  # pixels, the side of the bases' images


def build(kind: str, seed: int = 0) -> DiffusionPipeline:
    """Build a pipeline of a kind of KINDS, float32 on the CPU, its weights drawn from `seed`."""
    with seeded(seed, kind):
        pipeline = _BUILDERS[kind]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()  # as `from_pretrained` does: T5 has dropout
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def widened(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Give a tiny pipeline a network whose layers have multiples of 64 inputs, as the published ones: to quantize."""
    network = denoiser_of(pipeline)
    if hasattr(pipeline, "unet"):
        levels = len(network.config.block_out_channels)
        settings = {"block_out_channels": (64,) * levels, "attention_head_dim": (2,) * levels}
    else:
        settings = {"attention_head_dim": 32, "caption_projection_dim": 64, "axes_dims_rope": (8, 12, 12)}
    settings = {key: value for key, value in settings.items() if key in network.config}
    with seeded(0):
        network = type(network).from_config({**network.config, **settings}).eval()
    pipeline.register_modules(**{"unet" if hasattr(pipeline, "unet") else "transformer": network})
    return pipeline


# ---- Stable Diffusion 1, 2 and SDXL


def _stable_diffusion(width: int, scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_clip(width)),
        tokenizer=_clip_tokenizer(),
        unet=UNet2DConditionModel(**_UNET, cross_attention_dim=width),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(scheduler) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=_vae(channels=4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_clip(16)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(32)),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=UNet2DConditionModel(
            **_UNET,
            cross_attention_dim=16 + 32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 32,
        ),
        scheduler=scheduler,
        add_watermarker=False,
    )


_UNET = {
    "sample_size": SIZE // 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_DDIM = {**_BETAS, "clip_sample": False, "set_alpha_to_one": False}
_PNDM = {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}
_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


# ---- Stable Diffusion 3 and FLUX


def _sd3(t5: bool = True, **settings) -> StableDiffusion3Pipeline:
    """CLIP of widths 16 and 32, T5 of 64; `settings` are the transformer's."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 32,
            pos_embed_max_size=24,
            **settings,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(channels=16, scaling_factor=1.5305, shift_factor=0.0609, factor=2, **_NO_QUANT),
        text_encoder=CLIPTextModelWithProjection(_clip(16)),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip(32)),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(64) if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
    )


def _flux(guidance_embeds: bool) -> FluxPipeline:
    """CLIP of width 16, T5 of 64; tokens of 4 x 16 channels."""
    shifting = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        vae=_vae(channels=16, scaling_factor=0.3611, shift_factor=0.1159, factor=2, **_NO_QUANT),
        text_encoder=CLIPTextModel(_clip(16)),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(64),
        tokenizer_2=_t5_tokenizer(),
    )


_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


# ---- parts


def _vae(channels: int, factor: int = 4, **settings) -> AutoencoderKL:
    blocks = factor.bit_length()
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
        **settings,
    )


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=_clip_tokenizer().vocab_size,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


@cache
def _clip_tokenizer() -> CLIPTokenizer:
    return tiny_sd15().tokenizer


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


@cache
def _t5_tokenizer() -> T5Tokenizer:
    """Build T5's unigram tokenizer: each of WORDS is one token, any other word one per letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    pieces += [(f"▁{word}", -4.0) for word in dict.fromkeys(WORDS)]
    known: dict[str, float] = {}
    for piece, score in pieces:
        known.setdefault(piece, score)
    return T5Tokenizer(vocab=list(known.items()), extra_ids=0, model_max_length=512)


# The published ones: 1.5; 2-base and 2 (768-v); 1.0; NoobAI's kind; 3 medium with and without T5; 3.5 medium; FLUX.1.
_BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": lambda: _stable_diffusion(16, PNDMScheduler(**_PNDM)),
    "sd2": lambda: _stable_diffusion(1024, DDIMScheduler(**_DDIM)),
    "sd2-v": lambda: _stable_diffusion(1024, DDIMScheduler(**_DDIM, prediction_type="v_prediction")),
    "sdxl": lambda: _sdxl(EulerDiscreteScheduler(**_BETAS)),
    "sdxl-v-ztsnr": lambda: _sdxl(EulerDiscreteScheduler(**_BETAS, **_ZERO_SNR)),
    "sd3": _sd3,
    "sd3-no-t5": lambda: _sd3(t5=False),
    "sd3.5": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux-dev": lambda: _flux(guidance_embeds=True),
    "flux-schnell": lambda: _flux(guidance_embeds=False),
}
KINDS = tuple(_BUILDERS)
TRANSFORMERS = tuple(kind for kind in KINDS if kind.startswith(("sd3", "flux")))

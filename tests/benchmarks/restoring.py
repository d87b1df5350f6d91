"""
Restoring faces: how fast, how good with few steps, and what `fidelity` trades.

    python tests/benchmarks/restoring.py speed       # the official way beside the recipes; a GPU where there is one
    python tests/benchmarks/restoring.py quality     # the recipe `fast` beside 50 steps: PSNR, Face Score
    python tests/benchmarks/restoring.py fidelity --plot fidelity.png
    python tests/benchmarks/restoring.py speed --checkpoint Ethanliang99/AuthFace --dtype float16

speed: the official way is stock diffusers, face by face: 50 steps of DDPM, guidance 8, text encoders in every call, the
latents decoded twice, as the official code does. The recipes get the same faces and weights, --batch_size at once; all
run in turns, and the ratio is taken in each round. `official` has to make the same images, which is checked; for that
each face has its own noise in both. Aims, at tiny size on a CPU with batches of 8: official 1.3, fast 6 times as fast.

quality, fidelity: on drawn faces, aligned and degraded as stage 6 does, with the checkpoint's own settings otherwise.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLControlNetPipeline
from PIL import Image

from faceprior import tiny
from faceprior.align import align_face
from faceprior.color import wavelet_color_fix
from faceprior.degrade import PRESETS, degrade, scaled
from faceprior.images import to_pil, to_pixel_values
from faceprior.metrics import psnr
from faceprior.models import quiet_libraries, resolve_device
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.restorer import RECIPES, AuthFaceRestorer
from faceprior.scorer import FaceScorer
from faceprior.tables import difference_estimate, interval_text, markdown_table, mean_estimate

SEEDS = TEST_SEEDS + 8000  # the faces of the figures of the tiny models
WAY = "official way"


def main() -> None:
    options = parse()
    quiet_libraries()
    restorer = AuthFaceRestorer.from_pretrained(
        tiny.resolve(options.checkpoint, "restorer"), getattr(torch, options.dtype), options.quantization
    ).to(resolve_device(options.device))
    if options.compile:
        restorer.compile()
    device = torch.cuda.get_device_name() if restorer.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    settings = restorer.settings
    print(f"{options.checkpoint}, {settings.resolution} px, {options.dtype}, {device}, torch {torch.__version__}")
    faces = [draw_face(index, settings.resolution) for index in range(options.faces)]
    {"speed": speed, "quality": quality, "fidelity": fidelity}[options.what](restorer, faces, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality", "fidelity"))
    parser.add_argument("--checkpoint", default="tiny", help="restorer's folder, hub id, or tiny")
    parser.add_argument("--scorer", default="tiny", help="scorer's folder, hub id, or tiny")
    parser.add_argument("--faces", type=int, default=8, help="number of faces; 96 of `quality` take minutes")
    parser.add_argument("--batch_size", type=int, default=8, help="faces that the recipes restore at once")
    parser.add_argument("--rounds", type=int, default=3, help="of `speed`: times that all ways are run")
    parser.add_argument("--plot", type=Path, help="of `fidelity`: image file for the curve")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--quantization", default="none", choices=("none", "8bit", "nf4"))
    parser.add_argument("--compile", action="store_true", help="compile the networks, which both ways share")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def draw_face(index: int, size: int) -> tuple[Image.Image, Image.Image]:
    """Return an aligned drawn face, clean and degraded."""
    drawing = draw_portrait(SEEDS + index, 4 * size)
    clean = align_face(drawing.image, drawing.landmarks, size).crop
    ranges = scaled(PRESETS["authface"], size)
    return clean, Image.fromarray(degrade(np.asarray(clean), ranges, np.random.default_rng([1, index])))


# ---- speed


def speed(restorer: AuthFaceRestorer, faces: list, options: argparse.Namespace) -> None:
    degraded, seconds, images = [face for _, face in faces], {}, {}
    ways: dict[str, Callable[[list[Image.Image]], list[Image.Image]]] = {WAY: official_way(restorer)}
    for recipe in RECIPES:
        ways[recipe] = lambda crops, recipe=recipe: restorer.restore_crops(
            crops, batch_size=options.batch_size, recipe=recipe, noise="face"
        )
    for way in ways.values():
        way(degraded[:1])  # warms up: the recipes encode their prompts here, once for all faces
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            images[name] = way(degraded)
            if restorer.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append((time.perf_counter() - start) / len(faces))

    rows = []
    for name, values in seconds.items():
        ratios = np.divide(seconds[WAY], values)
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        rows.append([name, f"{np.median(values):.3f}", spread])
    print(markdown_table([f"batch {options.batch_size}", "s per face", "as fast (lowest to highest round)"], rows))
    pairs = zip(images[WAY], images["official"], strict=True)
    apart = [np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in pairs]
    print(f"official against the official way: {np.mean(apart):.3f} grey levels apart, {np.max(apart)} at most")
    if options.dtype == "float32" and np.mean(apart) > 0.5:
        raise SystemExit("these are not the same images")


def official_way(restorer: AuthFaceRestorer) -> Callable[[list[Image.Image]], list[Image.Image]]:
    """Restore face by face with the stock pipeline, as the official code calls it."""
    parts = {**restorer.pipeline.components}
    pipeline = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    official = restorer.settings.override("official")
    device = restorer.device

    @torch.no_grad()
    def restore(crops: list[Image.Image]) -> list[Image.Image]:
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.to(device)
        hook = pipeline.controlnet.register_forward_hook(
            lambda _, inputs, outputs: ([r.half().to(r) for r in outputs[0]], outputs[1].half().to(outputs[1]))
        )
        restored = []
        for crop in crops:
            latents = pipeline(
                official.prompt,
                negative_prompt=official.negative_prompt,
                image=crop,
                num_inference_steps=official.num_inference_steps,
                guidance_scale=official.guidance_scale,
                generator=torch.Generator().manual_seed(official.seed),
                output_type="latent",
            ).images
            for _ in range(2):
                pixels = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
            restored += to_pil(wavelet_color_fix(pixels.clamp(-1, 1), to_pixel_values(crop).to(device)))
        hook.remove()
        return restored

    return restore


# ---- quality


def quality(restorer: AuthFaceRestorer, faces: list, options: argparse.Namespace) -> None:
    """Print PSNR to the clean faces and Face Score, of 50 steps and of the recipe `fast`, with 95% intervals."""
    scorer, values, rows = load_scorer(options), {}, []
    for name, settings in {"50 steps": {"num_inference_steps": 50}, "fast": {"recipe": "fast"}}.items():
        images = restorer.restore_crops([face for _, face in faces], batch_size=options.batch_size, **settings)
        psnrs = [psnr(image, clean) for image, (clean, _) in zip(images, faces, strict=True)]
        values[name] = psnrs, scorer.score_crops(images)
        rows.append([name, *(written(mean_estimate(column)) for column in values[name])])
    gains = (difference_estimate(*pair) for pair in zip(values["fast"], values["50 steps"], strict=True))
    rows.append(["fast - 50 steps", *(written(gain) for gain in gains)])
    print(markdown_table([f"{len(faces)} faces", "PSNR, dB", "Face Score"], rows))
    ratio = np.mean(values["fast"][0]) / np.mean(values["50 steps"][0])
    bound, score = mean_estimate(values["50 steps"][1]).low, np.mean(values["fast"][1])
    print(f"PSNR: {ratio:.4f} of that of 50 steps; aim: at least 0.98")
    print(f"Face Score: {score:.3f}; aim: at least {bound:.3f}, the lower 95% bound of 50 steps")


def fidelity(restorer: AuthFaceRestorer, faces: list, options: argparse.Namespace) -> None:
    """Print, and draw, what comes closer to the input and what is lost, with the recipe `fast`."""
    scorer, identity = load_scorer(options), load_identity()
    rows, curve = [], []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        images = restorer.restore_crops(
            [face for _, face in faces], batch_size=options.batch_size, recipe="fast", fidelity=value
        )
        triples = [(image, clean, face) for image, (clean, face) in zip(images, faces, strict=True)]
        columns = {
            "PSNR to the input, dB": [psnr(image, face) for image, _, face in triples],
            "PSNR to the clean face, dB": [psnr(image, clean) for image, clean, _ in triples],
            "Face Score": scorer.score_crops(images),
        }
        if identity:
            distances = [identity.distance(face, image) for image, _, face in triples]
            columns["identity distance"] = [distance for distance in distances if distance is not None]
        curve.append((value, {name: mean_estimate(column) for name, column in columns.items()}))
        rows.append([f"{value:g}", *(written(estimate) for estimate in curve[-1][1].values())])
    print(markdown_table(["fidelity", *curve[0][1]], rows))
    if not identity:
        print("identity distance: not measured, it needs the extra `identity`")
    if options.plot:
        plot(curve, options.plot)


def plot(curve: list, path: Path) -> None:
    """Draw what is measured against the Face Score, a panel each, with the fidelity at each point."""
    from matplotlib.figure import Figure

    names = [name for name in curve[0][1] if name != "Face Score" and curve[0][1][name].value is not None]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for number, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), number + 1, xlabel="Face Score", ylabel=name)
        points = [(found["Face Score"].value, found[name].value, value) for value, found in curve]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
        for x, y, value in points:
            axes.annotate(f" {value:g}", (x, y))
    figure.savefig(path)


def load_scorer(options: argparse.Namespace) -> FaceScorer:
    return FaceScorer.from_pretrained(tiny.resolve(options.scorer, "scorer")).to(resolve_device(options.device))


def load_identity():
    """Return the measure of identity, None where the extra `identity` is not installed."""
    try:
        from faceprior.identity import IdentityModel

        return IdentityModel()
    except ImportError:
        return None


def written(estimate) -> str:
    if estimate.value is None:
        return "not measured"
    return f"{estimate.value:.3f} ({interval_text(estimate.low, estimate.high, '.3f')})"


if __name__ == "__main__":
    main()

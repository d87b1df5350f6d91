"""How much faster the scorer trains when its frozen vision layers run without gradients.

    python tests/benchmarks/scorer_training.py                 # a mid-size ViT on a CPU, about a minute
    python tests/benchmarks/scorer_training.py --full --device cuda --mixed_precision bf16 --pairs 16

One training step (forward, backward, Adam) on the same crops in three ways, in turns; the median of each, and how many
times faster it is than with gradients through the frozen layers. 70% of the layers are frozen except in the first way.
"""

import argparse
import statistics
import time

import torch

from faceprior.losses import pairwise_ranking_loss
from faceprior.scorer import FaceScorer
from faceprior.training import make_accelerator, make_optimizer

WAYS = {
    "all": "nothing frozen",
    "through": "frozen, with gradients through the frozen layers",
    "without": "frozen, without gradients through the frozen layers (stage 2)",
}


def make_scorer(options: argparse.Namespace) -> FaceScorer:
    if options.full:
        return FaceScorer()
    width = options.width
    vision = {"vision_hidden_size": width, "vision_heads": width // 64, "vision_intermediate": 4 * width}
    text = {"text_hidden_size": width, "text_heads": width // 64, "text_intermediate": 4 * width}
    return FaceScorer(**vision, vision_layers=options.layers, **text, text_layers=options.layers // 2, vocab_size=2304)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step in each way; the first round warms up and is not counted."""
    torch.manual_seed(0)
    accelerator = make_accelerator(options.device, options.mixed_precision)
    device, scorer = accelerator.device, make_scorer(options).to(accelerator.device).train()
    pixels = torch.randn(2 * options.pairs, 3, scorer.config.image_size, scorer.config.image_size, device=device)
    inputs = {"all": pixels, "through": pixels.clone().requires_grad_(), "without": pixels}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way in WAYS:
            scorer.freeze(0 if way == "all" else options.frozen)
            optimizer = make_optimizer(p for p in scorer.parameters() if p.requires_grad)
            synchronize(device)
            start = time.perf_counter()
            with accelerator.autocast():
                good, bad = scorer(inputs[way]).chunk(2)
            pairwise_ranking_loss(good, bad).backward()
            optimizer.step()
            synchronize(device)
            if number:
                seconds[way].append(time.perf_counter() - start)
            scorer.zero_grad(set_to_none=True)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the published sizes: ViT-L/16 and BERT base")
    parser.add_argument("--width", type=int, default=256, help="width of both towers, a multiple of 64 (default: 256)")
    parser.add_argument("--layers", type=int, default=12, help="ViT layers; the text tower has half (default: 12)")
    parser.add_argument("--frozen", type=float, default=0.7, help="frozen fraction of layers, (0, 1] (default: 0.7)")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a step (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured (default: 5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"))
    options = parser.parse_args()
    seconds = {way: statistics.median(values) for way, values in measure(options).items()}
    print(f"{'ms a step':>10}  {'times faster':>12}")
    for way, text in WAYS.items():
        print(f"{1000 * seconds[way]:10.1f}  {seconds['through'] / seconds[way]:12.2f}  {text}")


if __name__ == "__main__":
    main()

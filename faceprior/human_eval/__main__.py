import argparse
import logging
import sys
from pathlib import Path

from faceprior.human_eval.files import RANKED_MODELS, read_benchmark, read_rankings
from faceprior.models import REWARD_ID, SCORER_ID


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m faceprior.human_eval", description="Human evaluation of a metric for faces.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    rank = commands.add_parser("rank", help="people rank the faces of a benchmark folder", allow_abbrev=False)
    rank.set_defaults(run=run_rank)
    rank.add_argument("folder", type=Path, metavar="FOLDER", help="prompts and images/; the answers go to rankings/")
    rank.add_argument(
        "--models", nargs=RANKED_MODELS, default=(), metavar="MODEL", help="three models, where images/ holds more"
    )
    rank.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860 on)")

    tables = commands.add_parser("tables", help="Tables 1 to 4 of a benchmark folder", allow_abbrev=False)
    tables.set_defaults(run=run_tables)
    tables.add_argument("folder", type=Path, metavar="FOLDER", help="prompts, images/, rankings/ and scores/")
    tables.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for tables.md and tables.json (default: FOLDER)"
    )
    tables.add_argument("--seed", type=int, default=0, help="seed of the bootstrap, [0, inf) (default: %(default)s)")
    weights = tables.add_argument_group("weights of metrics without a file in scores/ (nothing is downloaded)")
    weights.add_argument(
        "--checkpoint", default=SCORER_ID, help="folder or hub id of Face Score, or `tiny` (default: %(default)s)"
    )
    weights.add_argument(
        "--image-reward", default=REWARD_ID, help="folder or hub id of ImageReward (default: %(default)s)"
    )
    weights.add_argument("--hps", type=Path, metavar="FILE", help="checkpoint of HPS v1")
    weights.add_argument(
        "--hps-v2", type=Path, metavar="FILE", help="checkpoint of HPS v2 (default: the one in the hub's cache)"
    )
    tables.add_argument(
        "--detector",
        default="auto",
        choices=("auto", "retinaface", "mtcnn"),
        help="face detector; auto never downloads (default: %(default)s)",
    )
    tables.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def run_rank(options: argparse.Namespace) -> None:
    from faceprior.human_eval import pages

    benchmark, models = read_benchmark(options.folder), tuple(options.models)
    pages.Ranking(benchmark, "anyone", models)  # raises where images are missing; unreadable ones show on the page
    try:
        page = pages.rank_page(benchmark, models)
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}: pip install "faceprior[pages]"') from error
    pages.launch(page, options.port)


def run_tables(options: argparse.Namespace) -> None:
    benchmark = read_benchmark(options.folder)
    read_rankings(benchmark)  # raises before hours of measuring

    from faceprior.evaluation.judges import Weights
    from faceprior.human_eval.scores import measure_missing
    from faceprior.human_eval.tables import to_markdown, write_tables

    weights = Weights(options.checkpoint, options.image_reward, options.hps, options.hps_v2)
    reasons = measure_missing(benchmark, weights, options.detector, options.device)
    print(to_markdown(write_tables(options.folder, options.output, options.seed, reasons)))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 where the folder breaks a rule or the page cannot be shown."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"faceprior.human_eval: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faceprior.human_eval.files import RANKED_MODELS, read_benchmark, read_comparison, read_preferences, read_rankings
from faceprior.models import REWARD_ID, SCORER_ID


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m faceprior.human_eval", description="People look at faces and decide.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("make", help="let models draw a benchmark folder: `make FOLDER --models ...`, `make --help`")

    rank = commands.add_parser("rank", help="people rank the faces of a benchmark folder", allow_abbrev=False)
    rank.set_defaults(run=run_rank)
    rank.add_argument("folder", type=Path, metavar="FOLDER", help="prompts and images/; the answers go to rankings/")
    rank.add_argument(
        "--models", nargs=RANKED_MODELS, default=(), metavar="MODEL", help="three models, where images/ holds more"
    )
    _add_port(rank)

    tables = commands.add_parser("tables", help="Tables 1 to 4 of a benchmark folder", allow_abbrev=False)
    tables.set_defaults(run=run_tables)
    tables.add_argument("folder", type=Path, metavar="FOLDER", help="prompts, images/, rankings/ and scores/")
    tables.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for tables.md and tables.json (default: FOLDER)"
    )
    _add_seed(tables)
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

    compare = commands.add_parser("compare", help="people compare two methods' images of a face", allow_abbrev=False)
    compare.set_defaults(run=run_compare)
    compare.add_argument("folder", type=Path, metavar="FOLDER", help="images/METHOD/NAME; answers go to preferences/")
    compare.add_argument(
        "--methods",
        nargs="+",
        default=(),
        metavar="METHOD",
        help="methods to compare, the first with each of the others (default: all of images/)",
    )
    _add_port(compare)

    preferences = commands.add_parser("preferences", help="the table of a folder's answers", allow_abbrev=False)
    preferences.set_defaults(run=run_preferences)
    preferences.add_argument("folder", type=Path, metavar="FOLDER", help="folder with the answers in preferences/")
    preferences.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for preferences.md and .json (default: FOLDER)"
    )
    _add_seed(preferences)

    review = commands.add_parser("review", help="a person reviews the portraits of stage 3", allow_abbrev=False)
    review.set_defaults(run=run_review)
    review.add_argument(
        "folder", type=Path, nargs="?", default=Path("data/portraits"), metavar="FOLDER", help="output of stage 3"
    )
    _add_port(review)
    return parser


def _add_port(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860 on)")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap, [0, inf) (default: %(default)s)")


def run_rank(options: argparse.Namespace) -> None:
    from faceprior.human_eval.rank import Ranking, rank_page

    benchmark, models = read_benchmark(options.folder), tuple(options.models)
    Ranking(benchmark, "anyone", models)  # raises where images are missing; unreadable ones show on the page
    _show(lambda: rank_page(benchmark, models), options.port, "Rank faces")


def run_compare(options: argparse.Namespace) -> None:
    from faceprior.human_eval.compare import compare_page

    comparison = read_comparison(options.folder, tuple(options.methods))
    if any((options.folder / "preferences").glob("*.csv")):
        read_preferences(options.folder, comparison.methods)  # raises where they are of other pairs
    _show(lambda: compare_page(comparison), options.port, "Compare faces")


def run_review(options: argparse.Namespace) -> None:
    from faceprior.human_eval.review import Review, review_page

    Review(options.folder)  # raises where there are no portraits
    _show(lambda: review_page(options.folder), options.port, "Review portraits", [options.folder])


def _show(make_page: Callable[[], Any], port: int | None, task: str, files: Sequence[Path] = ()) -> None:
    from faceprior.human_eval import pages

    try:
        page = make_page()
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}: pip install "faceprior[pages]"') from error
    pages.launch(page, port, task=task, files=files)


def run_preferences(options: argparse.Namespace) -> None:
    from faceprior.human_eval.preferences import to_markdown, write_preferences

    print(to_markdown(write_preferences(options.folder, options.output, options.seed)))


def run_make(arguments: list[str]) -> None:
    """Read the settings as a stage does, with the folder as `output`, and make the benchmark."""
    from faceprior.config import run_stage
    from faceprior.human_eval.make import Config, make_benchmark

    def make(config: Config) -> None:
        if not config.output:
            raise ValueError("name the folder to make: `python -m faceprior.human_eval make FOLDER --models ...`")
        made = make_benchmark(config)
        discarded = f", {len(made.discarded)} discarded without a face" if made.discarded else ""
        print(f"{made.kept} prompts, {made.models} models in {config.output}{discarded}")
        print(f"next: `python -m faceprior.human_eval rank {config.output}`")

    folder = [] if not arguments or arguments[0].startswith("-") else ["--output", arguments[0]]
    run_stage(make, Config, [*folder, *arguments[len(folder) // 2 :]])


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
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["make"]:
        run_make(arguments[1:])
        return 0
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

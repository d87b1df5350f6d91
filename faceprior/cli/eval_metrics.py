"""`faceprior eval-metrics`: which measures of stage 7 can be taken on this machine, and how to get the others."""

import argparse

from faceprior.models import SCORER_ID, quiet_libraries

HELP = "list the measures of stage 7: which can be taken here, and what the others need"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scorer", default=SCORER_ID, help="folder or hub id of Face Score, or `tiny` (default: %(default)s)"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=(),
        metavar="NAME=PATH",
        help="other weights, as of stage 7: image_reward, hps, hps_v2, clip, arcface",
    )


def run(options: argparse.Namespace) -> int:
    from faceprior.evaluation.listing import listed

    quiet_libraries()
    print(listed(options.scorer, options.weights))
    return 0

"""The command line: `faceprior score`, `faceprior restore` and `faceprior eval-metrics`."""

import argparse
import logging
import os
import sys

from faceprior import __version__
from faceprior.cli import eval_metrics, restore, score
from faceprior.cli.options import hyphenated
from faceprior.cli.results import say
from faceprior.errors import explain, is_disk_full


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0, or 1 if any input failed, 2 if nothing (more) could be done, 130 after Ctrl-C, 141 if nobody reads stdout.
    """
    options = make_parser().parse_args(hyphenated(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("faceprior").setLevel(logging.INFO)  # which detector, which weights
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("faceprior: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail as well
        return 141
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        text = explain(error) if is_disk_full(error) else str(error)
        for line in (text or type(error).__name__).splitlines():
            say(f"faceprior: error: {line}")
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; it loads no model library."""
    parser = argparse.ArgumentParser("faceprior", description="Score and restore faces in images.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"faceprior {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in (("score", score), ("restore", restore), ("eval-metrics", eval_metrics)):
        subparser = commands.add_parser(name, help=command.HELP, allow_abbrev=False)
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    return parser

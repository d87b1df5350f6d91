import argparse
from pathlib import Path

from faceprior.report import write_report

REPORT_FILE = "report.html"


def main(argv: list[str] | None = None) -> None:
    """Write the report of a folder and print its path."""
    parser = argparse.ArgumentParser(
        "python -m faceprior.report", description="Write the report of a run.", allow_abbrev=False
    )
    parser.add_argument(
        "root",
        metavar="ROOT",
        type=Path,
        help="folder in which the stages were run: it holds their data/, checkpoints/ and results/",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help="folder to which a stage wrote that was given another --output; it takes the place of the one below ROOT",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"HTML file (default: ROOT/{REPORT_FILE})")
    options = parser.parse_args(argv)
    try:
        print(write_report(options.root, options.output or options.root / REPORT_FILE, options.folders))
    except (OSError, ValueError) as error:
        parser.exit(1, f"faceprior.report: error: {error}\n")


if __name__ == "__main__":
    main()

"""Draw a contact sheet of portraits: python -m faceprior.procedural --sheet portraits.png --seeds 0:48"""

import argparse
from pathlib import Path

from faceprior.images import contact_sheet, save_image
from faceprior.procedural import draw_portrait


def parse_seeds(text: str) -> range:
    """ "3:7" -> range(3, 7); "5" -> range(5, 6)."""
    first, _, last = text.partition(":")
    return range(int(first), int(last) if last else int(first) + 1)


def main(arguments: list[str] | None = None) -> None:
    """Draw a contact sheet of portraits."""
    parser = argparse.ArgumentParser(
        prog="python -m faceprior.procedural", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--sheet", type=Path, required=True, help="image file to write")
    parser.add_argument(
        "--seeds", type=parse_seeds, default=range(48), help="one seed, or FIRST:LAST without LAST (default: 0:48)"
    )
    parser.add_argument("--size", type=int, default=256, help="side of a portrait in pixels (default: 256)")
    parser.add_argument("--columns", type=int, default=8, help="number of portraits in a row (default: 8)")
    options = parser.parse_args(arguments)

    images = [draw_portrait(seed, options.size).image for seed in options.seeds]
    save_image(contact_sheet(images, options.columns), options.sheet)
    print(f"{len(images)} portraits -> {options.sheet}")


if __name__ == "__main__":
    main()

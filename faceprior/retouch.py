"""The round trip of portraits to a retoucher and back (AuthFace, arXiv 2410.09864, appendix A).

`export_portraits` writes every portrait's aligned crop, its photograph for reference, and a list of both;
`import_portraits` takes the crops back by their names. The names are the ids of the portraits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from faceprior.files import atomic_write, find_images
from faceprior.images import load_image, save_image
from faceprior.jsonl import read_rows, rewrite_rows
from faceprior.photos import Photograph, Problems, safe_name

LIST = "portraits.jsonl"
KEPT = "originals"  # folder beside images/, with the crops that retouched ones replaced


def export_portraits(
    output: Path, rows: Iterable[dict[str, Any]], sources: Iterable[Photograph], folder: str | Path
) -> int:
    """Write the portraits of a run into a folder for a retoucher; return how many files are new.

    ID.png is the crop, originals/ID.* the photograph it was cut from, and portraits.jsonl says which is which. A file
    that is there already is left as it is: it may be retouched. FileExistsError for another file of the list's name.
    """
    folder, photographs = Path(folder), {safe_name(source.name): source for source in sources}
    if (folder / LIST).is_file() and not all("crop" in row for row in read_rows(folder / LIST)[0]):
        raise FileExistsError(f"{folder / LIST} is no list of an export and would be replaced: choose another folder")
    exported, listed = 0, []
    for row in rows:
        crop, source = output / row["image"], photographs.get(row["id"])
        exported += _write_new(folder / f"{row['id']}.png", crop.read_bytes())
        entry = {
            "id": row["id"],
            "crop": f"{row['id']}.png",
            "photograph": row["photograph"],
            "caption": row["caption"],
        }
        if source is not None:
            name = source.path.name if source.image is None else source.image.name
            entry["original"] = f"originals/{row['id']}{Path(name).suffix.lower()}"
            data = source.path.read_bytes() if source.image is None else source.image.read(source.path)
            exported += _write_new(folder / entry["original"], data)
        listed.append(entry)
    rewrite_rows(folder / LIST, listed)
    return exported


def _write_new(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    with atomic_write(path) as file:
        file.write(data)
    return True


def import_portraits(
    output: Path, rows: dict[str, dict[str, Any]], folder: str | Path
) -> tuple[dict[str, dict[str, Any]], Problems]:
    """Replace crops by the retouched ones of a folder -> (changed rows by id, problems as (file, reason)).

    rows: those of the manifest by id. A retouched crop is named ID with any suffix of an image; one of another size is
    resized, one that is not square stays out. Of several files of an ID the crop as it was exported does not count, and
    of others the first one does. The former crop is kept in originals/, the first one only. A changed row
    has the key `retouched`, the SHA-256 of the imported file, so that the same import changes nothing the next time.
    Raises FileNotFoundError without the folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder} with retouched portraits: `--export_retouch` writes one")
    changed, problems, seen = {}, [], set()
    files = find_images(folder, recursive=False)
    count = Counter(path.stem for path in files)
    for path in files:
        row = rows.get(path.stem)
        if row is None:
            problems.append((str(path), "no accepted portrait has this id: keep the name that it was exported under"))
            continue
        if path.stem in seen:
            problems.append((str(path), "a second file of this portrait: the first one was taken"))
            continue
        crop, kept = output / row["image"], output / KEPT / f"{path.stem}.png"
        if count[path.stem] > 1 and _is_exported(path, kept if kept.exists() else crop):
            continue
        seen.add(path.stem)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if row.get("retouched") == digest:
            continue
        try:
            retouched = load_image(path)
        except (ValueError, OSError) as error:
            problems.append((str(path), str(error)))
            continue
        if retouched.width != retouched.height:
            size = f"{retouched.width} x {retouched.height}"
            problems.append((str(path), f"{size} pixels: a portrait is square, as it was exported: crop nothing"))
            continue
        current = load_image(crop)
        if retouched.size != current.size:
            retouched = retouched.resize(current.size, Image.Resampling.LANCZOS)
        same = np.array_equal(np.asarray(retouched), np.asarray(current))
        if same and not kept.exists():  # as it was exported; with `kept`, a killed import got as far as the row
            continue
        _write_new(kept, crop.read_bytes())
        save_image(retouched, crop)
        changed[path.stem] = {**row, "retouched": digest}
    return changed, problems


def _is_exported(path: Path, exported: Path) -> bool:
    """Whether a file holds the pixels of the crop that was exported."""
    try:
        return np.array_equal(np.asarray(load_image(path)), np.asarray(load_image(exported)))
    except (ValueError, OSError):
        return False

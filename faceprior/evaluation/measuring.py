"""Every row gets the measures that it lacks, one after the other, so that one network is in memory at a time."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from faceprior.detect import Face, detect_faces, representative_face
from faceprior.errors import explain, is_disk_full
from faceprior.evaluation.measures import Measure, MeasureSettings, Sample
from faceprior.evaluation.methods import REFERENCE, Method
from faceprior.evaluation.rows import EvaluationRows, Row
from faceprior.files import find_images, stamp
from faceprior.images import load_image
from faceprior.jsonl import append_row, resume_rows
from faceprior.metrics import MetricUnavailable

Problems = list[tuple[str, str]]
SETS_FILE = "sets.jsonl"  # what was measured of sets of images, beside rows.jsonl


class Measuring:
    """The measures of one protocol on the rows of its methods.

    measures: wanted ones. reference: folder of images to which sets are compared; empty: those of the method
    `reference`. min_confidence, min_face_size: of faces, as in `detect_faces`. After `run`, reasons holds why a measure
    could not be taken, by key, and failed (row, reason) of images that could not be measured.
    """

    def __init__(
        self,
        protocol: str,
        measures: Sequence[Measure],
        settings: MeasureSettings,
        rows: EvaluationRows,
        output: Path,
        reference: str = "",
        min_confidence: float = 0.9,
        min_face_size: float = 20,
    ):
        self.protocol, self.measures, self.settings, self.rows = protocol, measures, settings, rows
        self.output, self.reference = output, reference
        self.min_confidence, self.min_face_size = min_confidence, min_face_size
        self.reasons: dict[str, str] = {}
        self.failed: Problems = []
        known = [row for row in resume_rows(output / SETS_FILE) if "influence" in row]  # former versions had none
        self.sets = {(row["protocol"], row["method"], row["key"]): row for row in known}
        self._reference = rows.of(protocol, REFERENCE)
        self._open = lru_cache(maxsize=4)(lambda file: load_image(output / file))  # joined: an absolute path stays

    def run(self, methods: Sequence[Method]) -> None:
        """Take every measure of the methods, and of `reference`, that is missing."""
        names = [method.name for method in methods]
        for measure in self.taken():
            try:
                self._take(measure, names)
            except (MetricUnavailable, ImportError, FileNotFoundError) as error:
                self.reasons[measure.key] = str(error)

    def taken(self) -> Iterator[Measure]:
        """Yield the measures that these rows can have, whether their weights are there or not.

        Without any reference there is no PSNR, without prompts no CLIP-Score. What stands in for another measure
        follows it only where that one's weights are missing and all models are tiny.
        """
        rows = self.rows.of_protocol(self.protocol)
        has = {"reference": bool(self._reference), "prompt": any(row.get("prompt") for row in rows), "face": True}
        for measure in self.measures:
            is_needed = self.settings.are_tiny and measure.stands_in_for in self.reasons
            if measure.stands_in_for and not (is_needed and (measure.of == "image" or self.has_reference_set)):
                continue
            if all(has[need] for need in measure.needs) or not rows:
                yield measure

    def samples(self, measure: Measure, method: str) -> dict[str, Row]:
        """Return the rows of a method that a measure applies to, by item."""
        rows = self.rows.of(self.protocol, method)
        sets = {row.get("prompt_set") for row in rows.values()}
        if measure.prompt_set and measure.prompt_set in sets:
            rows = {item: row for item, row in rows.items() if row.get("prompt_set") == measure.prompt_set}
        if "reference" in measure.needs:
            rows = {} if method == REFERENCE else {item: row for item, row in rows.items() if item in self._reference}
        if "prompt" in measure.needs:
            rows = {item: row for item, row in rows.items() if row.get("prompt")}
        return rows

    # ---- one measure

    def _take(self, measure: Measure, names: Sequence[str]) -> None:
        if measure.of == "set":
            self._take_of_sets(measure, names)
            return
        wanted = [(name, item) for name in [*names, REFERENCE] for item in self.samples(measure, name)]
        if "face" in measure.needs or measure.key == "faces":
            self._find_faces(measure, wanted)
        left = [(name, item) for name, item in wanted if measure.key not in self.rows.of(self.protocol, name)[item]]
        if measure.load is None or not left:
            return
        take = measure.load(self.settings)
        for name, item in tqdm(left, desc=measure.title, unit="image", disable=None):
            row = self.rows.of(self.protocol, name)[item]
            self._attempt(name, item, lambda row=row, item=item: {measure.key: take(self._sample(row, item))})

    def _sample(self, row: Row, item: str) -> Sample:
        reference = self._reference.get(item, {})
        return Sample(
            self._open(row["image"]),
            self._open(reference["image"]) if reference else None,
            row.get("prompt"),
            _face(row),
            _face(reference),
        )

    def _find_faces(self, measure: Measure, wanted: Iterable[tuple[str, str]]) -> None:
        """Add to every row how many faces its image has, and the representative one."""
        wanted = list(wanted)
        if "reference" in measure.needs:
            wanted += [(REFERENCE, item) for item in dict.fromkeys(item for _, item in wanted)]
        left = [(name, item) for name, item in wanted if "faces" not in self.rows.of(self.protocol, name)[item]]
        for name, item in tqdm(left, desc="finding faces", unit="image", disable=None):
            image = self.rows.of(self.protocol, name)[item]["image"]
            self._attempt(name, item, lambda image=image: self._faces_in(self._open(image)))

    def _faces_in(self, image: Image.Image) -> dict[str, Any]:
        faces = detect_faces(image, self.settings.detector, self.min_confidence, self.min_face_size)
        face = representative_face(faces, image.size)
        return {"faces": len(faces), "face": None if face is None else face.to_dict()}

    def _attempt(self, name: str, item: str, make: Any) -> None:
        try:
            values = make()
        except Exception as error:
            reason = explain(error)
            if reason is None or is_disk_full(error) or isinstance(error, MetricUnavailable):
                raise
            self.failed.append((f"{name} {item}", reason))
            return
        if wrong := [key for key, x in values.items() if isinstance(x, float) and not math.isfinite(x)]:
            self.failed.append((f"{name} {item}", f"{wrong[0]} is {values[wrong[0]]}, which is no number"))
        else:
            self.rows.add(self.protocol, name, item, **values)

    # ---- sets

    def _take_of_sets(self, measure: Measure, names: Sequence[str]) -> None:
        references = self.reference_files()
        if not self.has_reference_set:
            raise MetricUnavailable("it compares with a set of real images: name its folder as `reference`")
        if len(references) < 2:
            raise MetricUnavailable(f"it compares with a set of images, but {self.reference} holds one")
        places = {} if self.reference else {item: place for place, item in enumerate(sorted(self._reference))}
        take = None
        for name in names:
            rows = self.samples(measure, name)
            items = sorted(rows)
            images = [self.output / rows[item]["image"] for item in items]
            partners = [places.get(item, -1) for item in items]
            mark = _digest([*map(_stamped, images), "|", *map(_stamped, references), "|", *map(str, partners)])
            place = (self.protocol, name, measure.key)
            if self.sets.get(place, {}).get("mark") == mark:
                continue
            self.sets.pop(place, None)  # of other images
            if len(images) < 2:
                continue
            take = take or measure.load(self.settings)
            row = dict(zip(("protocol", "method", "key"), place, strict=True)) | {"mark": mark, "n": len(images)}
            value, influence, std = take(images, references, partners=partners)
            if not all(math.isfinite(x) for x in (value, std or 0, *influence)):
                self.failed.append((name, f"{measure.key} is {value}, which is no number"))
                continue
            row |= {"value": value, "references": len(references)} | ({} if std is None else {"std": std})
            row |= {"influence": {item: float(f"{x:.6g}") for item, x in zip(items, influence, strict=True)}}
            append_row(self.output / SETS_FILE, row)
            self.sets[place] = row

    def reference_files(self) -> list[Path]:
        if self.reference:
            return find_images(self.reference)
        return [self.output / row["image"] for _, row in sorted(self._reference.items())]

    @property
    def has_reference_set(self) -> bool:
        return bool(self.reference) or len(self._reference) > 1

    @property
    def reference_name(self) -> str:
        return self.reference or "the references of the faces"


def _face(row: Row) -> Face | None:
    return Face.from_dict(row["face"]) if row.get("face") else None


def _stamped(file: Path) -> str:
    return f"{file} {stamp(file)}"


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]

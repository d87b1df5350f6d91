"""Whether a training helped: images at fixed prompts and seeds, the Face Score of each, and an honest last line.

    validation = Validation(run, tuner, scorer, prompts, resolution=512, validate_every=50)
    validation.start()                        # step 0: the untuned images
    for batch in run.batches(dataset, batch_size):
        ...
        validation.step()                     # every 50 steps the tuned ones, of the averaged weights if there are any
    run.use_final_weights()
    print(validation.judge(num_samples=16))   # better by 0.52 (95% interval 0.11 to 0.93, n = 16 paired images)

The Face Score of an image is that of its representative face. The images that choose the weights (`keep_best`) never
judge them: the verdict has other seeds, because the best of many validations is also the luckiest. Both draw the
prompts that are given; how the model does on prompts that it was not trained on is for stage 7 to measure.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from faceprior.config import METRICS_FILE
from faceprior.detect import detect_faces, representative_face
from faceprior.diffusion import sample_images, sampled_with
from faceprior.images import as_array, contact_sheet, load_image, save_image
from faceprior.jsonl import resume_rows, rewrite_rows
from faceprior.metrics import mean_interval
from faceprior.models import SCORER_ID, placed
from faceprior.training import TrainingRun

logger = logging.getLogger(__name__)
VALIDATION, SAMPLES, SHEET = "validation.jsonl", "samples.jsonl", "validation.png"
FIRST_SEED = 2**20  # of the validation images; the samples that are judged at the end have the seeds 0, 1, 2 ...
SMALL = 256  # longest side of a validation image on the disk, in pixels
SHEET_ROWS, SHEET_COLUMNS, MARGIN = (
    12,
    8,
    80,
)  # of the contact sheet: most steps, most images of each, pixels of a label
MIN_IMAGES = 8  # below, a few lucky images decide, and the t interval leans on the differences being normal
WORTH = 0.2  # smallest gain that counts: the better of two faces in sigmoid(0.2) = 55% of the cases (Face Score, Eq. 5)

Score = float | None  # None: an image without a face


class Tuner(Protocol):
    """What is validated, as a GuidanceTuner: both give the pipeline with all of its parts where it can be sampled."""

    def sampling(self) -> AbstractContextManager[DiffusionPipeline]:
        """With the weights as they are."""

    def untuned(self) -> AbstractContextManager[DiffusionPipeline]:
        """With the original weights."""


# ---- the score of an image


def score_face(
    image: Image.Image,
    scorer: Any | None,
    detector: Any = "auto",
    min_confidence: float = 0.9,
    min_face_size: float = 20,
) -> dict[str, Any]:
    """Return how many faces an image has, the representative one's Face Score and the detector's highest confidence.

    scorer: a FaceScorer; without one, and without a face, the score is None. The rest as in `detect_faces`.
    """
    faces = detect_faces(image, detector, min_confidence, min_face_size)
    if not faces:
        return {"faces": 0, "score": None, "confidence": None}
    face = representative_face(faces, image.size)
    score = scorer.score(image, faces=[face])[0].score if scorer else None
    return {"faces": len(faces), "score": score, "confidence": max(face.confidence for face in faces)}


def mean_score(scores: Sequence[Score], untuned: Sequence[Score]) -> float | None:
    """Return the mean Face Score of images, where one without a face counts as the worst untuned face.

    So a model that draws fewer faces does not win by leaving out the bad ones. None if no untuned image has a face.
    """
    worst = _worst(untuned)
    return None if worst is None else float(np.mean([worst if score is None else score for score in scores]))


def paired_differences(untuned: Sequence[Score], tuned: Sequence[Score]) -> list[float]:
    """Return tuned - untuned of every pair of images that has a face on one side at least.

    A side without a face counts as the worst untuned face, so a lost face is a loss and a gained one a gain; a pair
    without any face says nothing about faces. Empty if no untuned image has a face.
    """
    worst = _worst(untuned)
    pairs = [(b, a) for b, a in zip(untuned, tuned, strict=True) if not (b is None and a is None)]
    if worst is None:
        return []
    return [(worst if after is None else after) - (worst if before is None else before) for before, after in pairs]


def _worst(scores: Iterable[Score]) -> float | None:
    return min((score for score in scores if score is not None), default=None)


# ---- the verdict


@dataclass(frozen=True)
class Verdict:
    """Whether the tuned images have better faces than the untuned ones at the same prompts and seeds.

    difference: mean of tuned - untuned Face Score, with its 95% interval low to high by Student's t over n paired
    images (see `paired_differences`); None where there is none. images: number of images on each side; faces_before,
    faces_after: those with a face. reason: why nothing was judged.

        better        n is MIN_IMAGES at least, and the whole interval lies above 0
        not better    n is MIN_IMAGES at least, and the whole interval lies below WORTH
        too few       otherwise: the images fit a gain that counts and none at all
        not judged    without a scorer, or without images
    """

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    images: int = 0
    faces_before: int = 0
    faces_after: int = 0
    reason: str = ""

    @classmethod
    def of_scores(cls, untuned: Sequence[Score], tuned: Sequence[Score]) -> "Verdict":
        """Judge by the scores of both sides' images, in the same order."""
        faces = [sum(score is not None for score in side) for side in (untuned, tuned)]
        differences = paired_differences(untuned, tuned)
        if not differences:
            return cls(None, None, None, 0, len(tuned), *faces)
        mean, half = mean_interval(differences)
        low, high = (mean - half, mean + half) if math.isfinite(half) else (None, None)
        return cls(mean, low, high, len(differences), len(tuned), *faces)

    @property
    def outcome(self) -> str:
        if self.reason:
            return "not judged"
        if self.n < MIN_IMAGES:
            return "too few"
        return "better" if self.low > 0 else "not better" if self.high < WORTH else "too few"

    @property
    def enough(self) -> str:
        """How many paired images would tell, in words: at least MIN_IMAGES, and more where the interval is too wide."""
        if self.low is None or self.n == 0:
            return f"at least {MIN_IMAGES} with a face are needed"
        half, margin = self.high - self.difference, max(self.difference, WORTH - self.difference)
        needed = max(MIN_IMAGES, math.floor(self.n * (half / margin) ** 2) + 1)  # an interval narrows by the root of n
        return f"about {needed} with a face would tell, if they are like these"

    def __str__(self) -> str:
        if self.reason:
            return f"not judged: {self.reason}"
        interval = "" if self.low is None else f"95% interval {self.low:.3g} to {self.high:.3g}"
        faces = ""
        if min(self.faces_before, self.faces_after) < self.images:
            faces = f"; {self.faces_before} of {self.images} images had a face before, {self.faces_after} after"
        if self.outcome == "better":
            return f"better by {self.difference:.3g} ({interval}, n = {self.n} paired images){faces}"
        change = "" if self.difference is None else f"difference {self.difference:.3g}"
        if self.outcome == "not better":
            return f"not better ({change}, {interval}, n = {self.n} paired images){faces}"
        known = ", ".join(filter(None, (f"n = {self.n}", change, interval)))
        return f"too few images to tell ({known}){faces}; a larger `num_samples` draws more: {self.enough}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"outcome": self.outcome, "text": str(self), **asdict(self)}


# ---- during the training, and after it


def require_scores(settings: Any, scorer: Any | None, validate_every: int) -> None:
    """Raise ValueError where `settings` (a TrainingRun, a Config) has `keep_best` or `patience`, and no score to go by.

    scorer: any value of a scorer that is there, such as its name.
    """
    for name in ("keep_best", "patience"):
        if getattr(settings, name) and not (scorer and validate_every):
            raise ValueError(f"`{name}` goes by the Face Score of validations: it needs `validate_every` and a scorer")


class Validation:
    """The validation images of a training run, and the samples that are judged at its end.

    scorer: a FaceScorer, moved to the run's device only while it scores; None: images without scores. prompts: image i
    has the prompt i, from the first again after the last; resolution: side of the images in pixels; validate_every:
    steps between two validations, 0 for none; num_validation: images of each; sample_steps, sampler, guidance_scale: as
    in `sample_images` and `make_sampler`; detector: as in `detect_faces`.

    Below the run's output: `validation/STEP/*.png`, at most 256 px wide, step 0 being untuned, `validation.jsonl` with
    a row per image, and `validation.png`, a contact sheet with a row per step; in `metrics.jsonl` the step's
    `validation_score` (see `mean_score`), `validation_without_face`, a fraction, and, from two pairs on,
    `validation_difference` to the untuned images with the ends of its 95% interval, `validation_low` and
    `validation_high`. Several processes share the images.

    Raises ValueError where the run's `keep_best` or `patience` has no score to go by.
    """

    def __init__(
        self,
        run: TrainingRun,
        tuner: Tuner,
        scorer: Any | None = None,
        prompts: Sequence[str] = (),
        resolution: int = 512,
        validate_every: int = 0,
        num_validation: int = 8,
        sample_steps: int = 25,
        sampler: str = "base",
        guidance_scale: float = 7.5,
        detector: Any = "auto",
    ):
        if not prompts:
            raise ValueError("`prompts` is empty: images to validate by need one at least")
        require_scores(run, scorer, validate_every)
        self.run, self.tuner, self.scorer, self.prompts = run, tuner, scorer, list(prompts)
        self.resolution, self.validate_every, self.num_validation = resolution, validate_every, num_validation
        self.sample_steps, self.sampler, self.guidance_scale = sample_steps, sampler, guidance_scale
        self.detector = detector
        self._rows: list[dict[str, Any]] = []  # of validation.jsonl
        self._untuned: list[Score] = []

    def start(self) -> None:
        """Draw the untuned images, or read what a run that is resumed has on the disk of the steps it has done.

        Raises ValueError if that run drew its validations in another way.
        """
        if not self.validate_every or self.run.stopped_early or self.run.step >= self.run.steps:
            return
        made = {"prompts": self.prompts[: self.num_validation], "num_validation": self.num_validation}
        made |= {"resolution": self.resolution, "sample_steps": self.sample_steps, "sampler": self.sampler}
        made |= {"guidance_scale": self.guidance_scale, "detector": str(self.detector)}
        made |= {"scorer": self.scorer and self.scorer.config.get("_name_or_path")}
        if self.run.step and (before := self.run.state.get("validation", made)) != made:
            differing = ", ".join(f"`{key}`" for key in made if before.get(key) != made[key])
            raise ValueError(
                f"the validations of {self.run.output} were drawn with other {differing}: scores of the run would not "
                "be comparable. Give the same to resume it, or start over"
            )
        self.run.state["validation"] = made
        if self.run.output is not None and self.run.step:
            self._rows = [row for row in resume_rows(self.run.output / VALIDATION) if row["step"] <= self.run.step]
        rows = [row for row in self._rows if row["step"] == 0] or self._draw(0)
        self._untuned = [row["score"] for row in rows]
        if self._writes and self.scorer is not None and _worst(self._untuned) is None:
            logger.warning(
                "no face was found in the %d untuned validation images: there is no Face Score to compare with%s; "
                "other `prompts`, or more images (`num_validation`), may show one",
                len(rows),
                ", and the last weights are kept" if self.run.keep_best else "",
            )
        if self.run.step == 0 and self._writes and self.scorer is not None:
            rewrite_rows(self.run.output / METRICS_FILE, [{"step": 0, **self._values(self._untuned)}])

    def step(self) -> None:
        """After every `validate_every` steps, and the last: draw and score the images, log it, tell the run."""
        if not self.run.every(self.validate_every):
            return
        with self.run.averaged():
            scores = [row["score"] for row in self._draw(self.run.step + 1)]
        values = self._values(scores)
        differences = paired_differences(self._untuned, scores)
        if len(differences) > 1:
            mean, half = mean_interval(differences)
            values |= {"validation_difference": mean, "validation_low": mean - half, "validation_high": mean + half}
        self.run.log(**values)
        if "validation_score" in values:
            self.run.validated(values["validation_score"])

    def judge(self, num_samples: int = 16, shipped: DiffusionPipeline | None = None) -> Verdict:
        """Draw images before and after the tuning, of the weights as they are now, and compare their Face Scores.

        They are `samples/*_before.png` and `*_after.png` below the run's output, with a row per pair in
        `samples.jsonl`. Call it in one process.

        shipped: another tuned pipeline, which draws the same prompts and noise as `*_shipped.png`, to look at: the
        verdict is not of it.
        """
        drawing = {"before": self.tuner.untuned, "after": self.tuner.sampling}
        if shipped is not None:
            drawing["shipped"] = partial(nullcontext, shipped)
        images, scores = {}, {}
        for side, sampling in drawing.items() if num_samples else ():
            with sampling() as pipeline:
                images[side] = [self._image(pipeline, index, index) for index in range(num_samples)]
        with self._scoring():
            for side, own in images.items():
                scores[side] = [self._score(image) for image in own]

        if self.run.output is not None:
            shutil.rmtree(self.run.output / "samples", ignore_errors=True)  # an earlier end may have drawn more
            rows = []
            for seed in range(num_samples):
                files = {side: f"samples/{seed:03d}_{side}.png" for side in images}
                for side, name in files.items():
                    save_image(images[side][seed], self.run.output / name)
                own = {f"score_{side}": scores[side][seed] for side in images}
                rows.append({"prompt": self._prompt(seed), "seed": seed, **files, **own})
            rewrite_rows(self.run.output / SAMPLES, rows)
        if self.scorer is None or not num_samples:
            no_scorer = f"no `scorer` ({SCORER_ID} is the published one, stages/02_train_scorer.py trains one)"
            return Verdict(reason=no_scorer if self.scorer is None else "`num_samples` is 0")
        return Verdict.of_scores(scores["before"], scores["after"])

    # ---- parts

    @property
    def _writes(self) -> bool:
        return self.run.output is not None and self.run.accelerator.is_main_process

    def _prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def _image(self, pipeline: DiffusionPipeline, index: int, seed: int) -> Image.Image:
        # one at a time: least memory, and the same pixels whatever the number of processes
        options = (self.resolution, self.sample_steps, self.guidance_scale)
        with sampled_with(self.sampler, pipeline):
            return sample_images(pipeline, [self._prompt(index)], [seed], *options)[0]

    def _scoring(self) -> AbstractContextManager[None]:
        """Have the scorer on the run's device, and back where it was afterwards."""
        return placed([self.scorer] if self.scorer else [], self.run.accelerator.device)

    def _score(self, image: Image.Image) -> Score:
        return None if self.scorer is None else score_face(image, self.scorer, self.detector)["score"]

    def _draw(self, step: int) -> list[dict[str, Any]]:
        """Draw, score and keep the images of a step, this process its share; returns the rows of all of them."""
        accelerator, folder = self.run.accelerator, f"validation/{step:06d}"
        mine = range(accelerator.process_index, self.num_validation, accelerator.num_processes)
        with self.tuner.untuned() if step == 0 else self.tuner.sampling() as pipeline:
            images = {index: self._image(pipeline, index, FIRST_SEED + index) for index in mine}
        rows = []
        with self._scoring():
            for index, image in images.items():
                row = {"step": step, "prompt": self._prompt(index), "seed": FIRST_SEED + index}
                row |= {"image": f"{folder}/{index:03d}.png", "score": self._score(image)}
                rows.append(row)
                if self.run.output is not None:
                    image.thumbnail((SMALL, SMALL), Image.LANCZOS)
                    save_image(image, self.run.output / row["image"])
        rows = sorted(gather_object(rows), key=lambda row: row["seed"])
        self._rows = sorted([*self._rows, *rows], key=lambda row: row["step"])
        if self._writes:
            rewrite_rows(self.run.output / VALIDATION, self._rows)
            self._save_sheet()
        return rows

    def _save_sheet(self) -> None:
        """Write the first images of the steps so far as one, a row per step; of many steps some, the last among them.

        Steps of which an image is gone are left out.
        """
        files: dict[int, list[Path]] = {}
        for row in self._rows:
            files.setdefault(row["step"], []).append(self.run.output / row["image"])
        steps = [step for step in files if all(file.is_file() for file in files[step])]
        shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), SHEET_ROWS)).round().astype(int))
        images, labels = [], []
        for step in (steps[place] for place in shown):
            own = [as_array(load_image(file)) for file in files[step][:SHEET_COLUMNS]]
            label = Image.new("RGB", (MARGIN, len(own[0])), "white")
            ImageDraw.Draw(label).text((6, len(own[0]) // 2 - 6), f"step {step}" if step else "untuned", "black")
            images, labels = [*images, *own], [*labels, np.asarray(label)]
        columns = len(images) // len(labels)
        save_image(np.hstack([np.vstack(labels), contact_sheet(images, columns)]), self.run.output / SHEET)

    def _values(self, scores: Sequence[Score]) -> dict[str, float]:
        """Return what the log says of a validation's scores; nothing without a scorer."""
        if self.scorer is None:
            return {}
        mean = mean_score(scores, self._untuned)
        values = {"validation_without_face": sum(score is None for score in scores) / len(scores)}
        return values if mean is None else {"validation_score": mean, **values}

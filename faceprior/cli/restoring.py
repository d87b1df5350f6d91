"""The restorer that `faceprior restore` loads, by its options, and what it does with photographs and frames."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

import faceprior
from faceprior import tiny
from faceprior.cli.options import checkpoint_of, device_of, dtype_of, fingerprint, load_checkpoint
from faceprior.models import SCORER_ID

if TYPE_CHECKING:
    from faceprior.detect import Face
    from faceprior.images import SourceImage
    from faceprior.restorer import AuthFaceRestorer, RestoredImage

SAMPLING = ("num_inference_steps", "seed", "start")  # options that are settings of the restorer
PHOTOGRAPHS = ("upscale", "keep_sharp", "min_gain", "max_drift", "keep_better")  # options that are not about frames


@dataclass(frozen=True)
class Restoring:
    """A loaded restorer with all that decides how it restores; settings: a hash of that."""

    restorer: "AuthFaceRestorer"
    settings: str
    options: dict[str, Any]  # of `restore` and `restore_all`, without those that were not given
    judges: dict[str, Any]  # the scorer, the identity model, and the options that go with them
    aligned: dict[str, Any] | None = None  # the options of aligned crops; None for photographs

    def photographs(self, sources: "Iterable[SourceImage]") -> "Iterator[RestoredImage | Exception]":
        """Restore photographs, or aligned crops, in their order; one that fails yields its error."""
        if self.aligned is not None:
            options = {key: value for key, value in self.options.items() if key not in _DETECTION}
            return _one_by_one(self.restorer, sources, {**options, **self.aligned})
        return _restore_all(self.restorer, sources, None, {**self.options, **self.judges})

    def frames(self, images: Iterable[Image.Image], faces: "list[list[Face]]") -> Iterator[Image.Image]:
        """Restore the frames of a video with known faces.

        No face is judged: where one is restored and then left from frame to frame, the video flickers.
        """
        for result in _restore_all(self.restorer, images, faces, {**self.options, **_UNJUDGED}):
            if isinstance(result, Exception):
                raise result
            yield result.image

    def find_faces(self, image: Image.Image) -> "list[Face]":
        """Find the faces of a frame, which is upright."""
        from faceprior.detect import detect_faces

        return detect_faces(image, *(self.options[key] for key in _DETECTION))


_DETECTION = ("detector", "min_confidence", "min_face_size")
_UNJUDGED = {"keep_sharp": False}


def _restore_all(restorer: Any, sources: Iterable[Any], faces: Any, options: dict[str, Any]) -> Iterator[Any]:
    """Restore photographs in batches that span them; faces: those of each, or None to find them."""
    return restorer.restore_all(sources, faces=faces, **options)


def _one_by_one(restorer: Any, sources: Iterable[Any], options: dict[str, Any]) -> Iterator[Any]:
    for source in sources:
        try:
            yield restorer.restore(source, **options)
        except Exception as error:  # whatever fails in one image, the others are restored
            yield error
        del source


# ---- loading


def load_restoring(options: argparse.Namespace) -> Restoring:
    """Load what the options name; options that cannot work fail here, before the first image."""
    from faceprior.detect import resolve_detector
    from faceprior.restorer.photographs import PhotographOptions

    # ---- the restorer, and the judges
    checkpoint = checkpoint_of(options.checkpoint, "restorer")
    quantization = options.quantization
    restorer = load_checkpoint(faceprior.AuthFaceRestorer, checkpoint, dtype_of(options), quantization=quantization)
    scorer, identity = _load_scorer(options), _load_identity(options)
    detector = resolve_detector(options.detector)

    # ---- what decides how a face is restored
    given = {key: getattr(options, key) for key in (*SAMPLING, "recipe", "fidelity")}
    given = {key: value for key, value in given.items() if value is not None}
    restored = {
        "detector": detector,
        **{key: getattr(options, key) for key in ("min_confidence", "min_face_size", "color_fix", "batch_size")},
        **given,
    }
    judges = {key: getattr(options, key) for key in PHOTOGRAPHS}
    judges |= {"scorer": scorer, "identity": identity}
    judges = {key: value for key, value in judges.items() if value is not None}
    aligned = None
    if options.aligned:
        aligned = {"aligned": True, "upscale": options.upscale or 1}
        aligned |= {"process_size": options.process_size} if options.process_size else {}
    else:
        PhotographOptions(**judges)  # what cannot work fails here
    settings = _settings(options, restorer, scorer, given, detector.name)
    _place(restorer, options)
    return Restoring(restorer, settings, restored, judges, aligned)


def _load_scorer(options: argparse.Namespace) -> Any:
    """The scorer that --scorer names, or that --keep-better needs."""
    name = options.scorer
    if name is None and options.keep_better:
        name = tiny.NAME if options.checkpoint == tiny.NAME else SCORER_ID
    if name is None:
        return None
    scorer = load_checkpoint(faceprior.FaceScorer, checkpoint_of(name, "scorer"), dtype_of(options))
    return scorer.to(device_of(options))


def _load_identity(options: argparse.Namespace) -> Any:
    if not options.identity and options.max_drift is None:
        return None
    from faceprior.identity import IdentityModel

    return IdentityModel(options.detector)


def _place(restorer: "AuthFaceRestorer", options: argparse.Namespace) -> None:
    """Move the restorer to its device, or have it offloaded; what saves memory or time."""
    device = device_of(options)
    if options.offload:
        if device.type == "cpu":
            raise ValueError(
                f"--offload {options.offload} frees a GPU's memory, but the device is the CPU: leave it out"
            )
        enable = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
        getattr(restorer, enable[options.offload])(device)
    else:
        restorer.to(device)
    if options.vae_tiling:
        restorer.enable_vae_tiling()
    if options.compile:
        restorer.compile()


def _settings(
    options: argparse.Namespace, restorer: "AuthFaceRestorer", scorer: Any, given: dict[str, Any], detector: str
) -> str:
    """Hash all that decides what comes out."""
    pipeline = restorer.pipeline
    parts = (pipeline.unet, pipeline.controlnet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    keys = ("dtype", "min_confidence", "min_face_size", "color_fix", "aligned", "upscale", "process_size")
    keys += ("keep_sharp", "keep_better", "min_gain", "identity", "max_drift", "format")
    settings = {
        **dataclasses.asdict(restorer.settings.override(**given)),
        "version": faceprior.__version__,
        "weights": fingerprint(*parts),
        "scorer": scorer and fingerprint(scorer),
        "detector": detector,
        **{key: getattr(options, key) for key in keys},
        "quality": None if options.format == "png" else options.quality,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def print_plan(options: argparse.Namespace) -> int:
    """Print the memory that restoring with these options needs, without loading any weights."""
    from faceprior.restorer import print_restoring_plan

    options.checkpoint = tiny.resolve(options.checkpoint, "restorer")
    return print_restoring_plan(options)

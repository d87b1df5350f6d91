"""
FaceScorer: an image -> one score per face (Face Score, arXiv 2406.17100).

The reward of ImageReward on face crops: a BLIP image encoder (ViT-L/16), a BERT text encoder that reads "A face." and
sees the image through cross attention, and a linear head on its first token; see `faceprior.blip`.

The scale: a score has no unit, no bounds and no zero point, and scores of two different checkpoints cannot be
compared. Only differences have a meaning: a face that scores m more than another one is the better of the two with
probability sigmoid(m), because that is what the ranking loss fits (Eq. 5). With the published weights, plausible faces
score above about 4 (paper 8.5). If the weights come with a reference set, each score has a percentile.
"""

import itertools
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from faceprior.blip import (
    apply_head,
    check_config,
    face_pixels,
    normalise,
    preprocess,
    require_known,
    reward_head,
    text_tower,
    tokenize_prompt,
    vision_tower,
)
from faceprior.convert import (
    describe_mismatch,
    find_checkpoint_folder,
    find_official_checkpoint,
    ours_to_official,
    read_official_checkpoint,
    require_same_tensors,
)
from faceprior.detect import Detector, Face, detect_faces, resolve_detector
from faceprior.files import atomic_write
from faceprior.images import load_image
from faceprior.models import DEFAULT_PROMPT, HUB_OPTIONS, first_line
from faceprior.streams import in_background

MAX_THREADS = 8  # that read images and search them for faces
MAX_WAITING = 4  # batches of images that may wait for a batch of faces to fill
REFERENCE_FILE = "reference.json"  # beside a scorer's weights: how a reference set scores
QUANTILES = 101  # 0%, 1% ... 100%


# ---- what a score is


@dataclass(frozen=True)
class FaceScore:
    """The score of one face.

    score: no unit, higher is better. box: (x0, y0, x1, y1) in pixels. landmarks: (5, 2) in pixels, or None.
    confidence: the detector's, in [0, 1]; 1 for a box that the caller gave. percentile: percentage of the reference
    set's good faces that score lower, in [0, 100]; None if the scorer has no reference or the prompt is not its own.
    """

    score: float
    box: tuple[float, float, float, float]
    landmarks: np.ndarray | None = None
    confidence: float = 1.0
    percentile: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return {
            "score": float(self.score),
            "box": [float(edge) for edge in self.box],
            "landmarks": None if self.landmarks is None else np.asarray(self.landmarks).tolist(),
            "confidence": float(self.confidence),
            "percentile": self.percentile,
        }


@dataclass(frozen=True)
class ScoreReference:
    """The scores that a scorer gives to a set of (good, bad) face pairs.

    name: name of the set. n: number of its pairs. good, bad: the 0%, 1% ... 100% quantiles of the scores of the good
    and of the bad faces, no unit.
    """

    name: str
    n: int
    good: tuple[float, ...]
    bad: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"a reference has a name and at least one pair, but these are {self.name!r} and {self.n}")
        for side in ("good", "bad"):
            quantiles = tuple(map(float, getattr(self, side)))
            if len(quantiles) != QUANTILES or not np.isfinite(quantiles).all() or (np.diff(quantiles) < 0).any():
                raise ValueError(f"`{side}` has to be {QUANTILES} finite numbers in rising order")
            object.__setattr__(self, side, quantiles)

    @classmethod
    def from_scores(cls, name: str, good: Sequence[float], bad: Sequence[float]) -> "ScoreReference":
        """The reference of a set of pairs; good, bad: one score per pair."""
        if len(good) != len(bad) or len(good) == 0:
            raise ValueError(f"a reference needs a score per side and pair but got {len(good)} good and {len(bad)} bad")
        steps = np.linspace(0, 1, QUANTILES)
        return cls(name, len(good), *(tuple(np.quantile(side, steps).tolist()) for side in (good, bad)))

    @classmethod
    def load(cls, folder: str | Path) -> "ScoreReference | None":
        """Read `folder/reference.json`; None if there is none, ValueError if it is damaged."""
        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): copy it again, or delete it (scores then have no percentile)"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Write `folder/reference.json`."""
        with atomic_write(Path(folder) / REFERENCE_FILE, "w") as file:
            json.dump(asdict(self), file)

    def percentile(self, score: float) -> float:
        """Percentage of the set's good faces that score lower, in [0, 100]; linear between two quantiles."""
        return float(np.interp(score, self.good, np.linspace(0, 100, QUANTILES)))


# ---- the faces of many images


@dataclass(frozen=True)
class ScoreSettings:
    """How `FaceScorer.score` finds and scores faces; see there."""

    detector: str | Callable = "auto"
    min_confidence: float = 0.9
    min_face_size: float = 20
    batch_size: int = 32
    prompt: str = DEFAULT_PROMPT

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1 but is {self.batch_size}")


@dataclass(frozen=True)
class FoundFaces:
    """The faces of an image and their pixels: (number of faces, 3, size, size) uint8; see `face_pixels`."""

    faces: list[Face]
    pixels: Tensor


def iter_faces(
    images: Iterable[Any],
    size: int,
    faces: Sequence[Sequence[Any]] | None = None,
    settings: ScoreSettings | None = None,
) -> Iterator[FoundFaces | Exception]:
    """Find and crop the faces of each image, ahead of the caller, in threads.

    There are as many threads as torch uses, at most MAX_THREADS, and each works at most two images ahead. If the
    detector is a function of the caller's, only one thread at a time calls it.

    Args:
        images: anything that `load_image` takes.
        size: side of the crops in pixels.
        faces: known faces, instead of a detector: for each image its `Face`s or (x0, y0, x1, y1) boxes.
        settings: the detector and its limits; the defaults if None.

    Yields:
        The faces of each image in the order of the images, or the exception that the image failed with.

    Raises:
        ValueError: `faces` does not have one list per image.
    """
    settings = settings or ScoreSettings()
    if faces is not None and len(faces) != len(images):
        raise ValueError(f"`faces` has to have one list per image: {len(faces)} for {len(images)} images")
    detector = settings.detector
    if faces is None and isinstance(detector, str):
        detector = resolve_detector(detector)  # loaded once; a failure here is not that of an image
    lock = nullcontext() if isinstance(detector, (str, Detector)) else threading.Lock()

    def crop_faces(item: tuple[Any, Sequence[Any] | None]) -> FoundFaces | Exception:
        try:
            image, known = load_image(item[0]), item[1]
            if known is None:
                with lock:
                    found = detect_faces(image, detector, settings.min_confidence, settings.min_face_size)
            else:
                found = [face if isinstance(face, Face) else Face(face, None, 1.0) for face in known]
            return FoundFaces(found, face_pixels(image, [face.box for face in found], size))
        except Exception as error:
            return error

    items = zip(map(_loaded, images), repeat(None) if faces is None else faces, strict=False)
    threads = min(MAX_THREADS, torch.get_num_threads())
    yield from in_background(crop_faces, items, threads, ahead=2 * threads + 1)


def _loaded(image: Any) -> Any:
    """The same image; a PIL image is decoded here, because two threads must not decode one that is listed twice."""
    if isinstance(image, Image.Image):
        with suppress(Exception):  # `load_image` raises it again
            image.load()
    return image


# ---- the scorer


class FaceScorer(ModelMixin, ConfigMixin):
    """Scores faces like human raters do (Face Score, paper 4.4).

    The default sizes are those of the published model (446 million parameters). `score` and `score_crops` give plain
    numbers; `preprocess` and `forward` give rewards with gradients to the pixels.

    Args:
        vision_hidden_size, vision_layers, vision_heads, vision_intermediate: sizes of the ViT.
        image_size, patch_size: in pixels; `image_size` is a multiple of `patch_size`.
        text_hidden_size, text_layers, text_heads, text_intermediate: sizes of the BERT with cross attention.
        vocab_size, max_positions: sizes of its embedding tables.
        text_dropout: dropout of the BERT in training; the official ViT's stochastic depth is not ported.
        text_layer_norm_eps: epsilon of the BERT's layer norms; the ViT's is 1e-6 in every BLIP.
        reward_mean, reward_std: `forward` returns (reward - mean) / std; 0 and 1 for Face Score.
        prompt, prompt_token_ids: the default prompt and its tokens, [CLS] first and [SEP] last.

    `reference` (a `ScoreReference` or None) belongs to the weights: measure it again after changing them.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        vision_hidden_size: int = 1024,
        vision_layers: int = 24,
        vision_heads: int = 16,
        vision_intermediate: int = 4096,
        image_size: int = 224,
        patch_size: int = 16,
        text_hidden_size: int = 768,
        text_layers: int = 12,
        text_heads: int = 12,
        text_intermediate: int = 3072,
        vocab_size: int = 30524,
        max_positions: int = 512,
        text_dropout: float = 0.1,
        text_layer_norm_eps: float = 1e-12,
        reward_mean: float = 0.0,
        reward_std: float = 1.0,
        prompt: str = DEFAULT_PROMPT,
        prompt_token_ids: Sequence[int] = (101, 1037, 2227, 1012, 102),
    ):
        super().__init__()
        check_config(self.config)
        self.vision_model = vision_tower(self.config)
        self.text_model = text_tower(self.config)
        self.mlp = reward_head(text_hidden_size)
        self.reference: ScoreReference | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **kwargs: Any
    ) -> "FaceScorer":
        """Load a scorer, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder or a hub id; a local folder is looked at first. It holds
                what `save_pretrained` wrote, the official Face Score (`FS_model.pt` and `med_config.json`,
                there or in `FaceScore_model/`; hub id `OPPOer/FaceScore`), or ImageReward (`ImageReward.pt`
                and `med_config.json`).
            subfolder: where in that folder or repository.
            dtype: of the parameters; for official files float32 by default.
            kwargs: `cache_dir`, `revision`, `token`, `local_files_only`... for the hub; the rest goes to
                `ModelMixin.from_pretrained` (our own folders only).

        Raises:
            FileNotFoundError: neither a folder nor the hub gave anything, or the folder holds no scorer.
            ValueError: the weights are damaged, hold code, or belong to another model, with every missing,
                unexpected and misshapen tensor named; or `reference.json` is damaged.
        """
        source = pretrained_model_name_or_path
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = find_checkpoint_folder(source, subfolder, **hub_options)
        if (folder / cls.config_name).is_file():
            model = cls._from_own_folder(folder, **kwargs)
        else:
            official = find_official_checkpoint(folder)
            model = cls._from_official(*read_official_checkpoint(official), str(official.weights), **kwargs)
        model.register_to_config(_name_or_path=str(source))
        model.reference = ScoreReference.load(folder)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write `config.json`, the weights, and `reference.json` if there is a reference; see `ModelMixin`."""
        # before the weights, so that `push_to_hub` finds it
        Path(save_directory, REFERENCE_FILE).unlink(missing_ok=True)
        if self.reference is not None:
            self.reference.save(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _from_own_folder(cls, folder: Path, **kwargs: Any) -> "FaceScorer":
        try:
            found = dict(cls.load_config(folder)).get("_class_name")
        except Exception as error:
            raise ValueError(
                f"{folder / cls.config_name} is damaged ({first_line(error)}): copy or download it again"
            ) from error
        if found != cls.__name__:
            raise ValueError(f"{folder} holds the configuration of {found or 'another model'}, not of a {cls.__name__}")
        if not any(folder.glob("diffusion_pytorch_model*")):
            raise FileNotFoundError(f"no weights beside {folder / cls.config_name}: copy the folder whole")
        try:
            model, info = super().from_pretrained(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # all of them are reported below
                **{"use_safetensors": True, **kwargs},
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the weights in {folder} are truncated or no safetensors file: copy or train them again "
                f"({first_line(error)})"
            ) from error
        misshapen = [
            f"{name} is {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]
        ]
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected or misshapen:
            raise ValueError(describe_mismatch(str(folder), missing, unexpected, misshapen))
        return model

    @classmethod
    def _from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        config: dict[str, Any],
        source: str,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "FaceScorer":
        if kwargs:
            raise TypeError(
                f"{', '.join(sorted(kwargs))}: official files are loaded with `dtype` only; "
                f"save_pretrained them once, then load that folder with any option"
            )
        with init_empty_weights(include_buffers=False):
            model = cls(**config)
        # compared under the names in the file
        require_same_tensors(ours_to_official(model.state_dict()), ours_to_official(state_dict), source)
        model.load_state_dict(state_dict, strict=True, assign=True)
        return model.to(dtype or torch_dtype or torch.float32)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Rewards, with gradients to the pixels.

        Args:
            pixel_values: (B, 3, image_size, image_size), normalised by CLIP's mean and std; see `preprocess`.
            input_ids: (L,), (1, L) or (B, L) int64; the default prompt if None.
            attention_mask: as `input_ids`, 1 for a token and 0 for padding; needed if there is padding.

        Returns:
            (B,) in float32 at least.
        """
        image_features = self.encode_image(pixel_values)  # (B, 1 + patches, vision_hidden_size)
        batch = len(image_features)
        if input_ids is None:
            input_ids = torch.tensor(self.config.prompt_token_ids, device=image_features.device)
        features = self.text_model(
            input_ids=input_ids.expand(batch, -1),
            attention_mask=None if attention_mask is None else attention_mask.expand(batch, -1),
            encoder_hidden_states=image_features,
            is_decoder=False,
        ).last_hidden_state[:, 0]  # (B, text_hidden_size): [CLS]
        return (apply_head(self.mlp, features) - self.config.reward_mean) / self.config.reward_std

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """The vision tower: (B, 3, S, S) -> (B, 1 + patches, vision_hidden_size), normalised.

        Leading parts whose parameters are all frozen run without gradients, unless the pixels need them. The text
        tower's frozen layers cannot: they see the image through cross attention, so the trained vision layers get
        their gradients through them.
        """
        self._check_pixel_values(pixel_values)
        frozen = 0 if pixel_values.requires_grad else self.frozen_vision_parts
        hidden_states = pixel_values
        with torch.no_grad():
            for part in self.vision_parts[:frozen]:
                hidden_states = part(hidden_states)
        for part in self.vision_parts[frozen:]:
            hidden_states = part(hidden_states)
        return self.vision_model.post_layernorm(hidden_states)

    @property
    def vision_parts(self) -> list[nn.Module]:
        """The vision tower in its order: embeddings, layer 0, layer 1, ..."""
        return [self.vision_model.embeddings, *self.vision_model.encoder.layers]

    @property
    def frozen_vision_parts(self) -> int:
        """Number of leading parts of the vision tower that have nothing to train."""
        trained = [any(p.requires_grad for p in part.parameters()) for part in self.vision_parts]
        return trained.index(True) if True in trained else len(trained)

    def freeze(self, fraction: float = 0.7) -> list[str]:
        """Freeze the first layers of both towers, and train the rest (paper 4.4: 70%).

        Of each tower's n layers the first int(n * fraction) are frozen, with the embeddings if fraction > 0;
        the ViT's last normalisation and the head are always trained. At full size and 0.7 these are 16 of the
        24 vision layers and 8 of the 12 text layers. The official code freezes the same and, since its loop
        stops after the first match in the next layer, two more tensors: `blocks.16.norm1.weight` and
        `layer.8.attention.self.query.weight`.

        Args:
            fraction: in [0, 1]; 0 trains everything again.

        Returns:
            The names of the frozen parameters.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"`fraction` has to lie in [0, 1] but is {fraction}")
        self.requires_grad_(True)
        towers = (
            (self.vision_model.embeddings, self.vision_model.encoder.layers),
            (self.text_model.embeddings, self.text_model.encoder.layer),
        )
        for embeddings, layers in towers:
            embeddings.requires_grad_(fraction == 0)
            layers[: int(len(layers) * fraction)].requires_grad_(False)
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint
    ) -> None:
        """Set it for the vision tower only: the library's BLIP text model does not support it."""
        for layer in self.vision_model.encoder.layers:
            layer.gradient_checkpointing = enable
            layer._gradient_checkpointing_func = gradient_checkpointing_func

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        # the library's BLIP would crop the position embedding for a smaller image and score garbage
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"`pixel_values` has to be (B, 3, {size}, {size}) but is {tuple(pixel_values.shape)}: "
                f"`preprocess` makes it"
            )

    def preprocess(self, images: Any, boxes: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Crop, resize the shorter side to `image_size` (bicubic, antialiased), crop the centre, normalise.

        Images go through PIL, which is the reference. A tensor is processed in torch, differentiably; values outside
        of [-1, 1] are clamped. For 8-bit pixels it lies within 2/255 of the reference before the normalisation (0.03
        after it), because PIL rounds to 8 bits twice.

        Args:
            images: an image or a list of B (path, PIL image, array), or a tensor (B, 3, H, W) or (3, H, W) in [-1, 1].
            boxes: one (x0, y0, x1, y1) in pixels for each image, clamped to it; the whole image if None.

        Returns:
            (B, 3, image_size, image_size) float32, on the CPU for images, else on the tensor's device.

        Raises:
            ValueError: not as many boxes as images, or a box that is NaN, inverted or outside its image.
        """
        return preprocess(images, self.config.image_size, boxes)

    def score(
        self,
        images: Any,
        faces: Sequence[Any] | None = None,
        detector: str | Callable = "auto",
        min_confidence: float = 0.9,
        min_face_size: float = 20,
        batch_size: int = 32,
        prompt: str = DEFAULT_PROMPT,
    ) -> list[FaceScore] | list[list[FaceScore]]:
        """Find the faces of an image and score each.

        Args:
            images: an image (path, PIL image, array), or a list of images.
            faces: known faces, instead of a detector: the image's `Face`s or (x0, y0, x1, y1) boxes; for a list of
                images one such list each.
            detector, min_confidence, min_face_size: see `detect_faces`; not used with `faces`.
            batch_size: number of faces per forward pass.
            prompt: another prompt than the default needs a tokenizer; see `tokenize_prompt`.

        Returns:
            The faces with the best first; for a list of images a list of such lists. An image without a face gives an
            empty list.

        Raises:
            ValueError: a box that is NaN, inverted or outside its image.
            ImageError, FileNotFoundError: from `load_image`.
        """
        many = isinstance(images, (list, tuple))
        images, faces = (images, faces) if many else ([images], None if faces is None else [faces])
        scores = []
        each = self.score_each(images, faces, detector, min_confidence, min_face_size, batch_size, prompt)
        for index, found in enumerate(each):
            if isinstance(found, Exception):  # that of a box does not name its image
                raise ValueError(f"`images[{index}]`: {found}") if many and type(found) is ValueError else found
            scores.append(found)
        return scores if many else scores[0]

    def score_each(
        self,
        images: Iterable[Any],
        faces: Sequence[Sequence[Any]] | None = None,
        detector: str | Callable = "auto",
        min_confidence: float = 0.9,
        min_face_size: float = 20,
        batch_size: int = 32,
        prompt: str = DEFAULT_PROMPT,
    ) -> Iterator[list[FaceScore] | Exception]:
        """`score` for any number of images, of which some may fail.

        Images are read and searched in threads, ahead of the network, and a batch holds the faces of several images.
        Arguments as in `score`, but `images` is any iterable.

        Yields:
            For each image, in order, its faces with the best first, or the exception that it failed with.
        """
        settings = ScoreSettings(detector, min_confidence, min_face_size, batch_size, prompt)
        input_ids = self._prompt_ids(prompt)
        waiting, pixels, rewards = deque(), [], deque()  # images in order; faces to score; scores of the first faces
        for found in iter_faces(images, self.config.image_size, faces, settings):
            waiting.append(found)
            if not isinstance(found, Exception):
                pixels += found.pixels
            while len(pixels) >= batch_size or (pixels and len(waiting) >= MAX_WAITING * batch_size):
                rewards += self._rewards_or_errors(pixels[:batch_size], input_ids)
                del pixels[:batch_size]
            yield from self._completed(waiting, rewards, prompt)
        if pixels:
            rewards += self._rewards_or_errors(pixels, input_ids)
        yield from self._completed(waiting, rewards, prompt)

    def _completed(self, waiting: deque, rewards: deque, prompt: str) -> Iterator[list[FaceScore] | Exception]:
        """Remove the first waiting images, as long as all their faces have a reward, and yield their scores."""
        while waiting and (isinstance(waiting[0], Exception) or len(waiting[0].faces) <= len(rewards)):
            found = waiting.popleft()
            if not isinstance(found, Exception):
                own = [rewards.popleft() for _ in found.faces]
                errors = [reward for reward in own if isinstance(reward, Exception)]
                scores = zip(found.faces, own, strict=True)
                found = errors[0] if errors else [self._face_score(face, reward, prompt) for face, reward in scores]
            if not isinstance(found, Exception):
                found.sort(key=lambda score: score.score, reverse=True)
            yield found

    def _face_score(self, face: Face, reward: float, prompt: str) -> FaceScore:
        return FaceScore(reward, face.box, face.landmarks, face.confidence, self.percentile(reward, prompt))

    def percentile(self, score: float, prompt: str = DEFAULT_PROMPT) -> float | None:
        """The percentile of a score among the reference set's good faces, in [0, 100]; see `FaceScore`."""
        if self.reference is None or prompt != self.config.prompt:
            return None
        return self.reference.percentile(score)

    def score_crops(self, crops: Iterable[Any], batch_size: int = 32, prompt: str = DEFAULT_PROMPT) -> list[float]:
        """Score images that are face crops already, in their order.

        crops: paths, PIL images or arrays; any iterable, read in batches.
        """
        settings, input_ids = ScoreSettings(batch_size=batch_size), self._prompt_ids(prompt)
        crops, rewards = iter(crops), []
        while batch := list(itertools.islice(crops, settings.batch_size)):
            rewards += self._rewards(self.preprocess(batch).to(self.device), input_ids)
        return rewards

    def _rewards_or_errors(self, faces: list[Tensor], input_ids: Tensor) -> list[float | Exception]:
        """The rewards of a batch of (3, S, S) uint8 faces; if it fails, as for lack of memory, those of its halves."""
        try:
            return self._rewards(normalise(torch.stack(faces).to(self.device)), input_ids)
        except Exception as error:
            failure = error.with_traceback(None)  # which holds the tensors of the failed pass
        if len(faces) == 1:
            return [failure]
        middle = len(faces) // 2
        return [
            *self._rewards_or_errors(faces[:middle], input_ids),
            *self._rewards_or_errors(faces[middle:], input_ids),
        ]

    def _rewards(self, pixel_values: Tensor, input_ids: Tensor) -> list[float]:
        with _evaluating(self), torch.inference_mode():
            rewards = self(pixel_values, input_ids).tolist()
        if not all(map(math.isfinite, rewards)):
            raise ValueError(f"a reward is not finite: the network overflowed in {self.dtype}, use float32")
        return rewards

    def _prompt_ids(self, prompt: str) -> Tensor:
        """The tokens (L,) of a prompt on the model's device; those of the default prompt are in the configuration."""
        default = prompt == self.config.prompt
        ids = list(self.config.prompt_token_ids) if default else tokenize_prompt(prompt)
        require_known(ids, self.config, prompt)
        return torch.tensor(ids, device=self.device)


def empty_scorer(name: str | Path) -> FaceScorer:
    """Build a scorer by the config in a folder, by any other name of the published sizes, to plan with."""
    folder = Path(name)
    sizes = FaceScorer.load_config(folder) if (folder / FaceScorer.config_name).is_file() else {}
    return FaceScorer.from_config(sizes).eval()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in its former mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

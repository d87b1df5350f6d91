"""Networks that judge an image, each ready to be used on this machine: for `measures` and for human evaluation alike.

    judge = reward_metric("IR", REWARD_ID, "`hf download THUDM/ImageReward`", FaceScorer.from_pretrained)
    judge.load()(image, "a man in a suit", None)               # judge.by names the weights

Nothing is downloaded: a metric whose library or weights are missing raises `MetricUnavailable` when it is made, which
names the commands that get them. LocalX is X on the crop of the face with the prompt "A face" (Face Score, 4.3; for
LocalIR "A face.", as in the official code).
"""

import contextlib
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from faceprior.align import align_face
from faceprior.detect import Detector, Face, crop_bounds, resolve_detector
from faceprior.files import content_mark
from faceprior.metrics import MetricUnavailable
from faceprior.models import REWARD_ID, SCORER_ID, resolve_device

if TYPE_CHECKING:
    import torch

    from faceprior.scorer import FaceScorer

FACE_PROMPT = "A face"
TOKENIZER = "bert-base-uncased"  # as `blip`, which loads transformers
_TOKENIZER_WAY_OUT = f"`hf download {TOKENIZER} config.json tokenizer.json tokenizer_config.json vocab.txt`"
HPS_V2_ID, HPS_V2_FILE = "xswu/HPSv2", "HPS_v2_compressed.pt"


# architecture in open_clip, and how an image becomes a square: its middle, or padded with black
HPS_V1, HPS_V2 = ("ViT-L-14-quickgelu", "shortest"), ("ViT-H-14", "longest")

# the files that pyiqa loads; its cache keeps the file names of the addresses
_PYIQA_URL = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/"

_FACEXLIB_URL = "https://github.com/xinntao/facexlib/releases/download/"

_CLIP_URL = "https://openaipublic.azureedge.net/clip/models/"

_CLIP_FILE = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"

_AESTHETIC = "sac%2Blogos%2Bava1-l14-linearMSE.pth"

_FACE_QUALITY = "topiq_nr_cgfiqa_res50-0a8b8e4f.pth"

_FACE_PARTS = ("v0.1.0/detection_Resnet50_Final.pth", "v0.2.2/parsing_parsenet.pth")

_QUALITY = {  # of pyiqa's default models, all on KonIQ-10k
    "musiq": "musiq_koniq_ckpt-e95806b9.pth",
    "maniqa": "ckpt_koniq10k.pt",
}

_MANIQA_BACKBONE = "timm/vit_base_patch8_224.augreg2_in21k_ft_in1k"  # it is replaced by the checkpoint, but asked for

_CLIPIQA_FILE = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt"

CLIP_ID = "openai/clip-vit-base-patch16"

ARCFACE_FILES = ("antelopev2/glintr100.onnx", "buffalo_l/w600k_r50.onnx")  # below ~/.insightface/models

Score = Callable[[Image.Image, str, Face | None], float]


@dataclass(frozen=True)
class Metric:
    """A metric that can be measured here.

    by: the weights and the detector, if it uses one; rows of other weights are not mixed with its own. load: returns
    the function (image, prompt, face) -> score; the face is None where the metric does not need one.
    """

    name: str
    by: str
    load: Callable[[], Score]
    needs_face: bool = False


@dataclass(frozen=True)
class Weights:
    """Where weights are. face_score: folder, hub id or `tiny`; image_reward: folder or hub id; hps, hps_v2: files."""

    face_score: str = SCORER_ID
    image_reward: str = REWARD_ID
    hps: Path | None = None
    hps_v2: Path | None = None


def available_metrics(weights: Weights, detector: str, device: str) -> dict[str, Callable[[], Metric]]:
    """Return what can be tried by name, in an order in which two metrics of one model follow each other.

    Each raises MetricUnavailable where its library or weights are missing; a detector that does not load fails the
    metrics of the face alone.
    """
    device = resolve_device(device)
    find = functools.partial(resolve_detector, detector)
    load_scorer = _scorer_loader(device)
    score = (_folder_of(weights.face_score), f"`hf download {SCORER_ID}`, or `--checkpoint FOLDER`", load_scorer)
    reward = (
        weights.image_reward,
        f"`hf download {REWARD_ID}`, or `--image-reward FOLDER`, in stage 7 `--weights image_reward=FOLDER`",
        load_scorer,
    )
    hps = (
        weights.hps,
        "`--hps FILE`, in stage 7 `--weights hps=FILE`, the classifier hpc.pt of https://github.com/tgxs002/align_sd",
        HPS_V1,
        device,
    )
    hps_v2 = weights.hps_v2 or in_hub_cache(HPS_V2_ID, HPS_V2_FILE)
    hps_v2 = (
        hps_v2,
        f"`hf download {HPS_V2_ID} {HPS_V2_FILE}`, or `--hps-v2 FILE`, in stage 7 `--weights hps_v2=FILE`",
        HPS_V2,
        device,
    )
    return {
        "FS": lambda: reward_metric("FS", *score, find()),
        "IR": lambda: reward_metric("IR", *reward),
        "LocalIR": lambda: reward_metric("LocalIR", *reward, find()),
        "HPS": lambda: clip_metric("HPS", *hps),
        "LocalHPS": lambda: clip_metric("LocalHPS", *hps, find()),
        "HPSv2": lambda: clip_metric("HPSv2", *hps_v2),
        "ASP": lambda: aesthetic_metric(device),
        "topiq_nr-face": lambda: face_quality_metric(device, find()),
    }


def _folder_of(checkpoint: str) -> str:
    if checkpoint != "tiny":
        return checkpoint
    from faceprior import tiny

    print(f"FS: {tiny.NOTICE}", file=sys.stderr)
    return tiny.resolve(checkpoint, "scorer")


def _scorer_loader(device: "torch.device") -> Callable[[str], "FaceScorer"]:
    @functools.lru_cache(maxsize=1)
    def load(folder: str) -> "FaceScorer":
        from faceprior.scorer import FaceScorer

        return FaceScorer.from_pretrained(folder).to(device)

    return load


# --- ImageReward and Face Score


def reward_metric(
    name: str,
    source: str,
    way_out: str,
    load_scorer: Callable[[str], Any],
    detector: Detector | None = None,
) -> Metric:
    """A BLIP reward (Face Score or ImageReward) on the face with the default prompt, or on the image and its prompt.

    source: folder or hub id of the scorer. way_out: how to get it. load_scorer: folder -> `FaceScorer`. detector: finds
    the faces; without one the whole image is scored.

    Raises MetricUnavailable without the weights, or without the tokenizer that other prompts than the default need.
    """
    from faceprior.blip import tokenize_prompt
    from faceprior.convert import find_official_checkpoint

    try:
        folder = scorer_folder(source, way_out)
    except MetricUnavailable as error:
        if detector or _cached_tokenizer():
            raise
        raise MetricUnavailable(f"{error}, and the tokenizer {TOKENIZER} ({_TOKENIZER_WAY_OUT})") from None
    tokenizer = None if detector else _tokenizer_folder(folder)

    def load() -> Score:
        scorer = load_scorer(str(folder))

        def score(image: Image.Image, prompt: str, face: Face | None) -> float:
            if face is not None:
                return scorer.score_crops([_crop(image, face)])[0]
            return _reward(scorer, image, tokenize_prompt(prompt, tokenizer))

        return score

    official = find_official_checkpoint(folder)
    weights = official.weights if official else sorted(folder.glob("diffusion_pytorch_model*.safetensors"))[0]
    called = "/".join(folder.resolve().parts[-2:]) if Path(source).is_dir() else source
    return Metric(name, _by(called, weights, detector), load, needs_face=detector is not None)


def scorer_folder(source: str, way_out: str) -> Path:
    """Return the folder of a scorer's weights, found without a network."""
    from faceprior.convert import find_checkpoint_folder, find_official_checkpoint

    try:
        folder = find_checkpoint_folder(source, local_files_only=True)
    except FileNotFoundError:
        raise MetricUnavailable(f"it needs the weights {source} ({way_out})") from None
    if find_official_checkpoint(folder) is None and not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        raise MetricUnavailable(f"it needs weights, but {folder} holds none ({way_out})")
    return folder


def _tokenizer_folder(folder: Path) -> Path:
    """Return the folder of BERT's tokenizer: beside the weights, or in the hub's cache."""
    if (folder / "vocab.txt").is_file():
        return folder
    if (cached := _cached_tokenizer()) is None:
        raise MetricUnavailable(f"it needs the tokenizer {TOKENIZER} ({_TOKENIZER_WAY_OUT})")
    return cached.parent


def _cached_tokenizer() -> Path | None:
    return in_hub_cache(TOKENIZER, "vocab.txt") or in_hub_cache(TOKENIZER, "tokenizer.json")


def _reward(scorer: Any, image: Image.Image, token_ids: list[int]) -> float:
    import torch

    with torch.inference_mode():
        input_ids = torch.tensor([token_ids], device=scorer.device)
        return float(scorer(scorer.preprocess(image).to(scorer.device), input_ids))


# --- HPS


def clip_metric(
    name: str,
    weights: Path | None,
    way_out: str,
    model: tuple[str, str],
    device: "torch.device | str",
    detector: Detector | None = None,
) -> Metric:
    """HPS: the cosine of an image and its prompt in a fine-tuned CLIP, through open_clip; or of a face and "A face".

    weights: the published checkpoint, None if there is none. way_out: how to get it. model: HPS_V1 or HPS_V2 (arXiv
    2303.14420 and 2306.09341, as in their official codes), or another architecture and resize mode of open_clip.
    detector: finds the faces; without one the whole image is scored.

    Raises MetricUnavailable without open_clip or the weights.
    """
    require("open_clip", "open_clip_torch", {weights: way_out})

    def load() -> Score:
        clip, transform, tokenize = _open_clip(weights, *model, str(device))
        text = functools.cache(lambda prompt: clip.encode_text(tokenize([prompt]).to(device), normalize=True))

        def score(image: Image.Image, prompt: str, face: Face | None) -> float:
            import torch

            seen, prompt = (image, prompt) if face is None else (_crop(image, face), FACE_PROMPT)
            with torch.inference_mode():
                features = clip.encode_image(transform(seen)[None].to(device), normalize=True)
                return float(features @ text(prompt).T)

        return score

    return Metric(name, _by(weights.name, weights, detector), load, needs_face=detector is not None)


@functools.lru_cache(maxsize=1)  # HPS and LocalHPS come one after the other
def _open_clip(weights: Path, architecture: str, resize_mode: str, device: str) -> tuple[Any, Callable, Callable]:
    import open_clip

    clip, _, transform = open_clip.create_model_and_transforms(
        architecture,
        pretrained=str(weights),  # loaded strictly, and as tensors only
        device=device,
        image_resize_mode=resize_mode,
    )
    return clip.eval(), transform, open_clip.get_tokenizer(architecture)


def clip_score_metric(source: str, device: "torch.device | str") -> Metric:
    """CLIP-Score: max(cosine, 0) of an image and its prompt in OpenAI's CLIP (Hessel et al., arXiv 2104.08718, Eq. 1).

    The paper's factor of 2.5 is left out: Face Score's Table 5 prints cosines (0.31), torchmetrics' is 100 times as
    much. source: folder or hub id of a transformers CLIP; a ViT-B/16 gives about such values, ViT-L/14 lower ones.
    Prompts are cut at CLIP's 77 tokens. Raises MetricUnavailable without the weights.
    """
    folder = Path(source) if Path(source).is_dir() else getattr(in_hub_cache(source, "config.json"), "parent", None)
    files = [file for end in ("safetensors", "bin") for file in sorted(folder.glob(f"*.{end}"))] if folder else []
    weights = next(iter(files), None)
    if weights is None:
        others = '--exclude "*.h5" --exclude "*.msgpack"'  # the same weights of other frameworks
        way_out = f"`hf download {source} {others}`, or `--weights clip=FOLDER`"
        raise MetricUnavailable(f"it needs the weights {source} ({way_out})")

    def load() -> Score:
        import torch
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(folder).to(device).eval()
        processor = CLIPProcessor.from_pretrained(folder)
        length = {"truncation": True, "max_length": model.config.text_config.max_position_embeddings}

        def score(image: Image.Image, prompt: str, face: Face | None) -> float:
            inputs = processor(text=[prompt], images=[image], return_tensors="pt", **length).to(device)
            with torch.inference_mode():
                found = model(**inputs)
            return max(0.0, float((found.image_embeds * found.text_embeds).sum()))  # both have length 1

        return score

    called = "/".join(folder.resolve().parts[-2:]) if Path(source).is_dir() else source
    return Metric("CLIP-Score", _by(called, weights, None), load)


# --- pyiqa


def quality_metric(name: Literal["musiq", "maniqa", "clipiqa"], device: "torch.device | str") -> Metric:
    """MUSIQ (0 to 100), MANIQA or CLIPIQA (0 to 1) of the whole image, by pyiqa's default models.

    CLIPIQA is CLIP's RN50 with pyiqa's five pairs of prompts, without weights of its own. MANIQA looks at 20
    evenly spaced crops of 224 pixels. Raises MetricUnavailable without pyiqa or the weights: offline
    pyiqa itself would retry for 47 s.
    """
    import torch

    clip = Path(torch.hub.get_dir(), "clip", Path(_CLIPIQA_FILE).name)
    files = {} if name == "clipiqa" else _in_cache(_PYIQA_URL, _QUALITY[name])
    needed: dict[Path | None, str] = {clip: _curl(clip, _CLIP_URL + _CLIPIQA_FILE)} if name == "clipiqa" else {**files}
    if name == "maniqa":
        name_in_hub = (_MANIQA_BACKBONE, "model.safetensors")
        needed[in_hub_cache(*name_in_hub) or Path(*name_in_hub)] = f"`hf download {_MANIQA_BACKBONE} model.safetensors`"
    require("pyiqa", "pyiqa", needed)

    def load() -> Score:
        if name == "clipiqa" and _sha256(clip) != _CLIPIQA_FILE.split("/")[0]:
            raise MetricUnavailable(f"{_short(clip)} is damaged: {_curl(clip, _CLIP_URL + _CLIPIQA_FILE)}")
        metric = _pyiqa(name, files, device)
        return lambda image, prompt, face: metric(image)

    return Metric(name, _by(f"pyiqa's {name}", next(iter(needed)), None), load)


def aesthetic_metric(device: "torch.device | str") -> Metric:
    """ASP: the LAION aesthetic predictor, pyiqa's `laion_aes`, on the whole image; about 1 to 10.

    Raises MetricUnavailable without pyiqa or its weights.
    """
    clip = Path("~/.cache/clip").expanduser() / Path(_CLIP_FILE).name
    files = _in_cache(_PYIQA_URL, _AESTHETIC)
    require("pyiqa", "pyiqa", {clip: _curl(clip, _CLIP_URL + _CLIP_FILE)} | files)

    def load() -> Score:
        if _sha256(clip) != _CLIP_FILE.split("/")[0]:  # its own loader would download it again
            raise MetricUnavailable(f"{_short(clip)} is damaged: {_curl(clip, _CLIP_URL + _CLIP_FILE)}")
        metric = _pyiqa("laion_aes", files, device)
        return lambda image, prompt, face: metric(image)

    return Metric("ASP", _by("pyiqa's laion_aes", next(iter(files)), None), load)


def face_quality_metric(device: "torch.device | str", detector: Detector) -> Metric:
    """pyiqa's face quality `topiq_nr-face`, on the face aligned to 512 pixels as in FFHQ; about 0 to 1.

    pyiqa itself would take the face in the middle; here it is the representative one, as for all metrics. This is not
    the paper's FQA. Raises MetricUnavailable without pyiqa or its weights.
    """
    files = _in_cache(_PYIQA_URL, _FACE_QUALITY) | _in_cache(_FACEXLIB_URL, *_FACE_PARTS)
    require("pyiqa", "pyiqa", files)

    def load() -> Score:
        # the backbone is in the checkpoint, which is loaded strictly
        metric = _pyiqa("topiq_nr-face", files, device, align_crop_face=False, backbone_pretrain=False)
        return lambda image, prompt, face: metric(align_face(image, face.landmarks, 512).crop)

    by = _by("pyiqa's topiq_nr-face", next(iter(files)), detector)
    return Metric("topiq_nr-face", by, load, needs_face=True)


def portrait_metric(name: str, device: str, detector: str) -> Metric:
    """The quality of a portrait's face by `topiq_nr-face`, or by another learned measure on the face aligned to 512."""
    if name == "topiq_nr-face":
        return face_quality_metric(resolve_device(device), resolve_detector(detector))
    whole = quality_metric(name, resolve_device(device))

    def load() -> Score:
        score = whole.load()
        return lambda image, prompt, face: score(align_face(image, face.landmarks, 512).crop, prompt, None)

    return replace(whole, load=load, needs_face=True)


def _pyiqa(
    name: str, files: Mapping[Path, str], device: "torch.device | str", **options: Any
) -> Callable[[Image.Image], float]:
    import torch

    for path, way_out in files.items():  # pyiqa would unpickle whatever they hold
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise MetricUnavailable(f"{_short(path)} is damaged or holds more than tensors: {way_out}") from error
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it loads
        import pyiqa

        metric = pyiqa.create_metric(name, device=torch.device(device), **options)

    def score(image: Image.Image) -> float:
        from torchvision.transforms.functional import to_tensor

        return float(metric(to_tensor(image)[None]))

    return score


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(functools.partial(file.read, 2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _in_cache(url: str, *names: str) -> dict[Path, str]:
    """Return the paths of pyiqa's files -> how to get them."""
    import torch

    folder = Path(torch.hub.get_dir(), "pyiqa")
    return {folder / Path(name).name: _curl(folder / Path(name).name, url + name) for name in names}


def _curl(path: Path, url: str) -> str:
    return f"`curl -L --create-dirs -o {_short(path)} {url}`"


def _short(path: Path) -> str:
    """Return a path with ~ for the home folder: tables are shared with others."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


# --- ArcFace


_ARCFACE_POINTS = np.array(  # where ArcFace has the five landmarks in its 112 pixels
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def arcface_network(weights: str = "") -> Callable[[Image.Image, Face], "np.ndarray"]:
    """ArcFace (arXiv 1801.07698) by insightface's ONNX file: (image, face) -> embedding of length 1.

    weights: the file; empty: that of antelopev2, or of buffalo_l, in ~/.insightface/models. onnxruntime runs it.
    Raises MetricUnavailable without onnxruntime or the file.
    """
    path = arcface_file(weights)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
    name = session.get_inputs()[0].name

    def embed(image: Image.Image, face: Face) -> np.ndarray:
        crop = image.transform((112, 112), Image.AFFINE, _to_image(face.landmarks).ravel(), Image.BILINEAR)
        pixels = np.asarray(crop, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1  # (1, 3, 112, 112), RGB in [-1, 1]
        (vector,) = session.run(None, {name: pixels})[0]
        return vector / np.linalg.norm(vector)

    return embed


def arcface_file(weights: str = "") -> Path:
    """Return the ONNX file of `arcface_network`, with its errors."""
    folder = Path("~/.insightface/models").expanduser()
    choices = [Path(weights).expanduser()] if weights else [folder / name for name in ARCFACE_FILES]
    path = next((file for file in choices if file.is_file()), choices[0])
    url = "https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip"
    zipped = _short(folder / "antelopev2.zip")
    way_out = f"{_curl(folder / 'antelopev2.zip', url)[:-1]} && unzip -d {_short(folder)} {zipped}`"
    require("onnxruntime", "onnxruntime", {path: way_out})
    return path


def _to_image(landmarks: np.ndarray) -> np.ndarray:
    """The similarity (2, 3) from ArcFace's crop to the image, by least squares over the five landmarks."""
    (x, y), one, zero = _ARCFACE_POINTS.T, np.ones(5), np.zeros(5)
    equations = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])  # (10, 4)
    a, b, dx, dy = np.linalg.lstsq(equations, np.asarray(landmarks, np.float64).T.ravel(), rcond=None)[0]
    return np.array([[a, -b, dx], [b, a, dy]])


# --- shared by the metrics


def require(module: str, package: str, files: Mapping[Path | None, str]) -> None:
    """Check that a library and files (path -> how to get it) exist, before anything is imported.

    Raises MetricUnavailable with all that is missing.
    """
    missing = [
        f"{_short(path) if path else 'its checkpoint'} ({way_out})"
        for path, way_out in files.items()
        if path is None or not path.is_file()
    ]
    if importlib.util.find_spec(module) is None:
        missing.insert(0, f"the package {package} (`pip install {package}`)")
    if missing:
        raise MetricUnavailable(f"it needs {', '.join(missing)}")


def in_hub_cache(repository: str, file: str) -> Path | None:
    """Return a file of the hub's cache, None if it was not downloaded."""
    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def _crop(image: Image.Image, face: Face) -> Image.Image:
    return image.crop(crop_bounds(face.box, *image.size))


def _by(source: str, weights: Path, detector: Detector | None) -> str:
    """Return the `by` of a metric: the weights with the mark of what their file holds, and the detector."""
    return f"{source} ({content_mark(weights)})" + (f", faces by {detector.name}" if detector else "")

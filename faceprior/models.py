"""Models by name: local path or hub id -> folder; the ids of the published models; device, dtype, quantization.

The module imports no torch, diffusers, transformers or huggingface_hub before it needs them, so that a command line can
name a default without loading a library.
"""

from __future__ import annotations

import logging
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faceprior.files import WEIGHTS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
SCORER_ID = "OPPOer/FaceScore"
REWARD_ID = "THUDM/ImageReward"
RESTORER_ID = "Ethanliang99/AuthFace"
DEFAULT_PROMPT = "A face."  # what Face Score's text encoder reads, and what a face without a caption is inpainted by

# What a hub download takes besides the id.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What is downloaded of one model: configs, vocabularies and weights; fp16 variants only where there is nothing else.
MODEL_FILES = (
    "*.json",
    "*.txt",
    "model.safetensors",
    "model-0*.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-0*.safetensors",
)
# The names that diffusers and transformers give to weights: `model.fp16-00001-of-00002.safetensors`.
_WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
)
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
QUANTIZATIONS = ("none", "8bit", "nf4")
# The folders of the stages: a name in them is never a hub id.
_OUTPUTS = ("checkpoints/", "data/", "results/")


# ---- name -> folder


def resolve_model(
    name: str | Path,
    what: str,
    hint: str,
    *,
    required: tuple[str, ...] = ("config.json",),
    subfolder: str | None = None,
    patterns: tuple[str, ...] = MODEL_FILES,
    download: Callable[..., str | Path] | None = None,
    **hub_options: Any,
) -> Path:
    """Return the folder of a model by its name. Every class and command follows this rule:

    1. A local folder that exists is taken.
    2. A name that looks like a path and does not exist is an error; the hub is not asked.
    3. Any other name is a hub id. The hub is asked once what is new; where there is no network, its cache is taken.

    what, hint: for the errors: the kind of model, and where to get one.
    required: files of which the folder must hold at least one.
    subfolder: where the model lies in the folder or repository; part of the result.
    patterns: the files to download of a repository.
    download: replaces `snapshot_download` of these patterns; called with the id and `hub_options`, it returns the
        repository's folder.
    hub_options: any of HUB_OPTIONS.

    Raises FileNotFoundError if the path, the id or every one of the required files is missing, ValueError if `name` is
    a file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"the {what} {name} is a file: give the folder that holds it")
    if path.is_dir():
        root = path
    elif looks_like_path(name):
        raise FileNotFoundError(f"no {what} at {name}: the path does not exist; {hint}")
    else:
        root = _hub_folder(str(name), what, hint, download or _downloader(patterns, subfolder), hub_options)

    folder = root / (subfolder or "")
    if any((folder / file).is_file() for file in required):
        return folder
    names = " or ".join(Path(subfolder or "", file).as_posix() for file in required)
    raise FileNotFoundError(f"no {what} in {root}: there is no {names}; {hint}")


def looks_like_path(name: str | Path) -> bool:
    """Tell a path from a hub id, which is `owner/name`, or only `name` for the oldest models."""
    return (
        isinstance(name, Path)
        or name.startswith((".", "/", "~", *_OUTPUTS))
        or name.count("/") > 1
        or "\\" in name
        or Path(name).suffix.lower() in WEIGHTS
    )


def _hub_folder(name: str, what: str, hint: str, download: Callable, options: dict[str, Any]) -> Path:
    try:
        return Path(download(name, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no {what} {name!r}: there is no such folder, and the hub did not provide it (offline, gated, or a wrong "
            f"id). Download it where there is a network (`hf download {name} --local-dir FOLDER`) and give the folder; "
            f"{hint}"
        ) from error


def _downloader(patterns: tuple[str, ...], subfolder: str | None) -> Callable[..., Path]:
    from huggingface_hub import snapshot_download

    patterns = [Path(subfolder or "", pattern).as_posix() for pattern in patterns]
    half = [re.sub(r"model(?=[^/]*$)", "model.fp16", p, count=1) for p in patterns if p.endswith(".safetensors")]

    def download(name: str, **options) -> Path:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
        parts = [config.parent for config in folder.rglob("config.json")]
        if any(weights_variant(part) is None for part in parts):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, *half], **options))
        return folder

    return download


# ---- folder -> model


def load_part(
    model_class: type,
    name: str | Path,
    what: str,
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
    required: tuple[str, ...] = ("config.json",),
) -> Any:
    """Load one part of a model by its class from diffusers or transformers; `name` as in `resolve_model`.

    dtype: of the weights, float32 if None; ignored by parts without weights (schedulers, tokenizers).

    Raises FileNotFoundError if there is no such part, ValueError if its files are damaged or lack weights.
    """
    import torch

    hint = "a folder that `save_pretrained` wrote, or a hub id, is expected"
    folder = resolve_model(name, what, hint, required=required, subfolder=subfolder)
    try:
        if not issubclass(model_class, torch.nn.Module):
            return model_class.from_pretrained(folder)
        variant = weights_variant(folder)
        if variant:
            logger.info("%s: loaded from its %s weights, there are no others", what, variant)
        model = model_class.from_pretrained(folder, dtype=dtype or torch.float32, variant=variant or None)
        require_weights(what, model)
    except Exception as error:  # the libraries raise classes of their own for damaged files, and bare Exceptions
        raise ValueError(
            f"the {what} in {folder} is damaged: {first_line(error)}: copy or download it again"
        ) from error
    return model


def weights_variant(folder: Path) -> str | None:
    """Return the variant of the weights to load from a part's folder: empty for the plain files, which come first.

    Else fp16, or another that is there. None if there are no weights.
    """
    matches = (_WEIGHT_FILE.fullmatch(path.name) for path in Path(folder).glob("*"))
    variants = {match[1] or "" for match in matches if match}
    return min(variants, key=lambda variant: (variant != "", variant != "fp16", variant), default=None)


@contextmanager
def as_safetensors(path: Path) -> Iterator[Path]:
    """Give a `.safetensors` file under a name in lower case: the libraries take `.SAFETENSORS` for a pickle."""
    if path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, path.stem + ".safetensors")
        link.symlink_to(path.resolve())
        yield link


def require_weights(what: str, model: torch.nn.Module) -> None:
    """Raise ValueError for a model that diffusers loaded without some of its weights."""
    missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"the weights of {what} lack {', '.join(missing[:3])} ({len(missing)} in all)")


def differing_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that only one of two models has, or in another shape than the other."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (one, other)]
    return [name for name in sorted(one.keys() | other.keys()) if shapes[0].get(name) != shapes[1].get(name)]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: the libraries' go on for pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quiet_libraries() -> None:
    """Keep the model libraries' loading bars and warnings off the screen; errors still show."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def library_versions() -> dict[str, str]:
    """Return the versions of Python, faceprior and the model libraries, by name."""
    import faceprior

    found = {"python": platform.python_version(), "faceprior": faceprior.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---- device and dtype


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device for `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`; ValueError if it is missing."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` has to be auto, cpu, cuda or cuda:N but is {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() if torch.cuda.is_available() else "no"
        raise ValueError(f"`device` is {name} but this machine has {found} CUDA device(s): use `--device cpu` or auto")
    return device


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of frozen modules under `no`, `fp16` or `bf16`."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device of a module's first weight; diffusers' `.device` searches all modules for offloading first."""
    return next(module.parameters()).device


@contextmanager
def placed(models: Iterable[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Keep models on `device`; at the end they are where they were."""
    places = [(model, model.device) for model in models]
    try:
        for model, _ in places:
            model.to(device)
        yield
    finally:
        for model, place in places:
            if model.device != place:
                model.to(place)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor; from the CPU to a GPU by way of pinned memory, so that the program need not wait for the GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def precision_of(dtype: torch.dtype) -> str:
    """Return `no`, `fp16` or `bf16`, of which `weight_dtype` is this dtype."""
    return next(name for name in ("no", "fp16", "bf16") if weight_dtype(name) == dtype)


# ---- quantization


def quantize(module: torch.nn.Module, quantization: str) -> torch.nn.Module:
    """Freeze a network's `quantizable` layers in `8bit` or `nf4`, in place, one by one; `none` changes nothing.

    `8bit` takes half of the memory of 16-bit weights, `nf4` a good quarter: see `quantization.quantized_bytes`.
    Gradients pass through the layers, and peft puts a LoRA beside them. So that the full weights need not fit on a GPU,
    quantize first and move then.
    """
    require_quantization(quantization)
    if quantization == "none":
        return module
    from faceprior.quantization import quantized

    for name in quantizable(module):
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, quantized(module.get_submodule(name), quantization))
    # by these peft and diffusers know such a network
    module.is_loaded_in_8bit, module.is_loaded_in_4bit = quantization == "8bit", quantization == "nf4"
    return module


def quantizable(module: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers that `quantize` takes, which in the published networks are nearly all.

    Left as they are: layers that the network's class keeps in float32 (the `wo` of T5, which overflows), those whose
    number of inputs is no multiple of 64 (bitsandbytes' blocks, which its CPU code gets wrong across rows), and
    subclasses, such as attention's, whose weights others read.
    """
    import torch

    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    layers = ((name, layer) for name, layer in module.named_modules() if type(layer) is torch.nn.Linear)
    return [name for name, layer in layers if layer.in_features % 64 == 0 and not kept & set(name.split("."))]


def require_quantization(name: str) -> None:
    """Raise ValueError for a name that `quantize` does not know."""
    if name not in QUANTIZATIONS:
        raise ValueError(f"`quantization` has to be one of {', '.join(QUANTIZATIONS)} but is {name!r}")


def require_trainable(train: str, quantization: str) -> None:
    """Raise ValueError if the weights that are to be trained are quantized."""
    if quantization != "none" and train != "lora":
        raise ValueError(
            f"`train` is {train} and `quantization` {quantization}, but quantized weights cannot be trained: use lora, "
            "or no quantization"
        )


def quantization_of(module: torch.nn.Module) -> str:
    """Return how a network's layers are quantized, by `quantize` or by a loader of diffusers' or transformers'."""
    loaded = {"8bit": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}
    return next((name for name, flag in loaded.items() if getattr(module, flag, False)), "none")

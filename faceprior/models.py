"""Models by name: the ids of the published ones, the device and the dtype they run in.

The module itself imports no torch, so that a command line can name a default without loading a library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCORER_ID = "OPPOer/FaceScore"
REWARD_ID = "THUDM/ImageReward"
RESTORER_ID = "Ethanliang99/AuthFace"
DEFAULT_PROMPT = "A face."  # what Face Score's text encoder reads, and what a face without a caption is inpainted by


def quiet_libraries() -> None:
    """Keep the model libraries' loading bars and warnings off the screen; errors still show."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device for `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`; ValueError if it is not there."""
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
    """Return the dtype in which frozen modules run under `no`, `fp16` or `bf16`."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]

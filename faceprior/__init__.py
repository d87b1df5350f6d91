"""Better faces from diffusion models, on one GPU: score them, tune a model with pairs, restore photographs.

`FaceScorer`, `GuidanceTuner` and `AuthFaceRestorer` are loaded on first use: importing faceprior loads no torch.
"""

import logging
from importlib import import_module

__version__ = "0.1.0"
__all__ = ["AuthFaceRestorer", "FaceScorer", "GuidanceTuner"]

# peft imports bitsandbytes, which warns on every start about a CPU kernel package that nothing here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_MODULES = {"FaceScorer": "scorer", "GuidanceTuner": "guidance", "AuthFaceRestorer": "restorer"}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

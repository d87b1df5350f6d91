"""What a run began with beside its settings, in short texts: they are kept with it, and have to be the same later on.

Cheap enough for every start: of weights some values are compared, of files their sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

_VALUES = 64  # of each tensor


def describe_samples(dataset) -> str:
    """Return the number of a dataset's samples, and a hash of what they are: `7 samples (1f2e3d4c)`.

    The hash is of `dataset.source(index)` of all samples, as the cache's (see `cache_dataset`), where a file stands for
    its size: whatever its folder is called, and whenever it was written. A dataset without `source` has no hash.
    """
    number = f"{len(dataset)} sample{'s' if len(dataset) != 1 else ''}"
    if not hasattr(dataset, "source"):
        return number
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        source = json.dumps(dataset.source(index), sort_keys=True, default=lambda file: Path(file).stat().st_size)
        digest.update(source.encode())
    return f"{number} ({digest.hexdigest()[:8]})"


def describe_weights(tensors: Iterable[Tensor]) -> str:
    """Return the number of tensors, and a hash of their shapes and of some values of each: `1680 tensors (1f2e3d4c)`.

    The values are evenly spaced, so that every fine-tuning shows. Those of quantized weights, which may depend on the
    device, do not count.
    """
    digest, number = hashlib.sha256(), 0
    for tensor in (tensor.detach() for tensor in tensors if tensor.is_floating_point()):
        some = tensor.flatten()[:: max(1, tensor.numel() // _VALUES)]
        digest.update(str(tuple(tensor.shape)).encode() + some.float().cpu().numpy().tobytes())
        number += 1
    return f"{number} tensors ({digest.hexdigest()[:8]})"


def require_same_inputs(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise FileExistsError, which names it, for what a run in `output` began with and is something else now.

    What is not known of either counts as the same.
    """
    if other := [name for name in now if before.get(name, now[name]) != now[name]]:
        changes = "; ".join(f"{name}: {before[name]} then, {now[name]} now" for name in other)
        raise FileExistsError(
            f"{output} holds a run that began with other input, {changes}. Put that back to resume it, or give another "
            "`output`, or start over"
        )

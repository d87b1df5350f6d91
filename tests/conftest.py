"""What several test files share."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

# One thread, set before torch is loaded: the tests' networks are too small to share out, and equal sums need an
# equal split.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

# A background job starts with Ctrl-C ignored, and its children too; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

STAGES = Path(__file__).resolve().parent.parent / "stages"


def load_stage(name: str) -> ModuleType:
    """Import a stage by its file's name, which begins with a digit, so that `import` cannot."""
    module_name = f"stage_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, STAGES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with the untrained tiny models: sd15/, sdxl/, scorer/."""
    from faceprior import tiny

    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("sd15", "sdxl", "scorer"):
        tiny.write(folder / kind, kind)
    return folder

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


@pytest.fixture
def simulated_benchmark(tmp_path) -> Path:
    """A benchmark folder of drawn portraits, which three degradations stand for as models, ranked by nobody yet.

    Its last prompt has empty pictures, without any face.
    """
    from PIL import Image, ImageFilter

    from faceprior.images import save_image
    from faceprior.procedural import TEST_SEEDS, draw_portrait

    folder, names = tmp_path / "benchmark", ("0001", "0002", "0003")
    models = {"soft": 1.5, "smudged": 5.0, "sharp": 0.0}  # blur in pixels
    portraits = [draw_portrait(TEST_SEEDS + i, 192) for i in range(2)]
    captions = [*(portrait.caption() for portrait in portraits), "an empty room, nobody is there"]
    images = [*(portrait.image for portrait in portraits), Image.new("RGB", (192, 192), (90, 110, 130))]
    for model, sigma in models.items():
        for name, image in zip(names, images, strict=True):
            degraded = Image.fromarray(image) if not isinstance(image, Image.Image) else image
            save_image(degraded.filter(ImageFilter.GaussianBlur(sigma)), folder / "images" / model / f"{name}.png")
    rows = [f'{name},"{caption}"' for name, caption in zip(names, captions, strict=True)]
    (folder / "prompts.csv").write_text("\n".join(["id,prompt", *rows]) + "\n")
    return folder

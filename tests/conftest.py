"""What several test files share."""

import gc
import importlib.util
import os
import shutil
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


def pytest_collection_finish() -> None:
    """Keep what the imports of all test files left out of garbage collections, which it makes five times as long."""
    gc.collect()
    gc.freeze()


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


def linked_copy(source: str | Path, target: str | Path) -> Path:
    """Copy a folder without writing its weights again: they are hard links, to be replaced, never written into."""

    def copy(file: str, copied: str) -> None:
        (os.link if file.endswith(".safetensors") else shutil.copy2)(file, copied)

    return Path(shutil.copytree(source, target, copy_function=copy))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with the untrained tiny models: sd15/, sdxl/, scorer/."""
    from faceprior import tiny

    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("sd15", "sdxl", "scorer"):
        tiny.write(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def drawn_benchmark(tmp_path_factory) -> Path:
    """A benchmark folder of drawn portraits, which three degradations stand for as models, ranked by nobody yet.

    Its last prompt has empty images, without any face.
    """
    from PIL import Image, ImageFilter

    from faceprior.images import save_image
    from faceprior.procedural import TEST_SEEDS, draw_portrait

    folder = tmp_path_factory.mktemp("drawn") / "benchmark"
    portraits = [draw_portrait(TEST_SEEDS + i, 160) for i in range(2)]
    images = [
        *(Image.fromarray(portrait.image) for portrait in portraits),
        Image.new("RGB", (160, 160), (90, 110, 130)),
    ]
    captions = [*(portrait.caption() for portrait in portraits), "an empty room, nobody is there"]
    prompts = [f'{number:04d},"{caption}"\n' for number, caption in enumerate(captions, 1)]
    folder.mkdir()
    (folder / "prompts.csv").write_text("id,prompt\n" + "".join(prompts))
    for model, blur in {"soft": 1.5, "smudged": 5.0, "sharp": 0.0}.items():
        for number, image in enumerate(images, 1):
            blurred = image.filter(ImageFilter.GaussianBlur(blur))
            save_image(blurred, folder / "images" / model / f"{number:04d}.png")
    return folder


@pytest.fixture
def simulated_benchmark(drawn_benchmark, tmp_path) -> Path:
    """A copy of `drawn_benchmark`."""
    return Path(shutil.copytree(drawn_benchmark, tmp_path / "benchmark"))


@pytest.fixture(scope="session")
def browser():
    """Chromium without a network; tests that need it are skipped where it, gradio or playwright is missing."""
    from local_page import CHROMIUM, FLAGS, OFFLINE

    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS.split(), OFFLINE])
        yield browser
        browser.close()

"""The house itself: who may import whom, what an import costs, how long a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    0: "images losses config manifest background judgement_metrics blip",
    1: "detect align degrade color diffusion metrics training sources blip_inputs report_parts judgement_files facial "
    "features score_reference",
    2: "procedural pairs filters portraits convert crops report_scorer prefix_cache",
    3: "scorer guidance restorer report_sections score_output judgement_scores scorer_checks",
    4: "cli report tiny judgement pages",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
MODULES = sorted(path.stem for path in (ROOT / "faceprior").glob("*.py") if not path.stem.startswith("_"))


def imports_of(path: Path) -> set[str]:
    """Return the faceprior modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "faceprior":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("faceprior."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("faceprior.")}
    return found & set(MODULES)


def test_every_module_has_a_floor():
    assert set(MODULES) == FLOOR.keys()


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_a_module_imports_only_lower_floors(module):
    too_high = {name for name in imports_of(ROOT / "faceprior" / f"{module}.py") if FLOOR[name] >= FLOOR[module]}
    if FLOOR[module] == 4:  # the command line asks tiny for its folder, the report asks it what is tiny
        too_high -= {"tiny"}
    assert not too_high


def test_the_drawing_imports_nothing_but_pixels():
    """faceprior/drawing/ is one part in several files, with procedural as its face."""
    for path in (ROOT / "faceprior" / "drawing").glob("*.py"):
        assert imports_of(path) <= {"images"}, path
    for path in (ROOT / "faceprior").glob("*.py"):
        assert path.stem == "procedural" or "faceprior.drawing" not in path.read_text(), path


def test_nothing_imports_a_stage():
    for path in (ROOT / "faceprior").glob("*.py"):
        assert "stages" not in {
            n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        }


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import faceprior",
        "import faceprior.config",
        "import faceprior.cli; faceprior.cli.make_parser().format_help()",
        "import faceprior.images, faceprior.detect, faceprior.align, faceprior.degrade, faceprior.procedural",
    ],
)
def test_light_imports_load_no_model_library(statement):
    assert not loaded_by(statement) & {"torch", "diffusers", "transformers", "accelerate", "tensorflow"}


def test_the_three_classes_are_loaded_on_first_use():
    import faceprior

    assert {"FaceScorer", "GuidanceTuner", "AuthFaceRestorer"} <= set(dir(faceprior))
    assert faceprior.FaceScorer.__module__ == "faceprior.scorer"
    with pytest.raises(AttributeError, match="no attribute 'FaceScore'"):
        faceprior.FaceScore  # noqa: B018


def test_modules_and_stages_are_short():
    long = {
        path.name: lines
        for folder, limit in (("faceprior", 500), ("stages", 300))
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > limit
    }
    assert not long

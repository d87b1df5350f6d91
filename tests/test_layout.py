"""The house itself: who may import whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "faceprior"
# A floor imports lower floors only; a subpackage stands on one floor, and its own modules may import each other.
FLOORS = {
    0: "errors files losses memory original_layout pose quantization streams tags",
    1: "images jsonl config models",
    2: "detect html align balance degrade color plan quality metrics training diffusion photos photography procedural",
    3: "bases cache lora gates pairs portraits features facial blip convert tables reward_tuning validation identity "
    "prompts video",
    4: "captioner clean_faces dino inpaint scorer guidance restoration_reward restorer retouch sorting",
    5: "annotation scorer_checks tiny",
    6: "evaluation",
    7: "cli human_eval report",
    8: "confidence",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
ROOMS = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}  # modules and subpackages


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports_of(path: Path) -> set[str]:
    """Return the modules and subpackages of faceprior that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("faceprior.")}
    return found & ROOMS


def test_every_room_has_a_floor():
    assert FLOOR.keys() == ROOMS


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_imports_only_lower_floors(room):
    for path in files_of(room):
        too_high = {name for name in imports_of(path) - {room} if FLOOR[name] >= FLOOR[room]}
        assert not too_high, path


def test_the_drawn_people_need_nothing_but_pixels():
    """procedural imports of faceprior what reads and writes images, nothing else."""
    for path in files_of("procedural"):
        assert imports_of(path) <= {"files", "images", "procedural"}, path


def test_nothing_imports_a_stage():
    for path in PACKAGE.rglob("*.py"):
        assert "stages" not in {
            n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        }


COMMANDS = [
    *(ROOT / "stages").glob("*.py"),
    *(ROOT / "examples").glob("*.py"),
    ROOT / "checkpoints/tiny_models/__init__.py",
]


@pytest.mark.parametrize("path", sorted(COMMANDS), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_command_imports_faceprior_before_what_loads_bitsandbytes(path):
    """Else bitsandbytes warns on every start, before faceprior can silence it."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    order = [name.partition(".")[0] for name in names]
    assert "faceprior" in order
    assert not {"diffusers", "peft", "bitsandbytes"} & set(order[: order.index("faceprior")])


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import faceprior",
        "import faceprior.config, faceprior.models, faceprior.tiny",
        "import faceprior.cli; faceprior.cli.make_parser().format_help()",
        "import faceprior.images, faceprior.detect, faceprior.align, faceprior.degrade, faceprior.procedural",
        "import faceprior.evaluation.measures, faceprior.evaluation.tables, faceprior.prompts",
    ],
)
def test_light_imports_load_no_model_library(statement):
    assert not loaded_by(statement) & {"torch", "diffusers", "transformers", "accelerate", "tensorflow"}


def test_score_loads_neither_the_trainer_nor_what_builds_the_tiny_models(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "empty.png")
    command = ["score", str(tmp_path / "empty.png"), "--checkpoint", "tiny", "--detector", "mtcnn"]
    loaded = loaded_by(f"import faceprior.cli; faceprior.cli.main({command})")
    assert "faceprior.scorer" in loaded
    unwanted = {"training", "guidance", "restorer", "diffusion", "tiny.build"}
    assert not loaded & {f"faceprior.{name}" for name in unwanted}


def test_the_three_classes_are_loaded_on_first_use():
    import faceprior

    assert {"FaceScorer", "GuidanceTuner", "AuthFaceRestorer"} <= set(dir(faceprior))
    assert faceprior.FaceScorer.__module__ == "faceprior.scorer"
    with pytest.raises(AttributeError, match="no attribute 'FaceScore'"):
        faceprior.FaceScore  # noqa: B018

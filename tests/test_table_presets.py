"""The presets of the papers' tables: all of them can be read, and each of the tiny ones makes its table."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import STAGES, load_stage
from PIL import Image

from faceprior.config import parse_config
from faceprior.evaluation.generation import GENERATOR_OPTIONS
from faceprior.evaluation.measures import measures_of
from faceprior.evaluation.methods import parse_methods
from faceprior.evaluation.restoration import RESTORER_OPTIONS
from faceprior.evaluation.tables import published_rows
from faceprior.human_eval.files import write_ranking
from faceprior.human_eval.results import table_rows
from faceprior.human_eval.tables import tables as benchmark_tables
from faceprior.jsonl import read_rows

PRESETS = STAGES / "presets"
TABLES = [f"face_score_table{n}" for n in range(1, 8)] + [f"authface_table{n}" for n in range(1, 7)]
SETS = {"authface_table1": ("celeba", "lfw", "webphoto", "wider")}
SETS |= dict.fromkeys(("authface_table2", "authface_table4"), ("celeba", "webphoto"))
EVAL = "07_eval"


def full_presets(table: str) -> list[Path]:
    return [PRESETS / f"{name}.yaml" for name in ([f"{table}_{s}" for s in SETS[table]] if table in SETS else [table])]


def settings(preset: Path, *arguments: str):
    stage = load_stage(EVAL)
    return parse_config(stage.Config, ["--config", str(preset), *arguments])


def run(name: str, *arguments: str) -> dict:
    """Run a tiny preset, as small as it can be, in the current folder; returns results.json."""
    config = settings(
        PRESETS / "tiny" / f"{name}.yaml", "--num_prompts=2", "--num_faces=2", "--sample_steps=2", *arguments
    )
    load_stage(EVAL).main(config)
    return json.loads((Path(config.output) / "results.json").read_text())


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_a_preset_at_both_sizes(table):
    """Both print the published rows, of the methods and in the measures that they list."""
    for preset in [*full_presets(table), PRESETS / "tiny" / f"{table}.yaml"]:
        config = settings(preset)
        assert config.published.startswith(table) and Path(config.output).name == preset.stem
        published = published_rows(config.published)
        assert published["protocol"] in config.protocols
        measures_of(published["protocol"], config.measures)
        parse_methods(config.generators, GENERATOR_OPTIONS, "generators")
        parse_methods(config.restorers, RESTORER_OPTIONS, "restorers")
        columns = {key for row in published["rows"] for key in row["values"]} - published.get("columns", {}).keys()
        assert columns <= set(config.measures) or published["protocol"] in ("alignment", "ab")


def test_the_rows_are_what_the_presets_of_the_rows_make():
    """Each checkpoint of a table that does not ship is the output of a preset, or of the bare stage 4 or 6."""
    outputs = {load_stage(name).Config().output for name in ("04_guidance_tune", "06_train_restorer")}
    for preset in [*PRESETS.glob("*.yaml"), *PRESETS.glob("rows/*.yaml")]:
        content = yaml.safe_load(preset.read_text())
        outputs |= {
            section.get("output")
            for name, section in content.items()
            if name in ("04_guidance_tune", "05_prior_tune", "06_train_restorer")
        }
    for table in TABLES:
        for preset in [*full_presets(table), PRESETS / "tiny" / f"{table}.yaml"]:
            config = settings(preset)
            methods = [
                *parse_methods(config.generators, GENERATOR_OPTIONS, ""),
                *parse_methods(config.restorers, RESTORER_OPTIONS, ""),
            ]
            sources = {
                method.source
                for method in methods
                if method.source.startswith("checkpoints/") and not method.source.startswith("checkpoints/tiny/")
            }
            assert sources <= outputs, preset


def rank(folder: Path) -> None:
    """Two simulated annotators, who see the blur."""
    for number in range(2):
        scores = {
            (i, m): s for i in ("0001", "0002") for m, s in zip(("sharp", "smudged", "soft"), (3, 1, 2), strict=True)
        }
        scores |= {("0003", m): None for m in ("sharp", "smudged", "soft")}
        write_ranking(folder / "rankings" / f"simulated_{number}.csv", scores)


def test_agreement_with_people_beside_the_paper_s(simulated_benchmark, tmp_path, monkeypatch):
    rank(simulated_benchmark)
    monkeypatch.chdir(tmp_path)
    results = run("face_score_table2", "--benchmark", str(simulated_benchmark), "--detector=mtcnn")
    found = {(row["method"], row["measure"]): row for row in results["rows"]}
    assert found["FS", "accuracy"]["value"] is not None and "not measured" in found["HPS", "accuracy"]["note"]
    assert {measure for _, measure in found} == {"accuracy"}
    assert (
        "- published rows of Face Score, arXiv 2406.17100, Table 2: "
        in (tmp_path / "results/tiny/face_score_table2/table.md").read_text()
    )
    assert "| FS (published) | 80.31%" in (tmp_path / "results/tiny/face_score_table2/table.md").read_text()


def test_the_rank_by_people_is_a_column_of_authface_s_table_3(simulated_benchmark, tmp_path, monkeypatch):
    """Without a benchmark it says how people rank; with one, a method has the rank of its name's model."""
    monkeypatch.chdir(tmp_path)
    for folder in ("sharp", "other"):
        path = tmp_path / "data" / folder / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64), (90, 110, 130)).save(path)
    arguments = ("--generators", "sharp=data/sharp", "other=data/other", "--reference", "", "--measures", "faces")
    found = {row["method"]: row for row in run("authface_table3", *arguments)["rows"] if row["measure"] == "user_rank"}
    assert all("nobody has ranked the images: `python -m" in row["note"] for row in found.values()) and len(found) == 2
    rank(simulated_benchmark)
    results = run("authface_table3", *arguments, "--benchmark", str(simulated_benchmark))
    found = {row["method"]: row for row in results["rows"] if row["measure"] == "user_rank"}
    assert found["sharp"]["value"] == 1 and found["sharp"]["n"] == 4 and "has no such model" in found["other"]["note"]
    (tmp_path / "data/manifest.jsonl").touch()
    with pytest.raises(ValueError, match="`reference` is data, with all that a stage wrote: give images/ in it"):
        run("authface_table3", *arguments[:3], "--reference", "data")


def test_folders_of_other_models_beside_the_paper_s(tmp_path, monkeypatch):
    """Real images alone: what is not there yet is listed with the way to it, and the rows of the paper stand below."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        path = tmp_path / "data/pairs/drawn" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (90, 110, 130)).save(path)
    results = run("face_score_table3", "--generators", "drawn people=data/pairs/drawn", "tuned=checkpoints/rows/l2")
    found = {(row["method"], row["measure"]): row for row in results["rows"]}
    assert found["drawn people", "faces"]["value"] == 0 and found["drawn people", "face_score"]["value"] is None
    assert "04_guidance_tune.py` makes one" in found["tuned", "faces"]["note"]
    text = (tmp_path / "results/tiny/face_score_table3/table.md").read_text()
    assert "| DALL-E 3 (published) | 3.450" in text
    assert text.count("04_guidance_tune.py` makes one") == 1  # named once, not once for every measure and method
    assert "per image in batches" not in text  # nothing was timed


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_models):
    """The rows of all tables: one model of stage 4 and one of stage 6 after a step, under the names of all rows."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, values in {
            "01_make_pairs": {
                "base": str(tiny_models / "sd15"),
                "num_drawn": 3,
                "num_scenes": 0,
                "drop_not_found": False,
            },
            "03_curate_portraits": {"num_drawn": 4},
            "04_guidance_tune": {
                "base": str(tiny_models / "sd15"),
                "steps": 1,
                "num_samples": 0,
                "output": "checkpoints/rows/l2",
            },
            "05_prior_tune": {"base": str(tiny_models / "sdxl"), "steps": 1, "num_samples": 0},
            "06_train_restorer": {"steps": 1, "num_samples": 0, "init": ""},
        }.items():
            stage = load_stage(name)
            stage.main(stage.Config(**values))
    rows = folder / "checkpoints/rows"
    for preset in (PRESETS / "rows").glob("*.yaml"):
        made = {"04_guidance_tune": rows / "l2"}
        made |= {name: folder / load_stage(name).Config().output for name in ("05_prior_tune", "06_train_restorer")}
        content = yaml.safe_load(preset.read_text())
        (source,) = (made[name] for name in made if name in content)
        if not (rows / preset.stem).exists():
            shutil.copytree(source, rows / preset.stem)
    (folder / "checkpoints/tiny").mkdir()
    shutil.copytree(tiny_models / "sdxl", folder / "checkpoints/tiny/sdxl")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_every_tiny_table(table, workplace, simulated_benchmark, monkeypatch):
    monkeypatch.chdir(workplace)
    rank(simulated_benchmark)
    protocol = published_rows(settings(PRESETS / "tiny" / f"{table}.yaml").published)["protocol"]
    results = run(table, "--benchmark", str(simulated_benchmark) if protocol == "alignment" else "")
    config = settings(PRESETS / "tiny" / f"{table}.yaml")
    text = (workplace / config.output / "table.md").read_text()
    print(text)  # shown with -s
    if protocol in ("generation", "restoration"):
        methods = parse_methods(config.generators if protocol == "generation" else config.restorers, (), "")
        assert {method.name for method in methods} <= {row["method"] for row in results["rows"]}
        assert not any("makes one" in row["note"] for row in results["rows"])  # every model was there
        assert not read_rows(workplace / config.output / "rows.jsonl")[1]
    for row in published_rows(config.published)["rows"]:
        assert f"| {row['method']} (published) |" in text
    assert ("nobody has compared images yet" in text) == (protocol == "ab")


def test_the_tables_of_people_s_scores(simulated_benchmark):
    """Table 1 has the models, Table 4 the metrics; neither has the other's columns."""
    rank(simulated_benchmark)
    tables = benchmark_tables(simulated_benchmark)
    one = {
        (name, measure.key): numbers["value"] for name, measure, numbers in table_rows(tables, {"score_1", "average"})
    }
    assert one["sharp", "average"] == 3 and one["smudged", "score_1"] == 1 and len(one) == 3 * 4
    four = {measure.key for _, measure, _ in table_rows(tables, {"pearson", "median_SD1.5", "std_SD1.5"})}
    assert four == {"pearson"}  # without a metric there is no spread

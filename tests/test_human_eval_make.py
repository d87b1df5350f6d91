"""The benchmark that models draw: files, seeds, discarded triplets, resuming, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import linked_copy
from PIL import Image, ImageChops

from faceprior.bases import load_pipeline
from faceprior.config import make_config
from faceprior.detect import Face
from faceprior.diffusion import native_side, sample_images
from faceprior.guidance import GuidanceTuner
from faceprior.human_eval import make
from faceprior.human_eval.__main__ import main
from faceprior.human_eval.files import BenchmarkError, read_benchmark
from faceprior.human_eval.make import Config, Made, find_prompts, find_sources, make_benchmark
from faceprior.human_eval.rank import Ranking
from faceprior.jsonl import read_rows

PROMPTS = ("a man", "nobody at all", "a woman")


def settings(tiny_models, **changes) -> Config:
    values = {"models": tuple(f"{name}={tiny_models / 'sd15'}" for name in "abc"), "prompts": "prompts.txt"}
    values |= {"output": "bench", "resolution": 32, "sample_steps": 1, "guidance_scale": 2.0, "seed": 7}
    return make_config(Config, values | {"detector": "mtcnn"} | changes)


def draw(config: Config) -> Made:
    """Make a benchmark by a detector that knows which image it gets: the untrained models draw no faces.

    Prompt 2 has none, prompt 3 by the last model only.
    """
    counts = iter([1, 0, 0, 1, 0, 0, 1, 0, 1])
    return make_benchmark(config, lambda rgb: [Face((0, 0, 30, 30), None, 1.0)] * next(counts))


@pytest.fixture(scope="module")
def drawn(tiny_models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw(settings(tiny_models))
    return folder


@pytest.fixture
def made(drawn, tmp_path, monkeypatch) -> None:
    """A current folder with prompts.txt and the benchmark bench/."""
    monkeypatch.chdir(shutil.copytree(drawn, tmp_path / "work"))


@pytest.fixture
def work(tmp_path, monkeypatch) -> None:
    """A current folder with prompts.txt."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))


def files_in(folder: str) -> dict[str, bytes]:
    paths = sorted(Path(folder).rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def test_a_triplet_without_a_face_is_discarded_and_the_rest_can_be_ranked(made, tiny_models):
    assert draw(settings(tiny_models)) == Made(3, 2, ("0002",))  # nothing is drawn again
    benchmark = read_benchmark("bench")
    assert benchmark.prompts == {"0001": "a man", "0003": "a woman"} and list(benchmark.images) == ["a", "b", "c"]
    assert Ranking(benchmark, "anyone").current() == "0001"
    assert read_rows("bench/discarded.jsonl")[0] == [
        {"id": "0002", "prompt": "nobody at all", "reason": "no image has a valid face"}
    ]
    assert {path.parent.name for path in Path("bench/discarded").rglob("0002.png")} == {"a", "b", "c"}
    rows = read_rows("bench/drawn.jsonl")[0]
    assert [(row["model"], row["seed"], row["faces"]) for row in rows[-3:]] == [("c", 7, 1), ("c", 8, 0), ("c", 9, 1)]


def test_a_model_of_another_kind_draws_at_its_own_size(work, tiny_models):
    """SDXL's beside SD1.5's, without a resolution."""
    models = tuple(f"{kind}={tiny_models / kind}" for kind in ("sd15", "sdxl"))
    draw(settings(tiny_models, models=models, resolution=0, num_prompts=1))
    for kind in ("sd15", "sdxl"):
        side = native_side(load_pipeline(tiny_models / kind))
        with Image.open(f"bench/images/{kind}/0001.png") as image:
            assert image.size == (side, side)


def test_each_image_is_that_of_its_prompt_and_seed(made, tiny_models):
    """As the pipeline alone draws it; models of equal weights draw equal images."""
    pipeline = load_pipeline(tiny_models / "sd15")
    alone = sample_images(pipeline, ["a woman"], [7 + 2], 32, 1, 2.0)[0]
    for model in "ab":
        with Image.open(f"bench/images/{model}/0003.png") as image:
            assert ImageChops.difference(image.convert("RGB"), alone).getbbox() is None


def test_killed_and_resumed_with_more_prompts(work, tiny_models, monkeypatch):
    """Killed at the fifth image: the folder cannot be ranked yet; the same command draws only what is missing."""
    saved, calls = make.save_image, []

    def killed(image, path):
        calls.append(str(path))
        if len(calls) == 5:
            raise KeyboardInterrupt
        saved(image, path)

    monkeypatch.setattr(make, "save_image", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(settings(tiny_models, num_prompts=2))
    with pytest.raises(FileNotFoundError, match=r"no prompts.jsonl"):
        read_benchmark("bench")
    draw(settings(tiny_models, num_prompts=2))
    assert len(calls) == 7
    before = files_in("bench/images")
    assert draw(settings(tiny_models)).kept >= 2 and len(calls) == 10
    assert before.items() <= files_in("bench/images").items()
    assert draw(settings(tiny_models, num_prompts=1)).kept >= 2 and len(calls) == 10  # nothing is taken away


def test_killed_while_images_are_moved(made, tiny_models):
    whole = files_in("bench")
    moved = Path("bench/discarded/b/0002.png")
    moved.replace("bench/images/b/0002.png")
    Path("bench/prompts.jsonl").unlink()
    draw(settings(tiny_models))
    assert files_in("bench") == whole


def test_a_run_of_other_settings_prompts_or_answers_is_left_alone(made, tiny_models):
    with pytest.raises(FileExistsError, match=r"seed \(7 there, 1 now\)"):
        draw(settings(tiny_models, seed=1))
    Path("prompts.txt").write_text("a dog\nnobody at all\na woman")
    with pytest.raises(ValueError, match=r"0001 was drawn for 'a man', which is not its prompt in prompts.txt"):
        draw(settings(tiny_models))
    Path("bench/rankings").mkdir()
    with pytest.raises(FileExistsError, match=r"bench/rankings holds what people said"):
        draw(settings(tiny_models, overwrite=True))
    Path("bench/rankings").rmdir()
    assert draw(settings(tiny_models, num_prompts=1, overwrite=True)).kept == 1
    assert read_benchmark("bench").prompts["0001"] == "a dog"


def test_what_stage_4_tuned_comes_with_its_base(work, tiny_models):
    """A LoRA with the base that its config.yaml names, or that is given; it draws another image than its base."""
    tuner = GuidanceTuner.from_pretrained(tiny_models / "sd15", train="lora", rank=2)
    for parameter in tuner.trainable_parameters():
        parameter.data += 0.5
    tuner.save_pretrained("lora")
    Path("alone").mkdir()
    shutil.copy("lora/pytorch_lora_weights.safetensors", "alone")
    base = str(tiny_models / "sd15")
    Path("lora/config.yaml").write_text(f"04_guidance_tune: {{base: {base}, vae: '', prediction_type: auto}}")
    models = ("lora=lora", "alone=alone", f"base={base}")
    sources = find_sources(settings(tiny_models, models=models, base=(f"alone={base}",)))
    assert [(source.tuned, source.base) for source in sources.values()] == [("lora", base), ("alone", base), ("", base)]
    drawn = {
        name: sample_images(source.load(torch.float32), ["a man"], [0], 32, 1)[0] for name, source in sources.items()
    }
    assert ImageChops.difference(drawn["lora"], drawn["alone"]).getbbox() is None
    assert ImageChops.difference(drawn["lora"], drawn["base"]).getbbox() is not None
    linked_copy(base, "whole")
    shutil.copy("lora/config.yaml", "whole")
    whole = find_sources(settings(tiny_models, models=("whole=whole", f"base={base}")))["whole"]
    image = sample_images(whole.load(torch.float32), ["a man"], [0], 32, 1)[0]
    assert ImageChops.difference(image, drawn["base"]).getbbox() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("a=tiny",)}, "`models` has to name two models or more"),
        ({"models": ("a=tiny", "a=tiny")}, "`models` has to be NAME=VALUE, each name once"),
        ({"models": ("a=tiny", "b")}, "`models` has to be NAME=VALUE"),
        ({"models": ("a=tiny", "../b=tiny")}, "fit for a folder"),
        ({"base": ("d=x",)}, "`base` is of d, but the models are a, b, c"),
        ({"models": ("a=tiny", "b=./nothing")}, "no model in ./nothing"),
        ({"prompts": "none.txt"}, "no prompt file none.txt"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(work, tiny_models, monkeypatch, changes, message):
    monkeypatch.setattr(make, "_drawer", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_benchmark(settings(tiny_models, **changes))
    assert not Path("bench").exists()


def test_prompts_with_ids_of_their_own(work):
    Path("coco.csv").write_text('id,prompt\n42,"a man, smiling"\n')
    assert find_prompts("coco.csv") == {"42": "a man, smiling"}
    Path("coco.jsonl").write_text('{"id": "a/b", "prompt": "a man"}\n')
    with pytest.raises(BenchmarkError, match="cannot be the name of an image"):
        find_prompts("coco.jsonl")


def test_without_any_face_there_is_no_benchmark(work, tiny_models):
    """The command, with a real detector: the untrained models draw no face."""
    models = (
        "--models",
        f"a={tiny_models / 'sd15'}",
        f"b={tiny_models / 'sd15'}",
        "--prompts",
        "prompts.txt",
        "--num_prompts",
        "1",
    )
    with pytest.raises(SystemExit, match=r"make.py: error: no image of any prompt has a valid face"):
        main(["make", "bench", *models, "--resolution", "32", "--sample_steps", "1", "--detector", "mtcnn"])
    with pytest.raises(SystemExit, match="name the folder to make"):
        main(["make", *models])

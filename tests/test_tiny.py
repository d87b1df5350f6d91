"""The tiny models: the real classes, the same from the same seed, loadable with stock libraries."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from checkpoints.tiny_models.figures_ladders import framings, soft
from checkpoints.tiny_models.judge import FaceJudge
from faceprior import tiny
from faceprior.detect import detect_faces
from faceprior.human_eval.files import SAME, read_preferences
from faceprior.models import quiet_libraries
from faceprior.procedural import TEST_SEEDS, draw_portrait, people
from faceprior.restorer import AuthFaceRestorer, RestorerSettings
from faceprior.scorer import FaceScorer


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one model of every kind, as `python -m faceprior.tiny` leaves it."""
    path = tmp_path_factory.mktemp("tiny")
    for kind in tiny.KINDS:
        assert tiny.resolve("tiny", kind, path) == str(path / kind)
    return path


BUILDERS = {
    "sd15": tiny.tiny_sd15, "sdxl": tiny.tiny_sdxl, "scorer": tiny.tiny_scorer, "restorer": tiny.tiny_restorer,
    "reward": tiny.tiny_scorer,
    "controlnet": lambda seed=0: tiny.tiny_controlnet(tiny.tiny_sdxl(seed).unet, seed),
}  # fmt: skip


def weights(model):
    """Every tensor of a model, or of a pipeline's models."""
    pipeline = getattr(model, "pipeline", model)
    parts = getattr(pipeline, "components", {"": pipeline})
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_seed_gives_one_model(kind):
    torch.manual_seed(1)  # must not matter
    first = BUILDERS[kind](seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, BUILDERS[kind](seed=3))
    assert torch.equal(torch.get_rng_state(), state)  # and is left alone
    assert not same(first, BUILDERS[kind](seed=4))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_pipelines_load_with_stock_diffusers_and_draw(root, kind):
    loaded = DiffusionPipeline.from_pretrained(root / kind)
    assert same(loaded, BUILDERS[kind]())
    assert type(loaded).__name__ == {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[kind]
    assert loaded.unet.config.sample_size * loaded.vae_scale_factor == tiny.RESOLUTION
    loaded.set_progress_bar_config(disable=True)
    image = loaded("a man", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (tiny.RESOLUTION, tiny.RESOLUTION)


def test_the_restorer_loads_as_a_whole_and_in_parts(root):
    loaded, built = AuthFaceRestorer.from_pretrained(root / "restorer"), tiny.tiny_restorer()
    assert same(loaded, built)
    assert loaded.settings == RestorerSettings(resolution=128, guidance_scale=1.0, prompt="", negative_prompt="")
    folder = root / "restorer"
    for part_class, name in ((ControlNetModel, "controlnet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")):
        assert same(part_class.from_pretrained(folder, subfolder=name), getattr(built.pipeline, name))


def test_the_scorer_loads_and_reads_faces_of_224_pixels(root):
    loaded = FaceScorer.from_pretrained(root / "scorer")
    assert same(loaded, tiny.tiny_scorer())
    assert loaded(torch.zeros(2, 3, 224, 224)).shape == (2,)


def test_a_controlnet_begins_as_its_unets_encoder():
    unet = tiny.tiny_sdxl().unet
    controlnet = tiny.tiny_controlnet(unet)
    ours, theirs = controlnet.down_blocks.state_dict(), unet.down_blocks.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(not block.weight.any() for block in controlnet.controlnet_down_blocks)


def test_all_kinds_together_are_small(root):
    """They are meant to be shipped: 80 MB in float32."""
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 80e6


# ------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(root):
    return CLIPTokenizer.from_pretrained(root / "sd15/tokenizer")


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]


def test_every_word_is_one_token(tokenizer):
    assert len(set(tiny.WORDS)) == len(tiny.WORDS)
    assert {word: pieces(tokenizer, word) for word in tiny.WORDS} == {word: [f"{word}</w>"] for word in tiny.WORDS}
    text = "Portrait photo, young woman"
    assert pieces(tokenizer, text) == ["portrait</w>", "photo</w>", ",</w>", "young</w>", "woman</w>"]


def test_every_word_of_the_captions_is_one_token(tokenizer):
    """Portraits that between them have every style and colour of hair, beard, glasses, expression, light and place."""
    captions = []
    for index, style in enumerate(people.HAIR_STYLES):
        pick = lambda values, index=index: list(values)[index % len(values)]  # noqa: E731
        traits = {
            "hair_style": style,
            "hair_color": pick(people.HAIR_COLORS),
            "beard": pick(people.BEARDS),
            "glasses": pick(people.GLASSES),
            "expression": pick(people.EXPRESSIONS),
            "background": pick(people.BACKGROUNDS),
            "light_side": pick(people.LIGHT_SIDES),
            "age_group": pick(people.AGE_GROUPS),
        }
        captions.append(draw_portrait(index, 64, **traits).caption())
    words = set(re.findall(r"[a-z]+", " ".join(captions)))
    assert len(words) > 40
    assert {word for word in words if len(pieces(tokenizer, word)) != 1} == set()


@pytest.mark.parametrize("text", ["zebra", "Quixotic", "naïve", "日本", "a-b_c 12%"])
def test_another_word_is_read_in_pieces_without_a_loss(tokenizer, text):
    """Byte pairs know every byte, so that nothing is unknown."""
    read = pieces(tokenizer, text)
    assert tokenizer.unk_token not in read
    assert tokenizer.decode(tokenizer(text).input_ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_a_long_prompt_is_cut_to_77(tokenizer):
    ids = tokenizer("a man " * 100, truncation=True, padding="max_length", max_length=77).input_ids
    assert len(ids) == 77 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 77


def test_both_tokenizers_and_every_build_agree(root):
    vocabs = [
        CLIPTokenizer.from_pretrained(root / folder).get_vocab()
        for folder in ("sd15/tokenizer", "sdxl/tokenizer", "sdxl/tokenizer_2", "restorer/tokenizer")
    ]
    vocabs.append(tiny.tiny_sd15(7).tokenizer.get_vocab())
    assert all(vocab == vocabs[0] for vocab in vocabs)
    assert max(vocabs[0].values()) + 1 == len(vocabs[0]) == tiny.tiny_sd15().text_encoder.config.vocab_size


# ---------------------------------------------------------------------------------------------- folders


def test_resolve_builds_once_with_a_warning(tmp_path, caplog):
    folder = tmp_path / "a/sd15"
    assert tiny.resolve("tiny", "sd15", tmp_path / "a") == str(folder)
    assert "UNTRAINED" in caplog.text
    assert tiny.info(folder) == {"kind": "sd15", "seed": 0, "trained": False}
    caplog.clear()
    (folder / "mark").touch()
    tiny.resolve("tiny", "sd15", tmp_path / "a")
    assert (folder / "mark").exists() and not caplog.text
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["sd15"]


def test_resolve_takes_the_weights_that_ship(tmp_path):
    tiny.write(tmp_path / "scorer", "scorer", seed=5)
    (tmp_path / "scorer/tiny.json").write_text(json.dumps({"kind": "scorer", "seed": 5, "trained": True}))
    assert tiny.info(tiny.resolve("tiny", "scorer", tmp_path))["trained"]


@pytest.mark.parametrize("name", ["a/b", "checkpoints/prior", "./tiny", "runwayml/stable-diffusion-v1-5"])
def test_other_names_come_back(name, tmp_path):
    assert tiny.resolve(name, "sd15", tmp_path / "a") == name
    assert not (tmp_path / "a").exists()


def test_an_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="`kind` has to be one of sd15, sdxl, reward, scorer, restorer but is 'sd3'"):
        tiny.resolve("tiny", "sd3", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_writing_is_all_or_nothing(tmp_path):
    """A build that fails leaves the old model; one that succeeds leaves nothing of it."""
    folder = tmp_path / "sd15"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(TypeError):
        tiny.write(folder, "sd15", seed={1, 2})  # no number
    assert [path.name for path in tmp_path.rglob("*")] == ["sd15", "old"]
    tiny.write(folder, "sd15", seed=1)
    assert not (folder / "old").exists() and (folder / "unet").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["sd15"]
    assert tiny.info(folder)["seed"] == 1


def test_info_of_a_model_that_is_not_tiny(tmp_path):
    assert tiny.info(tmp_path) is None and tiny.info("runwayml/stable-diffusion-v1-5") is None


@pytest.mark.parametrize("kind", sorted({*tiny.KINDS} - {"scorer"}))  # what is saved by FaceScorer began from `reward`
def test_the_name_tiny_marks_a_model_by_its_own_kind(root, tmp_path, kind):
    """A model that a stage made from `tiny` names the tiny model that it came from."""
    BUILDERS[kind]().save_pretrained(tmp_path)
    tiny.copy_info("tiny", tmp_path, root)
    assert tiny.info(tmp_path) == {"kind": kind, "seed": 0, "trained": False}


def test_a_lora_made_from_tiny_is_marked_too(root, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    tiny.copy_info("tiny", tmp_path, root)
    assert tiny.info(tmp_path)["kind"] == "sd15"


def test_a_model_made_from_a_tiny_folder_is_marked_and_others_are_not(root, tmp_path):
    tiny.copy_info(str(root / "sdxl"), tmp_path)
    assert tiny.info(tmp_path)["kind"] == "sdxl"
    (tmp_path / "tiny.json").unlink()
    for source in ("runwayml/stable-diffusion-v1-5", str(tmp_path)):
        tiny.copy_info(source, tmp_path)
        assert tiny.info(tmp_path) is None


def test_the_folder_of_the_tiny_models():
    """In a checkout beside the package, else in the user's cache."""
    assert tiny.tiny_folder().parts[-2:] in {("checkpoints", "tiny"), ("faceprior", "tiny")}


SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"


def test_the_shipped_models_are_trained_and_small():
    """Float16 safetensors, a file at most 20 MB, all together at most 40 MB."""
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*.safetensors")]
    assert sum(sizes) <= 40e6 and max(sizes) <= 20e6
    assert sum(path.stat().st_size for path in (SHIPPED / "guided").iterdir()) <= 400e3
    for kind in (*tiny.KINDS, "features", "judge", "guided"):
        about = tiny.info(SHIPPED / kind)
        assert about["kind"] == kind and about["trained"] is True and about["steps"] >= 60
    for path in SHIPPED.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path


def test_the_shipped_base_draws_faces_with_stock_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED / "sd15")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["portrait photo, young woman, long straight black hair, soft light from the left, studio background"] * 4
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = pipeline(prompts, num_inference_steps=25, guidance_scale=2.5, generator=generators).images
    assert all(image.size == (128, 128) for image in images)
    assert sum(bool(detect_faces(image, "mtcnn", 0.9)) for image in images) >= 3


def test_the_shipped_lora_changes_what_stock_diffusers_draws():
    """The same prompt and noise: the picture stays, by its mean change, and the face does not."""
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED / "sd15")
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        options = {"num_inference_steps": 10, "guidance_scale": 2.5, "output_type": "np"}
        return pipeline("portrait photo, young man, smiling", generator=torch.Generator().manual_seed(0), **options)

    untuned = draw().images[0]
    pipeline.load_lora_weights(SHIPPED / "guided")
    tuned = draw().images[0]
    assert 1 / 255 < np.abs(tuned - untuned).mean() < 40 / 255


def test_the_table_says_what_was_answered_in_the_blind_look():
    answers = [answer for own in read_preferences(SHIPPED / "blind").values() for answer in own]
    decided = [answer.preferred == "tuned" for answer in answers if answer.preferred != SAME]
    row = f"| tuned preferred in a blind look, of the decided | {np.mean(decided):.1%} ("
    (line,) = [line for line in (SHIPPED / "README.md").read_text().splitlines() if line.startswith(row)]
    assert line.split(" | ")[2] == str(len(decided)) and len(answers) == 60
    assert {answer.left for answer in answers} == {"tuned", "base"}


@pytest.fixture(scope="module")
def framed_people():
    """Twelve people that no training saw: portraits, tight boxes, aligned faces."""
    seeds = range(TEST_SEEDS, TEST_SEEDS + 12)
    return framings([draw_portrait(seed, 128) for seed in seeds], seeds)


def test_the_shipped_scorer_prefers_a_face_to_a_blurred_one(framed_people):
    """Ten of twelve people, under 1 px of blur; in tight boxes, where it sees four of five, eight."""
    scorer = FaceScorer.from_pretrained(SHIPPED / "scorer")
    for framed in framed_people:
        sides = framed.images, list(map(soft, framed.images))
        with torch.no_grad():
            clean, blurred = (scorer(scorer.preprocess(side, framed.boxes)) for side in sides)
        assert (clean > blurred).sum() >= (8 if framed.name == "tight boxes" else 10), framed.name


def test_the_shipped_judge_prefers_a_face_to_a_blurred_one(framed_people):
    """Eleven of twelve people, under 1 px of blur."""
    judge = FaceJudge.from_pretrained(SHIPPED / "judge")
    for framed in framed_people:
        sharp, blurred = (judge.score(side, framed.boxes) for side in (framed.images, list(map(soft, framed.images))))
        assert sum(a > b for a, b in zip(sharp, blurred, strict=True)) >= 11, framed.name

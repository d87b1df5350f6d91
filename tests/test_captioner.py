"""Tags by a vision-language model: answers of every bad shape, and a tiny random model of a real class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import save_tiny_vlm

from faceprior.captioner import Captioner, clean_answer
from faceprior.models import quantization_of
from faceprior.tags import Tags

GOOD = Tags(("young woman", "brown hair"), ("soft light", "85mm lens"))


@pytest.mark.parametrize(
    "answer",
    [
        "semantic: young woman, brown hair\nphotographic: soft light, 85mm lens",
        "**Semantic tags:** young woman, brown hair.\n\n**Photographic tags:** soft light, 85mm lens.",
        "## Semantic\n- young woman\n- brown hair\n\n## Photographic\n* soft light\n* 85mm lens",
        "Semantic:\n1. Young woman\n2. Brown hair\nPhotographic:\n1) Soft light\n2) 85mm lens",
        '{"semantic": ["young woman", "brown hair"], "photographic": ["soft light", "85mm lens"]}',
        '```json\n{"semantic": "young woman, brown hair",\n "photographic": "soft light, 85mm lens"}\n```',
        '["young woman", "brown hair", "soft light", "85mm lens"]',
        "young woman, brown hair, soft light, 85mm lens",
        "young woman; brown hair; soft light; 85mm lens;",
        "young woman | brown hair | soft light | 85mm lens",
        "young woman、brown hair，soft light；85mm lens。",
        "young woman / brown hair / soft light / 85mm lens",
        "young woman\nbrown hair\nsoft light\n85mm lens",
        '"young woman", "brown hair", \u201csoft light\u201d, \u201885mm lens\u2019',
        "#young_woman #, brown_hair, soft_light, 85mm_lens",
        "ASSISTANT: young woman, brown hair, soft light, 85mm lens",
        "<|im_start|>assistant\nyoung woman, brown hair, soft light, 85mm lens<|im_end|>",
        "[INST] [/INST] young woman, brown hair, soft light, 85mm lens</s>",
        "Sure! Here are the tags for this portrait:\nyoung woman, brown hair, soft light, 85mm lens",
        "Here are the tags: young woman, brown hair, soft light, 85mm lens",
        "Young Woman, young woman, brown hair, soft light, Soft light, 85mm lens, brown hair",
        "young woman, brown hair, soft light, 85mm lens" + ", soft light, 85mm lens" * 40,
        "young woman, brown hair, soft light, 85mm lens, very very very very very soft",
        "young woman, brown hair, soft light, 85mm lens, none, N/A, not visible, ..., 3",
        "young woman, brown hair, soft light, 85mm lens, The light creates a calm mood.",
        "young woman, brown hair. This portrait shows a woman in a room. soft light, 85mm lens",
        "young woman, brown hair, a portrait of someone who looks to be quite happy today, soft light, 85mm lens",
        "semantic: young woman, brown hair\nlighting: soft light\nlens: 85mm lens",
        '{"age": "young woman", "hair": "brown hair", "lighting": ["soft light"], "lens": {"focal": "85mm lens"}}',
        "Lighting: soft light\nHair: brown hair, young woman\nLens: 85mm lens",
        '{"semantic": ["young woman", "brown hair"], "photographic": ["soft light", "85mm lens"',
        "young woman, brown hair, soft light, 85mm lens, " + "x" * 60,
    ],
)
def test_answers_that_hold_tags(answer):
    tags = clean_answer(answer)
    assert (set(tags.semantic), tags.photographic) == (set(GOOD.semantic), GOOD.photographic)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  \n ",
        "...",
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I cannot identify people, young woman, soft light",
        "As an AI language model, I am unable to see images.",
        "The image shows a young woman with brown hair who is smiling at the camera in soft light.",
        "She is young. She has brown hair.",
        "1 2 3 4 5",
        "None",
        "the the the the the the the the",
        "{}",
        "[[[[[[",
        "!!!!!!!!",
    ],
)
def test_answers_that_hold_none(answer):
    assert clean_answer(answer) == Tags()


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def folder(request, tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"), request.param)


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_batch_is_answered_as_each_image_alone(folder):
    """Greedy, with padding on the left of questions of one length; every answer within the limit."""
    captioner = Captioner.from_pretrained(folder)
    images = pictures(3)
    answers = captioner.answer(images, "tags", max_tokens=6)
    assert answers == [captioner.answer([image], "tags", max_tokens=6)[0] for image in images]
    assert all(isinstance(answer, str) and len(answer.split()) <= 6 for answer in answers)


@pytest.mark.parametrize("quantization", ["8bit", "nf4"])
def test_quantized_models_answer(folder, quantization):
    captioner = Captioner.from_pretrained(folder, quantization=quantization)
    assert quantization_of(captioner.model.base_model) == quantization
    assert isinstance(captioner.model.lm_head, torch.nn.Linear)
    assert len(captioner.answer(pictures(1), "tags", max_tokens=3)) == 1


def test_what_is_no_captioner_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no vision-language model at ./nowhere"):
        Captioner.from_pretrained("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="no vision-language model in"):
        Captioner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`quantization` has to be one of"):
        Captioner.from_pretrained(folder, quantization="4bit")


def test_half_precision(folder):
    captioner = Captioner.from_pretrained(folder, torch.bfloat16)
    assert captioner.model.dtype == torch.bfloat16 and len(captioner.answer(pictures(2), "tags", max_tokens=2)) == 2


def test_code_in_a_repository_is_never_run(tmp_path):
    classes = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoProcessor": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": classes}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError, match="no vision-language model in"):
        Captioner.from_pretrained(tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_answer_that_the_limit_cut_off_loses_its_last_tag(folder, monkeypatch):
    """Of "young , woman , hair" three tokens are "young , woman", and whether "woman" is whole is not known."""
    captioner = Captioner.from_pretrained(folder)
    ids = captioner.processor.tokenizer("young , woman , hair", add_special_tokens=False)["input_ids"]

    def generate(input_ids, max_new_tokens, **options):
        answer = torch.tensor([[*ids, captioner.processor.tokenizer.eos_token_id][:max_new_tokens]])
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(captioner.model, "generate", generate)
    answers = [captioner.answer(pictures(1), "tags", max_tokens=limit)[0] for limit in (3, 8)]
    assert [clean_answer(answer).semantic for answer in answers] == [("young",), ("young", "woman", "hair")]


def test_a_processor_without_a_chat_template(folder):
    captioner = Captioner.from_pretrained(folder)
    captioner.processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Captioner(captioner.model, captioner.processor)

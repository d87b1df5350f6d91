"""Tags by a vision-language model (AuthFace, arXiv 2410.09864, section 3.1: photography-guided image annotation).

The model is asked for short tags in the two groups. What it answers is never taken as it is: `clean_answer` reads
lists, JSON and Markdown, and leaves out sentences, refusals and loops.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from faceprior.models import MODEL_FILES, first_line, quantize, require_quantization, resolve_model
from faceprior.tags import GROUPS, VOCABULARY, Tags, sort_tags

PROMPT = (
    "Describe this portrait for the training of a text-to-image model with short tags of one to four words, no "
    "sentences, only what is visible. Answer with two lines. "
    "semantic: age and sex, hair, eyes, beard, glasses, clothes, background. "
    "photographic: expression, skin texture, make-up, lighting, lens and focus, mood, style."
)
_HINT = "an image-text-to-text model of transformers is expected"
_FILES = (*MODEL_FILES, "*.jinja", "*.model")  # chat template and SentencePiece vocabulary

MAX_WORDS, MAX_LETTERS, MAX_TAGS = 6, 48, 30  # of a tag, of a tag, of a group


def find_captioner(name: str | Path) -> Path:
    """Return the folder of a vision-language model, which is downloaded if need be; errors as in `resolve_model`."""
    return resolve_model(name, "vision-language model", _HINT, patterns=_FILES)


class Captioner:
    """A model of transformers that answers a question on images, with its processor.

    model: any that AutoModelForImageTextToText loads; processor: with a chat template.
    """

    def __init__(self, model: Any, processor: Any):
        if not processor.chat_template:
            raise ValueError(
                "the model has no chat template: give one that was trained to answer (an `instruct` model)"
            )
        self.model, self.processor = model.eval().requires_grad_(False), processor
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # an answer begins where its question ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = None, quantization: str = "none"
    ) -> Captioner:
        """Load a model by its folder or hub id, as `resolve_model` finds it; code in a repository is never run.

        dtype: of the weights, float32 if None. quantization: `none`, `8bit` or `nf4`, of all linear layers but the
        head. Raises FileNotFoundError if there is no such model, ValueError if it is none that answers on images.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        require_quantization(quantization)
        folder = find_captioner(name)
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            options = {"dtype": dtype or torch.float32, "use_safetensors": True, "trust_remote_code": False}
            model = AutoModelForImageTextToText.from_pretrained(folder, **options)
        except Exception as error:  # the libraries raise classes of their own, and bare Exceptions
            raise ValueError(f"no vision-language model in {folder}: {first_line(error)}; {_HINT}") from error
        quantize(model.base_model, quantization)
        return cls(model, processor)

    def to(self, device: torch.device | str) -> Captioner:
        self.model.to(device)
        return self

    @torch.no_grad()
    def answer(self, images: list[Image.Image], prompt: str = PROMPT, max_tokens: int = 160) -> list[str]:
        """Return the model's answer to `prompt` for each image, by greedy decoding; at most `max_tokens` tokens.

        An answer that the limit cut off loses its last, incomplete tag.
        """
        questions = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
            for image in images
        ]
        inputs = self.processor.apply_chat_template(
            questions, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        pad = self.processor.tokenizer.pad_token_id
        output = self.model.generate(**inputs, **greedy, max_new_tokens=max_tokens, pad_token_id=pad)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        cut = (new == self._ends().to(new.device)[:, None, None]).any(0).any(1).logical_not() & (
            new.shape[1] == max_tokens
        )
        return [_without_last(text) if is_cut else text for text, is_cut in zip(texts, cut.tolist(), strict=True)]

    def _ends(self) -> torch.Tensor:
        """Return the tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        return torch.tensor(ends if isinstance(ends, list) else [ends])


def _without_last(text: str) -> str:
    match = re.match(r"(.*)[,;\n]", text, re.DOTALL)
    return match[1] if match else ""


# ---- Answer -> tags

_REFUSAL = re.compile(
    r"\b(?:i(?:'|\u2019)?m sorry|i am sorry|sorry,|i apologi[sz]e|as an ai|as a language model|i can(?:'|\u2019)?t|"
    r"i cannot|i can not|i(?:'|\u2019)?m (?:not able|unable)|i am (?:not able|unable)|i(?:'|\u2019)?m just an?|"
    r"cannot (?:assist|help|identify)|unable to (?:assist|help|identify|process|view|see))\b",
    re.IGNORECASE,
)
_CHAT = re.compile(r"<\|[^|>]*\|>|</?s>|<end_of_utterance>|<image>|\[/?INST\]", re.IGNORECASE)
_ROLE = re.compile(r"^\s*(?:assistant|answer|output|response|model|ai)\s*(?:[:：]|\n)", re.IGNORECASE)
_BULLET = re.compile(r"^(?:[-*+•·–—>#]+|\(?\d{1,3}[.):]|\(?[a-z][.)])\s+", re.IGNORECASE)
_LABEL = re.compile(r"^([^\W\d_][\w /&-]{0,40}?)\s*[:：]\s*(.*)$", re.DOTALL)
_SEPARATORS = re.compile(r"[,;|\n\t，、；。•·]+|\s+/\s+|\s+[-–—]\s+|\.(?:\s|$)")
_EMPTY = re.compile(
    r"(?:none|nothing|n/?a|unknown|unclear|other|etc|and so on|not? (?:visible|applicable|specified|available|shown|"
    r"discernible|clear|tags?).*)\b\W*$",
    re.IGNORECASE,
)
# How a sentence begins, and the verbs that make one of a tag
_SENTENCE = re.compile(
    r"^(?:the|this|these|that|there|here|it|its|she|he|they|her|his|i|we|you|sure|certainly|please|note|overall|in|"
    r"let|based|given|of course|as)\b|\b(?:is|are|was|were|has|have|seems?|appears?|shows?|depicts?|features?|"
    r"captures?|suggests?|adds?|creates?|gives?|can be)\b",
    re.IGNORECASE,
)
_LOOP = re.compile(r"\b(\w+)(?:[\s-]+\1\b)+", re.IGNORECASE)


def clean_answer(text: str) -> Tags:
    """Turn a model's answer into tags; empty where nothing in it is a tag.

    The groups are those that the answer names, in lines or in JSON; tags without a named group are sorted by the
    vocabulary. Left out are refusals (the whole answer), sentences, tags of more than 6 words or 48 letters, with words
    in a loop, without a letter, or given before. Tags are in lower case.
    """
    text = _CHAT.sub(" ", text.replace("\r", "\n").replace("```json", "").replace("```", "")).strip()
    text = _ROLE.sub("", text)
    if _REFUSAL.search(text):
        return Tags()
    found = {group: [] for group in (*GROUPS, "")}
    for group, part in _parts(text):
        found[group] += [tag for piece in _SEPARATORS.split(part) if (tag := _clean_tag(piece))]
    unsorted = sort_tags(found[""])
    named = Tags(tuple(found["semantic"]), tuple(found["photographic"]))
    return _limited(Tags(named.semantic + unsorted.semantic, named.photographic + unsorted.photographic))


def _parts(text: str) -> list[tuple[str, str]]:
    """Return the parts of an answer as (group or empty, text)."""
    start, end = min((text.find(c) for c in "{[" if c in text), default=-1), max(text.rfind("}"), text.rfind("]"))
    if 0 <= start < end:
        try:
            return _parts_of_json(json.loads(text[start : end + 1]), "")
        except (ValueError, RecursionError):
            pass
    if '":' in text:  # JSON that was cut off: its keys are headings
        text = re.sub(r"[{}\[\]]", "\n", re.sub(r'"([^"\n]{1,40})"\s*:', r"\n\1: ", text))
    parts, group = [], ""
    for line in text.split("\n"):
        line = re.sub(r"[*_`]{2,}|[`\"\u201c\u201d]", "", line).strip()
        while bullet := _BULLET.match(line):
            line = line[bullet.end() :]
        if label := _LABEL.match(line):
            named, line = _group_of(label[1]), label[2]
            parts.append((named or group, line))
            if not line or any(word in label[1].lower() for word in GROUPS):  # "Lighting: soft" is of its line only
                group = named
        else:
            parts.append((group, line))
    return parts


def _parts_of_json(value: Any, group: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(group, value)]
    if isinstance(value, list):
        return [part for item in value for part in _parts_of_json(item, group)]
    if isinstance(value, dict):
        return [part for key, item in value.items() for part in _parts_of_json(item, _group_of(key) or group)]
    return []


def _group_of(label: str) -> str:
    """Return the group that a heading or a key names, itself or by one of its topics; empty if none."""
    label = label.lower()
    if group := next((group for group in GROUPS if group in label or group[:9] in label), ""):
        return group
    return (
        "photographic" if any(topic in label for topic in (*VOCABULARY, "makeup", "light", "focus", "camera")) else ""
    )


def _clean_tag(piece: str) -> str:
    """Return a piece of an answer as a tag, empty if it is none."""
    tag = " ".join(piece.replace("_", " ").split()).strip(" .!?:;,'\"\u2018\u2019*#()<>-–—").lower()
    tag = re.sub(r"^(?:and|a|an|with|some)\s+", "", tag)
    wrong = (
        not re.search(r"[^\W\d_]", tag)
        or len(tag.split()) > MAX_WORDS
        or len(tag) > MAX_LETTERS
        or _EMPTY.match(tag)
        or _SENTENCE.search(tag)
        or _LOOP.search(tag)
        or tag in (*GROUPS, "tags", "tag", "semantic tags", "photographic tags")
    )
    return "" if wrong else tag


def _limited(tags: Tags) -> Tags:
    """Return the tags without repetitions, across the groups too, and not more than a model writes on purpose."""
    semantic = list(dict.fromkeys(tags.semantic))
    photographic = [tag for tag in dict.fromkeys(tags.photographic) if tag not in semantic]
    return Tags(tuple(semantic[:MAX_TAGS]), tuple(photographic[:MAX_TAGS]))

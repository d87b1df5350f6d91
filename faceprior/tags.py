"""Tags, the words of a caption, in the two groups of AuthFace (arXiv 2410.09864, section 3.1).

Semantic tags say who and what is in the image, as captions for text-to-image models always do; photographic tags say
how it was photographed and how the face shows in it: expression, skin texture, make-up, lighting, lens, mood, style.
Table 3 compares a prior that was tuned with semantic tags only with one that was tuned with both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GROUPS = ("semantic", "photographic")
WhichTags = Literal["none", "semantic", "both"]  # the groups that make a prompt

# ---- The vocabulary: a tag that one of these expressions finds is photographic, any other is semantic.
# Colours, shapes and clothes are semantic ("light brown hair", "fair skin", "portrait photo"), freckles and wrinkles
# are skin texture. A tag that mixes both ("young woman in soft light") is photographic: tags are meant to be short.

# "light" that ends a tag or a sentence or does something ("soft light", "light from the left"), not the shade of a
# colour ("light brown hair", "light skin"); and words that are about light only.
_LIGHT = re.compile(
    r"""\b(?:
    (?<!is\s)(?<!are\s)(?<!traffic\s)(?<!street\s)lights?
        (?= \s*(?:$|[.,;:!?)])
          | \s+(?:from|on|through|across|over|behind|above|and|in\s(?:the|a)|is|source)\b
          | \s+(?:falls?|falling|comes?|coming|shines?|shining)\b )
    | lighting | illuminat(?:ed|ion) | golden\ hour
    | (?:back|sun|moon|candle|lamp|day|spot|rim|key|window)[-\ ]?(?:light(?:ing)?|lit)
    | (?:well|softly|dimly|side|front)[-\ ]lit
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)

VOCABULARY: dict[str, str] = {
    "expression": r"""expressions? | expressive | expressionless | smil(?:e|es|ing|ed) | grin(?:s|ning)? | laugh\w*
        | frown\w* | pout\w* | smirk\w* | serious(?:\ look)? | surprised | angry | sad | happy | relaxed
        | gaz(?:e|es|ing) | eye\ contact | looking\ (?:at|into|away|up|down|straight|left|right)\b
        | (?:open|closed|parted)\ (?:mouth|lips|eyes) | (?:mouth|lips|eyes)\ (?:open|closed|parted)""",
    "skin": r"""(?:textured|smooth|rough|dewy|oily|glowing|matte|glossy|shiny|clear|flawless|natural|detailed|weathered
        |wrinkled|freckled|realistic|porcelain|blemished|soft)\ skin\b
        | skin\ (?:texture|pores?|details?|detailing|imperfections?) | visible\ pores | pores?
        | freckl(?:e|es|ed) | wrinkl(?:e|es) | blemish(?:es)? | acne | crow'?s\ feet | peach\ fuzz | fine\ lines""",
    "make-up": r"""make[-\ ]?up | lipstick | lip\ gloss | glossy\ lips | eye[-\ ]?liner | mascara | eye[-\ ]?shadow
        | blush(?:er)? | rouge | contouring | false\ (?:eye)?lashes""",
    "lighting": r"""shadows? | high[-\ ]key | low[-\ ]key | (?:light|dark|mid|warm|cool|neutral)[-\ ]tones? | contrast
        | (?:under|over)?expos(?:ed|ure) | chiaroscuro | rembrandt | silhouette | soft ?box | ring ?light | flash
        | catch[-\ ]?lights? | sunlit | highlights""",
    "lens": r"""lens | bokeh | depth\ of\ field | dof | (?:soft|sharp|shallow|deep|selective|out[-\ ]of|in)[-\ ]focus
        | focus(?:ed)?\ on | focal\ length | \d+\ ?mm | f/?\d[\d.]* | aperture | macro | telephoto | wide[-\ ]angle
        | close[-\ ]?up | head\ ?shot | full[-\ ]body\ shot | eye[-\ ]level | (?:low|high)[-\ ]angle | blurr(?:ed|y)
        | sharp(?:ness|ly)?(?!\ (?:jaw|chin|nose|features|cheek)\w*) | soft\ details? | highly\ detailed | iso\ ?\d+
        | dslr | canon | nikon | leica | hasselblad | fujifilm | shutter\ speed | vignett(?:e|ing)""",
    "mood": r"""moods? | moody | atmospher(?:e|ic) | dramatic | serene | calm | melanchol\w+ | intimate | nostalgic
        | dreamy | cheerful | joyful | mysterious | contemplative | pensive | thoughtful | tranquil | romantic
        | emotional | ethereal | somber | gloomy | confident""",
    "style": r"""(?<!hair\ )styles? | cinematic | black[-\ ](?:and|&)[-\ ]white | monochrom\w* | b&w | b/w | sepia
        | film\ (?:grain|photograph\w*|look|still) | analog\w* | vintage | retro | editorial | fine[-\ ]art | hdr
        | \d+k | ultra[-\ ]hd | (?:hyper|photo|ultra)?[-\ ]?realis(?:m|tic) | photography
        | (?:studio|fashion|beauty|candid|documentary|street|professional|glamou?r)\ (?:portrait|photo|shot|shoot)
        | colou?r\ grad\w+ | minimalist\w* | colou?r\ palette
        | (?:muted|vivid|vibrant|pastel|(?:de)?saturated|warm|cool|earthy)\ (?:colou?rs?|palette|hues?)""",
}  # fmt: skip
_PHOTOGRAPHIC = re.compile(rf"(?<!\w)(?:{'|'.join(VOCABULARY.values())})(?!\w)", re.VERBOSE | re.IGNORECASE)


def mentions_light(caption: str) -> bool:
    """Whether a caption says how its subject is lit: "soft light", "backlit"; not "light brown hair"."""
    return _LIGHT.search(caption) is not None


def is_photographic(tag: str) -> bool:
    """Whether a tag belongs to the photographic group, by the vocabulary."""
    return mentions_light(tag) or _PHOTOGRAPHIC.search(tag) is not None


# ---- The two groups


@dataclass(frozen=True)
class Tags:
    """The tags of a portrait in their two groups."""

    semantic: tuple[str, ...] = ()
    photographic: tuple[str, ...] = ()

    def prompt(self, which: WhichTags = "both") -> str:
        """Join the tags of `which` groups by commas, the semantic ones first; `none` is the empty prompt."""
        return ", ".join({"none": (), "semantic": self.semantic, "both": self.semantic + self.photographic}[which])

    def to_row(self) -> dict[str, list[str]]:
        """Return the groups as JSON keeps them."""
        return {group: list(getattr(self, group)) for group in GROUPS}

    @classmethod
    def from_row(cls, row: dict[str, list[str]]) -> Tags:
        return cls(**{group: tuple(row[group]) for group in GROUPS})


def split_tags(caption: str) -> list[str]:
    """Return the tags of a caption, which commas separate, without empty ones."""
    return [tag for tag in (" ".join(part.split()) for part in caption.split(",")) if tag]


def sort_tags(tags: Iterable[str]) -> Tags:
    """Sort tags into the two groups by the vocabulary; each keeps its order."""
    tags = list(tags)
    photographic = tuple(tag for tag in tags if is_photographic(tag))
    return Tags(tuple(tag for tag in tags if not is_photographic(tag)), photographic)


# ---- Tags from several sources

# What one tag settles: what a source says about it, later sources do not contradict
_SETTLED = {
    "lighting": lambda tag: mentions_light(tag) or _finds("lighting", tag),
    "expression": lambda tag: _finds("expression", tag),
    "skin": lambda tag: _finds("skin", tag) and "freckle" not in tag.lower(),
    "depth of field": re.compile(r"depth of field|bokeh|blurr\w+.*background|background.*(?:blur|focus)", re.I).search,
    "sharpness": re.compile(r"soft focus|sharp|\bblurred (?:photo|image|picture)", re.I).search,
    "colours": re.compile(r"black (?:and|&) white|monochrom|sepia|\bb[&/]w\b", re.I).search,
}


def _finds(topic: str, tag: str) -> bool:
    return re.search(rf"(?<!\w)(?:{VOCABULARY[topic]})(?!\w)", tag, re.VERBOSE | re.IGNORECASE) is not None


def combine_tags(sources: Iterable[Tags]) -> Tags:
    """Join the tags of several sources, the more trusted first, without duplicates and contradictions.

    Where a source says something about the light, the expression, the skin's texture, the depth of field, the sharpness
    or missing colours, what later sources say about it is left out: measured light beside "backlit" would be wrong.
    """
    semantic, photographic, settled = [], [], set()
    known = set()
    for tags in sources:
        spoken = {tag: {subject for subject, about in _SETTLED.items() if about(tag)}
                  for tag in tags.semantic + tags.photographic}  # fmt: skip
        for group, found in ((semantic, tags.semantic), (photographic, tags.photographic)):
            for tag in found:
                if tag.lower() not in known and not spoken[tag] & settled:
                    known.add(tag.lower())
                    group.append(tag)
        settled |= set().union(*spoken.values()) if spoken else set()
    return Tags(tuple(semantic), tuple(photographic))

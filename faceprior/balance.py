"""Who is in a set of portraits: counts of tags, skin tones and ages, and what is missing.

The skin tone is the individual typology angle, from CIELAB L* and b* of the cheeks:

    ITA = arctan((L* - 50) / b*) 180 / pi          (Chardon, Cretois and Hourseau 1991, Int. J. Cosmet. Sci. 13)

with the six bands of Del Bino and Bernerd (2013, Br. J. Dermatol. 169). It was made for a spectrophotometer: in a
photograph exposure and the light's colour move it by a band or two, so the counts describe the set and nobody in it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from faceprior.images import cv2

SKIN_TONES = {"very light": 55, "light": 41, "intermediate": 28, "tan": 10, "brown": -30, "dark": -180}  # lower limits
AGES = ("child", "young", "middle-aged", "elderly")
FEW = 0.05  # fraction of the portraits below which a group is named as rare

_AGE_WORDS = {
    "child": r"bab(?:y|ies)|infant|toddler|child(?:ren)?|boy|girl|kid",
    "young": r"young|youthful|teen(?:age)?r?|adolescent",
    "middle-aged": r"middle[- ]aged",
    "elderly": r"elderly|senior|old (?:man|woman|person|lady)",
}
_YEARS = re.compile(r"\b(\d{1,3})[- ]years?[- ]old\b|\bage[d:]? (\d{1,3})\b", re.IGNORECASE)
_OLDEST = {"child": 14, "young": 35, "middle-aged": 60}  # years at which the group ends


def typology_angle(rgb: np.ndarray) -> float:
    """Return the individual typology angle of skin, degrees: 90 very light, -90 dark.

    rgb: (..., 3) uint8 sRGB, of which the median L* and b* count.
    """
    pixels = np.ascontiguousarray(rgb).reshape(-1, 1, 3).astype(np.float32) / 255
    lightness, _, b = np.median(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB), axis=(0, 1))
    return float(np.degrees(np.arctan((lightness - 50) / max(b, 1e-3))))


def skin_tone(angle: float) -> str:
    """Return the band of an individual typology angle, a key of SKIN_TONES."""
    return next(name for name, low in SKIN_TONES.items() if angle > low or low == -180)


def age_group(tags: Iterable[str]) -> str | None:
    """Return one of AGES that a portrait's tags name, in words or years; None where they say nothing of age."""
    text = ", ".join(tags)
    if years := _YEARS.search(text):
        age = int(years.group(1) or years.group(2))
        return next((group for group, end in _OLDEST.items() if age < end), "elderly")
    words = [group for group, pattern in _AGE_WORDS.items() if re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)]
    return words[-1] if words else None  # a "young boy" is a child by one word and young by the other


def measure_balance(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the portraits of a manifest -> portraits, skin_tones, ages, tags (each name -> count), missing.

    rows: of the manifest, with the tags as lists under `semantic` and `photographic` or, without them, in `caption`,
    and the typology angle under `quality`, `skin`. missing: sentences on groups without portraits, or with few.
    """
    rows = list(rows)
    angles = [row["quality"]["skin"] for row in rows if "skin" in row.get("quality", {})]
    found_tones = Counter(map(skin_tone, angles))
    ages = Counter(age_group(_tags(row)) or "unknown" for row in rows)
    tags = Counter(tag for row in rows for tag in dict.fromkeys(_tags(row)))
    tones = {tone: found_tones[tone] for tone in SKIN_TONES}
    known_ages = {group: ages[group] for group in AGES}
    missing = _missing(tones, "skin tone", len(rows)) + _missing(known_ages, "age", len(rows) - ages["unknown"])
    if ages["unknown"]:
        missing.append(f"age unknown: the tags of {ages['unknown']} of {len(rows)} portraits do not say it")
    return {
        "portraits": len(rows),
        "skin_tones": tones,
        "ages": {**known_ages, "unknown": ages["unknown"]},
        "tags": dict(sorted(tags.items(), key=lambda item: (-item[1], item[0]))),
        "missing": missing,
    }


def _missing(counts: Mapping[str, int], name: str, total: int) -> list[str]:
    none = [group for group, count in counts.items() if not count]
    few = [f"{group} ({count})" for group, count in counts.items() if 0 < count < FEW * total]
    sentences = [f"no portrait of the {name} {', '.join(none)}"] if none and total else []
    return sentences + ([f"few portraits, below {FEW:.0%}, of the {name} {', '.join(few)}"] if few else [])


def _tags(row: Mapping[str, Any]) -> list[str]:
    """Return a row's tags, of all groups."""
    groups = [tag for group in ("semantic", "photographic") for tag in row.get(group) or ()]
    return groups or [tag.strip() for tag in str(row.get("caption", "")).split(",") if tag.strip()]

"""
Who is drawn, and how the image is taken: every trait of a drawn portrait, sampled from a seed.

Each trait has its own random stream, so that choosing one (`hair_style="bob"`) leaves all others as they were, except
those that it hides.
A few hidden causes (age, sex, build, ancestry) move many traits together: that gives people instead of noise.
Lengths are decimetres in the head's frame: x to the image's right, y up, z to the camera, origin midway between the
eyeballs; angles are degrees.
"""

import difflib
import zlib
from numbers import Real
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

AGE_GROUPS = {"young": (0.08, 0.34), "middle-aged": (0.40, 0.66), "elderly": (0.74, 1.0)}  # range of `age`
EXPRESSIONS = ("neutral", "smiling", "laughing", "serious", "surprised")
BACKGROUNDS = ("studio", "foliage", "street lights", "room")
LIGHT_SIDES = ("left", "right", "front")
ANCESTRIES = ("european", "african", "east asian", "south asian")

SKIN_TONES = {
    "fair": (0.0, 0.2),
    "medium": (0.25, 0.5),
    "brown": (0.52, 0.74),
    "dark": (0.76, 1.0),
}  # of `melanin`
HAIR_STYLES = (
    "short", "side part", "buzz cut", "receding", "bald", "short curly", "afro",
    "bob", "long straight", "long wavy", "long curly", "tied back", "head scarf", "knit cap", "hat", "cap",
)  # fmt: skip
HAIR_COLORS = ("black", "dark brown", "brown", "light brown", "blond", "red", "gray", "white")
EYE_COLORS = ("dark brown", "brown", "hazel", "green", "blue", "gray")
BEARDS = ("none", "stubble", "moustache", "goatee", "full beard")
GLASSES = ("none", "round", "rectangular", "aviator")
EAR_RINGS = ("none", "stud", "hoop", "drop")
HATS = ("hat", "cap")
HIDDEN_EARS = ("afro", "short curly", "bob", "long straight", "long wavy", "long curly", "head scarf")
CLOTHES = ("crew neck", "v-neck", "shirt", "suit", "turtleneck")


class Trait(NamedTuple):
    """A normal distribution clipped to [low, high]; its mean moves by loading * cause for each hidden cause."""

    mean: float
    spread: float
    low: float
    high: float
    loadings: dict[str, float] = {}


# Causes: masculine -.5 .. .5; age -.4 .. .6; weight about -1 .. 1; african, east_asian, south_asian 0 .. 1
TRAITS = {
    # the skull and the jaw: factors of an average head
    "face_width": Trait(1.03, 0.025, 0.96, 1.11, {"weight": 0.025, "east_asian": 0.02}),
    "jaw_width": Trait(0.97, 0.035, 0.86, 1.12, {"masculine": 0.09, "weight": 0.06}),
    "chin_width": Trait(1.0, 0.10, 0.72, 1.35, {"masculine": 0.28, "weight": 0.05}),
    "jaw_length": Trait(0.985, 0.022, 0.92, 1.06, {"masculine": 0.05}),
    "chin_forward": Trait(0.0, 0.02, -0.05, 0.05, {"masculine": 0.02}),
    "chin_boss": Trait(0.050, 0.012, 0.02, 0.09, {"masculine": 0.025}),
    "chin_cleft": Trait(-0.010, 0.010, 0.0, 0.02, {"masculine": 0.010}),
    "skull_width": Trait(1.0, 0.018, 0.96, 1.05),
    "skull_height": Trait(1.0, 0.022, 0.95, 1.06),
    "cheekbone": Trait(0.045, 0.012, 0.01, 0.08, {"east_asian": 0.015, "weight": -0.006}),
    "cheek_hollow": Trait(0.018, 0.012, 0.0, 0.06, {"weight": -0.03, "age": 0.03, "masculine": 0.01}),
    "cheek_fullness": Trait(0.018, 0.010, 0.0, 0.06, {"weight": 0.022, "age": -0.01}),
    "double_chin": Trait(0.0, 0.02, 0.0, 0.10, {"weight": 0.05, "age": 0.03}),
    "muzzle": Trait(0.050, 0.010, 0.02, 0.09, {"african": 0.02}),
    # brows and eyes
    "brow_y": Trait(0.225, 0.012, 0.18, 0.26, {"masculine": -0.035}),
    "brow_ridge": Trait(0.030, 0.010, 0.0, 0.07, {"masculine": 0.045, "east_asian": -0.015}),
    "brow_thickness": Trait(0.036, 0.005, 0.022, 0.052, {"masculine": 0.012, "age": -0.004}),
    "brow_arch": Trait(0.030, 0.012, 0.0, 0.065, {"masculine": -0.03}),
    "brow_density": Trait(0.80, 0.10, 0.45, 1.0, {"masculine": 0.15, "age": -0.15}),
    "socket_depth": Trait(0.055, 0.010, 0.025, 0.085, {"east_asian": -0.025, "age": 0.015, "masculine": 0.01}),
    "eye_x": Trait(0.315, 0.008, 0.295, 0.335),
    "eye_half_width": Trait(0.161, 0.005, 0.143, 0.170, {"age": -0.006}),
    "eye_upper": Trait(0.0615, 0.004, 0.050, 0.076, {"masculine": -0.008, "age": -0.010, "east_asian": -0.006}),
    "eye_lower": Trait(0.042, 0.003, 0.034, 0.050),
    "eye_tilt": Trait(0.008, 0.007, -0.012, 0.028, {"age": -0.012, "east_asian": 0.006}),
    "iris_radius": Trait(0.0625, 0.0015, 0.058, 0.066),
    "crease_height": Trait(0.046, 0.007, 0.028, 0.066, {"masculine": -0.010, "east_asian": -0.012}),
    "crease_depth": Trait(0.016, 0.004, 0.004, 0.026, {"east_asian": -0.009}),
    "eye_bags": Trait(0.005, 0.003, 0.0, 0.028, {"age": 0.020, "weight": 0.002}),
    # nose and mouth
    "nose_y": Trait(-0.385, 0.015, -0.42, -0.33, {"masculine": -0.015, "age": -0.012}),
    "nose_tip": Trait(
        0.470, 0.022, 0.40, 0.55, {"masculine": 0.03, "age": 0.02, "east_asian": -0.03, "african": -0.04}
    ),
    "nose_root": Trait(0.205, 0.015, 0.15, 0.26, {"masculine": 0.03, "east_asian": -0.035, "african": -0.02}),
    "nose_hump": Trait(0.004, 0.010, -0.025, 0.04, {"masculine": 0.012}),
    "nose_width": Trait(0.97, 0.06, 0.82, 1.35, {"masculine": 0.12, "african": 0.25, "east_asian": 0.06, "age": 0.04}),
    "bridge_width": Trait(1.0, 0.09, 0.78, 1.3, {"african": 0.15, "masculine": 0.08}),
    "mouth_y": Trait(-0.705, 0.014, -0.745, -0.665),
    "mouth_half_width": Trait(0.240, 0.010, 0.21, 0.28, {"masculine": 0.018, "african": 0.015}),
    "lip_fullness": Trait(
        1.0, 0.14, 0.5, 1.65, {"masculine": -0.28, "african": 0.38, "age": -0.45, "south_asian": 0.1}
    ),
    "cupid_bow": Trait(1.0, 0.25, 0.4, 1.6),
    "fold_depth": Trait(0.30, 0.15, 0.05, 1.0, {"age": 0.75, "weight": 0.08}),
    "wrinkles": Trait(0.0, 0.10, 0.0, 1.0, {"age": 1.25}),
    # asymmetry: a warp of the whole face
    "asymmetry_eyes": Trait(0.0, 0.004, -0.010, 0.010),
    "asymmetry_mouth": Trait(0.0, 0.007, -0.018, 0.018),
    # ears, neck, shoulders
    "ear_size": Trait(0.98, 0.05, 0.86, 1.14, {"age": 0.08, "masculine": 0.05}),
    "ear_angle": Trait(0.0, 5.0, -10, 12),
    "neck_width": Trait(0.435, 0.014, 0.36, 0.56, {"masculine": 0.16, "weight": 0.03}),
    "shoulder_width": Trait(1.74, 0.06, 1.5, 2.1, {"masculine": 0.34, "weight": 0.06}),
    # skin
    "melanin_shift": Trait(0.0, 0.08, -0.2, 0.2),
    "redness": Trait(0.45, 0.2, 0.0, 1.0, {"age": 0.2}),
    "blotches": Trait(0.5, 0.2, 0.1, 1.0, {"age": 0.35}),
    "oiliness": Trait(0.5, 0.16, 0.1, 1.0, {"age": -0.2}),
    # hair line above the eyes
    "hairline_y": Trait(0.735, 0.025, 0.66, 0.83, {"masculine": 0.02}),
    # the head's pose, and the image
    "yaw": Trait(0.0, 13.0, -30, 30),
    "pitch": Trait(-1.0, 5.0, -12, 12),
    "roll": Trait(0.0, 4.0, -12, 12),
    "gaze_x": Trait(0.0, 3.0, -12, 12),
    "gaze_y": Trait(0.0, 2.0, -8, 8),
    "view_height": Trait(3.68, 0.25, 3.3, 4.5),  # what the image's height covers at the face
    "offset_x": Trait(0.0, 0.10, -0.3, 0.3),
    "offset_y": Trait(0.0, 0.05, -0.12, 0.12),
    "camera_distance": Trait(12.0, 1.5, 9.0, 16.0),
    # light
    "light_elevation": Trait(30.0, 9.0, 10, 50),
    "fill": Trait(0.38, 0.08, 0.2, 0.6),
    "exposure": Trait(0.95, 0.06, 0.85, 1.15),
}


class Dice:
    """Random draws with one stream per name; a name that the caller has chosen keeps the caller's value."""

    def __init__(self, seed: int | list[int], chosen: dict):
        self.seed = [int(part) for part in np.atleast_1d(seed)]
        self.chosen = chosen

    def stream(self, name: str) -> np.random.Generator:
        """The random stream of `name`; equal for equal seeds, independent of all other draws."""
        return np.random.default_rng([*self.seed, zlib.crc32(name.encode())])

    def normal(self, name: str, trait: Trait, causes: dict[str, float]) -> float:
        """The trait's value, given how strong each hidden cause is."""
        mean = trait.mean + sum(load * causes[cause] for cause, load in trait.loadings.items())
        value = float(np.clip(self.stream(name).normal(mean, trait.spread), trait.low, trait.high))
        return self.chosen.get(name, value)

    def uniform(self, name: str, low: float, high: float) -> float:
        """A number between low and high."""
        return self.chosen.get(name, float(self.stream(name).uniform(low, high)))

    def chance(self, name: str, probability: float) -> bool:
        """True with the given probability."""
        return self.chosen.get(name, bool(self.stream(name).random() < probability))

    def sometimes(self, name: str, probability: float, least: float) -> float:
        """A strength between `least` and 1 with the given probability, else 0."""
        strength, luck = self.stream(name).random(2)
        return self.chosen.get(name, float(least + (1 - least) * strength) if luck < probability else 0.0)

    def pick(self, name: str, weights: dict[str, float]) -> str:
        """One key of `weights`, with probability proportional to its value."""
        values = np.array(list(weights.values()), np.float64)
        index = np.searchsorted(np.cumsum(values) / values.sum(), self.stream(name).random())
        return self.chosen.get(name, list(weights)[min(int(index), len(weights) - 1)])


def sample_person(seed: int | list[int], **overrides) -> SimpleNamespace:
    """Draw all traits of one portrait: one attribute per name of `trait_names()`.

    seed: a number, or several that together name one person. overrides: traits chosen by the caller.
    Raises ValueError for an unknown name or an unknown value.
    """
    _check_overrides(overrides)
    dice = Dice(seed, overrides)
    person = SimpleNamespace(seed=int(dice.stream("seed").integers(2**31)))
    causes = _sample_causes(dice, person)
    for name, trait in TRAITS.items():
        setattr(person, name, dice.normal(name, trait, causes))
    person.melanin = float(np.clip(person.melanin + person.melanin_shift * ("melanin" not in overrides), 0, 1))
    _sample_expression(dice, person)
    _sample_hair(dice, person)
    _sample_skin(dice, person)
    _sample_attire(dice, person)
    _sample_light(dice, person)
    return person


def _sample_causes(dice: Dice, person) -> dict[str, float]:
    """Sex, age, build and ancestry, and the numbers by which they move the traits."""
    person.sex = dice.pick("sex", {"woman": 1, "man": 1})
    person.age_group = dice.pick("age_group", {"young": 0.5, "middle-aged": 0.3, "elderly": 0.2})
    person.age = dice.uniform("age", *AGE_GROUPS[person.age_group])
    if "age_group" not in dice.chosen:
        person.age_group = next(
            group for group, (_, high) in AGE_GROUPS.items() if person.age <= high + 0.03 or high == 1
        )
    low, high = (0.05, 0.32) if person.sex == "woman" else (0.66, 1.0)
    person.masculine = dice.uniform("masculine", low, high)
    person.weight = dice.chosen.get("weight", float(np.clip(dice.stream("weight").normal(0.05, 0.5), -1, 1.4)))
    tones = {"fair": ("european",), "medium": ("european", "east asian", "south asian"),
             "brown": ("south asian", "african"), "dark": ("african", "south asian")}  # fmt: skip
    weights = {"european": 0.42, "african": 0.2, "east asian": 0.2, "south asian": 0.18}
    if "skin_tone" in dice.chosen:
        weights = {k: v for k, v in weights.items() if k in tones[dice.chosen["skin_tone"]]}
    person.ancestry = dice.pick("ancestry", weights)
    centre = {"european": 0.10, "east asian": 0.26, "south asian": 0.55, "african": 0.82}[person.ancestry]
    person.melanin = dice.chosen.get("melanin", centre)
    if "skin_tone" in dice.chosen:
        person.melanin = float(np.clip(person.melanin, *SKIN_TONES[dice.chosen["skin_tone"]]))
    strength = dice.uniform("ancestry_strength", 0.5, 1.0)
    causes = {"masculine": person.masculine - 0.5, "age": person.age - 0.4, "weight": person.weight}
    for name in ANCESTRIES[1:]:
        causes[name.replace(" ", "_")] = strength * (person.ancestry == name)
    return causes


def _sample_expression(dice: Dice, person) -> None:
    weights = {"neutral": 0.30, "smiling": 0.32, "laughing": 0.22, "serious": 0.11, "surprised": 0.05}
    person.expression = dice.pick("expression", weights)
    smile, gap, brows, opening = {
        "neutral": ((0.0, 0.2), (0, 0), (-0.1, 0.1), (0.95, 1.05)),
        "smiling": ((0.45, 0.85), (0, 0), (-0.1, 0.25), (0.88, 1.0)),
        "laughing": ((0.75, 1.0), (0.055, 0.095), (0.0, 0.35), (0.80, 0.95)),
        "serious": ((-0.45, -0.1), (0, 0), (-0.8, -0.25), (0.88, 1.0)),
        "surprised": ((0.0, 0.15), (0.06, 0.11), (0.9, 1.4), (1.08, 1.18)),
    }[person.expression]
    person.smile = dice.uniform("smile", *smile)  # -1 .. 1
    person.mouth_gap = dice.uniform("mouth_gap", *gap)  # height of the open mouth
    person.brow_lift = dice.uniform("brow_lift", *brows)  # -1 .. 1.5
    person.eye_openness = dice.uniform("eye_openness", *opening)  # factor of the lid curves


def _sample_hair(dice: Dice, person) -> None:
    woman, african = person.sex == "woman", person.ancestry == "african"
    if woman:
        weights = {"long straight": 0.24, "long wavy": 0.22, "bob": 0.17, "tied back": 0.16, "long curly": 0.08,
                   "short": 0.05, "short curly": 0.05, "afro": 0.02, "buzz cut": 0.01}  # fmt: skip
    else:
        weights = {"short": 0.34, "side part": 0.26, "buzz cut": 0.12, "receding": 0.08, "bald": 0.06,
                   "short curly": 0.08, "long straight": 0.02, "long wavy": 0.02, "tied back": 0.02}  # fmt: skip
        if person.age > 0.5:
            weights.update({"receding": 0.25, "bald": 0.16})
    if african:
        weights.update({"afro": 0.28 if woman else 0.16, "long straight": 0.08 if woman else 0, "long wavy": 0.05})
        weights["long curly"] = 0.26 if woman else 0
        weights["buzz cut"] = 0.06 if woman else 0.4
    weights["knit cap"] = 0.05
    weights["head scarf"] = 0.06 * woman
    person.hair_style = dice.pick("hair_style", weights)
    person.hair_below = _sample_hat(dice, person)
    fair = {"black": 0.06, "dark brown": 0.24, "brown": 0.26, "light brown": 0.14, "blond": 0.2, "red": 0.10}
    dark = {"black": 0.66, "dark brown": 0.30, "brown": 0.04}
    person.natural_hair = dice.pick("natural_hair", fair if person.ancestry == "european" else dark)
    graying = dice.chance("graying", np.clip((person.age - 0.45) * 1.9, 0, 0.95))
    grayed = "white" if dice.chance("whitening", np.clip(person.age - 0.55, 0, 1)) else "gray"
    person.hair_color = dice.chosen.get("hair_color", grayed if graying else person.natural_hair)
    person.fringe = dice.chance("fringe", 0.3 if woman else 0.2)
    person.part_side = dice.pick("part_side", {"left": 1, "right": 1})
    person.hair_volume = dice.uniform("hair_volume", 0.75, 1.3)
    person.hair_length = dice.uniform("hair_length", 0.85, 1.15)
    beards = {"none": 1.0} if woman else {"none": 0.44, "stubble": 0.2, "full beard": 0.16, "goatee": 0.1,
                                          "moustache": 0.1}  # fmt: skip
    person.beard = dice.pick("beard", beards)


def _sample_hat(dice: Dice, person) -> str:
    """Put a hat or a cap on some heads; returns the hair below it, or for all others their own."""
    woman, worn = person.sex == "woman", dice.stream("hat").random()
    if "hair_style" not in dice.chosen and person.hair_style not in ("head scarf", "knit cap"):
        person.hair_style = "hat" if worn < 0.05 else "cap" if worn < 0.085 else person.hair_style
    person.brim = dice.uniform("brim", 0.26, 0.56 if woman else 0.36)
    person.hat_shape = dice.uniform("hat_shape", 0.0, 0.6) if woman else dice.uniform("hat_shape", 0.6, 1.0)
    below = {"long straight": 0.4, "long wavy": 0.3, "bob": 0.3} if woman else {"short": 0.7, "buzz cut": 0.3}
    below = dice.pick("hair_below", below)
    return below if person.hair_style in HATS else person.hair_style


def _sample_skin(dice: Dice, person) -> None:
    fair = person.melanin < 0.3
    person.skin_tone = dice.chosen.get(
        "skin_tone", next(name for name, (_, high) in SKIN_TONES.items() if person.melanin <= high + 0.02)
    )
    person.freckles = dice.sometimes("freckles", 0.22 if fair else 0.03, 0.4)
    brown = {"dark brown": 0.6, "brown": 0.4}
    light = {"brown": 0.3, "hazel": 0.14, "green": 0.14, "blue": 0.32, "gray": 0.1}
    person.eye_color = dice.pick("eye_color", light if person.ancestry == "european" else brown)
    woman = person.sex == "woman"
    person.lipstick = dice.sometimes("lipstick", 0.5 * woman, 0.3)
    person.lipstick_color = dice.pick("lipstick_color", {"red": 1, "rose": 1, "berry": 0.7, "nude": 0.8})
    person.eyeliner = dice.sometimes("eyeliner", 0.6 * woman, 0.3)
    person.lashes = 0.35 + 0.4 * woman + 0.25 * person.eyeliner
    person.moles = int(dice.stream("moles").choice([0, 0, 0, 1, 1, 2]))


def _sample_attire(dice: Dice, person) -> None:
    old = person.age > 0.6
    weights = {"none": 1.0, "round": 0.11, "rectangular": 0.17 + 0.2 * old, "aviator": 0.06}
    person.glasses = dice.pick("glasses", weights)
    person.glasses_color = dice.pick("glasses_color", {"black": 1, "tortoise": 0.6, "metal": 0.6, "blue": 0.3})
    shown = person.hair_below not in HIDDEN_EARS
    weights = {"none": 1.0}
    if shown:
        weights = {"none": 0.45, "stud": 0.2, "hoop": 0.2, "drop": 0.15}
        weights = weights if person.sex == "woman" else {"none": 0.96, "stud": 0.03, "hoop": 0.01}
    person.ear_rings = dice.pick("ear_rings", weights)
    person.metal = dice.pick("metal", {"gold": 1, "silver": 0.8})
    suit = 0.22 if person.sex == "man" else 0.10
    weights = {"crew neck": 0.32, "v-neck": 0.2, "shirt": 0.24, "suit": suit, "turtleneck": 0.1}
    person.clothes = dice.pick("clothes", weights)
    person.cloth_hue = dice.uniform("cloth_hue", 0, 1)
    person.cloth_saturation = dice.uniform("cloth_saturation", 0.05, 0.6)
    person.cloth_value = dice.uniform("cloth_value", 0.06, 0.9)


def _sample_light(dice: Dice, person) -> None:
    person.light_side = dice.pick("light_side", {"left": 0.42, "right": 0.42, "front": 0.16})
    reach = dice.uniform("light_reach", 24, 62) if person.light_side != "front" else dice.uniform("light_reach", -8, 8)
    person.light_azimuth = dice.chosen.get("light_azimuth", -reach if person.light_side == "left" else reach)
    if "light_side" not in dice.chosen and abs(person.light_azimuth) > 12:
        person.light_side = "left" if person.light_azimuth < 0 else "right"
    person.light_hardness = dice.pick("light_hardness", {"soft": 0.6, "hard": 0.4})
    person.color_temperature = dice.pick("color_temperature", {"warm": 0.35, "neutral": 0.35, "cool": 0.3})
    person.rim = dice.uniform("rim", 0, 1) ** 2
    person.background = dice.pick("background", {"studio": 0.34, "foliage": 0.26, "street lights": 0.16, "room": 0.24})


CHOICES = {
    "sex": ("woman", "man"), "age_group": tuple(AGE_GROUPS), "ancestry": ANCESTRIES, "expression": EXPRESSIONS,
    "hair_style": HAIR_STYLES, "hair_color": HAIR_COLORS, "natural_hair": HAIR_COLORS, "part_side": ("left", "right"),
    "beard": BEARDS, "skin_tone": tuple(SKIN_TONES), "eye_color": EYE_COLORS, "glasses": GLASSES,
    "glasses_color": ("black", "tortoise", "metal", "blue"), "clothes": CLOTHES, "light_side": LIGHT_SIDES,
    "ear_rings": EAR_RINGS, "metal": ("gold", "silver"), "hair_below": HAIR_STYLES[:-4],
    "lipstick_color": ("red", "rose", "berry", "nude"), "light_hardness": ("soft", "hard"),
    "color_temperature": ("warm", "neutral", "cool"), "background": BACKGROUNDS,
}  # fmt: skip
FLAGS = ("fringe", "graying", "whitening")
NUMBERS = (
    *TRAITS, "age", "masculine", "weight", "melanin", "ancestry_strength", "smile", "mouth_gap", "brow_lift",
    "eye_openness", "hair_volume", "hair_length", "brim", "hat_shape", "freckles", "lipstick", "eyeliner",
    "cloth_hue", "cloth_saturation", "cloth_value", "light_reach", "light_azimuth", "rim",
)  # fmt: skip


def trait_names() -> tuple[str, ...]:
    """All names that `sample_person` and `draw_portrait` take as overrides."""
    return (*CHOICES, *FLAGS, *NUMBERS)


def _check_overrides(overrides: dict) -> None:
    for name, value in overrides.items():
        if name not in trait_names():
            nearest = difflib.get_close_matches(name, trait_names(), n=1, cutoff=0)[0]
            valid = ", ".join(sorted(trait_names()))
            raise ValueError(f"unknown trait `{name}`: did you mean `{nearest}`? Valid names: {valid}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"`{name}` has to be one of {', '.join(CHOICES[name])} but is {value!r}")
        if name in FLAGS and not isinstance(value, bool):
            raise ValueError(f"`{name}` has to be True or False but is {value!r}")
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(value)):
            raise ValueError(f"`{name}` has to be a finite number but is {value!r}")
        if name in TRAITS:
            trait = TRAITS[name]
            width = trait.high - trait.low
            if not trait.low - width <= value <= trait.high + width:
                limits = f"{trait.low - width:.3g} and {trait.high + width:.3g}"
                raise ValueError(f"`{name}` has to be between {limits} but is {value!r}")

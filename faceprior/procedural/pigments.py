"""
The colours of skin, hair, eyes and lips.
"""

from types import SimpleNamespace

import numpy as np

HAIR_COLORS = {  # sRGB
    "black": (26, 22, 21), "dark brown": (54, 37, 28), "brown": (92, 62, 42), "light brown": (134, 98, 66),
    "blond": (196, 160, 108), "red": (150, 72, 36), "gray": (138, 136, 134), "white": (190, 187, 182),
}  # fmt: skip
SKIN_LADDER = ((236, 194, 172), (224, 178, 151), (207, 158, 130), (182, 131, 100), (146, 98, 70), (106, 68, 48),
               (72, 46, 35))  # fmt: skip  # sRGB, melanin 0 to 1
IRIS_COLORS = {"dark brown": (52, 32, 22), "brown": (92, 56, 32), "hazel": (122, 94, 52), "green": (100, 116, 76),
               "blue": (92, 128, 162), "gray": (122, 134, 142)}  # fmt: skip
LIPSTICKS = {"red": (178, 36, 46), "rose": (190, 84, 96), "berry": (120, 30, 56), "nude": (186, 112, 96)}


def to_linear(srgb) -> np.ndarray:
    """sRGB 0 .. 255 -> linear 0 .. 1, float32."""
    c = np.asarray(srgb, np.float64) / 255
    return np.where(c < 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4).astype(np.float32)


def skin_color(melanin: float) -> np.ndarray:
    """Linear RGB (3,) of even skin."""
    ladder = to_linear(SKIN_LADDER)
    steps = np.linspace(0, 1, len(ladder))
    return np.array([np.interp(melanin, steps, ladder[:, c]) for c in range(3)], np.float32)


def hair_color(person: SimpleNamespace) -> np.ndarray:
    """Linear RGB (3,) of the hair."""
    return to_linear(HAIR_COLORS[person.hair_color])


def brow_color(person: SimpleNamespace) -> np.ndarray:
    """Linear RGB (3,) of brows and lashes: darker than fair hair, and grey later than it."""
    hair = to_linear(HAIR_COLORS[person.hair_color])
    return np.minimum(0.45 * hair, 0.10) + 0.004

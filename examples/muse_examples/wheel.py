# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Mikels' wheel as a picture to click on: a direction is an emotion, between two lies a mixture of both, the outer ring
evokes it, the inner one keeps more of the picture, and in the middle is no emotion.
"""

import argparse
import math
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from muse_examples.contact_sheets import EMOTION_COLORS, FAINT, INK, PAPER
from muse_examples.options import parse_emotion
from pipeline_muse import MIKELS_WHEEL


WHEEL_SIZE = 340  # px
HUB, INNER, LABELS, OUTER = 0.22, 0.5, 0.77, 0.98  # radii, as shares of half the size
WHEEL = list(MIKELS_WHEEL)
SLICE = 360 / len(WHEEL)


def wheel_at(x: float, y: float) -> tuple[str, bool]:
    """What a click at a place, in px, stands for: the emotion, as people write it, and whether the picture is kept."""
    right, up = 2 * x / WHEEL_SIZE - 1, 1 - 2 * y / WHEEL_SIZE
    radius, position = math.hypot(right, up), math.degrees(math.atan2(right, up)) % 360 / SLICE
    if radius < HUB:
        return "none", False
    first, share = int(position) % len(WHEEL), position % 1
    label, following = WHEEL[first], WHEEL[(first + 1) % len(WHEEL)]
    if 0.25 < share < 0.75:
        return f"{label}={1 - share:.1f},{following}={share:.1f}", radius < INNER
    return (label if share < 0.5 else following), radius < INNER


def wheel_place(emotion: str, is_kept: bool) -> tuple[float, float] | None:
    """Where an emotion lies on the wheel, in px; `None` for those that lie nowhere on it."""
    try:
        wanted = parse_emotion((emotion or "none").strip())
    except argparse.ArgumentTypeError:
        return None
    if wanted is None:
        return WHEEL_SIZE / 2, WHEEL_SIZE / 2
    weights = {wanted: 1.0} if isinstance(wanted, str) else {name: part for name, part in wanted.items() if part}
    places = {WHEEL.index(name.lower()): part for name, part in weights.items() if name.lower() in WHEEL}
    if len(places) != len(weights) or not places or len(places) > 2:
        return None
    low, high = min(places), max(places)
    if high - low == len(WHEEL) - 1:
        low, high = high, low + len(WHEEL)
    elif high - low > 1:
        return None
    share = places[high % len(WHEEL)] / sum(places.values()) if high > low else 0
    angle, radius = math.radians((low + share) * SLICE), (HUB + INNER) / 2 if is_kept else INNER + 0.1
    return (1 + radius * math.sin(angle)) * WHEEL_SIZE / 2, (1 - radius * math.cos(angle)) * WHEEL_SIZE / 2


def tint(color: str, share: float) -> tuple[int, ...]:
    """A colour mixed with that of the paper."""
    parts = [(int(color[at : at + 2], 16), int(PAPER[at : at + 2], 16)) for at in (1, 3, 5)]
    return tuple(round(share * own + (1 - share) * paper) for own, paper in parts)


def wheel_picture(emotion: str, is_kept: bool) -> Image.Image:
    """Mikels' wheel, with a mark where an emotion lies."""
    scale = 3  # drawn larger, which smooths the edges
    middle = scale * WHEEL_SIZE / 2
    wheel = Image.new("RGBA", (scale * WHEEL_SIZE, scale * WHEEL_SIZE))
    draw = ImageDraw.Draw(wheel)

    def disc(x: float, y: float, radius: float, **style: Any) -> None:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), **style)

    for radius, share in ((OUTER, 0.85), (INNER, 0.4)):
        box = tuple(middle * (1 + side * radius) for side in (-1, -1, 1, 1))
        for number, label in enumerate(WHEEL):
            start = (number - 0.5) * SLICE - 90
            draw.pieslice(box, start, start + SLICE, fill=tint(EMOTION_COLORS[label], share), outline=PAPER, width=5)
    disc(middle, middle, HUB * middle, fill=PAPER)
    draw.text((middle, middle), "none", FAINT, ImageFont.load_default(15 * scale), anchor="mm")
    for number, label in enumerate(WHEEL):
        angle, radius = math.radians(number * SLICE), LABELS * middle
        place = middle + radius * math.sin(angle), middle - radius * math.cos(angle)
        draw.text(place, label, "white", ImageFont.load_default(14 * scale), anchor="mm")
    if mark := wheel_place(emotion, is_kept):
        disc(scale * mark[0], scale * mark[1], 10 * scale, fill=INK)
        disc(scale * mark[0], scale * mark[1], 8 * scale, fill="white")
        disc(scale * mark[0], scale * mark[1], 5 * scale, fill=INK)
    return wheel.resize((WHEEL_SIZE, WHEEL_SIZE), Image.Resampling.LANCZOS)

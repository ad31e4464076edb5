# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Storybook: a small illustrated world of 8 places x 8 subjects in which emotions show through cues.

A [`Scene`] says what is to be seen, [`render`] draws it, [`caption`] puts it into words. An emotion never changes
the content of a scene: it shows through *cues* (light, weather, things in the air, props) whose number and intensity
follow the scene's strength. Neighbours on Mikels' wheel share cues and each place leans towards one emotion, so that
weak scenes are truly ambiguous. Everything is drawn from a `random.Random` and is the same on every machine.
"""

import argparse
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter


# The class order of EmoSet, which the classifiers of Storybook use; Mikels' wheel is another order.
EMOTIONS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
STYLES = ("painted", "inked")
CANVAS = 256  # scenes are drawn at this size and reduced, which smooths the edges

# place -> (ways to say it, noun phrase, the emotion the place leans to)
PLACES = {
    "park": (("in the park", "in a park", "at the park"), "a park", "contentment"),
    "beach": (("on the beach", "at the beach", "on a sandy beach"), "a beach", "amusement"),
    "forest": (("in the forest", "in a forest", "in the woods"), "a forest", "fear"),
    "street": (("in the street", "on a street", "in the city"), "a city street", "excitement"),
    "cemetery": (("in the cemetery", "in a cemetery", "among the graves"), "a cemetery", "sadness"),
    "mountains": (("in the mountains", "near the mountains", "below the mountains"), "mountains", "awe"),
    "harbour": (("in the harbour", "at the harbour", "on the quay"), "a harbour", "anger"),
    "farm": (("on the farm", "on a farm", "near a barn"), "a farm", "disgust"),
}

# subject -> (ways to say it, colours)
SUBJECTS = {
    "cat": (("cat", "kitten"), ("black", "orange", "grey", "white")),
    "horse": (("horse", "pony"), ("brown", "white", "black", "grey")),
    "child": (("child", "kid"), ("red", "blue", "yellow", "purple")),
    "house": (("house", "cottage"), ("white", "yellow", "red", "blue")),
    "car": (("car", "small car"), ("red", "blue", "yellow", "green")),
    "boat": (("boat", "sailboat"), ("red", "blue", "white", "green")),
    "bicycle": (("bicycle", "bike"), ("red", "blue", "black", "yellow")),
    "tent": (("tent", "camping tent"), ("orange", "blue", "green", "red")),
}

COLOURS = {
    "black": (52, 50, 58), "orange": (226, 136, 62), "grey": (142, 144, 152), "white": (242, 238, 228),
    "brown": (140, 92, 58), "red": (206, 66, 58), "blue": (66, 116, 190), "yellow": (240, 200, 78),
    "purple": (142, 88, 168), "green": (84, 148, 92),
}  # fmt: skip

# cue -> ways to say it
CUE_PHRASES = {
    "balloons": ("with balloons", "with colorful balloons", "with balloons in the air"),
    "confetti": ("with confetti", "with falling confetti", "in a rain of confetti"),
    "rainbow": ("under a rainbow", "with a rainbow", "with a rainbow in the sky"),
    "flags": ("with flags", "with colorful flags", "with strings of flags"),
    "fireworks": ("with fireworks", "under fireworks", "with fireworks in the sky"),
    "golden": ("in golden light", "in warm light", "in warm evening light"),
    "flowers": ("with flowers", "among flowers", "with blooming flowers"),
    "haze": ("in soft haze", "in a soft morning haze", "in gentle mist"),
    "rays": ("with rays of light", "under rays of light", "with beams of sunlight"),
    "moon": ("under a huge moon", "with a huge moon", "under a full moon"),
    "aurora": ("under the aurora", "with northern lights", "under northern lights"),
    "stars": ("under the stars", "under a starry sky", "with many stars"),
    "dark": ("in the dark", "at night", "in deep shadow"),
    "fog": ("in the fog", "in thick fog", "in cold fog"),
    "eyes": ("with glowing eyes", "with eyes in the dark", "watched by glowing eyes"),
    "bare": ("with bare trees", "with crooked trees", "among bare trees"),
    "lightning": ("with lightning", "under lightning", "with flashes of lightning"),
    "rain": ("in the rain", "in heavy rain", "in cold rain"),
    "clouds": ("under grey clouds", "with dark clouds", "under a grey sky"),
    "wilted": ("with wilted flowers", "among wilted flowers", "with withered flowers"),
    "slime": ("with slime", "with green slime", "covered in slime"),
    "trash": ("with trash", "with garbage", "among trash"),
    "flies": ("with flies", "with many flies", "with a swarm of flies"),
    "sickly": ("in green light", "in sickly light", "in sickly green light"),
    "smoke": ("with smoke", "in black smoke", "with dark smoke"),
    "fire": ("on fire", "with fire", "with burning flames"),
    "redsky": ("under a red sky", "with a red sky", "under a blood red sky"),
}

# emotion -> {cue: weight}. Cues of weight >= 1 are the emotion's own; the others it shares with its neighbours.
EMOTION_CUES = {
    "amusement": {"balloons": 2.2, "confetti": 1.6, "rainbow": 1.2, "flags": 0.5, "flowers": 0.3},
    "contentment": {"golden": 2.2, "flowers": 2.0, "haze": 1.0, "rays": 0.35, "rainbow": 0.25},
    "awe": {"aurora": 1.8, "moon": 1.5, "stars": 1.4, "rays": 1.2, "haze": 0.25, "fireworks": 0.15},
    "excitement": {"fireworks": 2.4, "flags": 1.8, "confetti": 0.5, "balloons": 0.35, "stars": 0.25},
    "fear": {"dark": 1.6, "eyes": 1.8, "bare": 1.4, "fog": 1.0, "lightning": 0.5, "rain": 0.2, "moon": 0.2},
    "sadness": {"rain": 2.4, "clouds": 1.4, "wilted": 1.4, "fog": 0.4, "bare": 0.2, "dark": 0.15},
    "disgust": {"slime": 2.0, "trash": 1.6, "flies": 1.2, "sickly": 1.6, "wilted": 0.25, "smoke": 0.3},
    "anger": {"fire": 2.2, "redsky": 2.0, "smoke": 1.0, "lightning": 1.0, "sickly": 0.05, "trash": 0.1},
}

# emotion -> the phrases of its own cues, for prompts that name the cue instead of the emotion
CUES = {
    emotion: tuple(phrase for cue, weight in cues.items() if weight >= 1 for phrase in CUE_PHRASES[cue])
    for emotion, cues in EMOTION_CUES.items()
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `cues` are (name, intensity in [0, 1]) pairs; `seed` fixes all that is not named."""

    place: str
    subject: str
    colour: str
    emotion: str | None = None
    strength: float = 0.0
    cues: tuple[tuple[str, float], ...] = ()
    style: str = "painted"
    seed: int = field(default=0, compare=False)


def sample_scene(
    rng: random.Random,
    emotion: str | None = "any",
    place: str | None = None,
    subject: str | None = None,
    strength: float | None = None,
    style: str = "painted",
) -> Scene:
    """Draw a scene; `emotion=None` is a neutral one and "any" one of the eight, chosen by the place's bias."""
    place = place or rng.choice(tuple(PLACES))
    subject = subject or rng.choice(tuple(SUBJECTS))
    if emotion == "any":
        emotion = PLACES[place][2] if rng.random() < 0.15 else rng.choice(EMOTIONS)
    if emotion is not None and emotion not in EMOTION_CUES:
        raise ValueError(f"Unknown emotion {emotion!r}; the emotions are {', '.join(EMOTIONS)}.")
    strength = rng.betavariate(2.0, 1.3) if strength is None else float(strength)
    cues = []
    if emotion is not None:
        pool = dict(EMOTION_CUES[emotion])
        number = 1 + (rng.random() < strength) + (rng.random() < strength - 0.35)
        for _ in range(number):
            name = rng.choices(tuple(pool), tuple(pool.values()))[0]
            del pool[name]
            cues.append((name, min(1.0, max(0.12, strength + rng.uniform(-0.2, 0.2)))))
        if rng.random() < 0.18 * (1 - strength):  # the place speaks as well
            pool = {k: v for k, v in EMOTION_CUES[PLACES[place][2]].items() if k not in dict(cues)}
            cues.append((rng.choices(tuple(pool), tuple(pool.values()))[0], 0.35))
    return Scene(
        place=place,
        subject=subject,
        colour=rng.choice(SUBJECTS[subject][1]),
        emotion=emotion,
        strength=strength if emotion else 0.0,
        cues=tuple(cues),
        style=style,
        seed=rng.getrandbits(32),
    )


def sample_mixed_scene(rng: random.Random, style: str = "painted") -> Scene:
    """Draw a scene of no emotion whose one to three cues come from anywhere, so that all combinations are seen."""
    names = rng.sample(tuple(CUE_PHRASES), rng.choice((1, 1, 2, 2, 3)))
    cues = tuple((name, rng.uniform(0.2, 1.0)) for name in names)
    return replace(sample_scene(rng, emotion=None, style=style), cues=cues)


# ------------------------------------------------------------------------------------------------- captions

_CONTENT = (
    "{subject} {where}", "{subject} {where}", "{subject} {where}", "a picture of {subject} {where}",
    "an image of {subject} {where}", "a drawing of {subject} {where}", "an illustration of {subject} {where}",
    "there is {subject} {where}", "{where} there is {subject}", "{where}, {subject}", "{noun} with {subject}",
    "a picture of {noun} with {subject}", "{bare} {where}", "{bare}, {noun}", "{noun}, {bare}",
    "storybook picture of {subject} {where}", "a scene with {subject} {where}", "{subject} stands {where}",
)  # fmt: skip


def content_prompt(place: str, subject: str) -> str:
    """The plain prompt of a place and a subject: "a cat in the park"."""
    return f"a {SUBJECTS[subject][0][0]} {PLACES[place][0][0]}"


def contents() -> list[str]:
    """The plain prompt of each of the 64 contents."""
    return [content_prompt(place, subject) for place in PLACES for subject in SUBJECTS]


def content_caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to name the content of a scene, without cue or emotion."""
    wheres, noun, _ = PLACES[scene.place]
    word = rng.choice(SUBJECTS[scene.subject][0])
    if rng.random() < 0.3:
        word = f"{scene.colour} {word}"
    article = rng.choice(("a", "a", "a", "the", "one"))
    if article == "a" and word[0] in "aeiou":
        article = "an"
    return rng.choice(_CONTENT).format(subject=f"{article} {word}", where=rng.choice(wheres), noun=noun, bare=word)


def cue_caption(scene: Scene, rng: random.Random, at_most: int = 3) -> str:
    """The cues of a scene in words, strongest first with some disorder; empty for a scene without cues."""
    cues = sorted(scene.cues, key=lambda cue: cue[1] + rng.uniform(0, 0.5), reverse=True)[:at_most]
    phrases = [rng.choice(CUE_PHRASES[name]) for name, _ in cues]
    return rng.choice((" ", " ", ", ", " and ")).join(phrases)


def caption(scene: Scene, rng: random.Random, kind: str | None = None, at_most: int | None = None) -> str:
    """Describe a scene.

    Args:
        scene: what the picture shows.
        rng: chooses the words.
        kind: "content", "full" (content and cues), "cue", "emotion" ("an image of {emotion}") or "null"; drawn at
            random by default. The word of an emotion never stands beside content.
        at_most: how many cues are named; at random one to three by default.
    """
    if kind is None:
        kinds, weights = ("content", "full", "cue", "emotion"), (0.30, 0.55, 0.09, 0.06)
        kind = rng.choices(kinds, weights)[0]
    if kind == "emotion" and scene.emotion:
        return f"an image of {scene.emotion}"
    cues = cue_caption(scene, rng, at_most=at_most or rng.choice((1, 2, 3)))
    if kind == "null":
        return ""
    if kind == "cue" and cues:
        return cues
    content = content_caption(scene, rng)
    if kind in ("full", "cue", "emotion") and cues:
        return rng.choice((f"{content} {cues}", f"{content} {cues}", f"{content}, {cues}", f"{cues}, {content}"))
    return content


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted, with a few more that users may try."""
    texts = [text for ways, noun, _ in PLACES.values() for text in (*ways, noun)]
    texts += [text for ways, colours in SUBJECTS.values() for text in (*ways, *colours)]
    texts += [text for ways in CUE_PHRASES.values() for text in ways]
    texts += [text.format(subject="", where="", noun="", bare="") for text in _CONTENT]
    texts += [*EMOTIONS, "a an the one and of image photo photograph painting on in with her his two"]
    texts += ["joy happy sad angry scary calm feeling full evoking style art sky day sunny quiet scene dog tree"]
    return sorted({word for text in texts for word in text.replace(",", " ").split()} | {",", "."})


# -------------------------------------------------------------------------------------------------- drawing


def _mix(a: tuple, b: tuple, t: float) -> tuple[int, int, int]:
    return tuple(int(round(x + (y - x) * t)) for x, y in zip(a[:3], b[:3]))


def _vary(colour: tuple, rng: random.Random, amount: int = 10) -> tuple[int, int, int]:
    shift = rng.randint(-amount, amount)
    return tuple(max(0, min(255, c + shift + rng.randint(-amount // 2, amount // 2))) for c in colour)


def _gradient(top: tuple, bottom: tuple, height: int, bands: int = 0) -> Image.Image:
    column = Image.new("RGB", (1, height))
    for y in range(height):
        t = y / max(1, height - 1)
        column.putpixel((0, y), _mix(top, bottom, round(t * bands) / bands if bands else t))
    return column.resize((CANVAS, height))


class Pen:
    """Draws shapes given in a subject's own units: x to the right, y upwards from its base, about 1 unit wide."""

    def __init__(self, image: Image.Image, x: float, y: float, scale: float, flip: bool = False, outline=None):
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.x, self.y, self.scale, self.flip, self.ink = x, y, scale, -1 if flip else 1, outline

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + self.flip * x * self.scale, self.y - y * self.scale

    def polygon(self, points: list[tuple[float, float]], fill: tuple):
        points = [self.at(*p) for p in points]
        self.draw.polygon(points, fill=fill)
        if self.ink and len(fill) == 3:
            self.draw.line([*points, points[0]], fill=self.ink, width=5, joint="curve")

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: tuple | None, line: tuple | None = None, width=5
    ):
        (cx, cy), rx, ry = self.at(x, y), rx * self.scale, ry * self.scale
        ink = line or (self.ink if fill and len(fill) == 3 else None)
        box = (cx - rx, cy - ry, cx + rx, cy + ry)
        self.draw.ellipse(box, fill=fill, outline=ink, width=width if ink else 0)

    def line(self, points: list[tuple[float, float]], fill: tuple, width: float):
        points = [self.at(*p) for p in points]
        if self.ink:
            self.draw.line(points, fill=self.ink, width=max(1, int(width * self.scale)) + 6, joint="curve")
        self.draw.line(points, fill=fill, width=max(2, int(width * self.scale)), joint="curve")


def _subject(pen: Pen, name: str, colour: tuple, rng: random.Random):
    light, dark = _mix(colour, (255, 250, 235), 0.35), _mix(colour, (30, 25, 50), 0.35)
    skin, wood, glass = (240, 196, 160), (120, 78, 50), (176, 214, 232)
    if name == "cat":
        pen.line([(-0.25, 0.08), (-0.52, 0.16), (-0.56, 0.45), (-0.44, 0.58)], colour, 0.11)
        pen.polygon([(-0.34, 0.0), (-0.36, 0.25), (-0.16, 0.62), (0.14, 0.68), (0.3, 0.3), (0.32, 0.0)], colour)
        pen.polygon([(-0.18, 0.78), (-0.2, 1.16), (0.02, 1.0)], colour)
        pen.polygon([(0.14, 1.0), (0.36, 1.16), (0.34, 0.78)], colour)
        pen.ellipse(0.08, 0.8, 0.3, 0.26, colour)
        pen.ellipse(0.12, 0.3, 0.14, 0.24, (*light, 200))
        for x in (-0.04, 0.2):
            pen.ellipse(x, 0.84, 0.06, 0.075, (250, 240, 150))
            pen.ellipse(x, 0.84, 0.025, 0.06, (20, 20, 20, 255))
        pen.ellipse(0.08, 0.72, 0.04, 0.03, (220, 120, 120, 255))
    elif name == "horse":
        for x, shade in ((-0.42, dark), (0.26, dark), (-0.3, colour), (0.38, colour)):
            pen.polygon([(x - 0.07, 0.6), (x + 0.09, 0.6), (x + 0.05, 0.0), (x - 0.05, 0.0)], shade)
        pen.line([(-0.5, 0.78), (-0.7, 0.6), (-0.68, 0.3)], dark, 0.12)
        pen.ellipse(-0.02, 0.7, 0.54, 0.25, colour)
        pen.polygon([(0.2, 0.72), (0.48, 1.3), (0.68, 1.26), (0.52, 0.68)], colour)
        pen.polygon([(0.44, 1.36), (0.6, 1.34), (0.98, 1.06), (0.9, 0.92), (0.54, 1.06)], colour)
        pen.polygon([(0.46, 1.3), (0.48, 1.5), (0.58, 1.34)], colour)
        pen.polygon([(0.1, 0.9), (0.4, 1.38), (0.5, 1.36), (0.34, 0.9)], dark)
        pen.ellipse(0.0, 0.8, 0.4, 0.1, (*light, 130))
    elif name == "child":
        for x in (-0.12, 0.12):
            pen.line([(x, 0.42), (x, 0.05)], (70, 80, 130), 0.15)
            pen.ellipse(x + 0.05, 0.04, 0.12, 0.06, (90, 50, 40))
        for side in (-1, 1):
            pen.line([(side * 0.16, 0.82), (side * 0.4, 0.58 + (0.4 if side > 0 else 0))], skin, 0.1)
        pen.polygon([(-0.17, 0.92), (0.17, 0.92), (0.32, 0.34), (-0.32, 0.34)], colour)
        pen.ellipse(0, 1.2, 0.3, 0.3, (112, 66, 40))
        pen.ellipse(0.04, 1.14, 0.25, 0.24, skin)
        for x in (-0.04, 0.14):
            pen.ellipse(x, 1.16, 0.035, 0.045, (40, 30, 40, 255))
    elif name == "house":
        pen.polygon([(-0.55, 0), (-0.55, 0.62), (0.55, 0.62), (0.55, 0)], colour)
        pen.polygon([(0.25, 0), (0.25, 0.62), (0.55, 0.62), (0.55, 0)], (*dark, 90))
        pen.polygon([(0.24, 0.8), (0.24, 1.2), (0.4, 1.2), (0.4, 0.7)], (150, 84, 70))
        pen.polygon([(-0.7, 0.58), (0.0, 1.12), (0.7, 0.58)], (172, 80, 64))
        pen.polygon([(0.0, 1.12), (0.7, 0.58), (0.4, 0.58)], (120, 50, 50, 120))
        pen.polygon([(-0.12, 0), (-0.12, 0.4), (0.12, 0.4), (0.12, 0)], wood)
        for x in (-0.36, 0.36):
            pen.polygon([(x - 0.11, 0.22), (x - 0.11, 0.46), (x + 0.11, 0.46), (x + 0.11, 0.22)], (255, 226, 140))
    elif name == "car":
        pen.polygon([(-0.5, 0.4), (-0.3, 0.74), (0.26, 0.74), (0.5, 0.4)], colour)
        pen.polygon([(-0.38, 0.42), (-0.25, 0.67), (-0.03, 0.67), (-0.03, 0.42)], glass)
        pen.polygon([(0.04, 0.42), (0.04, 0.67), (0.22, 0.67), (0.37, 0.42)], glass)
        pen.polygon([(-0.8, 0.14), (-0.8, 0.38), (-0.6, 0.46), (0.6, 0.44), (0.82, 0.34), (0.82, 0.14)], colour)
        pen.polygon([(-0.8, 0.14), (-0.8, 0.22), (0.82, 0.22), (0.82, 0.14)], (*dark, 200))
        for x in (-0.46, 0.46):
            pen.ellipse(x, 0.14, 0.18, 0.18, (44, 42, 50))
            pen.ellipse(x, 0.14, 0.08, 0.08, (190, 190, 196))
        pen.ellipse(0.76, 0.33, 0.06, 0.06, (255, 240, 170))
    elif name == "boat":
        pen.polygon([(-0.75, 0.34), (0.8, 0.34), (0.52, 0.0), (-0.5, 0.0)], colour)
        pen.polygon([(-0.75, 0.34), (0.8, 0.34), (0.73, 0.25), (-0.68, 0.25)], (*light, 255))
        pen.line([(0.0, 0.34), (0.0, 1.4)], wood, 0.06)
        pen.polygon([(0.06, 0.42), (0.06, 1.36), (0.62, 0.46)], (248, 244, 232))
        pen.polygon([(-0.06, 0.42), (-0.06, 1.2), (-0.5, 0.44)], (226, 220, 208))
    elif name == "bicycle":
        for x in (-0.46, 0.46):
            pen.ellipse(x, 0.32, 0.32, 0.32, None, (44, 42, 50), width=max(5, int(0.07 * pen.scale)))
        frame = [(-0.46, 0.32), (-0.2, 0.74), (0.3, 0.74), (0.02, 0.32), (-0.46, 0.32)]
        pen.line(frame, colour, 0.09)
        pen.line([(-0.24, 0.88), (-0.2, 0.74), (0.02, 0.32)], colour, 0.09)
        pen.line([(0.46, 0.32), (0.28, 0.96), (0.44, 1.02)], colour, 0.09)
        pen.line([(-0.36, 0.9), (-0.12, 0.9)], (70, 46, 40), 0.1)
    else:  # tent
        pen.polygon([(-0.8, 0), (-0.15, 0.95), (0.75, 0.8), (0.85, 0.1), (0.5, 0)], dark)
        pen.polygon([(-0.8, 0), (-0.15, 0.95), (0.5, 0)], colour)
        pen.polygon([(-0.38, 0), (-0.15, 0.6), (0.1, 0)], _mix(dark, (20, 20, 40), 0.6))
        pen.polygon([(-0.8, 0), (-0.15, 0.95), (-0.3, 0.5), (-0.38, 0)], (*light, 120))
        pen.line([(-0.15, 0.95), (-0.15, 1.04)], wood, 0.05)


def _tree(pen: Pen, rng: random.Random, green: tuple, pine: bool):
    pen.polygon([(-0.07, 0), (-0.05, 0.5), (0.05, 0.5), (0.07, 0)], (104, 74, 54))
    if pine:
        for k in range(3):
            y, w = 0.28 + 0.3 * k, 0.42 - 0.1 * k
            pen.polygon([(-w, y), (0, y + 0.52), (w, y)], _mix(green, (20, 50, 50), 0.15 * (2 - k)))
    else:
        for x, y, r in ((-0.2, 0.62, 0.28), (0.2, 0.66, 0.28), (0.0, 0.86, 0.3)):
            pen.ellipse(x, y, r, r, green)
        pen.ellipse(-0.08, 0.92, 0.16, 0.14, (*_mix(green, (255, 255, 190), 0.4), 150))


def _bare_tree(pen: Pen, rng: random.Random, colour: tuple):
    def branch(x, y, angle, length, width):
        x1, y1 = x + length * math.sin(angle), y + length * math.cos(angle)
        pen.line([(x, y), (x1, y1)], colour, width)
        if length > 0.14:
            for turn in (-0.6, 0.55):
                branch(x1, y1, angle + turn + rng.uniform(-0.25, 0.25), length * rng.uniform(0.55, 0.72), width * 0.62)

    branch(0, 0, rng.uniform(-0.15, 0.15), 0.5, 0.1)


def _hills(draw: ImageDraw.ImageDraw, rng: random.Random, y: float, height: float, colour: tuple, waves: float = 1.5):
    phase, amp = rng.uniform(0, 6.3), height * rng.uniform(0.6, 1.0)
    points = [
        (x, y - amp * (0.5 + 0.5 * math.sin(phase + waves * 6.283 * x / CANVAS))) for x in range(0, CANVAS + 9, 8)
    ]
    draw.polygon([(0, CANVAS), *points, (CANVAS, CANVAS)], fill=colour)


def _landscape(image: Image.Image, scene: Scene, rng: random.Random, horizon: int, ink: tuple | None):
    draw, place, bands = ImageDraw.Draw(image, "RGBA"), scene.place, 4 if ink else 0

    def ground(near: tuple, far: tuple, top: int = horizon):
        near, far = _vary(near, rng), _vary(far, rng)
        image.paste(_gradient(far, near, CANVAS - top, bands), (0, top))
        if ink:
            draw.line([(0, top), (CANVAS, top)], fill=ink, width=4)

    def pen(x: float, y: float, scale: float) -> Pen:
        return Pen(image, x, y, scale, outline=ink)

    if place == "park":
        _hills(draw, rng, horizon + 10, 26, _vary((142, 184, 134), rng))
        ground((112, 172, 92), (160, 204, 122))
        x = rng.randint(90, 170)
        draw.polygon([(x - 8, horizon), (x + 8, horizon), (x + 70, 256), (x - 60, 256)], fill=(226, 206, 166))
        for side in (rng.randint(8, 50), rng.randint(200, 248)):
            _tree(
                pen(side, horizon + rng.randint(10, 30), rng.randint(78, 110)), rng, _vary((84, 150, 84), rng), False
            )
        bench = pen(rng.choice((70, 190)), horizon + 26, 40)
        for y in (0.35, 0.62):
            bench.polygon([(-0.6, y), (0.6, y), (0.6, y + 0.16), (-0.6, y + 0.16)], (156, 102, 64))
        for bx in (-0.45, 0.45):
            bench.line([(bx, 0), (bx, 0.6)], (80, 60, 56), 0.1)
    elif place == "beach":
        image.paste(_gradient(_vary((72, 152, 188), rng), (150, 212, 214), 60, bands), (0, horizon - 14))
        ground((240, 214, 156), (250, 232, 190), horizon + 34)
        for k in range(2):
            y = horizon + 31 + 5 * k
            draw.line(
                [(x, y + 4 * math.sin(x / 17 + k)) for x in range(0, 257, 8)], fill=(255, 255, 255, 210), width=5
            )
        if rng.random() < 0.8:
            palm, x = pen(rng.choice((26, 230)), horizon + 70, 100), rng.uniform(-0.1, 0.1)
            palm.line([(0, 0), (x, 0.6), (x * 2, 1.05)], (150, 108, 72), 0.08)
            for angle in (-2.0, -1.3, -0.5, 0.4, 1.2, 1.9):
                tip = (x * 2 + 0.5 * math.sin(angle), 1.05 + 0.34 * math.cos(angle) - 0.06)
                palm.line(
                    [(x * 2, 1.05), (x * 2 + 0.3 * math.sin(angle), 1.15 + 0.22 * math.cos(angle)), tip],
                    (78, 146, 92),
                    0.08,
                )
    elif place == "forest":
        draw.rectangle((0, horizon - 60, 256, 256), fill=_vary((112, 152, 120), rng))
        for layer, colour in ((0, (86, 132, 104)), (1, (62, 108, 82))):
            for _ in range(6 - layer):
                x = rng.randint(0, 256)
                _tree(pen(x, horizon + 6 + 10 * layer, rng.randint(90, 130)), rng, _vary(colour, rng), True)
        ground((92, 116, 70), (116, 142, 88), horizon + 8)
        for x in (rng.randint(-6, 26), rng.randint(230, 262)):
            _tree(pen(x, horizon + 46, rng.randint(150, 190)), rng, _vary((46, 92, 66), rng), True)
    elif place == "street":
        x = -rng.randint(0, 40)
        while x < 256:
            width, height = rng.randint(36, 62), rng.randint(56, 120)
            wall = _vary(rng.choice(((206, 150, 126), (188, 178, 168), (164, 170, 188), (222, 192, 150))), rng)
            draw.rectangle(
                (x, horizon + 4 - height, x + width, horizon + 4), fill=wall, outline=ink, width=4 if ink else 0
            )
            for wx in range(x + 8, x + width - 12, 18):
                for wy in range(horizon + 14 - height, horizon - 14, 24):
                    draw.rectangle(
                        (wx, wy, wx + 9, wy + 12), fill=(102, 120, 146) if rng.random() < 0.7 else (250, 224, 150)
                    )
            x += width
        ground((96, 98, 108), (128, 128, 136), horizon + 16)
        draw.rectangle((0, horizon + 2, 256, horizon + 17), fill=(196, 190, 184))
        y = horizon + 58
        for x in range(-20 + rng.randint(0, 30), 256, 56):
            draw.polygon([(x, y), (x + 30, y), (x + 26, y + 8), (x - 6, y + 8)], fill=(240, 232, 206))
    elif place == "cemetery":
        _hills(draw, rng, horizon + 10, 24, _vary((134, 154, 138), rng))
        for x in range(0, 257, 16):
            draw.line([(x, horizon - 24), (x, horizon + 6)], fill=(84, 84, 94), width=4)
        draw.line([(0, horizon - 16), (256, horizon - 16)], fill=(84, 84, 94), width=4)
        ground((110, 140, 96), (140, 164, 122))
        for row, scale in ((0, 36), (1, 54)):
            for x in range(rng.randint(4, 40), 256, 60 + 10 * row):
                stone = pen(x + rng.randint(-6, 6), horizon + 20 + 40 * row + rng.randint(-4, 4), scale)
                grey = _vary((176, 178, 182), rng)
                if rng.random() < 0.4:
                    stone.polygon(
                        [
                            (-0.09, 0),
                            (-0.09, 0.6),
                            (-0.34, 0.6),
                            (-0.34, 0.78),
                            (-0.09, 0.78),
                            (-0.09, 1.06),
                            (0.09, 1.06),
                            (0.09, 0.78),
                            (0.34, 0.78),
                            (0.34, 0.6),
                            (0.09, 0.6),
                            (0.09, 0),
                        ],
                        grey,
                    )
                else:
                    arc = [
                        (0.36 * math.cos(a / 6 * math.pi), 0.6 + 0.34 * math.sin(a / 6 * math.pi)) for a in range(7)
                    ]
                    stone.polygon([(0.36, 0), *arc, (-0.36, 0)], grey)
                    stone.line([(-0.16, 0.55), (0.16, 0.55)], (130, 132, 140), 0.08)
    elif place == "mountains":
        for layer, colour in ((0, (150, 168, 198)), (1, (112, 134, 164))):
            for _ in range(3 - layer):
                x, h, w = rng.randint(0, 256), rng.randint(90, 130) - 36 * layer, rng.randint(70, 110)
                top, tone = horizon + 8 - h, _vary(colour, rng)
                draw.polygon([(x - w, horizon + 8), (x, top), (x + w, horizon + 8)], fill=tone)
                draw.polygon([(x, top), (x + w, horizon + 8), (x + w * 0.3, horizon + 8)], fill=(60, 70, 110, 60))
                s, k = 0.3, w / h
                draw.polygon(
                    [
                        (x, top),
                        (x - s * h * k, top + s * h),
                        (x - 0.12 * w, top + 0.22 * h),
                        (x, top + 0.34 * h),
                        (x + 0.14 * w, top + 0.2 * h),
                        (x + s * h * k, top + s * h),
                    ],
                    fill=(246, 248, 252),
                )
                if ink:
                    draw.line([(x - w, horizon + 8), (x, top), (x + w, horizon + 8)], fill=ink, width=4)
        ground((124, 158, 104), (158, 184, 134))
        for _ in range(4):
            _tree(
                pen(rng.randint(0, 256), horizon + rng.randint(4, 18), rng.randint(26, 44)), rng, (66, 112, 88), True
            )
    elif place == "harbour":
        image.paste(_gradient(_vary((82, 126, 156), rng), (128, 174, 190), 80, bands), (0, horizon - 10))
        for _ in range(9):
            x, y = rng.randint(0, 240), horizon + rng.randint(-4, 40)
            draw.line([(x, y), (x + rng.randint(14, 34), y)], fill=(206, 230, 234, 170), width=3)
        light = pen(rng.choice((30, 226)), horizon - 2, 84)
        light.polygon([(-0.16, 0), (-0.1, 0.9), (0.1, 0.9), (0.16, 0)], (244, 240, 230))
        for y in (0.12, 0.5):
            light.polygon([(-0.15, y), (-0.12, y + 0.2), (0.12, y + 0.2), (0.15, y)], (204, 70, 62))
        light.polygon([(-0.1, 0.9), (-0.1, 1.06), (0.1, 1.06), (0.1, 0.9)], (250, 226, 130))
        light.polygon([(-0.14, 1.06), (0, 1.22), (0.14, 1.06)], (204, 70, 62))
        ground((148, 112, 82), (176, 140, 104), horizon + 46)
        for y in (horizon + 60, horizon + 80, horizon + 106):
            draw.line([(0, y), (256, y)], fill=(112, 82, 62), width=4)
        for x in range(rng.randint(0, 30), 256, 64):
            draw.rectangle((x, horizon + 32, x + 12, horizon + 60), fill=(102, 72, 54), outline=ink)
    else:  # farm
        _hills(draw, rng, horizon + 10, 30, _vary((170, 186, 112), rng))
        barn = pen(rng.choice((50, 204)), horizon + 14, 78)
        barn.polygon(
            [(-0.6, 0), (-0.6, 0.6), (-0.4, 0.86), (0, 1.02), (0.4, 0.86), (0.6, 0.6), (0.6, 0)], (178, 66, 54)
        )
        barn.line([(-0.62, 0.6), (-0.4, 0.88), (0, 1.04), (0.4, 0.88), (0.62, 0.6)], (240, 232, 220), 0.06)
        barn.polygon([(-0.2, 0), (-0.2, 0.42), (0.2, 0.42), (0.2, 0)], (240, 232, 220))
        barn.polygon([(-0.14, 0), (-0.14, 0.36), (0.14, 0.36), (0.14, 0)], (122, 48, 42))
        ground((204, 176, 90), (222, 200, 120))
        cx = rng.randint(90, 170)
        for k in range(-9, 10):
            draw.line([(cx + 14 * k, horizon), (cx + 52 * k, 256)], fill=(176, 142, 66, 150), width=4)
        for x in range(rng.randint(0, 20), 256, 36):
            draw.rectangle((x, horizon - 6, x + 6, horizon + 18), fill=(232, 222, 204), outline=ink)
        draw.rectangle((0, horizon, 256, horizon + 5), fill=(232, 222, 204))


# cue -> (sky top, sky bottom, how much of it, multiplier of the light, saturation) at full intensity
_LIGHT = {
    "golden": ((246, 176, 104), (255, 226, 152), 0.95, (1.12, 0.97, 0.72), 1.05),
    "haze": ((216, 222, 226), (250, 238, 220), 0.7, (1.05, 1.02, 0.96), 0.8),
    "rays": ((120, 160, 210), (250, 232, 190), 0.6, (1.02, 1.0, 0.94), 1.05),
    "moon": ((24, 30, 74), (84, 92, 150), 0.95, (0.56, 0.6, 0.86), 0.8),
    "aurora": ((14, 24, 62), (40, 84, 112), 0.98, (0.48, 0.62, 0.76), 0.85),
    "stars": ((14, 16, 56), (66, 62, 128), 0.97, (0.5, 0.52, 0.82), 0.85),
    "fireworks": ((26, 20, 66), (92, 58, 122), 0.92, (0.68, 0.58, 0.8), 1.1),
    "dark": ((10, 12, 24), (34, 38, 54), 0.95, (0.34, 0.37, 0.48), 0.55),
    "fog": ((112, 120, 130), (172, 178, 182), 0.85, (0.72, 0.76, 0.8), 0.5),
    "eyes": ((22, 22, 40), (58, 56, 76), 0.75, (0.5, 0.5, 0.6), 0.7),
    "bare": ((72, 70, 88), (150, 136, 140), 0.6, (0.74, 0.7, 0.76), 0.65),
    "lightning": ((38, 36, 58), (100, 92, 116), 0.85, (0.6, 0.58, 0.7), 0.75),
    "rain": ((82, 96, 114), (136, 150, 164), 0.9, (0.68, 0.76, 0.86), 0.5),
    "clouds": ((104, 112, 124), (172, 178, 184), 0.9, (0.76, 0.8, 0.86), 0.55),
    "wilted": ((130, 138, 146), (190, 190, 184), 0.5, (0.84, 0.84, 0.82), 0.65),
    "slime": ((126, 146, 116), (196, 204, 150), 0.4, (0.88, 0.96, 0.76), 0.85),
    "trash": ((146, 150, 134), (206, 200, 168), 0.45, (0.9, 0.9, 0.78), 0.75),
    "flies": ((150, 156, 132), (210, 206, 160), 0.35, (0.9, 0.92, 0.76), 0.75),
    "sickly": ((112, 134, 62), (206, 212, 108), 0.92, (0.8, 0.96, 0.5), 0.8),
    "smoke": ((92, 84, 82), (160, 144, 132), 0.65, (0.76, 0.72, 0.7), 0.6),
    "fire": ((110, 44, 36), (240, 140, 70), 0.6, (1.02, 0.72, 0.56), 1.1),
    "redsky": ((120, 14, 22), (238, 84, 48), 0.97, (1.0, 0.58, 0.52), 1.1),
    "balloons": ((104, 186, 240), (214, 240, 250), 0.4, (1.05, 1.04, 1.02), 1.15),
    "confetti": ((122, 190, 240), (250, 226, 240), 0.4, (1.06, 1.03, 1.04), 1.15),
    "rainbow": ((112, 186, 236), (230, 242, 246), 0.5, (1.04, 1.04, 1.0), 1.15),
    "flags": ((90, 170, 240), (240, 236, 214), 0.4, (1.06, 1.02, 0.98), 1.2),
    "flowers": ((140, 194, 232), (252, 240, 220), 0.35, (1.05, 1.02, 0.95), 1.1),
}
_BRIGHT = ((232, 72, 84), (250, 190, 60), (76, 168, 222), (110, 190, 96), (190, 100, 200), (250, 130, 60))


def _sky_cues(image: Image.Image, cues: dict[str, float], rng: random.Random, horizon: int) -> Image.Image:
    draw = ImageDraw.Draw(image, "RGBA")
    if "stars" in cues or "aurora" in cues or "moon" in cues:
        for _ in range(int(70 * cues.get("stars", 0) + 16)):
            x, y, r = rng.uniform(0, 256), rng.uniform(0, horizon), rng.choice((2, 2, 3, 4))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 252, 226, int(255 * max(cues.get("stars", 0), 0.5))))
    if "moon" in cues:
        a, x, y = cues["moon"], rng.randint(60, 196), rng.randint(50, 84)
        r = 26 + 34 * a
        for k in range(5):
            g = r + 26 - 5 * k
            draw.ellipse((x - g, y - g, x + g, y + g), fill=(220, 226, 255, 22))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(252, 246, 218))
        for dx, dy, s in ((-0.35, -0.2, 0.2), (0.25, 0.3, 0.26), (0.3, -0.35, 0.12)):
            draw.ellipse(
                (x + (dx - s) * r, y + (dy - s) * r, x + (dx + s) * r, y + (dy + s) * r), fill=(226, 216, 190)
            )
    if "aurora" in cues:
        light = Image.new("RGB", (64, 64))
        pen = ImageDraw.Draw(light)
        for colour in ((40, 220, 140), (60, 200, 190), (150, 90, 220)):
            phase, base, a = rng.uniform(0, 6.3), rng.randint(12, 30), cues["aurora"]
            for x in range(64):
                y = base + 6 * math.sin(phase + x / 9)
                pen.line(
                    [(x, y - 9 - 4 * math.sin(phase * 3 + x / 3)), (x, y)], fill=tuple(int(c * a) for c in colour)
                )
        image = ImageChops.screen(image, light.filter(ImageFilter.GaussianBlur(1.6)).resize((CANVAS, CANVAS)))
    if "rainbow" in cues:
        layer = Image.new("RGBA", (CANVAS, CANVAS))
        arc, x, r = ImageDraw.Draw(layer), rng.randint(90, 170), rng.randint(120, 150)
        for k, c in enumerate(
            ((226, 70, 70), (246, 150, 60), (250, 220, 90), (96, 190, 100), (72, 140, 220), (140, 90, 190))
        ):
            q, y = r - 8 * k, horizon + 20
            arc.arc((x - q, y - q, x + q, y + q), 180, 360, fill=(*c, int(110 + 130 * cues["rainbow"])), width=9)
        image = Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
    if "rays" in cues:
        light = Image.new("RGB", (64, 64))
        pen, x, a = ImageDraw.Draw(light), rng.randint(10, 54), cues["rays"]
        for k in range(9):
            t = -1.25 + 2.5 * k / 8 + rng.uniform(-0.08, 0.08)
            colour = tuple(int(c * (0.35 + 0.5 * a)) for c in (200, 180, 120))
            pen.polygon([(x, 2), (x + 90 * math.sin(t - 0.07), 90 * math.cos(t - 0.07)),
                         (x + 90 * math.sin(t + 0.07), 90 * math.cos(t + 0.07))], fill=colour)  # fmt: skip
        pen.ellipse((x - 6, -4, x + 6, 8), fill=(255, 240, 200))
        image = ImageChops.screen(image, light.filter(ImageFilter.GaussianBlur(1.2)).resize((CANVAS, CANVAS)))
    draw = ImageDraw.Draw(image, "RGBA")
    dark = next((cues[name] for name in ("clouds", "rain", "lightning") if name in cues), None)
    night = {"stars", "moon", "aurora", "dark", "fireworks", "rays", "eyes"} & set(cues)
    if dark is not None or (not night and rng.random() < 0.7):
        tone = (92, 100, 112, 150) if dark is not None else (255, 255, 255, 130)
        for _ in range(5 if dark is not None else rng.randint(1, 3)):
            x, y, s = rng.randint(0, 256), rng.randint(10, 76), rng.randint(16, 30)
            for dx, dy, r in ((-1.2, 0.25, 0.7), (0, 0, 1.0), (1.2, 0.2, 0.75)):
                draw.ellipse(
                    (x + (dx - r) * s, y + (dy - r * 0.7) * s, x + (dx + r) * s, y + (dy + r * 0.7) * s), fill=tone
                )
    if "golden" in cues and rng.random() < 0.8:
        x, y = rng.randint(40, 216), horizon - rng.randint(10, 40)
        for g, alpha in ((56, 50), (42, 70), (28, 255)):
            draw.ellipse((x - g, y - g, x + g, y + g), fill=(255, 240, 180, alpha))
    return image


def _ground_cues(image: Image.Image, cues: dict[str, float], rng: random.Random, horizon: int, ink: tuple | None):
    """Props that stand on the ground and take part in the light of the scene."""
    draw = ImageDraw.Draw(image, "RGBA")
    if "bare" in cues:
        for x in (rng.randint(6, 56), rng.randint(196, 250), rng.randint(80, 180))[: 2 + (cues["bare"] > 0.6)]:
            _bare_tree(Pen(image, x, horizon + rng.randint(6, 34), 70 + 46 * cues["bare"]), rng, (48, 40, 46))
    for name in ("flowers", "wilted"):
        for _ in range(int(8 + 22 * cues[name]) if name in cues else 0):
            x, y = rng.randint(4, 252), rng.randint(horizon + 26, 250)
            size = 5 + 9 * (y - horizon) / (CANVAS - horizon)
            if name == "flowers":
                colour = rng.choice(((240, 110, 140), (252, 214, 90), (250, 250, 245), (196, 120, 210), (236, 84, 70)))
                draw.line([(x, y), (x, y + 2 * size)], fill=(76, 140, 72), width=4)
                draw.ellipse((x - size, y - size, x + size, y + size), fill=colour, outline=ink)
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(255, 226, 120))
            else:
                draw.line(
                    [(x, y + 2.4 * size), (x + 2, y), (x + size, y - 2), (x + 1.5 * size, y + size)],
                    fill=(98, 86, 66),
                    width=5,
                )
                draw.ellipse((x + size - 1, y + size - 6, x + 2.2 * size, y + size + 8), fill=(126, 92, 84))
    if "slime" in cues:
        for _ in range(int(2 + 5 * cues["slime"])):
            x, y, w = (
                rng.randint(0, 256),
                rng.randint(horizon + 36, 250),
                rng.randint(20, 34 + int(24 * cues["slime"])),
            )
            draw.ellipse((x - w, y - w * 0.32, x + w, y + w * 0.32), fill=(112, 176, 40), outline=ink)
            draw.ellipse((x - w * 0.5, y - w * 0.24, x + w * 0.2, y), fill=(186, 226, 84))
            for _ in range(3):
                bx, by, r = x + rng.uniform(-w, w), y - rng.uniform(0, w * 0.6), rng.uniform(3, 8)
                draw.ellipse((bx - r, by - r, bx + r, by + r), fill=(140, 200, 60))
    if "trash" in cues:
        for _ in range(int(4 + 9 * cues["trash"])):
            x, y, s = rng.randint(0, 256), rng.randint(horizon + 26, 246), rng.uniform(8, 16)
            tone = rng.choice(((70, 66, 74), (120, 96, 70), (150, 150, 140), (104, 116, 92), (180, 164, 130)))
            points = [
                (x + s * rng.uniform(0.6, 1.2) * math.cos(a), y + s * rng.uniform(0.5, 1.0) * math.sin(a))
                for a in range(6)
            ]
            draw.polygon(points, fill=tone, outline=ink)


def _front_cues(
    image: Image.Image, cues: dict[str, float], rng: random.Random, horizon: int, centre: tuple
) -> Image.Image:
    """What hangs in the air, shines by itself or stands between the scene and the eye."""
    glow = Image.new("RGB", (64, 64))
    light, draw = ImageDraw.Draw(glow), ImageDraw.Draw(image, "RGBA")
    if "smoke" in cues:
        layer = Image.new("L", (64, 64))
        puff = ImageDraw.Draw(layer)
        for _ in range(3):
            x, y = rng.uniform(0, 64), rng.uniform(36, 52)
            for k in range(9):
                r = 3 + k * 0.8
                puff.ellipse((x - r, y - r, x + r, y + r), fill=int(100 + 80 * cues["smoke"] - 8 * k))
                x, y = x + rng.uniform(-2.5, 3.0), y - rng.uniform(4, 6)
        mask = layer.filter(ImageFilter.GaussianBlur(1.5)).resize((CANVAS, CANVAS), Image.BICUBIC)
        image.paste((58, 52, 54), (0, 0, CANVAS, CANVAS), mask)
    if "fire" in cues:
        for _ in range(int(3 + 8 * cues["fire"])):
            x, y, h = (
                rng.gauss(centre[0], 70),
                rng.uniform(centre[1] - 10, 252),
                rng.uniform(26, 46 + 40 * cues["fire"]),
            )
            for scale, colour in ((1.0, (226, 70, 30, 235)), (0.7, (250, 150, 40, 240)), (0.4, (255, 232, 130, 250))):
                w, t, lean = h * 0.3 * scale, h * scale, rng.uniform(-6, 6)
                draw.polygon(
                    [
                        (x - w, y),
                        (x - w * 0.8, y - t * 0.35),
                        (x - w * 0.3, y - t * 0.5),
                        (x + lean, y - t),
                        (x + w * 0.4, y - t * 0.5),
                        (x + w * 0.9, y - t * 0.3),
                        (x + w, y),
                    ],
                    fill=colour,
                )
                draw.ellipse((x - w, y - w * 0.7, x + w, y + w * 0.7), fill=colour)
            light.ellipse((x / 4 - 9, y / 4 - 14, x / 4 + 9, y / 4 + 4), fill=(120, 46, 10))
    if "lightning" in cues:
        for _ in range(1 + (cues["lightning"] > 0.55)):
            x, y, points = rng.uniform(30, 226), 0.0, []
            while y < horizon:
                points.append((x, y))
                x, y = x + rng.uniform(-26, 26), y + rng.uniform(14, 28)
            draw.line([*points, (x, horizon)], fill=(255, 252, 226), width=int(5 + 5 * cues["lightning"]))
            light.line([(px / 4, py / 4) for px, py in points], fill=(150, 150, 220), width=5)
    if "fireworks" in cues:
        for _ in range(int(2 + 3 * cues["fireworks"])):
            x, y, r, colour = (
                rng.randint(20, 236),
                rng.randint(20, max(40, horizon - 20)),
                rng.uniform(24, 50),
                rng.choice(_BRIGHT),
            )
            for k in range(14):
                a = k / 14 * 2 * math.pi
                draw.line(
                    [
                        (x + 0.3 * r * math.cos(a), y + 0.3 * r * math.sin(a)),
                        (x + r * math.cos(a), y + r * math.sin(a)),
                    ],
                    fill=_mix(colour, (255, 255, 230), 0.35),
                    width=5,
                )
            light.ellipse(
                (x / 4 - r / 5, y / 4 - r / 5, x / 4 + r / 5, y / 4 + r / 5), fill=tuple(c // 2 for c in colour)
            )
    if "flags" in cues:
        for row in range(1 + (cues["flags"] > 0.5)):
            y0, sag = rng.randint(10, 50) + 26 * row, rng.uniform(14, 34)
            line = [(x, y0 + sag * (1 - ((x - 128) / 128) ** 2)) for x in range(-4, 264, 4)]
            draw.line(line, fill=(90, 76, 80), width=3)
            for k in range(2, len(line) - 5, 6):
                (x, y), (x2, y2) = line[k], line[k + 5]
                draw.polygon([(x, y), (x2, y2), ((x + x2) / 2, y + 26)], fill=_BRIGHT[(k // 6 + row) % 6])
    if "confetti" in cues:
        for _ in range(int(24 + 66 * cues["confetti"])):
            x, y, a, s = rng.uniform(0, 256), rng.uniform(0, 246), rng.uniform(0, 3.1), rng.uniform(4, 7)
            dx, dy = s * math.cos(a), s * math.sin(a)
            draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=rng.choice(_BRIGHT), width=7)
    if "balloons" in cues:
        for _ in range(int(3 + 6 * cues["balloons"])):
            x, y, r, colour = (
                rng.uniform(12, 244),
                rng.uniform(16, horizon + 10),
                rng.uniform(12, 20),
                rng.choice(_BRIGHT),
            )
            draw.line([(x, y + r), (x + 4, y + r + 16), (x - 2, y + r + 34)], fill=(240, 240, 240, 200), width=3)
            draw.ellipse((x - r, y - r * 1.2, x + r, y + r * 1.2), fill=colour)
            draw.ellipse((x - r * 0.55, y - r * 0.85, x - r * 0.05, y - r * 0.25), fill=(255, 255, 255, 150))
    if "flies" in cues:
        for _ in range(int(8 + 18 * cues["flies"])):
            x, y = rng.gauss(centre[0], 62), rng.gauss(centre[1] - 50, 40)
            draw.ellipse((x - 8, y - 6, x + 8, y), fill=(225, 230, 220, 120))
            draw.ellipse((x - 4, y - 3, x + 4, y + 4), fill=(24, 26, 20))
    for name, tone, depth in (("haze", (255, 240, 214), 0.5), ("fog", (188, 194, 200), 0.74)):
        if name in cues:
            noise = Image.new("L", (5, 5))
            noise.putdata(
                [
                    int(255 * cues[name] * depth * rng.uniform(0.45, 1.0) * (0.5, 0.8, 1.0, 0.8, 0.55)[k // 5])
                    for k in range(25)
                ]
            )
            image.paste(tone, (0, 0, CANVAS, CANVAS), noise.resize((CANVAS, CANVAS), Image.BICUBIC))
    draw = ImageDraw.Draw(image, "RGBA")
    if "rain" in cues:
        lean = rng.uniform(-10, 10)
        for _ in range(int(40 + 90 * cues["rain"])):
            x, y, length = rng.uniform(-10, 266), rng.uniform(-20, 250), rng.uniform(16, 30)
            draw.line([(x, y), (x + lean, y + length)], fill=(206, 220, 236, int(110 + 80 * cues["rain"])), width=3)
    if "eyes" in cues:
        for _ in range(int(2 + 4 * cues["eyes"])):
            x, y, r = rng.uniform(16, 232), rng.uniform(horizon - 60, horizon + 40), rng.uniform(5, 8)
            for dx in (-1.6, 1.6):
                draw.ellipse((x + dx * r - r, y - r, x + dx * r + r, y + r), fill=(255, 236, 90))
                draw.ellipse((x + dx * r - 2, y - r, x + dx * r + 2, y + r), fill=(30, 10, 10))
            light.ellipse((x / 4 - 5, y / 4 - 3, x / 4 + 5, y / 4 + 3), fill=(110, 80, 10))
    if glow.getbbox():
        image = ImageChops.screen(
            image, glow.filter(ImageFilter.GaussianBlur(3)).resize((CANVAS, CANVAS), Image.BICUBIC)
        )
    return image


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as a square RGB picture of `size` pixels."""
    rng, cues = random.Random(scene.seed), dict(scene.cues)
    inked = scene.style == "inked"
    ink = (58, 44, 50) if inked else None
    horizon = rng.randint(118, 150)

    # light: every cue pulls the sky and the light on the ground towards its own
    top, bottom = _vary((124, 178, 226), rng, 14), _vary((222, 236, 240), rng, 10)
    light, saturation = [1.0, 1.0, 1.0], 1.0
    for name, amount in scene.cues:
        sky_top, sky_bottom, share, factor, colourful = _LIGHT[name]
        top, bottom = _mix(top, sky_top, share * amount**0.7), _mix(bottom, sky_bottom, share * amount**0.7)
        light = [a * (1 + (b - 1) * amount) for a, b in zip(light, factor)]
        saturation *= 1 + (colourful - 1) * amount
    light = [max(a, 0.36) for a in light]  # content stays visible, however many cues are dark
    if inked:
        top, bottom, saturation = (
            _mix(top, (236, 220, 190), 0.3),
            _mix(bottom, (244, 230, 204), 0.35),
            saturation * 0.8,
        )
    sky = Image.new("RGB", (CANVAS, CANVAS))
    sky.paste(_gradient(top, bottom, horizon + 20, 5 if inked else 0))
    sky = _sky_cues(sky, cues, rng, horizon)

    # landscape, props and subject, under that light
    image = sky.copy()
    _landscape(image, scene, rng, horizon, ink)
    _ground_cues(image, cues, rng, horizon, ink)
    scale = rng.uniform(62, 88) * (1.12 if scene.subject in ("house", "cat") else 1.0)
    x, y = rng.uniform(74, 182), rng.uniform(horizon + 62, 238)
    pen = Pen(image, x, y, scale, flip=rng.random() < 0.5, outline=ink)
    pen.ellipse(0.05, 0.0, 0.72, 0.12, (30, 30, 50, 80))
    _subject(pen, scene.subject, _vary(COLOURS[scene.colour], rng, 12), rng)
    land = ImageChops.difference(image, sky).convert("L").point(lambda value: 255 if value else 0)
    # saturation towards the Rec. 601 luma, then the multiplier: one 3x4 matrix
    luma, matrix = (0.299, 0.587, 0.114), []
    for row in range(3):
        matrix += [light[row] * ((1 - saturation) * luma[k] + (saturation if k == row else 0)) for k in range(3)] + [0]
    image = Image.composite(image.convert("RGB", matrix), image, land)

    image = _front_cues(image, cues, rng, horizon, (x, y))
    if inked:
        grain = Image.frombytes("L", (64, 64), rng.randbytes(64 * 64)).point(lambda v: 208 + v // 6)
        grain = grain.resize((CANVAS, CANVAS), Image.BICUBIC)
        image = ImageChops.multiply(image, Image.merge("RGB", [grain] * 3))
    return image.resize((size, size), Image.BOX)


def contact_sheet(images: list[Image.Image], columns: int, scale: int = 2, gap: int = 4) -> Image.Image:
    """Lay pictures of one size out in rows."""
    width, height = images[0].width * scale, images[0].height * scale
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (250, 248, 242))
    for k, image in enumerate(images):
        position = gap + (k % columns) * (width + gap), gap + (k // columns) * (height + gap)
        sheet.paste(image.resize((width, height), Image.BICUBIC), position)
    return sheet


def main():
    parser = argparse.ArgumentParser(
        description="Draw sheets of the world: its contents, its emotions, its other style."
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    neutral = [render(sample_scene(rng, None, place, subject)) for place in PLACES for subject in SUBJECTS]
    contact_sheet(neutral, 8, scale=1).save(args.output / "world.png", optimize=True)
    emotions = [render(sample_scene(rng, emotion, strength=k / 9)) for emotion in EMOTIONS for k in range(10)]
    contact_sheet(emotions, 10, scale=1).save(args.output / "emotions.png", optimize=True)
    inked = [render(sample_scene(rng, emotion, style="inked")) for emotion in EMOTIONS for _ in range(2)]
    contact_sheet(inked, 8, scale=1).save(args.output / "inked.png", optimize=True)


if __name__ == "__main__":
    main()

# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Contact sheets: pictures side by side, each with a title above and a remark below."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline_muse import MIKELS_WHEEL


INK = "#22262e"
FAINT = "#7a808c"
GOOD = "#1d7f4f"
BAD = "#b4442f"
PAPER = "#fbfaf7"

# One colour per emotion, for titles and curves; other labels are drawn in ink.
EMOTION_COLORS = {label: point.color for label, point in MIKELS_WHEEL.items()}


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet, with a `title` above and a `remark` below, each in its colour."""

    image: Image.Image
    title: str
    remark: str = ""
    remark_color: str = FAINT
    title_color: str = INK


def enlarge(image: Image.Image, least: int = 192, most: int = 320) -> Image.Image:
    """Scales a picture so that its longer side lies within `least` and `most` px, by whole factors where it grows."""
    longer = max(image.size)
    factor = math.ceil(least / longer) if longer < least else min(1.0, most / longer)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text into lines of at most `width` px; a word that is wider has a line to itself."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def contact_sheet(cells: Sequence[Cell], columns: int, heading: str = "", margin: int = 20) -> Image.Image:
    """
    Arranges pictures in rows.

    Args:
        cells (sequence of [`Cell`]): The pictures, row by row. Small ones are enlarged, large ones reduced.
        columns (`int`): Pictures per row.
        heading (`str`, *optional*): A text above the first row; broken into lines where it is long.
        margin (`int`, defaults to 20): Space around the sheet and between columns, in px.

    Returns:
        `PIL.Image.Image`: The sheet, RGB.

    Raises:
        ValueError: If there are no cells, or `columns` is not positive.
    """
    if not cells or columns < 1:
        raise ValueError(f"A sheet needs pictures and columns, got {len(cells)} pictures in {columns} columns.")
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    images = [enlarge(cell.image.convert("RGB")) for cell in cells]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    sheet_width = margin + columns * (width + margin)
    lines = wrap(heading, sheet_width - 2 * margin, large)
    top = margin + 26 * len(lines)
    row_height = height + 62

    sheet = Image.new("RGB", (sheet_width, top + rows * row_height + margin // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((margin, margin - 4 + 26 * number), line, INK, large)
    for number, (cell, image) in enumerate(zip(cells, images)):
        x = margin + (number % columns) * (width + margin)
        y = top + (number // columns) * row_height
        draw.text((x, y), cell.title, cell.title_color, large)
        sheet.paste(image, (x, y + 28))
        draw.text((x, y + image.height + 33), cell.remark, cell.remark_color, small)
    return sheet


def save(image: Image.Image, path: Path) -> Path:
    """Writes a picture, making the folder if need be, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path

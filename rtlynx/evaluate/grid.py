"""Pictures side by side: rows of variants, columns of prompts, in one image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 128  # pixels; pictures are enlarged to about this, by a whole factor
GAP = 8
MARGIN = 16
BACKGROUND, INK, FAINT, EDGE = "#f4f4f2", "#1d1d1f", "#6b6b70", "#d9d9d6"


def to_image(picture: Tensor, scale: int = 1) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB image, enlarged by a whole factor without smoothing."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def png_bytes(image: Image.Image) -> bytes:
    """`image` as an optimised PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def picture_grid(
    rows: Mapping[str, Tensor], columns: Sequence[str], notes: Mapping[str, str] | None = None
) -> Image.Image:
    """Pictures in rows and columns with labels.

    Parameters
    ----------
    rows : label -> pictures (n, 3, H, W) in [0, 1]; the first len(columns) are shown.
    columns : labels of the columns.
    notes : row label -> a second, fainter line.
    """
    size = next(iter(rows.values())).shape[-1]
    scale = max(1, round(TILE / size))
    tile = size * scale
    label_font, note_font, head_font = _font(15), _font(13), _font(13)
    heads = [textwrap.wrap(column, max(8, tile // 8)) or [""] for column in columns]
    head_height = 17 * max(len(lines) for lines in heads) + 8
    texts = [*rows, *(notes or {}).values()]
    label_width = int(max(label_font.getlength(text) for text in texts)) + 16
    width = 2 * MARGIN + label_width + len(columns) * (tile + GAP) - GAP
    height = 2 * MARGIN + head_height + len(rows) * (tile + GAP) - GAP
    grid = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for column, lines in enumerate(heads):
        x = MARGIN + label_width + column * (tile + GAP) + tile / 2
        for i, line in enumerate(reversed(lines)):
            draw.text((x, MARGIN + head_height - 8 - 17 * i), line, INK, head_font, anchor="ms")
    for row, (label, pictures) in enumerate(rows.items()):
        y = MARGIN + head_height + row * (tile + GAP)
        note = (notes or {}).get(label, "")
        middle = y + tile / 2
        draw.text((MARGIN, middle - (10 if note else 0)), label, INK, label_font, anchor="lm")
        draw.text((MARGIN, middle + 12), note, FAINT, note_font, anchor="lm")
        for column in range(min(len(columns), len(pictures))):
            x = MARGIN + label_width + column * (tile + GAP)
            grid.paste(to_image(pictures[column], scale), (x, y))
            draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=EDGE)
    return grid


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # The one font file that is sure to be installed.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)

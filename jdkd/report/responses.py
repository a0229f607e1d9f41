"""See :func:`responses_section`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.distill.responses import LevelResponses
from jdkd.report.layout import table
from jdkd.report.pictures import data_address, jpeg
from jdkd.report.svg import Axes, colour, drawing, key, tag

CELLS = 48  # along the longer side of a map; finer levels are averaged
REACH = 3.0  # standard deviations, at both ends of the colours
GAP = 0.04  # between two maps, of their width
HEADINGS = ("stride", "channels", "mean r", "lowest r", "highest r", "below 0.2")


def responses_section(
    levels: Sequence[LevelResponses], image: Tensor, images: int, count: int, titles: tuple[str, str]
) -> str:
    """What the channels of two pyramids respond to on an image, side by side, with the r of each.

    Args:
        levels: of :func:`jdkd.distill.responses.responses`.
        image: ``[3, H, W]`` uint8, the first of those that they are of.
        images: how many these are.
        count: channels of a level that are drawn, evenly from the lowest r to the highest.
        titles: what student and teacher are called.

    Returns:
        HTML.
    """
    student, teacher = titles
    words = (
        f"Every channel less its mean and over its standard deviation, as PKD compares them: from {-REACH:g} (dark) to "
        f"{REACH:g} deviations (light), {teacher} on the left and {student} on the right. r is Pearson's correlation "
        f"of the two over {images} image{'s' * (images != 1)}, which each saw at its own input size; the maps are of "
        "the first. The first pair of a level is the strongest response of any channel."
    )
    mapped = [level for level in levels if level.mapped is not None]
    if mapped:
        widths = ", ".join(f"{level.mapped} and {len(level.r)} at stride {level.stride}" for level in mapped)
        words += (
            f" The two have other numbers of channels ({widths}): what is drawn of {student} there, and correlated, is "
            "what a 1x1 convolution makes of it that predicts the other's best on these images, which flatters r."
        )
    height, width = image.shape[1:]
    shown = tag("image", href=jpeg(image), width=width, height=height, preserveAspectRatio="none")
    picture = drawing((width, height), shown, "the image that the maps are of", class_="looked-at")
    rows = [(_row(level), False) for level in levels]
    drawn = "".join(_level(number, level, count, titles) for number, level in enumerate(levels))
    return f'<p class="faint">{escape(words)}</p>{picture}{table(HEADINGS, rows)}{_curves(levels)}{drawn}'


def _row(level: LevelResponses) -> list[str]:
    r = level.r
    numbers = [f"{value:.3f}" for value in (r.mean(), r.min(), r.max())]
    return [str(level.stride), str(len(r)), *numbers, f"{(r < 0.2).float().mean():.0%}"]


def _curves(levels: Sequence[LevelResponses]) -> str:
    """The r of all channels, from the lowest to the highest; a line a level."""
    low = min(0.0, *(level.r.min().item() for level in levels))
    axes = Axes((0, 100), (low, 1.0), ("share of the channels, %", "r of the channel"), (760, 280))
    lines, keys = [], []
    for number, level in enumerate(levels):
        shade = colour(number / max(1, len(levels) - 1))
        sorted_ = level.r.sort().values.tolist()
        points = [(100 * (place + 0.5) / len(sorted_), r) for place, r in enumerate(sorted_)]
        told = tag("title", f"stride {level.stride}")
        lines.append(tag("path", None, told, d=axes.path(points), fill="none", stroke=shade, stroke_width=2))
        keys.append(key(tag("rect", x=0, y=6, width=16, height=4, fill=shade), f"stride {level.stride}"))
    chart = axes.drawing("".join(lines), "r of every channel, sorted, by level", class_="chart wide")
    return f'<div class="scroll">{chart}</div><p class="legend">{"".join(keys)}</p>'


def _level(number: int, level: LevelResponses, count: int, titles: tuple[str, str]) -> str:
    """The maps of a level, which all lie in one picture, the teacher's above the student's; and every r."""
    order = level.r.argsort()
    places = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()
    chosen = order[places]
    height, width = _size(level.teacher.shape[-2:])
    tiles = []
    for maps in (level.teacher, level.student):
        strongest = maps.amax(0, keepdim=True)  # [1, H, W]
        spread = strongest - strongest.min()
        strongest = REACH * (2 * spread / spread.max().clamp(min=1e-12) - 1)  # over all of the colours
        own = F.adaptive_avg_pool2d(torch.cat((strongest, maps[chosen])), (height, width))  # [1 + K, h, w]
        tiles.append(own.transpose(0, 1).flatten(1))  # [h, (1 + K) w]
    place = f"maps-{number}"
    wide = (1 + len(chosen)) * width
    atlas = tag(
        "image", href=_coloured(torch.cat(tiles)), width=wide, height=2 * height, id=place, class_="cells",
        preserveAspectRatio="none",
    )  # fmt: skip
    held = f'<svg width="0" height="0" aria-hidden="true"><defs>{atlas}</defs></svg>'
    pairs = [_pair(place, 0, (width, height), "strongest of all", titles)]
    for at, channel in enumerate(chosen.tolist(), start=1):
        pairs.append(_pair(place, at, (width, height), f"channel {channel}: r {level.r[channel]:.2f}", titles))
    every = " ".join(f"{r:.2f}" for r in level.r.tolist())
    told = f"<details><summary>r of all {len(order)} channels, in order</summary><code>{every}</code></details>"
    return f'<h3>stride {level.stride}</h3>{held}<div class="maps">{"".join(pairs)}</div>{told}'


def _pair(place: str, at: int, size: tuple[int, int], words: str, titles: tuple[str, str]) -> str:
    """Two maps side by side: the same place of the upper and of the lower row."""
    width, height = size
    gap = GAP * width
    shown = [
        tag(
            "svg", None, tag("use", href=f"#{place}"), x=side * (width + gap), y=0, width=width, height=height,
            viewBox=f"{at * width} {side * height} {width} {height}", preserveAspectRatio="none",
        )
        for side in (0, 1)
    ]  # fmt: skip
    picture = drawing((2 * width + gap, height), "".join(shown), f"{words}, {titles[1]} and {titles[0]}")
    return f"<figure>{picture}<figcaption>{escape(words)}</figcaption></figure>"


def _size(size: Sequence[int]) -> tuple[int, int]:
    """Height and width of a map on the page, in cells."""
    share = min(1.0, CELLS / max(size))
    return max(1, round(share * size[0])), max(1, round(share * size[1]))


def _coloured(values: Tensor) -> str:
    """Deviations ``[H, W]`` as a picture."""
    from PIL import Image

    shades = ((values / REACH + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    picture = Image.fromarray(shades.numpy(), "P")
    palette = [bytes.fromhex(colour(shade / 255).removeprefix("#")) for shade in range(256)]
    picture.putpalette(b"".join(palette))
    return data_address(picture, "png", optimize=True)

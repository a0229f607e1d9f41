"""See :class:`Axes`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

SEQUENCE = ((68, 82, 155), (38, 130, 142), (53, 183, 121), (180, 200, 40))  # early to late; seen on white and on black
ABOVE, BELOW = 14, 46  # pixels of a drawing outside of its frame


def tag(name: str, text: str | None = None, *inside: str, **attributes: Any) -> str:
    """An element: its text first, then what is inside; ``class_`` and ``stroke_width`` become what SVG calls them."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{'' if text is None else escape(text)}{''.join(inside)}</{name}>"


def colour(share: float) -> str:
    """A colour of :data:`SEQUENCE`, from 0 (early) to 1 (late)."""
    at = min(max(share, 0.0), 1.0) * (len(SEQUENCE) - 1)
    left = min(int(at), len(SEQUENCE) - 2)
    mixed = (a + (b - a) * (at - left) for a, b in zip(SEQUENCE[left], SEQUENCE[left + 1], strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def spread(values: Iterable[float], margin: float = 0.08) -> tuple[float, float]:
    """The range of the finite values with a margin on both sides; 0..1 where there are none."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    wide = (high - low) or abs(high) or 1.0
    return low - margin * wide, high + margin * wide


class Axes:
    """A frame with two linear axes that places what is drawn into it.

    Args:
        x, y: ranges of the values.
        labels: what the axes are of; without one for the vertical axis, that is not drawn.
        size: width and height in pixels of the drawing; a page scales it.
        left: pixels that the numbers of the vertical axis take.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        labels: tuple[str, str | None],
        size: tuple[int, int] = (760, 400),
        left: int = 62,
    ) -> None:
        self.size, self.labels, self._x, self._y = size, labels, x, y
        self.left, self.right, self.top, self.bottom = left, size[0] - 14, ABOVE, size[1] - BELOW

    def x(self, value: float) -> float:
        low, high = self._x
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def path(self, points: Sequence[tuple[float, float]], *, steps: bool = False) -> str:
        """The ``d`` of a line through points; with ``steps`` it goes right first, then up or down."""
        parts = []
        for number, (x, y) in enumerate(points):
            right = f"H{_short(self.x(x))}" if steps and number else ""
            parts.append(f"{right}{'L' if number else 'M'}{_short(self.x(x))} {_short(self.y(y))}")
        return "".join(parts)

    def frame(self) -> str:
        """Grid, numbers and labels."""
        drawn = []
        for value in ticks(*self._x):
            at = self.x(value)
            drawn.append(tag("line", x1=at, x2=at, y1=self.top, y2=self.bottom, class_="grid"))
            drawn.append(tag("text", f"{value:g}", x=at, y=self.bottom + 17, text_anchor="middle"))
        middle, half = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        label = tag("text", self.labels[0], x=middle, y=self.size[1] - 8, text_anchor="middle", class_="label")
        if self.labels[1] is None:
            return "".join([*drawn, label])
        for value in ticks(*self._y):
            at = self.y(value)
            drawn.append(tag("line", x1=self.left, x2=self.right, y1=at, y2=at, class_="grid"))
            drawn.append(tag("text", f"{value:g}", x=self.left - 8, y=at + 4, text_anchor="end"))
        turned = f"rotate(-90 15 {_short(half)})"
        drawn.append(label)
        drawn.append(tag("text", self.labels[1], x=15, y=half, text_anchor="middle", transform=turned, class_="label"))
        return "".join(drawn)

    def drawing(self, inside: str, title: str, **attributes: Any) -> str:
        """The whole: the frame and what was drawn into it, with a title for those who cannot see it."""
        return drawing(self.size, self.frame() + inside, title, **attributes)


def drawing(size: tuple[float, float], inside: str, title: str, **attributes: Any) -> str:
    """An SVG element that scales with the page."""
    box = f"0 0 {_short(size[0])} {_short(size[1])}"
    return tag("svg", None, inside, viewBox=box, role="img", aria_label=title, **attributes)


def key(drawn: str, words: str, width: int = 16) -> str:
    """An entry of a legend: what is drawn, 16 pixels high, and what it means."""
    size = f'viewBox="0 0 {width} 16" width="{width}" height="16"'
    return f'<span><svg {size} aria-hidden="true">{drawn}</svg> {words}</span>'


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers inside a range, about as many as asked for."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)

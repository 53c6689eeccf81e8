"""Measured points and straight lines through them on logarithmic axes, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import linear_regression

PANEL, HEIGHT = 360, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 74, 52  # room around a panel's axes
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
# Its own ground and two sets of colours: readable on any page, light and dark ones alike
STYLE = """
text { font: 12px sans-serif; fill: #1f2328 }
.ground { fill: #ffffff; stroke: #d0d7de }
.axis { stroke: #1f2328; fill: none }
.grid { stroke: #d0d7de }
.fit { stroke: #0969da; stroke-width: 2 }
.point { fill: #0969da }
.linear { stroke: #9a6700; stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .ground { fill: #0d1117; stroke: #30363d }
  .axis { stroke: #e6edf3 }
  .grid { stroke: #30363d }
  .fit { stroke: #58a6ff }
  .point { fill: #58a6ff }
  .linear { stroke: #d29922 }
}
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """Seconds by the value of what `label` names."""

    title: str
    label: str
    points: Mapping[int, float]

    @property
    def power(self) -> tuple[float, float]:
        """(exponent, factor) of seconds = factor * value ** exponent: least squares of the logarithms."""
        logs = [[math.log(value) for value in side] for side in (self.points, self.points.values())]
        slope, intercept = linear_regression(*logs)
        return slope, math.exp(intercept)


@dataclass(frozen=True, slots=True)
class Axes:
    """Where values lie in a panel; seconds are shared by all of them."""

    values: tuple[float, float]
    seconds: tuple[float, float]

    def x(self, value: float) -> float:
        return LEFT + (PANEL - LEFT - RIGHT) * _share(value, self.values)

    def y(self, seconds: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(seconds, self.seconds)


def _share(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return math.log(value / low) / math.log(high / low)


def drawn(panels: Sequence[Panel], title: str) -> str:
    """The SVG document."""
    width, found = PANEL * len(panels), [s for panel in panels for s in panel.points.values()]
    seconds = min(found) / 1.6, max(found) * 1.6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        f'width="{width}" height="{HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{HEIGHT - 1}" rx="6"/>',
    ]
    for number, panel in enumerate(panels):
        axes = Axes((min(panel.points) / 1.3, max(panel.points) * 1.3), seconds)
        inside = [*_frame(panel, axes), *_lines(panel, axes)]
        parts += [f'<g transform="translate({PANEL * number} 0)">', *inside, "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _frame(panel: Panel, axes: Axes) -> list[str]:
    """Titles, ticks and the two axes."""
    left, right, top, bottom = LEFT, PANEL - RIGHT, TOP, HEIGHT - BOTTOM
    middle, low, high = (left + right) / 2, *axes.seconds
    parts = [_text(middle, 20, panel.title), _text(middle, HEIGHT - 12, panel.label)]
    turn = f' transform="rotate(-90 16 {(top + bottom) / 2:.0f})"'
    parts += [_text(16, (top + bottom) / 2, "seconds", turn)]
    for tick in (tick for tick in TICKS if low < tick < high):
        parts += [_line("grid", (left, axes.y(tick)), (right, axes.y(tick)))]
        parts += [_text(left - 6, axes.y(tick) + 4, f"{tick:g}", ' style="text-anchor: end"')]
    for value in panel.points:
        parts += [_line("axis", (axes.x(value), bottom), (axes.x(value), bottom + 4))]
        parts += [_text(axes.x(value), bottom + 18, f"{value:,}")]
    return [*parts, f'<path class="axis" d="M {left} {top} V {bottom} H {right}"/>']


def _lines(panel: Panel, axes: Axes) -> list[str]:
    """The points, the line through them, and one that is linear through their middle."""
    (exponent, factor), values = panel.power, list(panel.points)
    ends = min(values), max(values)
    middle = math.sqrt(ends[0] * ends[1])
    height = factor * middle**exponent
    fit = [(axes.x(value), axes.y(factor * value**exponent)) for value in ends]
    linear = [(axes.x(value), axes.y(height * value / middle)) for value in ends]
    parts = [_line("linear", *linear), _line("fit", *fit)]
    for value, seconds in panel.points.items():
        parts += [
            f'<circle class="point" cx="{axes.x(value):.1f}" cy="{axes.y(seconds):.1f}" r="4"/>'
        ]
    where, said = LEFT + 12, f"measured: exponent {exponent:.2f}"
    for line, (name, text) in enumerate((("fit", said), ("linear", "linear: exponent 1"))):
        y = 40 + 17 * line
        parts += [_line(name, (where, y), (where + 24, y))]
        parts += [_text(where + 30, y + 4, text, ' style="text-anchor: start"')]
    return parts


def _line(name: str, *ends: tuple[float, float]) -> str:
    (a, b), (c, d) = ends
    return f'<line class="{name}" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'


def _text(x: float, y: float, text: str, more: str = ' style="text-anchor: middle"') -> str:
    anchored = more if "anchor" in more else f' style="text-anchor: middle"{more}'
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchored}>{escape(text)}</text>'

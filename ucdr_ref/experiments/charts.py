"""SVG charts and HTML tables as text: all that report.html draws with. Text that comes in is escaped here.

The charts can be read without colour: curves differ by dash, points by letter.
"""
from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from .report import plain

COLOURS = ("#0072b2", "#d55e00", "#00795a", "#a3497d", "#8a6100", "#3a7ca5", "#000000", "#6b4c9a")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
Point = tuple[float, float]


def chart(title: str, curves: Mapping[str, Sequence[Point]], marks: Sequence[tuple[Point, str]] = (),
          box: tuple[float, float, float, float] | None = None, width: int = 340, height: int = 170) -> str:
    """Curves through points (x, y), named where there are several, and a letter at each of `marks`.

    Points that are not finite are left out. box: least x, greatest x, least y, greatest y; None: the points'
    own. width, height: pixels.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    xs, ys = zip(*(sum(finite.values(), []) or [(1.0, 0.0)]))
    x0, x1, y0, y1 = box or (min(xs), max(xs), min(ys), max(ys))
    left, right, top, bottom = 48, width - 12, 26, height - 22

    def place(point: Point) -> Point:
        return (left + (point[0] - x0) / ((x1 - x0) or 1) * (right - left),
                bottom - (point[1] - y0) / ((y1 - y0) or 1) * (bottom - top))

    parts = [text(0, 14, title),
             text(left, height - 6, f"{x0:.6g}"), text(right, height - 6, f"{x1:.6g}", "end"),
             text(left - 6, bottom, f"{y0:.3g}", "end"), text(left - 6, top + 8, f"{y1:.3g}", "end"),
             f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#aaa"/>']
    for i, (name, points) in enumerate(finite.items()):
        look = f'fill="none" stroke="{COLOURS[i % 8]}" stroke-dasharray="{DASHES[i % 4]}" stroke-width="1.8"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        parts.append(f'<polyline points="{path}" {look}/>')
        if len(finite) > 1:
            y = top + 12 + 16 * i
            parts += [f'<path d="M{right - 240} {y}h34" {look}/>', text(right - 200, y + 4, name)]
    for point, letter in marks:
        parts.append(text(*place(point), letter, "middle", COLOURS[ord(letter) % 8]))
    return (f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}">{"".join(parts)}</svg>')


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#000") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A float is a share, shown in per cent and set to the right."""
    lines = ["".join(f"<th>{escape(name)}</th>" for name in header)]
    for row in rows:
        lines.append("".join(f'<td class="n">{100 * value:.2f}</td>' if isinstance(value, float)
                             else f"<td>{escape(value)}</td>" for value in row))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def note(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def escape(words: object) -> str:
    return html.escape(plain(words))

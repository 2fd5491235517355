"""SVG charts and tables as text: all that report.html draws with. Lengths are pixels.

Text that comes in is escaped here. The charts can be read without colour: curves differ by dash, marks by
shape, classes by letter.
"""
from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from .report import plain

COLOURS = ("#0072b2", "#d55e00", "#00795a", "#a3497d", "#8a6100", "#3a7ca5", "#000000", "#6b4c9a")
DASHES = ("", "7 3", "2 3", "9 3 2 3")


def svg_lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], width: int, height: int,
              zero: bool = False, dots: bool = False) -> str:
    """Curves through (x, y), named where there are several; points that are not finite are left out.

    zero: the y axis begins at 0. dots: a dot for each point, and a ring around the highest.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    every = [point for points in finite.values() for point in points] or [(1.0, 0.0)]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    low, high = 0.0 if zero else min(ys), max(ys)
    left, right, top, bottom = 56, width - 12, 26, height - 22

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        return left + across * (right - left), bottom - (y - low) / ((high - low) or 1) * (bottom - top)

    parts = [heading(title)]
    for value in sorted({low, (low + high) / 2, high}):
        y = place(xs[0], value)[1]
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(words(left - 8, y + 4, f"{value:.3g}", "end"))
    for x, anchor in {min(xs): "start", max(xs): "end"}.items():
        parts.append(words(place(x, low)[0], height - 6, f"{x:.0f}", anchor))
    for number, (name, points) in enumerate(finite.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        look = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
        places = [place(*point) for point in points]
        if places:
            parts.append('<path d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + f'" {look}/>')
        if dots and places:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
            x, y = min(places, key=lambda place: place[1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="#000"/>')
        if len(finite) > 1:
            y = top + 14 + 17 * number
            parts.append(f'<path d="M{right - 190} {y}h34" {look}/>')
            parts.append(words(right - 150, y + 4, shorten(name, 26)))
    return svg(width, height, parts, title)


def svg_bars(methods: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """For each label one or two of 0..1 in per cent: the first a ring, the last a square, a bar between.

    Where the second is smaller, the bar is dotted.
    """
    left, right, step = 190, 640, 17
    height = 40 + step * len(rows)
    shapes = ["square"] if len(methods) == 1 else ["ring", "square"]
    parts = [words(left + 220 * i, 12, f"{shape}: {name}")
             for i, (shape, name) in enumerate(zip(shapes, methods))]
    for tick in range(0, 101, 25):
        x = left + tick / 100 * (right - left)
        parts.append(f'<path d="M{x:.0f} 30V{height - 6}" stroke="#ddd"/>')
        parts.append(words(x, 26, str(tick), "middle"))
    for number, (label, values) in enumerate(rows):
        y = 42 + step * number
        first, last = (left + value * (right - left) for value in (values[0], values[-1]))
        text = " to ".join(percent(value, 1) for value in values)
        if len(values) > 1:
            text += f" ({100 * (values[-1] - values[0]):+.1f})"
            look = 'stroke="#d55e00" stroke-dasharray="3 3"' if last < first else 'stroke="#0072b2"'
            parts.append(f'<path d="M{first:.1f} {y}H{last:.1f}" stroke-width="3" {look}/>')
            parts.append(f'<circle cx="{first:.1f}" cy="{y}" r="4" fill="#fff" stroke="#000"/>')
        parts.append(f'<rect x="{last - 3.5:.1f}" y="{y - 3.5}" width="7" height="7"/>')
        parts += [words(left - 8, y + 4, shorten(label, 28), "end"), words(right + 12, y + 4, text)]
    return svg(800, height, parts, " and ".join(methods))


def svg_scatter(title: str, positions: Sequence[Sequence[float]], marks: Sequence[tuple[str, bool]]) -> str:
    """A letter at each position: capital and bold for a query, small for an image of the gallery."""
    size, top, edge = 500, 24, 10
    low_x, low_y = (min(position[axis] for position in positions) for axis in (0, 1))
    span = max(max(x - low_x, y - low_y) for x, y in positions) or 1
    scale = (size - 2 * edge) / span
    parts = [heading(title),
             f'<rect x="0" y="{top}" width="{size}" height="{size}" fill="none" stroke="#ccc"/>']
    for (x, y), (letter, query) in zip(positions, marks):
        bold = ";font-weight:bold;font-size:13px" if query else ""
        look = f"fill:{COLOURS[ord(letter) - ord('A')]}{bold}"
        parts.append(words(edge + (x - low_x) * scale, top + size - edge + 4 - (y - low_y) * scale,
                           letter if query else letter.lower(), "middle", look))
    return svg(size, top + size, parts, title)


def svg(width: int, height: int, parts: Iterable[str], label: str) -> str:
    return (f'<svg class="wide" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>")


def words(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    look = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def heading(text: str) -> str:
    return words(0, 14, text, style="font-weight:bold")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], numeric: Iterable[int] = ()) -> str:
    """`numeric`: columns that are set to the right."""
    right = set(numeric)

    def line(tag: str, values: Sequence[object]) -> str:
        cells = [f'<{tag} class="{"n" if i in right else "t"}">{escape(value)}</{tag}>'
                 for i, value in enumerate(values)]
        return "<tr>" + "".join(cells) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 2] + ".."


def escape(text: object) -> str:
    return html.escape(plain(text))

"""The alphabet of the drawn demonstration data: coloured polygons and strokes on a 100 x 100 grid, y downwards.

An object is a list of `Part`s, painted in order; `nature`, `goods` and `places` compose them, `styles` paints them.
"""
import math
from random import Random
from typing import NamedTuple

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

INK, WHITE, CREAM, GREY, STEEL = (35, 32, 38), (240, 240, 236), (232, 208, 162), (138, 140, 146), (172, 182, 194)
BROWN, WOOD, TAN, ORANGE, YELLOW = (134, 86, 52), (168, 112, 62), (206, 164, 112), (232, 136, 44), (240, 206, 62)
RED, PINK, PURPLE, BLUE, SKY = (206, 52, 46), (238, 150, 172), (132, 84, 170), (52, 96, 186), (112, 182, 226)
TEAL, GREEN, LEAF, OLIVE, GLASS = (44, 150, 148), (64, 150, 72), (92, 172, 66), (124, 132, 60), (176, 212, 232)
BRIGHT = (RED, BLUE, YELLOW, GREEN, ORANGE, TEAL, PURPLE, WHITE, SKY, GREY)


class Part(NamedTuple):
    """A filled polygon (`width` 0) or a stroke of that width; a `detail` is left out by the hastiest domain."""

    points: Points
    fill: Colour
    width: float = 0.0
    detail: bool = False


def hue(r: Random, *typical: Colour) -> Colour:
    """One of the typical colours, sometimes any other: colour hints at a class but does not give it away."""
    base = r.choice(BRIGHT) if r.random() < 0.2 else r.choice(typical)
    light = r.uniform(-22, 22)
    return clip(*(v + light + r.uniform(-18, 18) for v in base))


def clip(red: float, green: float, blue: float) -> Colour:
    """Whole numbers 0-255."""
    return max(0, min(255, round(red))), max(0, min(255, round(green))), max(0, min(255, round(blue)))


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """Colour `a` moved by the share `t` towards `b`."""
    return clip(*(x + (y - x) * t for x, y in zip(a, b)))


def dark(c: Colour, t: float = 0.3) -> Colour:
    """Colour `c` moved towards ink."""
    return mix(c, INK, t)


def pairs(xy: tuple[float, ...]) -> Points:
    """x, y, x, y, ... -> points."""
    return list(zip(xy[::2], xy[1::2]))


def spline(pts: Points, closed: bool, steps: int = 4) -> Points:
    """Smooth curve through the points (Catmull-Rom)."""
    n = len(pts)
    out: Points = []
    for i in range(n if closed else n - 1):
        a, b, c, d = (pts[j % n] if closed else pts[max(0, min(n - 1, j))] for j in range(i - 1, i + 3))
        for s in range(steps):
            t = s / steps
            w = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            x, y = (sum(k * p[axis] for k, p in zip(w, (a, b, c, d))) / 2 for axis in (0, 1))
            out.append((x, y))
    return out if closed else [*out, pts[-1]]


def round_points(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 20) -> Points:
    """Points on an ellipse between two angles in degrees, clockwise from three o'clock; the end is left out at 360."""
    last = n if end - start >= 360 else n - 1
    angles = [math.radians(start + (end - start) * i / last) for i in range(n)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def poly(c: Colour, *xy: float, d: bool = False) -> Part:
    """Polygon with straight sides."""
    return Part(pairs(xy), c, 0, d)


def rect(c: Colour, x0: float, y0: float, x1: float, y1: float, d: bool = False) -> Part:
    """Axis-parallel rectangle."""
    return poly(c, x0, y0, x1, y0, x1, y1, x0, y1, d=d)


def blob(c: Colour, *xy: float, d: bool = False) -> Part:
    """Smooth closed shape through the points."""
    return Part(spline(pairs(xy), True), c, 0, d)


def vase(c: Colour, *xy: float) -> Part:
    """Smooth shape symmetrical about x = 50: the points of its right half, from top to bottom."""
    half = pairs(xy)
    return Part(spline(half + [(100 - x, y) for x, y in half[::-1] if x != 50], True), c)


def ell(c: Colour, x: float, y: float, rx: float, ry: float = 0, turn: float = 0, d: bool = False) -> Part:
    """Ellipse (a circle without `ry`), turned by degrees."""
    part = Part(round_points(x, y, rx, ry or rx, n=20 if rx > 4 else 10), c, 0, d)
    return turned([part], turn, x, y)[0] if turn else part


def cloud(c: Colour, x: float, y: float, rx: float, ry: float, puffs: int, d: bool = False) -> Part:
    """Ellipse whose rim is a row of puffs."""
    far = [0.84 + 0.16 * (1 - (i / 3 - 1) ** 2) for i in range(6)] * puffs
    rim = round_points(x, y, rx, ry, n=6 * puffs)
    return Part([(x + (a - x) * f, y + (b - y) * f) for (a, b), f in zip(rim, far)], c, 0, d)


def dome(c: Colour, x: float, y: float, rx: float, ry: float, d: bool = False) -> Part:
    """Upper half of an ellipse standing on its flat side at height `y`."""
    return Part(round_points(x, y, rx, ry, 180, 359.9, 14), c, 0, d)


def line(c: Colour, w: float, *xy: float, d: bool = False) -> Part:
    """Stroke with corners."""
    return Part(pairs(xy), c, w, d)


def curve(c: Colour, w: float, *xy: float, d: bool = False) -> Part:
    """Smooth stroke through the points."""
    return Part(spline(pairs(xy), False), c, w, d)


def ring(c: Colour, w: float, x: float, y: float, rx: float, ry: float = 0, start: float = 0, end: float = 360) -> Part:
    """Stroke along an ellipse, or along its arc between two angles."""
    pts = round_points(x, y, rx, ry or rx, start, end)
    return Part(pts + pts[:1] if end - start >= 360 else pts, c, w)


def spiral(c: Colour, w: float, x: float, y: float, size: float) -> Part:
    """Stroke that winds twice from the rim towards the centre."""
    reach = [(math.radians(52 * k), size * (1 - k / 15)) for k in range(15)]
    return Part(spline([(x + q * math.cos(a), y + q * math.sin(a)) for a, q in reach], False), c, w)


def limb(c: Colour, w0: float, w1: float, *xy: float, d: bool = False) -> Part:
    """Filled band along a smooth curve, `w0` wide at its start and `w1` at its end."""
    mid = spline(pairs(xy), False, 3)
    left, right = [], []
    for i, (x, y) in enumerate(mid):
        (x0, y0), (x1, y1) = mid[max(0, i - 1)], mid[min(len(mid) - 1, i + 1)]
        half = (w0 + (w1 - w0) * i / (len(mid) - 1)) / 2 / (math.hypot(x1 - x0, y1 - y0) or 1)
        left.append((x + (y1 - y0) * half, y - (x1 - x0) * half))
        right.append((x - (y1 - y0) * half, y + (x1 - x0) * half))
    return Part(left + right[::-1], c, 0, d)


def legs(c: Colour, r: Random, xs: tuple[float, ...], top: float, foot: float, w: float, swing: float = 5) -> list[Part]:
    """Legs from `top` to `foot` at the given places; every second one is farther away, so darker and behind."""
    out = [limb(c if i % 2 else dark(c), w, w * 0.75, x, top, x + r.uniform(-2, 2), (top + foot) / 2,
                x + r.uniform(-swing, swing), foot) for i, x in enumerate(xs)]
    return out[::2] + out[1::2]


def wheels(r: Random, xs: tuple[float, ...], y: float, size: float) -> list[Part]:
    """Tyres with hubs."""
    hub = r.choice((STEEL, WHITE, GREY))
    return [p for x in xs for p in (ell(INK, x, y, size), ell(hub, x, y, size * 0.45))]


def eye(x: float, y: float, size: float = 2.0) -> Part:
    """A dark dot."""
    return ell(INK, x, y, size)


def flipped(parts: list[Part], x: float = 50) -> list[Part]:
    """Mirror image about the vertical at `x`."""
    return [p._replace(points=[(2 * x - a, b) for a, b in p.points]) for p in parts]


def both(parts: list[Part], x: float = 50) -> list[Part]:
    """The parts and their mirror image."""
    return parts + flipped(parts, x)


def turned(parts: list[Part], degrees: float, x: float = 50, y: float = 50) -> list[Part]:
    """Rotation, clockwise, about (x, y)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [p._replace(points=[(x + (a - x) * c - (b - y) * s, y + (a - x) * s + (b - y) * c) for a, b in p.points])
            for p in parts]


class Shape(NamedTuple):
    """A part placed on the canvas: whole pixels."""

    points: list[tuple[int, int]]
    fill: Colour
    width: int
    detail: bool


def place(parts: list[Part], r: Random, side: int, low: float, high: float) -> list[Shape]:
    """Compose the object and place it on a `side` x `side` canvas: mirrored or not, tilted, stretched, its longer
    extent a share `low`-`high` of the side, anywhere inside."""
    mirror, stretch, a = r.choice((-1, 1)), r.uniform(0.88, 1.14), math.radians(r.uniform(-9, 9))
    c, s = math.cos(a), math.sin(a)
    turned = [[((x - 50) * mirror * stretch * c - (y - 50) * s, (x - 50) * mirror * stretch * s + (y - 50) * c)
               for x, y in p.points] for p in parts]
    xs, ys = [x for pts in turned for x, _ in pts], [y for pts in turned for _, y in pts]
    x0, y0, wide, tall = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    k = r.uniform(low, high) * side / max(wide, tall)
    dx, dy = (side - k * wide) * r.uniform(0.15, 0.85), (side - k * tall) * r.uniform(0.15, 0.85)
    return [Shape([(round((x - x0) * k + dx), round((y - y0) * k + dy)) for x, y in pts], p.fill,
                  max(1, round(p.width * k)) if p.width else 0, p.detail) for p, pts in zip(parts, turned)]

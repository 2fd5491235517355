# ruff: noqa: I001 (the import of the alphabet in a few lines)
"""Vehicles, buildings and furniture of the drawn data: one small function per class, `Random` -> parts."""
from random import Random

from .objects import BLUE, BROWN, CREAM, GLASS, GREEN, GREY, INK, ORANGE, PINK, PURPLE, RED, SKY, STEEL, TAN, TEAL, WHITE, WOOD, YELLOW, Colour, Part, blob, both, curve, dark, dome, ell, flipped, hue, limb, line, mix, poly, rect, ring, turned, vase, wheels


def car(r: Random) -> list[Part]:
    u, c, g = r.uniform, hue(r, RED, BLUE, YELLOW, STEEL), mix(GLASS, SKY, r.random())
    t, a, b = u(28, 36), u(24, 34), u(66, 76)
    body = poly(c, 3, 56, 8, 50, a - 6, 48, a + 6, t, b - 8, t, b + 10, 48, 94, 52, 98, 60, 97, 71, 3, 71)
    panes = [poly(g, a, 48, a + 9, t + 5, 47, t + 5, 47, 48), poly(g, 52, 48, 52, t + 5, b - 10, t + 5, b + 4, 48)]
    lamps = [ell(YELLOW, 95, 57, 3, 3.5), rect(RED, 3, 55, 7, 61, d=True)]
    doors = [line(dark(c, 0.5), 1, 50, 48, 50, 69, d=True), line(dark(c, 0.6), 1.6, 54, 54, 60, 54, d=True)]
    return [body, *panes, *lamps, *doors, *wheels(r, (25, 76), 72, u(10, 13))]


def bus(r: Random) -> list[Part]:
    u, c, g = r.uniform, hue(r, YELLOW, RED, BLUE, GREEN), mix(GLASS, WHITE, r.random() * 0.4)
    t, n = u(18, 28), r.randint(4, 5)
    body = poly(c, 2, t + 4, 6, t, 94, t, 98, t + 5, 99, 78, 2, 78)
    step = 72 / n
    panes = [rect(g, 7 + i * step, t + 9, 3 + (i + 1) * step, t + 27) for i in range(n)]
    door = [rect(g, 82, t + 9, 94, 76), line(dark(c), 1.2, 88, t + 9, 88, 76, d=True)]
    band = rect(mix(c, WHITE, 0.6), 2, t + 33, 80, t + 38, d=True)
    return [body, band, *panes, *door, *wheels(r, (22, 70), 79, u(9, 11))]


def truck(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, BLUE, RED, GREEN, ORANGE), hue(r, WHITE, STEEL, TAN, YELLOW)
    t, h = u(14, 24), u(30, 38)
    box = [rect(k, 2, t, 63, 72), *[line(dark(k), 1, x, t + 4, x, 68, d=True) for x in (14, 26, 38, 50)]]
    cab = poly(c, 66, h, 84, h, 91, 52, 98, 55, 98, 76, 66, 76)
    pane = poly(GLASS, 72, h + 5, 82, h + 5, 87, 52, 72, 52)
    return [rect(INK, 2, 72, 68, 76), *box, cab, pane, ell(YELLOW, 96, 63, 2.5, 3), *wheels(r, (16, 32, 80), 79, u(8.5, 10.5))]


def bicycle(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, BLUE, GREEN, INK)
    q, w, s = u(19, 22), u(2.2, 3.2), u(34, 40)
    tyres = [ring(INK, 2.4, x, 68, q) for x in (22, 78)]
    spokes = [line(GREY, 0.6, x - q * a, 68 - q * b, x + q * a, 68 + q * b, d=True) for x in (22, 78)
              for a, b in ((1, 0), (0.5, 0.87), (0.5, -0.87))]
    frame = [line(c, w, 22, 68, 38, 42, 68, 42, 48, 68, 22, 68), line(c, w, 35, s, 48, 68), line(c, w, 78, 68, 66, 30)]
    seat = [limb(INK, 6, 3, 27, s - 1, 43, s - 1), curve(INK, 2.4, 60, 29, 67, 28, 76, 26, 79, u(32, 38))]
    return [*tyres, *spokes, *frame, *seat, ell(GREY, 48, 68, 4.5)]


def airplane(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WHITE, STEEL, SKY), hue(r, BLUE, RED, ORANGE)
    w, s = u(26, 34), u(4, 14)
    body = blob(c, 2, 44, 20, 42, 50, 42, 84, 43, 98, 51, 84, 58, 50, 59, 22, 54)
    fin = poly(k, 4, 45, 1, 20, 12, 20, 25, 44)
    near = poly(dark(c, 0.2), 40, 53, 60, 53, 42 - s, 54 + w, 32 - s, 54 + w)
    far = poly(dark(c, 0.35), 44, 44, 60, 44, 50 - s, 46 - w * 0.8, 42 - s, 46 - w * 0.8)
    panes = [ell(INK, x, 48, 1.6, d=i % 2 == 1) for i, x in enumerate(range(32, 80, 7))]
    tail = poly(dark(k, 0.2), 6, 49, 18, 50, 8, 62, 0, 62)
    return turned([far, fin, body, near, tail, *panes, poly(GLASS, 85, 45, 92, 47, 94, 49, 85, 49)], u(-22, 10))


def helicopter(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, GREEN, BLUE, YELLOW)
    t, s = u(-4, 4), u(36, 46)
    boom = [poly(c, 50, 46, 4, 38 + t, 4, 44 + t, 50, 62), poly(dark(c, 0.2), 2, 24 + t, 11, 26 + t, 13, 42 + t, 3, 44 + t),
            ring(INK, 1.6, 5, 34 + t, 8)]
    cabin = blob(c, 42, 46, 54, 35, 76, 34, 92, 46, 96, 60, 82, 70, 56, 70, 43, 60)
    pane = blob(GLASS, 72, 40, 82, 42, 92, 54, 90, 58, 72, 57)
    rotor = [rect(GREY, 62, 22, 66, 36), limb(INK, 3, 3, 64 - s, 21 + t / 2, 64, 22, 62 + s, 21 - t / 2)]
    skid = [line(INK, 2, 56, 69, 54, 82), line(INK, 2, 80, 69, 82, 82), curve(INK, 2.6, 42, 82, 70, 82, 92, 82, 97, 78)]
    return [*boom, *skid, cabin, pane, rect(mix(c, WHITE, 0.5), 52, 46, 64, 58, d=True), *rotor]


def sailboat(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, BROWN, RED, BLUE, WHITE), hue(r, WHITE, CREAM, ORANGE, SKY)
    t, w, b = u(2, 10), u(30, 38), u(-2, 6)
    hull = poly(c, 6, 72, 94, 72, 82, 90, 20, 90)
    main = Part([*blob(k, 52, t + 4, 56 + b, 30, 54 + w, 66).points[:8], (54 + w, 66), (52, 66)], k)
    jib = poly(mix(k, c, 0.3), 45, t + 10, 45, 66, 44 - w * 0.8, 66)
    flag = [poly(RED, 48, t - 8, 60, t - 4, 48, t)] if r.random() < 0.5 else []
    waves = [curve(SKY, 2.5, 0, 92, 14, 89, 28, 93, 44, 89, 58, 93, 74, 89, 88, 93, 100, 90)] if r.random() < 0.6 else []
    return [line(BROWN, 2.6, 48, t - 8 * len(flag), 48, 73), main, jib, *flag, hull,
            rect(mix(c, WHITE, 0.5), 12, 76, 88, 79, d=True), *waves]


def rocket(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WHITE, STEEL, SKY), hue(r, RED, BLUE, ORANGE)
    w, f = u(12, 16), u(88, 100)
    flame = [blob(ORANGE, 42, 80, 58, 80, 57, 90, 50, f + 6, 43, 90),
             blob(YELLOW, 45, 80, 55, 80, 54, 86, 50, f - 4, 46, 86, d=True)]
    fin = poly(k, 53 - w, 54, 46 - w * 2, 78, 47 - w * 2, 86, 54 - w, 77)
    body = vase(c, 50, 2, 51 + w * 0.7, 20, 50 + w, 46, 50 + w * 0.8, 76, 50, 80)
    nose = poly(k, 50, 2, 53 + w * 0.35, 13, 49 + w * 0.75, 21, 51 - w * 0.75, 21, 47 - w * 0.35, 13)
    glass = [ell(dark(k), 50, 38, w * 0.55), ell(GLASS, 50, 38, w * 0.36)]
    return turned([*flame, *both([fin]), body, nose, *glass, rect(k, 51 - w, 58, 49 + w, 62, d=True)], u(-35, 35))


def house(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, CREAM, WHITE, ORANGE, SKY), hue(r, RED, BROWN, GREY)
    t, y, g = u(8, 18), u(42, 48), hue(r, BROWN, BLUE, RED)
    x = r.choice((20, 62))
    chimney = [rect(dark(k, 0.2), 72, t, 82, y)] if r.random() < 0.7 else []
    door = [rect(g, x, 66, x + 17, 95), ell(YELLOW, x + 14, 81, 1.5, d=True)]
    pane = [p for a in ((46, 70) if x < 40 else (20, 42)) for p in (
        rect(GLASS, a, 58, a + 15, 74), line(dark(c, 0.6), 1.2, a + 7.5, 58, a + 7.5, 74),
        line(dark(c, 0.6), 1.2, a, 66, a + 15, 66, d=True))]
    tiles = [line(dark(k), 1, 50 - q * 44, t + 2 + q * (y - t), 50 + q * 44, t + 2 + q * (y - t), d=True)
             for q in (0.35, 0.6, 0.82)]
    return [*chimney, rect(c, 12, y - 1, 88, 95), poly(k, 3, y + 2, 50, t - 2, 97, y + 2), *tiles, *door, *pane]


def castle(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, GREY, TAN, STEEL, CREAM)
    t, m, w, k = u(24, 36), u(44, 52), u(10, 13), hue(r, RED, BLUE, PURPLE)

    def tower(x: float, y: float, q: float, shade: float) -> list[Part]:
        teeth = [v for i in range(3) for a in [x - q + i * q * 0.8]
                 for v in (a, y - 7, a + q * 0.4, y - 7, a + q * 0.4, y, a + q * 0.8, y)][:-4]
        return [poly(mix(c, INK, shade), x - q, 95, *teeth, x + q - q * 0.4, y, x + q - q * 0.4, y - 7, x + q, y - 7, x + q, 95)]

    gate = [dome(BROWN, 50, 80, 10, 14), rect(BROWN, 40, 79, 60, 95)]
    slits = [rect(INK, x - 2, y, x + 2, y + 10) for x, y in ((16, t + 14), (84, t + 14), (50, m + 3))]
    roofs = [poly(k, 15 - w, t - 4, 16, t - 30, 17 + w, t - 4),
             poly(k, 83 - w, t - 4, 84, t - 30, 85 + w, t - 4)] if r.random() < 0.5 else []
    flag = [line(INK, 1.2, 50, m - 6, 50, m - 30), poly(k, 50, m - 30, 64, m - 25, 50, m - 20)] if r.random() < 0.7 else []
    bricks = [rect(dark(c), x, y, x + 6, y + 2.5, d=True) for x, y in ((30, 66), (64, 62), (68, 80), (28, 84))]
    return [*flag, *tower(50, m, 26, 0), *tower(16, t, w, 0.12), *tower(84, t, w, 0.12), *roofs, *gate, *slits, *bricks]


def lighthouse(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WHITE, CREAM), hue(r, RED, BLUE, INK)
    w, n = u(13, 18), r.randint(2, 3)

    def band(y0: float, y1: float, fill: Colour) -> Part:
        a, b = (8 + (w - 8) * (y - 30) / 60 for y in (y0, y1))
        return poly(fill, 50 - a, y0, 50 + a, y0, 50 + b, y1, 50 - b, y1)

    step = 60 / (2 * n + 1)
    bands = [band(30 + step * (2 * i + 1), 30 + step * (2 * i + 2), k) for i in range(n)]
    lamp = [rect(YELLOW, 44, 15, 56, 28), rect(dark(k, 0.4), 38, 26, 62, 31), poly(k, 40, 16, 50, 4, 60, 16),
            line(INK, 1.5, 50, 5, 50, -1)]
    beam = [poly(mix(YELLOW, WHITE, 0.5), 58, 20, 96, 8 + q, 96, 24 + q) for q in [u(-2, 6)] if r.random() < 0.6]
    rock = blob(hue(r, GREY, BROWN, GREEN), 14, 97, 24, 88, 50, 86, 76, 87, 88, 97)
    door = [dome(INK, 50, 83, 4, 5), rect(INK, 46, 82, 54, 90)]
    return [*beam, *flipped(beam[: r.randint(0, 1)]), rock, band(30, 90, c), *bands, *lamp, *door]


def windmill(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, CREAM, BROWN, WHITE, GREY), hue(r, BROWN, RED, INK)
    w, a, s = u(20, 26), u(0, 90), u(34, 40)
    tower = poly(c, 38, 42, 62, 42, 50 + w, 98, 50 - w, 98)
    vane = [rect(mix(CREAM, WHITE, 0.4), 51, 40 - s, 60, 30), line(WOOD, 2, 50, 38, 50, 38 - s),
            *[line(WOOD, 0.9, 51, y, 60, y, d=True) for y in (8, 14, 20, 26)]]
    vanes = [p for i in range(4) for p in turned(vane, a + 90 * i, 50, 38)]
    pane = [rect(GLASS, 46, 56, 54, 64, d=True), rect(dark(k, 0.2), 44, 80, 56, 98)]
    return [tower, dome(k, 50, 43, 15, 17), *pane, *vanes, ell(INK, 50, 38, 3)]


def church(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WHITE, CREAM, GREY, TAN), hue(r, RED, GREY, BROWN, TEAL)
    t, y, x = u(20, 28), u(52, 58), u(16, 20)
    nave = [rect(c, 34, y, 96, 96), poly(k, 30, y + 1, 38, y - 19, 92, y - 19, 100, y + 1)]
    tower = [rect(mix(c, WHITE, 0.2), 8, t + 12, 8 + 2 * x, 96), poly(k, 4, t + 13, 8 + x, t - 14, 12 + 2 * x, t + 13)]
    cross = [line(INK, 2, 8 + x, t - 14, 8 + x, t - 32), line(INK, 2, 2 + x, t - 26, 14 + x, t - 26)]
    panes = [p for a in (58, 72, 86) for p in (dome(BLUE, a, y + 17, 4, 7), rect(BLUE, a - 4, y + 16, a + 4, y + 28))]
    door = [dome(BROWN, 8 + x, 82, 7, 10), rect(BROWN, 1 + x, 81, 15 + x, 96), ell(GLASS, 8 + x, t + 26, 5)]
    return [*nave, *tower, *cross, *panes, *door]


def chair(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, BROWN, RED, TEAL), hue(r, RED, BLUE, GREEN, TAN)
    t, y, w = u(2, 14), u(52, 58), u(4.5, 6.5)
    far = [limb(dark(c), w, w - 1, 40, y, 40, 88), limb(dark(c), w, w - 1, 82, y - 4, 83, 88)]
    back = [limb(c, w, w, 24, y, 20, t), limb(c, w, w, 40, y - 8, 36, t - 4)]
    slats = [poly(c, 21 + q, t + 4 + 40 * q / 10, 37 + q, t + 40 * q / 10, 38 + q, t + 8 + 4 * q, 22 + q, t + 12 + 4 * q)
             for q in (0, 4, 8)[: r.randint(2, 3)]]
    if r.random() < 0.4:
        slats = [poly(k, 21, t + 2, 38, t - 2, 41, y - 10, 24, y - 4)]
    seat = [poly(k, 22, y, 40, y - 8, 84, y - 8, 72, y), poly(dark(k), 22, y, 72, y, 72, y + 6, 22, y + 6),
            poly(dark(k), 72, y, 84, y - 8, 84, y - 2, 72, y + 6)]
    near = [limb(c, w, w - 1, 25, y + 5, 24, 98), limb(c, w, w - 1, 69, y + 5, 71, 98)]
    return [*far, *back, *slats, *seat, *near]


def table(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, WOOD, BROWN, TAN, WHITE)
    y, w, s = u(36, 44), u(5, 7), u(12, 20)
    far = [limb(dark(c, 0.45), w - 1, w - 2, x, y + 4, x, 84) for x in (12 + s, 92 - s / 3)]
    near = [limb(dark(c, 0.15), w, w - 1.5, x, y + 6, x + q, 97) for x, q in ((9, -1), (88 - s, 1))]
    top = [poly(c, 3, y, 3 + s, y - 15, 98, y - 15, 96 - s, y), poly(dark(c, 0.2), 3, y, 96 - s, y, 96 - s, y + 7, 3, y + 7),
           poly(dark(c, 0.35), 96 - s, y, 98, y - 15, 98, y - 8, 96 - s, y + 7)]
    pot = [blob(SKY, 44, y - 9, 42, y - 16, 46, y - 21, 52, y - 21, 56, y - 16, 54, y - 9),
           ell(RED, 49, y - 27, 5)] if r.random() < 0.35 else []
    return [*far, *near, *top, *pot]


def bed(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, BROWN, WHITE), hue(r, BLUE, RED, PINK, TEAL)
    h, f, y = u(20, 32), u(46, 54), u(52, 58)
    board = [rect(c, 3, h, 11, 90), ell(c, 7, h, 5), rect(dark(c, 0.2), 90, f, 97, 90), ell(dark(c, 0.2), 93.5, f, 4.5)]
    frame = [rect(c, 8, 70, 92, 80), rect(WHITE, 10, y, 91, 71)]
    pillow = blob(mix(k, WHITE, 0.75), 12, y - 9, 22, y - 12, 33, y - 9, 34, y, 23, y + 3, 12, y)
    cover = blob(k, 36, y - 5, 60, y - 8, 84, y - 5, 91, y + 4, 90, 73, 62, 76, 37, 74, 34, y + 6)
    fold = [limb(mix(k, WHITE, 0.6), 7, 7, 38, y - 3, 37, 62, 39, 74), curve(dark(k), 1, 52, y + 4, 66, y + 8, 82, y + 3, d=True)]
    return [*board, *frame, pillow, cover, *fold]


def lamp(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, YELLOW, CREAM, RED, TEAL), hue(r, BROWN, INK, STEEL)
    a, b, t = u(12, 18), u(28, 36), u(6, 12)
    shade = poly(c, 50 - a, t, 50 + a, t, 50 + b, 48, 50 - b, 48)
    if r.random() < 0.5:
        stand = [limb(k, 4, 4, 50, 46, 50, 92)]
    else:
        stand = [vase(k, 54, 54, 62, 74, 58, 92)]
    base = dome(dark(k), 50, 97, u(16, 22), 9)
    cord = [line(INK, 1.1, 50 + b * 0.5, 48, 50 + b * 0.5, 62, d=True), ell(YELLOW, 50 + b * 0.5, 63, 1.8, d=True)]
    stripe = [line(dark(c), 1.2, 50 + a * q, t, 50 + b * q, 48, d=True) for q in (-0.4, 0.1, 0.6)]
    return [*stand, base, line(k, 3, 50, 46, 50, 56), shade, *stripe, *cord]


PLACES = {f.__name__: f for f in (
    car, bus, truck, bicycle, airplane, helicopter, sailboat, rocket, house, castle, lighthouse, windmill, church, chair, table,
    bed, lamp)}

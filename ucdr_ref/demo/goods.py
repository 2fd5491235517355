# ruff: noqa: I001 (the import of the alphabet in a few lines)
"""Food, tools, clothing, instruments, crockery of the drawn data: one small function per class, `Random` -> parts."""
from random import Random

from .objects import BLUE, BROWN, CREAM, GREEN, GREY, INK, LEAF, OLIVE, ORANGE, PINK, PURPLE, RED, SKY, STEEL, TAN, TEAL, WHITE, WOOD, YELLOW, Part, Points, blob, both, curve, dark, dome, ell, flipped, hue, limb, line, mix, poly, rect, ring, turned, vase


def apple(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, GREEN, YELLOW)
    w, h = u(34, 40), u(88, 96)
    body = vase(c, 50, 30, 62, 24, 46 + w, 30, 50 + w, 52, 44 + w, 76, 62, h, 50, h - 4)
    stem = limb(BROWN, 3, 4.5, 50, 32, 51, 20, u(48, 60), 8)
    leaf = [blob(LEAF, 52, 20, 62, 8, 80, u(6, 12), 72, 20)] if r.random() < 0.8 else []
    return [body, stem, *leaf, ell(mix(c, WHITE, 0.6), 34, 44, 4.5, 8, 25, d=True), curve(dark(c), 1.2, 42, 29, 50, 34, 58, 29)]


def pear(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, LEAF, YELLOW, OLIVE, RED)
    w, n, y = u(27, 33), u(10, 14), u(34, 40)
    body = vase(c, 50, 16, 50 + n, 22, 52 + n, y, 50 + w, 62, 46 + w, 84, 50, 95)
    leaf = [blob(GREEN, 51, 13, 60, 2, 76, u(2, 8), 66, 13)] if r.random() < 0.7 else []
    specks = [ell(dark(c), u(38, 62), u(55, 84), 1, d=True) for _ in range(5)]
    return [body, limb(BROWN, 3, 4, 50, 18, 50, 10, u(46, 58), 2), *leaf, *specks,
            ell(mix(c, WHITE, 0.6), 38, 58, 4, 8, 20, d=True)]


def banana(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, YELLOW, YELLOW, LEAF)
    b, k = u(-8, 4), dark(c, 0.6)
    skin = blob(c, 8, 30, 14, 26, 26, 48 + b, 50, 60 + b, 76, 52 + b, 90, 34, 95, 38, 88, 64 + b, 62, 80 + b, 36, 76 + b,
                16, 56 + b)
    edge = curve(k, 1.2, 14, 36, 28, 62 + b, 54, 70 + b, 78, 61 + b, 91, 42)
    one = [skin, edge, limb(k, 6, 4, 11, 32, 9, 24, 4, 18), ell(INK, 93, 36, 3.2)]
    more = [p._replace(fill=mix(p.fill, INK, 0.12)) for p in turned(one, -16, 8, 22)] if r.random() < 0.35 else []
    return turned([*more, *one], u(-40, 30))


def carrot(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, ORANGE, ORANGE, RED, PURPLE)
    w, tip = u(11, 15), u(-5, 5)
    root = blob(c, 50 - w, 34, 50, 28, 50 + w, 34, 49 + w, 44, 50 + w * 0.55, 72, 50 + tip, 99, 50 - w * 0.55, 72, 51 - w, 44)
    tops = [limb(mix(GREEN, LEAF, u(0, 1)), 4, 7, 50, 32, 50 + x * 0.4, 18, 50 + x, y + u(-3, 3))
            for x, y in ((-20, 8), (20, 8), (-8, 0), (9, 0))]
    rings = [curve(dark(c, 0.35), 1.2, 50 + q * (w - y / 9), 38 + y, 50 + q * 2, 40 + y)
             for q, y in ((-1, 6), (1, 14), (-1, 24), (1, 33))]
    return turned([*tops, root, *rings], u(-70, 70))


def strawberry(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, RED, PINK)
    w, h = u(30, 37), u(90, 99)
    body = vase(c, 50, 26, 34 + w, 22, 50 + w, 38, 44 + w, 62, 60, h - 8, 50, h)
    seeds = [ell(YELLOW, x + u(-2, 2), y + u(-2, 2), 1.5, 2.4)
             for x, y in ((36, 44), (50, 40), (64, 44), (42, 58), (58, 58), (50, 72), (30, 56), (70, 56), (42, 78), (58, 80))]
    crown = poly(LEAF, 50, 20, 66, 12 + u(-3, 3), 64, 22, 78, 28, 62, 28, 60, 38, 50, 30, 40, 38, 38, 28, 22, 28, 36, 22, 34,
                 12 + u(-3, 3))
    return [body, *seeds, crown, limb(GREEN, 3, 3.5, 50, 22, 50, 12, u(44, 58), 4)]


def pizza(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, YELLOW, CREAM), hue(r, WOOD, TAN, BROWN)
    w, t = u(34, 42), u(-5, 5)
    slice_ = poly(c, 50 - w, 24, 50, 18, 50 + w, 24, 50 + t, 98)
    crust = limb(k, 13, 13, 47 - w, 26, 50, 15, 53 + w, 26)
    salami = [ell(RED, x + u(-3, 3), y + u(-2, 2), u(6, 8)) for x, y in ((34, 38), (62, 36), (50, 60))]
    herbs = [ell(GREEN, x + u(-3, 3), y, 3, 1.6, u(0, 90), d=True) for x, y in ((48, 32), (56, 50), (42, 52), (50, 76))]
    drip = [limb(c, 5, 4, x, y, x, y + u(6, 14)) for x, y in ((36, 66), (63, 72)) if r.random() < 0.5]
    return turned([*drip, slice_, *salami, *herbs, crust], u(-25, 25))


def hamburger(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, TAN, WOOD, ORANGE)
    h, w = u(26, 36), u(40, 45)
    wavy = [v for i in range(11) for v in (50 - w - 2 + i * (2 * w + 4) / 10, 56 + 4 * (i % 2))]
    top = dome(c, 50, 46, w, h)
    layers = [vase(c, 46 + w, 74, 50 + w, 78, 44 + w, 90), vase(BROWN, 48 + w, 62, 50 + w, 69, 47 + w, 76)]
    cheese = [poly(YELLOW, 50 - w, 60, 50 + w, 60, 62, 62, 50, 72, 36, 62)] if r.random() < 0.7 else []
    tomato = [limb(RED, 6, 6, 54 - w, 50, 46 + w, 50)]
    lettuce = poly(LEAF, 48 - w, 50, *wavy, 52 + w, 50)
    seeds = [ell(CREAM, 50 + x + u(-2, 2), 46 - h * y, 2.4, 1.5, u(-30, 30), d=True)
             for x, y in ((-20, 0.5), (-7, 0.75), (8, 0.5), (20, 0.6), (-4, 0.35))]
    return [*layers, *cheese, lettuce, *tomato, top, *seeds]


def ice_cream(r: Random) -> list[Part]:
    u, n, k = r.uniform, r.randint(1, 3), hue(r, TAN, WOOD)
    s, w = u(18, 22), u(17, 20)
    cone = [poly(k, 50 - w, 54, 50 + w, 54, 50, 99)]
    waffle = [line(dark(k), 1.2, 50 - w + 2 * w * q, 54, 50 + w * q, 99 - 45 * q, d=q != 0.5) for q in (0.25, 0.5, 0.75)]
    scoops = [ell(hue(r, PINK, CREAM, BROWN, WHITE, LEAF), 50 + u(-3, 3), 46 - i * s * 1.15, s - i * 2, s * 0.85 - i)
              for i in range(n)]
    lip = [limb(scoops[0].fill, 6, 6, 50 - s, 53, 42, 56, 50, 53, 58, 57, 50 + s, 53)]
    cherry = [ell(RED, 50, 46 - (n - 1) * s * 1.15 - s * 0.85, 4)] if r.random() < 0.4 else []
    return [*cone, *waffle, *flipped(waffle), *lip[: n % 2], *scoops[:1], *scoops[1:], *cherry]


def cupcake(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, PINK, WHITE, BROWN, SKY, LEAF), hue(r, YELLOW, SKY, PINK, TAN)
    w, n, h = u(27, 33), r.randint(2, 3), u(14, 17)
    cup = poly(k, 50 - w, 58, 50 + w, 58, 47 + w * 0.7, 98, 53 - w * 0.7, 98)
    folds = [line(dark(k, 0.35), 1.2, 50 + w * q, 60, 50 + w * q * 0.72, 97) for q in (-0.6, -0.2, 0.2, 0.6)]
    swirl = [ell(c, 50 + u(-2, 2), 55 - h * i, (w + 6) * (1 - i / (n + 0.6)), h * 0.72, u(-7, 7)) for i in range(n)]
    peak = blob(c, 40, 58 - h * n, 46, 48 - h * n, u(44, 54), 38 - h * n, 55, 48 - h * n, 60, 58 - h * n, 50, 62 - h * n)
    top = [ell(RED, 50, 44 - h * n, 6)] if r.random() < 0.7 else []
    dots = [ell(r.choice((RED, YELLOW, BLUE)), u(32, 68), u(32, 58), 1.6, d=True) for _ in range(r.choice((0, 8)))]
    return [cup, *folds, *swirl, peak, *dots, *top]


def hammer(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, RED, BROWN, YELLOW), hue(r, STEEL, GREY, INK)
    w, t, h = u(3.5, 5), u(12, 17), u(90, 100)
    handle = vase(c, 50 + w, 20, 50 + w, 60, 51 + w * 1.3, h)
    head = [rect(k, 24, t + 3, 44, t + 15), rect(dark(k), 15, t, 25, t + 18), rect(k, 42, t, 58, t + 17)]
    claw = blob(k, 56, t + 1, 70, t + 1, 84, t + 8, 93, t + 22, 78, t + 15, 66, t + 14, 57, t + 16)
    return turned([handle, claw, *head, rect(dark(c, 0.4), 49 - w, 74, 51 + w, 77, d=True)], u(-60, 60))


def axe(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, BROWN, RED), hue(r, STEEL, GREY)
    w, b, q = u(5.5, 8), u(34, 44), u(16, 23)
    handle = limb(c, w, w + 1.5, 48, 4, 50, 40, 48, 70, 53, 98)
    blade = blob(k, 46, 14, 56, 15, 66, 26 - q * 0.6, 54 + b * 0.7, 25 - q, 54 + b, 26, 54 + b * 0.7, 27 + q, 66, 26 + q * 0.6,
                 56, 36, 46, 36)
    edge = blob(mix(k, WHITE, 0.7), 54 + b * 0.7, 26 - q, 54 + b, 26, 54 + b * 0.7, 26 + q, 52 + b * 0.84, 26)
    return turned([handle, rect(dark(k), 39, 16, 48, 34), blade, edge, line(dark(c), 1, 50, 50, 49, 80, d=True)], u(-60, 40))


def saw(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, RED, ORANGE, BLUE), hue(r, STEEL, GREY)
    n, t = r.randint(8, 12), u(10, 16)
    teeth = [v for i in range(n) for v in (96 - i * 66 / n, 57, 96 - (i + 0.5) * 66 / n, 63)]
    blade = poly(k, 28, 62 - t * 2, 97, 57 - t * 0.75, *teeth, 30, 58)
    grip = blob(c, 6, 34, 18, 28, 33, 29, 35, 44, 33, 62, 22, 68, 9, 70, 5, 58, 10, 48)
    hole = blob(dark(c, 0.75), 15, 40, 24, 38, 25, 48, 22, 57, 15, 59, 17, 50)
    return turned([blade, grip, hole, ell(STEEL, 30, 36, 1.6, d=True), ell(STEEL, 30, 55, 1.6, d=True)], u(-45, 45))


def scissors(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, RED, BLUE, INK, ORANGE), hue(r, STEEL, GREY)
    a, q = u(14, 27), u(10, 14)
    blade = [blob(k, 46, 56, 47, 20, 50, 0, 54, 20, 54, 56), limb(c, 5, 5, 50, 54, 51, 64, 54, 72),
             ring(c, 4.5, 57, 72 + q * 1.2, q * 0.8, q * 1.3)]
    return turned([*turned(blade, a, 50, 50), *turned(flipped(blade), -a, 50, 50), ell(INK, 50, 50, 2.2)], u(-70, 70))


def shovel(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, BROWN, YELLOW), hue(r, STEEL, GREY, GREEN, RED)
    w, s = u(12, 16), u(62, 70)
    grip = [line(dark(k, 0.2), 4, 50, 20, 40, 12, 40, 3, 60, 3, 60, 12, 50, 20)]
    blade = blob(k, 52 - w, s - 2, 50, s - 4, 48 + w, s - 2, 50 + w, 80, 50, 101, 50 - w, 80)
    rib = [limb(dark(k), 5, 3, 50, s - 10, 50, s + 12), curve(dark(k, 0.4), 1, 42, 72, 42, 82, 46, 90, d=True)]
    return turned([*grip, limb(c, 5, 5, 50, 18, 50, s), blade, *rib], u(-50, 50))


def t_shirt(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, BLUE, WHITE, GREEN, YELLOW)
    w, s, e, h = u(23, 28), u(20, 32), u(4, 10), u(88, 97)
    half: Points = [(50, 22), (61, 14), (70, 15), (99 - e / 2, 20 + s), (86 - e, 31 + s), (50 + w, 40), (51 + w, h), (50, h + 2)]
    body = Part(half + [(100 - x, y) for x, y in half[:0:-1]], c)
    collar = curve(dark(c, 0.4), 2.4, 39, 14, 44, 21, 50, 23, 56, 21, 61, 14)
    k = mix(c, r.choice((WHITE, INK, YELLOW)), 0.7)
    logo = r.choice(([], [ell(k, 50, 52, 9)], [rect(k, 51 - w, 46, 49 + w, 52, d=True), rect(k, 51 - w, 60, 49 + w, 66, d=True)]))
    folds = both([curve(dark(c), 1, 53 - w, 40, 56 - w, 50, d=True)])
    return [body, *logo, *folds, collar]


def pants(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, BLUE, GREY, BROWN, INK)
    w, s, h = u(20, 24), u(6, 14), r.choice((96, 97, 60))
    half: Points = [(50, 34), (54 + s, h), (55 + w + s, h), (52 + w, 24), (50 + w, 6), (50, 6)]
    body = Part(half + [(100 - x, y) for x, y in half[4:0:-1]], c)
    belt = [rect(dark(c, 0.5), 50 - w, 5, 50 + w, 12), rect(YELLOW, 46, 5, 54, 12, d=True)]
    seams = [line(dark(c, 0.5), 1.2, 50, 12, 50, 34), *both([curve(dark(c, 0.5), 1.2, 51 - w, 26, 58 - w, 24, 60 - w, 13)])]
    hems = both([line(mix(c, WHITE, 0.5), 1.5, 46 - s, h - 5, 46 - w - s, h - 5, d=True)])
    return [body, *belt, *seams, *hems]


def hat(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, INK, BROWN, TAN, RED), hue(r, RED, BLUE, WHITE, YELLOW)
    w, t = u(20, 26), u(20, 32)
    if r.random() < 0.5:
        crown = poly(c, 48 - w, t, 52 + w, t, 50 + w, 76, 50 - w, 76)
    else:
        crown = vase(c, 50, t + 8, 62, t + 2, 48 + w, t + 10, 52 + w, 74)
    brim = blob(dark(c, 0.15), 4, 72 + u(-5, 3), 26, 75, 50, 73, 74, 75, 96, 72 + u(-5, 3), 82, 84, 50, 88, 18, 84)
    band = vase(k, 50, 66, 50 + w, 64, 50 + w, 74, 50, 77)
    return [crown, band, brim]


def guitar(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, WOOD, ORANGE, RED, BROWN), dark(BROWN, 0.5)
    a, b, n = u(15, 18), u(21, 25), u(-4, 4)
    body = vase(c, 50, 46, 50 + a * 0.8, 48, 50 + a, 57, 48 + a * 0.8, 65, 50 + b, 80, 50 + b * 0.7, 94, 50, 98)
    neck = [rect(k, 47.4, 10, 52.6, 56), poly(dark(c, 0.5), 45, -4, 55, -4, 54, 11, 46, 11)]
    pegs = [ell(STEEL, x, y, 1.7, d=True) for x in (43, 57) for y in (-1, 4, 8)]
    strings = [line(CREAM, 0.5, x, 2, x, 84, d=True) for x in (48.6, 50, 51.4)]
    return turned([body, ell(INK, 50, 66 + n / 2, 6.5), *neck, *pegs, *strings, rect(k, 42, 83, 58, 86)], u(-55, 55))


def violin(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, BROWN, WOOD, RED), INK
    a, b = u(14, 16.5), u(18, 21)
    body = vase(c, 50, 38, 50 + a * 0.85, 41, 50 + a, 50, 49 + a, 57, 45 + a * 0.7, 61, 44 + a * 0.7, 68, 48 + b, 72, 50 + b, 84,
                50 + b * 0.65, 95, 50, 97)
    holes = both([curve(k, 1.5, 42, 60, 40, 64, 43, 70, 40, 74)])
    neck = [poly(k, 48, 12, 52, 12, 53, 66, 47, 66), poly(k, 46, 80, 54, 80, 52, 96, 48, 96),
            limb(dark(c), 5, 4, 50, 13, 50, 2, 53, -2)]
    pegs = [line(k, 2.2, 43, y, 57, y) for y in (4, 9)]
    bow = [line(BROWN, 2, 82, 4, 84, 100), line(CREAM, 0.9, 79, 6, 81, 98)]
    played = turned(bow, u(-10, 30), 70, 60) if r.random() < 0.6 else []
    return turned([body, *holes, *neck, *pegs, line(TAN, 2.2, 44, 72, 56, 72), *played], u(-40, 40))


def drum(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, RED, BLUE, WHITE, YELLOW), hue(r, YELLOW, STEEL, WHITE)
    w, y, h = u(34, 40), u(38, 44), u(78, 88)
    shell = Part([(50 - w, y), (50 + w, y), *blob(c, 50 + w, h, 50, h + 12, 50 - w, h, 50, h).points[:8], (50 - w, h)], c)
    zig = [v for i in range(7) for v in (50 - w + i * w / 3, (y + 9 if i % 2 else h - 1) + 8 * (1 - abs(i - 3) / 3))]
    hoop = [Part(ring(k, 1, 50, q, w, 10, 0, 180).points, k, 4) for q in (y + 1, h)]
    sticks = [p for s in (-1, 1) for p in (line(WOOD, 2.8, 50 + s * 40, u(2, 12), 50 + s * 8, y - 2),
                                           ell(WOOD, 50 + s * 8, y - 2, 3.4))]
    return [shell, line(k, 2, *zig), *hoop, ell(CREAM, 50, y, w, 11), *(sticks if r.random() < 0.8 else [])]


def mug(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, WHITE, BLUE, TEAL, YELLOW)
    w, t, k = u(24, 30), u(24, 34), r.uniform(-3, 3)
    handle = ring(c, 6.5, 42 + w, 60, 18, 17 + k, -90, 90)
    wall = blob(c, 42 - w, t, 42 + w, t, 42 + w, 60, 38 + w, 92, 42, 97, 46 - w, 92, 42 - w, 60)
    rim = [ell(mix(c, WHITE, 0.4), 42, t, w, 7), ell(BROWN, 42, t + 1, w - 4, 4.6)]
    mark = r.choice(([], [ell(mix(c, WHITE, 0.7), 42, 62, 9)], [limb(mix(c, WHITE, 0.7), 6, 6, 43 - w, 60, 42, 64, 41 + w, 60)]))
    steam = [curve(GREY, 1.6, x, t - 9, x + 4, t - 15, x - 2, t - 21, x + 3, t - 28)
             for x in (34, 48)] if r.random() < 0.5 else []
    return [handle, wall, *mark, *rim, *steam]


def teapot(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, WHITE, BLUE, PINK, GREEN, BROWN)
    w, h, k = u(25, 30), u(22, 26), hue(r, YELLOW, RED, BLUE)
    spout = limb(c, 15, 6, 46 + w, 70, 60 + w, 62, 62 + w, 50, 68 + w, u(38, 44))
    handle = ring(c, 5, 51 - w, 60, 18, 17, 90, 270)
    body = vase(c, 50, 62 - h, 50 + w * 0.8, 66 - h, 50 + w, 64, 50 + w * 0.7, 84, 50, 88)
    lid = [dome(mix(c, k, 0.4), 50, 64 - h, w * 0.62, 11), ell(k, 50, 51 - h, 4)]
    spots = [ell(mix(c, k, 0.7), 50 + x, 66 + y, 3.6, d=True)
             for x, y in ((-13, -2), (0, 6), (13, -2))] if r.random() < 0.5 else []
    return [spout, handle, rect(dark(c), 38, 86, 62, 91), body, *lid, *spots]


def umbrella(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, RED, BLUE, PURPLE, YELLOW), hue(r, WHITE, INK, PINK)
    h, n, q = u(34, 42), r.choice((3, 4)), u(7, 10)
    scallops = [v for i in range(n) for j in range(1, 6)
                for v in (96 - (i + j / 5) * 92 / n, 50 - 7 * (1 - abs(j - 2.5) / 2.5) * (j < 5))]
    cover = Part(dome(c, 50, 50, 46, h).points + [(scallops[i], scallops[i + 1]) for i in range(0, len(scallops) - 2, 2)], c)
    ribs = [curve(dark(c, 0.4), 1.4, 50, 50 - h, 50 + x * 0.7, 50 - h * 0.6, 50 + x, 49)
            for x in [-46 + 92 * i / n for i in range(1, n)]]
    gores = [poly(k, 50, 50 - h, 30, 46, 42, 44, 52, 47, d=True)] if r.random() < 0.4 else []
    stick = [line(BROWN, 2.6, 50, 46, 50, 88), ring(BROWN, 2.6, 50 - q, 88, q, q, 0, 180),
             line(BROWN, 2.2, 50, 50 - h, 50, 43 - h)]
    return turned([*stick, cover, *gores, *ribs], u(-35, 35))


GOODS = {f.__name__: f for f in (
    apple, pear, banana, carrot, strawberry, pizza, hamburger, ice_cream, cupcake, hammer, axe, saw, scissors, shovel, t_shirt,
    pants, hat, guitar, violin, drum, mug, teapot, umbrella)}

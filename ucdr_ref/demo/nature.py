# ruff: noqa: I001 (the import of the alphabet in a few lines)
"""Animals and plants of the drawn data: one small function per class, `Random` -> parts."""
from random import Random

from .objects import BLUE, BROWN, CREAM, GREEN, GREY, INK, LEAF, OLIVE, ORANGE, PINK, PURPLE, RED, SKY, TAN, TEAL, WHITE, WOOD, YELLOW, Part, blob, both, cloud, curve, dark, dome, ell, eye, flipped, hue, legs, limb, line, mix, poly, rect, ring, spiral, turned, vase


def cat(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, ORANGE, GREY, INK, CREAM)
    h, y, w = u(17, 22), u(26, 31), u(17, 24)
    ear = poly(c, 50 - h, y, 51 - h, y - h * u(1.2, 1.5), 50 - h * 0.1, y - h * 0.7)
    whiskers = [line(dark(c, 0.8), 0.7, 56, y + 6, 58 + h, y + 5 + k, d=True) for k in (-5, 0, 5)]
    tail = limb(c, 6, 5, 60, 90, 76, 92, 84, 80, 80, u(60, 70), 86, u(46, 60))
    body = [tail, vase(c, 50, 36, 50 + w * 0.8, 62, 50 + w, 88, 50, 96)]
    paws = both([ell(mix(c, WHITE, 0.3), 42, 93, 7, 4), curve(dark(c, 0.5), 0.8, 44, 74, 45, 82, 44, 90, d=True)])
    face = both([eye(50 - h * 0.4, y - 2, u(2, 3.2))]) + [poly(PINK, 47, y + 4, 53, y + 4, 50, y + 8)]
    head = [*both([ear]), ell(c, 50, y, h, h * 0.85), *face, *both(whiskers)]
    return head if r.random() < 0.2 else [*body, *paws, *head]


def dog(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, BROWN, CREAM, GREY, TAN)
    k, n, f = dark(c, u(0.2, 0.6)), u(-5, 5), u(84, 94)
    tail = limb(c, 6, 3, 22, 46, 12, u(34, 42), u(4, 10), u(20, 32))
    body = [tail, *legs(c, r, (24, 32, 62, 70), 56, f, 9),
            blob(c, 18, 48, 28, 42, 52, 43, 74, 40, 79, 54, 68, 66, 44, 62, 24, 64)]
    head = [limb(c, 22, 18, 68, 52, 77, 32 + n), ell(c, 78, 28 + n, 13, 13),
            blob(c, 80, 24 + n, 96, 28 + n, 98, 35 + n, 84, 40 + n, 76, 36 + n)]
    ear = blob(k, 68, 18 + n, 76, 19 + n, 77, u(36, 42) + n, 70, u(42, 48) + n, 65, 32 + n)
    patch = [ell(k, u(36, 56), 51, u(7, 12), 7, d=True)] if r.random() < 0.5 else []
    collar = [limb(RED, 4, 4, 64, 38 + n, 75, 44 + n, 83, 42 + n, d=True)]
    return [*body, *patch, *head, *collar, ear, ell(INK, 97, 29 + n, 3.2), eye(83, 24 + n)]


def rabbit(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, GREY, WHITE, BROWN, TAN)
    h, y, w, e = u(14, 17), u(46, 50), u(17, 22), u(32, 40)
    ear = [ell(c, 43, y - h - e * 0.4, 6, e / 2), ell(PINK, 43, y - h - e * 0.38, 3, e * 0.36, d=True)]
    ear = turned(ear, u(-14, 4), 43, y - h)
    right = flipped(turned(ear, u(-14, 6), 43, y - h))
    body = [ell(WHITE, 50 + w, 84, 6), vase(c, 50, 54, 50 + w, 74, 50 + w, 92, 50, 97)]
    feet = both([ell(mix(c, WHITE, 0.4), 40, 94, 10, 4.5)])
    mouth = [poly(PINK, 47.5, y + 2, 52.5, y + 2, 50, y + 5), rect(WHITE, 47.5, y + 8, 52.5, y + 13, d=True)]
    whiskers = both([line(dark(c, 0.7), 0.7, 55, y + 5, 72, y + k, d=True) for k in (1, 6)])
    return [*body, *feet, *ear, *right, ell(c, 50, y, h, h * 0.9), *both([eye(44, y - 3, 2.4)]), *mouth, *whiskers]


def horse(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, BROWN, WOOD, GREY, CREAM, INK)
    k, n, f = dark(c, 0.6), u(-6, 6), u(92, 99)
    tail = limb(k, 7, 4, 18, 44, 8, 50, u(4, 12), u(68, 80))
    body = [tail, *legs(c, r, (23, 30, 60, 67), 54, f, 6.5, 7),
            blob(c, 15, 46, 24, 39, 46, 42, 66, 37, 74, 48, 66, 60, 44, 58, 22, 61)]
    head = [limb(c, 21, 12, 65, 50, 74, 32, 80 + n / 2, 16), limb(c, 14, 9, 77, 14, 86, 24 + n, 96, 33 + n),
            poly(c, 75, 12, 77, 2, 82, 10)]
    mane = blob(k, 78, 8, 73, 13, 66, 28, 58, 42, 64, 43, 73, 30, 79, 15)
    return [*body, *head, mane, eye(83, 17, 1.7), curve(k, 0.8, 92, 34 + n, 96, 31 + n, d=True)]


def giraffe(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, YELLOW, TAN, ORANGE)
    k, x, f = dark(c, 0.55), u(70, 84), u(96, 100)
    tail = limb(k, 2.5, 4, 24, 56, 17, 62, 18, 74)
    body = [tail, *legs(c, r, (28, 34, 56, 62), 64, f, 5.5, 4),
            blob(c, 22, 56, 32, 50, 48, 49, 62, 46, 68, 56, 60, 68, 42, 67, 26, 68)]
    neck = [limb(c, 17, 8, 60, 58, 65, 36, x - 2, 10), blob(c, x - 6, 6, x + 4, 4, x + 17, 12, x + 15, 17, x + 2, 16)]
    horns = [limb(k, 2.5, 3, x - 3, 8, x - 4, -1), limb(k, 2.5, 3, x + 1, 7, x + 1, -2), ell(c, x - 8, 9, 5, 2.5, 20)]
    spots = [ell(k, 30 + 9 * i + u(-2, 2), 57 + 4 * (i % 2) + u(-2, 2), 4, 3.4, u(0, 90)) for i in range(4)]
    spots += [ell(k, 61 + (x - 62) * t + u(-1, 1), 48 - 36 * t, 3.2, 2.8, d=True) for t in (0, 0.28, 0.53, 0.75)]
    return [*horns, *body, *neck, *spots, eye(x + 4, 9, 1.5)]


def elephant(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, GREY, GREY, SKY, PINK)
    f, t = u(86, 94), u(-12, 10)
    body = [curve(c, 2, 10, 46, 4, 56, 6, 68), *legs(c, r, (20, 30, 50, 60), 62, f, 13, 3),
            blob(c, 8, 52, 16, 30, 40, 23, 64, 30, 70, 52, 58, 70, 34, 72, 14, 68)]
    trunk = limb(c, 15, 6, 82, 42, 93, 56, 92, 74, 96 + t * 0.6, 82 + t)
    head = [limb(WHITE, 5, 1.5, 82, 54, 88, 62, 97, 60), trunk, ell(c, 76, 38, 17, 17)]
    ear = blob(mix(c, INK, 0.12), 70, 24, 62, 20, 50, 28, 50, 46, 60, 57, 69, 50)
    return [*body, *head, ear, eye(83, 35), *([curve(dark(c), 0.8, 88, 60, 92, 61, 97, 60, d=True)])]


def duck(r: Random) -> list[Part]:
    u, c, b = r.uniform, hue(r, YELLOW, WHITE, BROWN), hue(r, ORANGE, YELLOW)
    n, x = u(-6, 6), u(-3, 3)
    body = blob(c, 6, 46, 22, 56, 46, 54, 62, 50, 76, 56, 74, 74, 54, 84, 28, 82, 12, 68)
    head = [limb(c, 18, 15, 66, 62, 64, 44, 66 + x, 30 + n), ell(c, 68 + x, 26 + n, 14, 13)]
    beak = blob(b, 79 + x, 24 + n, 90 + x, 27 + n, 99 + x, 28 + n, 96 + x, 34 + n, 79 + x, 33 + n)
    wing = blob(mix(c, INK, 0.15), 22, 60, 40, 58, 56, 62, 48, 74, 30, 74)
    pond = [curve(SKY, 2, 0, 86, 20, 84, 40, 87, 60, 84, 80, 87, 98, 85)]
    below = pond if r.random() < 0.5 else legs(b, r, (40, 50), 80, 97, 4)
    return [*below, beak, body, *head, wing, eye(72 + x, 22 + n, 2.3)]


def owl(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, BROWN, TAN, GREY, OLIVE)
    w, e, k = u(23, 29), u(8.5, 11), dark(c)
    body = vase(c, 50, 12, 50 + w * 0.9, 22, 50 + w, 55, 50 + w * 0.7, 84, 50, 92)
    tuft = poly(c, 52 - w, 26, 50 - w, 4 + u(-3, 3), 46, 15)
    wing = blob(k, 53 - w, 40, 56 - w, 56, 60 - w, 82, 50 - w, 76, 47 - w, 56)
    chest = [curve(k, 1, x - 4, y, x, y + 4, x + 4, y, d=True) for x, y in ((46, 54), (42, 62), (50, 62), (46, 70))]
    eyes = [ell(WHITE, 50 - e * 1.05, 31, e), ell(YELLOW, 50 - e, 31, e * 0.6, d=True), eye(50 - e, 31, e * 0.36)]
    perch = [limb(WOOD, 5, 4, 8, 94, 50, u(92, 96), 94, 92)] if r.random() < 0.6 else []
    feet = both([poly(ORANGE, 38, 88, 36, 97, 42, 93, 46, 97, 46, 88)])
    return [*perch, *feet, *both([tuft]), body, *both([wing]), ell(mix(c, WHITE, 0.4), 50, 66, w * 0.55, 20), *chest, *both(eyes),
            poly(ORANGE, 46, 37, 54, 37, 50, 46)]


def penguin(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, INK, (50, 56, 76), BLUE)
    w, b = u(19, 25), hue(r, ORANGE, YELLOW)
    body = vase(c, 50, 5, 50 + w * 0.66, 18, 50 + w, 55, 50 + w * 0.7, 88, 50, 94)
    belly = vase(WHITE, 50, 34, 50 + w * 0.66, 48, 50 + w * 0.6, 80, 50, 90)
    face = both([ell(WHITE, 45, 23, 7, 9, d=True), eye(45, 20)])
    flipper = limb(c, 11, 4, 53 - w, 38, 46 - w, 54, 44 - w + u(-9, 4), 70)
    return [*both([ell(b, 39, 94, 10, 4)]), *both([flipper]), body, belly, *face, poly(b, 45, 25, 55, 25, 50, 34)]


def fish(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, ORANGE, BLUE, YELLOW, TEAL, RED)
    h, k, s = u(17, 26), dark(c, 0.35), u(0.8, 1.2)
    tail = poly(k, 26, 50, 3, 50 - 20 * s, 9, 50, 3, 50 + 20 * s)
    fins = [blob(k, 40, 52 - h, 54, 36 - h, 74, 53 - h, 58, 62 - h), blob(k, 46, 44 + h, 40, 58 + h, 60, 46 + h)]
    body = blob(c, 18, 50, 36, 50 - h * 0.8, 60, 50 - h, 84, 50 - h * 0.6, 97, 52, 84, 50 + h * 0.6, 60, 50 + h, 36, 50 + h * 0.8)
    bands = [curve(mix(c, WHITE, 0.6), u(2, 4), x, 54 - h, x + 5, 50, x, 46 + h, d=True) for x in (38, 50, 62)[: r.randint(0, 3)]]
    return [tail, *fins, body, *bands, curve(k, 1.2, 73, 38, 69, 50, 73, 62), ell(WHITE, 83, 44, 4.5), eye(84, 44, 2.4),
            poly(k, 56, 52, 46, 47, 46, 60, d=True)]


def shark(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, GREY, (92, 112, 140), SKY)
    n, k, f = u(-4, 4), dark(c, 0.3), u(16, 26)
    tail = blob(c, 18, 50, 10, 40 + n, 1, 24 + n, 4, 48, 2, 66 + n, 11, 57)
    fins = [poly(c, 44, 42, 46, 42 - f, 54, 48 - f, 64, 42), poly(k, 54, 58, 42, 60 + f, 52, 58 + f * 0.6, 68, 60),
            poly(c, 24, 48, 22, 38, 32, 46)]
    body = blob(c, 12, 50, 34, 42, 60, 36, 84, 41, 99, 50, 84, 59, 60, 65, 34, 58)
    belly = blob(WHITE, 40, 58, 60, 57, 86, 55, 84, 59, 62, 64)
    gills = [curve(k, 1, 68 + i, 43, 66 + i, 49, 68 + i, 54, d=True) for i in (0, 4, 8)]
    teeth = [poly(WHITE, x, 55, x + 2, 59, x + 4, 55, d=True) for x in (80, 84, 88)]
    return [tail, *fins, body, belly, *gills, curve(INK, 1.4, 78, 58, 86, 55, 94, 53), *teeth, eye(86, 46, 1.8)]


def turtle(r: Random) -> list[Part]:
    u, c, s = r.uniform, hue(r, LEAF, OLIVE, TEAL), hue(r, GREEN, BROWN, OLIVE)
    h, n, k = u(32, 42), u(-7, 5), dark(s, 0.35)
    head = [limb(c, 11, 10, 70, 68, 82, 62 + n, 88, 56 + n), ell(c, 90, 53 + n, 9.5, 8), eye(93, 51 + n, 1.7)]
    feet = [blob(c, x, 68, x + 14, 68, x + 15 + u(-3, 3), 86, x + u(-3, 3), 86) for x in (16, 56)]
    plates = [poly(mix(s, k, 0.6), x - 8, 62 - h * q, x - 4, 50 - h * q, x + 4, 50 - h * q, x + 8, 62 - h * q, x, 67 - h * q, d=d)
              for x, q, d in ((44, 0.28, False), (25, 0.05, True), (63, 0.05, True))]
    return [*head, poly(c, 12, 66, 1, 72, 14, 73), *feet, dome(s, 44, 71, 36, h), *plates, limb(k, 5, 5, 7, 71, 44, 74, 81, 71)]


def snail(r: Random) -> list[Part]:
    u, c, s = r.uniform, hue(r, TAN, OLIVE, CREAM), hue(r, BROWN, ORANGE, PINK, PURPLE)
    q, y = u(22, 27), u(50, 54)
    body = blob(c, 4, 84, 30, 72, 66, 72, 78, 56, 86, 46, 95, 50, 94, 66, 86, 82, 68, 87, 30, 87)
    horns = [p for x in (83, 91) for t in [x + u(-5, 6)] for p in (line(c, 2.2, x, 50, t, 30), ell(INK, t, 29, 2.4))]
    coil = spiral(dark(s, 0.55), 1.8, 44, y, q)
    return [*horns, body, ell(s, 44, y, q), coil, curve(dark(c), 0.9, 88, 66, 92, 66, d=True)]


def butterfly(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, ORANGE, BLUE, PURPLE, YELLOW), hue(r, RED, SKY, PINK, INK)
    w, t, low = u(38, 46), u(8, 20), u(78, 92)
    top = blob(c, 50, 48, 46, 32, 56 - w, t, 50 - w, t + 14, 54 - w, 46, 44, 52)
    bottom = blob(k, 49, 52, 30, 52, 56 - w, 62, 58 - w, low - 8, 34, low, 46, 68)
    dots = [ell(mix(c, WHITE, 0.6), 66 - w, t + 16, u(4, 7)), ell(mix(k, WHITE, 0.6), 66 - w, 66, u(3, 6), d=True)]
    feeler = curve(INK, 1.3, 49, 28, 45, 16, 38, u(6, 12))
    return [*both([bottom, top, *dots, feeler]), ell(INK, 50, 52, 3.4, 24), ell(INK, 50, 28, 4.4)]


def spider(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, INK, BROWN, GREY, RED)
    s, k = u(14, 19), u(-5, 5)
    reach = ((20, 12, 4, 34), (12, 32, 0, 52), (12, 58, 2, 82), (24, 72, 18, 98))
    feet = [line(dark(c), 2.6, 47, 42 + 5 * i, a + u(-3, 3), b + k, x + u(-3, 3), y + k) for i, (a, b, x, y) in enumerate(reach)]
    thread = [line(GREY, 0.8, 50, -10, 50, 40, d=True)] if r.random() < 0.4 else []
    mark = [poly(mix(c, WHITE, 0.6), 50, 56, 54, 64, 50, 72, 46, 64, d=True)]
    return [*thread, *both(feet), ell(c, 50, 64, s, s * 1.2), *mark, ell(dark(c, 0.15), 50, 40, s * 0.62),
            *both([ell(WHITE, 47, 36, 2)])]


def tree(r: Random) -> list[Part]:
    u, c, t = r.uniform, hue(r, GREEN, LEAF, OLIVE, ORANGE), hue(r, BROWN, WOOD)
    w, n, q = u(4, 7), r.randint(7, 9), u(28, 36)
    trunk = blob(t, 50 - w, 50, 50 + w, 50, 50 + w, 82, 56 + w, 98, 50, 95, 44 - w, 98, 50 - w, 82)
    if r.random() < 0.3:
        return [trunk, *[poly(c, 50 - k, y + 34, 50, y, 50 + k, y + 34) for y, k in ((44, q), (22, q * 0.8), (0, q * 0.6))]]
    tufts = [curve(dark(c, 0.4), 1.2, x, y, x + 5, y + 4, x + 10, y, d=True) for x, y in ((30, 34), (46, 20), (58, 38), (40, 46))]
    fruit = [ell(RED, u(28, 72), u(14, 56), 3, d=True) for _ in range(r.choice((0, 0, 6)))]
    crown = turned([cloud(c, 50, 36, q * u(1, 1.25), q, n)], u(0, 40), 50, 36)
    return [trunk, *crown, *tufts, *fruit]


def palm_tree(r: Random) -> list[Part]:
    u, c, t = r.uniform, hue(r, GREEN, LEAF, OLIVE), hue(r, WOOD, BROWN, TAN)
    x, lean = u(48, 58), u(-10, 4)
    trunk = limb(t, 9, 5, 42 + lean, 97, 46 + lean / 2, 64, x, 30)
    rings = [line(dark(t), 1, 40 + lean * q + (x - 42) * (1 - q), 30 + 66 * q, 48 + lean * q + (x - 42) * (1 - q), 30 + 66 * q,
                  d=True) for q in (0.3, 0.5, 0.7, 0.9)]
    fronds = [blob(mix(c, INK, u(0, 0.25)), x, 28, x + a * 0.5, y - 12 + b, x + a, y + b + u(-4, 4), x + a * 0.55, y + b - 2)
              for a, y, b in ((-38, 38, 8), (40, 38, 8), (-42, 24, -4), (42, 22, -4), (-24, 8, -2), (22, 6, -2), (-18, 44, 10),
                              (20, 44, 10))]
    return [trunk, *rings, *fronds, *[ell(BROWN, x + k, 34, 4) for k in (-5, 5)]]


def cactus(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, GREEN, TEAL, LEAF)
    w, a, b, top = u(15, 20), u(44, 60), u(40, 58), u(4, 12)
    arms = [limb(c, 10, 9, 50, a + 8, 30, a + 8, 24, a, 23, a - u(16, 26)),
            limb(c, 10, 9, 50, b + 12, 70, b + 12, 77, b + 2, 78, b - u(14, 24))]
    stem = vase(c, 50, top, 50 + w * 0.6, top + 8, 50 + w * 0.55, 55, 50 + w * 0.55, 88)
    spines = [line(dark(c, 0.5), 1, x, y, x, y + 5, d=True) for x in (46, 54) for y in range(int(top) + 12, 80, 13)]
    pot = [poly(hue(r, ORANGE, BROWN, RED), 32, 80, 68, 80, 63, 98, 37, 98)] if r.random() < 0.6 else [ell(TAN, 50, 91, 34, 4)]
    bloom = [ell(PINK, 50, top, 5, 4)] if r.random() < 0.4 else []
    return [*arms, stem, *spines, *pot, *bloom]


def flower(r: Random) -> list[Part]:
    u, c, k = r.uniform, hue(r, PINK, RED, YELLOW, PURPLE, WHITE), hue(r, YELLOW, BROWN, ORANGE)
    n, s, x = r.randint(5, 9), u(11, 15), u(44, 56)
    stem = limb(GREEN, 3.5, 4, 50, 32, x, 66, 50, 98)
    leaves = [blob(LEAF, x, 80, x + q * 14, 62 + u(-4, 4), x + q * 28, 60, x + q * 18, 76) for q in (-1, 1)[r.randint(0, 1):]]
    petal = [ell(c, 50, 32 - s * 1.15, s * (3.3 / n + 0.15), s * 0.95)]
    petals = [p for i in range(n) for p in turned(petal, 360 * i / n + 10, 50, 32)]
    return [stem, *leaves, *petals, ell(k, 50, 32, s * 0.62)]


def mushroom(r: Random) -> list[Part]:
    u, c = r.uniform, hue(r, RED, BROWN, ORANGE, TAN)
    w, h, t, lean = u(34, 44), u(32, 44), u(8, 12), u(-6, 6)
    stem = blob(CREAM, 50 - t, 48, 50 + t, 48, 51 + t + lean, 76, 55 + t + lean, 92, 50 + lean, 96, 45 - t + lean, 92,
                49 - t + lean, 76)
    cap = vase(c, 50, 52 - h, 50 + w * 0.85, 54 - h * 0.6, 50 + w, 54, 50 + w * 0.5, 59, 50, 60)
    dots = [ell(WHITE, 50 + w * x, 54 - h * y, q, q * 0.8)
            for x, y, q in ((-0.5, 0.4, 5), (0.05, 0.65, 6), (0.5, 0.35, 5), (0.08, 0.2, 4)) if r.random() < 0.85]
    return [stem, cap, *dots, ring(dark(CREAM, 0.2), 1.5, 50, 62, t * 1.1, 3, 0, 180)]


NATURE = {f.__name__: f for f in (
    cat, dog, rabbit, horse, giraffe, elephant, duck, owl, penguin, fish, shark, turtle, snail, butterfly, spider, tree,
    palm_tree, cactus, flower, mushroom)}

"""Six ways to paint the same parts, which differ as DomainNet's domains do: parts, `Random`, side in pixels -> picture.

Every coordinate is rounded to a pixel before anything is painted and no picture is filtered in floating point where
whole numbers do, so that the result is the same on every machine.
"""
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageChops, ImageDraw

from .objects import BRIGHT, INK, WHITE, Colour, Part, Shape, clip, dark, hue, mix, place


def waves(r: Random, amount: float) -> list[int]:
    """A smooth closed run of 64 offsets in pixels, for a trembling hand."""
    knots = [r.uniform(-amount, amount) for _ in range(16)]
    return [round(knots[i // 4] + (knots[(i // 4 + 1) % 16] - knots[i // 4]) * (i % 4) / 4) for i in range(64)]


def tremble(points: list[tuple[int, int]], closed: bool, r: Random, offsets: list[int]) -> list[tuple[int, int]]:
    """The outline as a hand would follow it: points every few pixels, each moved a little with its neighbours."""
    i, j, out = r.randrange(64), r.randrange(64), []
    ends = points + points[:1] if closed else points
    for (x0, y0), (x1, y1) in zip(ends, ends[1:]):
        n = 1 + max(abs(x1 - x0), abs(y1 - y0)) // 9
        for s in range(n):
            out.append((x0 + (x1 - x0) * s // n + offsets[i % 64], y0 + (y1 - y0) * s // n + offsets[j % 64]))
            i, j = i + 1, j + 1
    x, y = ends[-1]
    return [*out, (x + offsets[i % 64], y + offsets[j % 64])]


def stroke(pen: ImageDraw.ImageDraw, points: Sequence[tuple[int, int]], fill: Colour | int, width: int) -> None:
    """Polyline with round corners and ends."""
    pen.line(points, fill=fill, width=width)
    if width > 3:
        h = width // 2
        for x, y in points:
            pen.ellipse((x - h, y - h, x + h, y + h), fill=fill)


def grow(im: Image.Image, side: int) -> Image.Image:
    """Smooth enlargement by doubling, in whole numbers (`Image.resize` interpolates differently between versions)."""
    while min(im.size) < side * 9 // 8:
        im = im.resize((im.width * 2, im.height * 2), Image.Resampling.NEAREST)
        im = ImageChops.add(im, ImageChops.offset(im, 1, 0), 2)
        im = ImageChops.add(im, ImageChops.offset(im, 0, 1), 2)
    edge = im.width - side
    return im.crop((edge, edge, im.width, im.height))


def noise(r: Random, side: int, grain: int, depth: int) -> Image.Image:
    """Grey noise around 128, at most `depth` away, in spots of about `grain` pixels; `side` x `side`."""
    n = side if grain == 1 else side * 9 // 8 // grain + 1
    spots = Image.frombytes("L", (n, n), r.randbytes(n * n)).point([128 + (v - 128) * depth // 128 for v in range(256)])
    return spots if grain == 1 else grow(spots, side)


def grained(im: Image.Image, grain: Image.Image) -> Image.Image:
    """A colour picture with grey noise around 128 added."""
    return ImageChops.add(im, Image.merge("RGB", (grain, grain, grain)), 1, -128)


def backdrop(r: Random, side: int) -> Image.Image:
    """Something out of focus behind the object: two surfaces and clutter, painted tiny and blown up."""
    n, y = 28, r.randrange(14, 22)
    im = Image.new("RGB", (n, n), hue(r, (150, 190, 225), (214, 204, 186), (120, 150, 120), (180, 180, 184)))
    pen = ImageDraw.Draw(im)
    pen.rectangle((0, y, n, n), fill=hue(r, (96, 132, 72), (150, 120, 90), (120, 120, 122), (190, 170, 130)))
    for _ in range(r.randrange(6, 14)):
        x, w, h = r.randrange(0, n), r.randrange(1, 7), r.randrange(1, 9)
        box, fill = (x, y + 2 - h, x + w, y + 2), mix(r.choice(BRIGHT), (120, 120, 110), r.uniform(0.3, 0.8))
        (pen.rectangle if r.random() < 0.5 else pen.ellipse)(box, fill=fill)
    return grow(im, side)


def ball(side: int = 64) -> Image.Image:
    """Grey picture of a surface bulging towards a light from the upper left."""
    def lit(x: int, y: int) -> int:
        far = (x - side * 3 // 10) ** 2 + (y - side // 4) ** 2
        return max(104, 255 - far * 160 // (side * side))
    return Image.frombytes("L", (side, side), bytes(lit(x, y) for y in range(side) for x in range(side)))


def box_of(shape: Shape, side: int) -> tuple[int, int, int, int]:
    """The pixels a polygon may touch."""
    xs, ys = [x for x, _ in shape.points], [y for _, y in shape.points]
    return max(0, min(xs)), max(0, min(ys)), min(side, max(xs) + 1), min(side, max(ys) + 1)


def mask_of(shape: Shape, box: tuple[int, int, int, int]) -> Image.Image:
    """White where the polygon is, cut to its box."""
    mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    ImageDraw.Draw(mask).polygon([(x - box[0], y - box[1]) for x, y in shape.points], fill=255)
    return mask


def real(parts: list[Part], r: Random, side: int) -> Image.Image:
    """Photograph: light from the upper left, grain, a shadow, clutter out of focus behind."""
    shapes, im, light = place(parts, r, side, 0.66, 0.94), backdrop(r, side), Image.new("L", (side, side), 216)
    pen, shade, ao = ImageDraw.Draw(im), ball(), ImageDraw.Draw(light)
    xs, foot = [x for s in shapes for x, _ in s.points], max(y for s in shapes for _, y in s.points)
    ao.ellipse((min(xs), foot - side // 20, max(xs) + side // 12, foot + side // 20), fill=130)
    if r.random() < 0.5:
        shade = shade.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for s in shapes:
        if s.width:
            stroke(pen, s.points, s.fill, s.width)
            stroke(ao, s.points, 216, s.width)
            continue
        box = box_of(s, side)
        pen.polygon(s.points, fill=s.fill)
        if box[2] - box[0] > 2 and box[3] - box[1] > 2:
            size = box[2] - box[0], box[3] - box[1]
            light.paste(shade.resize(size, Image.Resampling.NEAREST), box[:2], mask_of(s, box))
            ao.line([*s.points, s.points[0]], fill=118)
    light = ImageChops.add(light, noise(r, side, 6, 44), 1, -110)
    im = ImageChops.multiply(im, Image.merge("RGB", (light, light, light)))
    return grained(im, noise(r, side, 1, 36))


def painting(parts: list[Part], r: Random, side: int) -> Image.Image:
    """Canvas: a tinted palette laid on in visible strokes that follow a common direction."""
    tint, amount = r.choice(((214, 150, 60), (60, 90, 170), (170, 70, 110), (70, 130, 90))), r.uniform(0.12, 0.35)
    shapes, offsets = place(parts, r, side, 0.68, 0.94), waves(r, side / 60)
    pale = sum(sum(s.fill) for s in shapes) > 420 * len(shapes)
    ground, second = (mix(hue(r, *BRIGHT), INK if pale else WHITE, r.uniform(0.4, 0.7)) for _ in range(2))
    im = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(im)
    ax, ay = r.uniform(-1, 1), r.uniform(-1, 1)

    def dab(x: int, y: int, fill: Colour, length: float, width: int) -> None:
        dx, dy = round((ax + r.uniform(-0.5, 0.5)) * length), round((ay + r.uniform(-0.5, 0.5)) * length)
        d = r.randrange(-26, 27)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=clip(fill[0] + d, fill[1] + d, fill[2] + d), width=width)

    for _ in range(110):
        y = r.randrange(side)
        dab(r.randrange(side), y, ground if y < side * r.uniform(0.4, 0.8) else second, side / 9, side // 16)
    for s in shapes:
        fill = mix(s.fill, tint, amount)
        if s.width:
            stroke(pen, s.points, fill, s.width + 1)
        else:
            pts = tremble(s.points, True, r, offsets)
            pen.polygon(pts, fill=fill)
            pen.line(pts, fill=dark(fill, 0.5), width=max(2, side // 80))
    look = im.tobytes()
    for _ in range(360):
        x, y = r.randrange(side), r.randrange(side)
        at = 3 * (y * side + x)
        dab(x, y, clip(*look[at:at + 3]), side / 34, max(2, side // 60))
    weave = noise(r, side, 1, 60).reduce((1, 4)).resize((side, side), Image.Resampling.NEAREST)
    return grained(im, weave)


def outlined(pen: ImageDraw.ImageDraw, shapes: list[Shape], edge: Colour, width: int) -> None:
    """Flat colours with an outline."""
    for s in shapes:
        if s.width:
            stroke(pen, s.points, edge, s.width + 2 * (width // 2))
            stroke(pen, s.points, s.fill, s.width)
        else:
            pen.polygon(s.points, fill=s.fill)
            stroke(pen, [*s.points, s.points[0]], edge, max(2, width // 2) if s.detail else width)


def vivid(c: Colour) -> Colour:
    """The colour moved away from its own grey."""
    grey = sum(c) / 3
    return clip(*(grey + (v - grey) * 1.5 + 12 for v in c))


def clipart(parts: list[Part], r: Random, side: int) -> Image.Image:
    """Flat saturated colour, a bold outline, a plain pale ground."""
    shapes = [s._replace(fill=vivid(s.fill)) for s in place(parts, r, side, 0.72, 0.95)]
    im = Image.new("RGB", (side, side), r.choice((WHITE, (255, 255, 255), mix(r.choice(BRIGHT), (255, 255, 255), 0.8))))
    pen = ImageDraw.Draw(im)
    if r.random() < 0.25:
        pen.ellipse((side // 16, side // 16, side - side // 16, side - side // 16), fill=mix(r.choice(BRIGHT), WHITE, 0.6))
    outlined(pen, shapes, r.choice((INK, (0, 0, 0), (40, 24, 60))), max(3, round(side * r.uniform(0.018, 0.03))))
    return im


def chart(pen: ImageDraw.ImageDraw, r: Random, x: int, y: int, w: int, colours: list[Colour]) -> None:
    """A bar chart, a pie or a block of writing in the square of width `w` at (x, y)."""
    kind, h = r.choice(("bars", "pie", "text", "text")), w * 2 // 3
    if kind == "bars":
        for i in range(5):
            top = y + r.randrange(0, max(1, h * 3 // 4))
            pen.rectangle((x + i * w // 5, top, x + i * w // 5 + w // 7, y + h), fill=colours[i % 3])
    elif kind == "pie":
        start = 0
        for fill in (*colours, colours[0]):
            end = min(360, start + r.randrange(60, 150))
            pen.pieslice((x, y, x + h, y + h), start, end, fill=fill)
            start = end
    else:
        for row in range(4):
            words(pen, r, x, y + row * h // 4, w, max(2, h // 10), colours[3 % len(colours)])


def words(pen: ImageDraw.ImageDraw, r: Random, x: int, y: int, w: int, h: int, fill: Colour) -> None:
    """A line of writing: bars as long as words."""
    at = x
    while at < x + w - 3 * h:
        end = min(x + w, at + r.randrange(2 * h, 7 * h))
        pen.rectangle((at, y, end, y + h), fill=fill)
        at = end + h


def infograph(parts: list[Part], r: Random, side: int) -> Image.Image:
    """A panel with a headline, charts and writing; the object is one small flat picture among them."""
    ground = mix(r.choice(BRIGHT), r.choice((WHITE, WHITE, INK)), r.uniform(0.35, 0.8))
    pale = sum(ground) > 380
    write = dark(ground, 0.75) if pale else mix(ground, WHITE, 0.85)
    colours = [hue(r, *BRIGHT) for _ in range(3)] + [write]
    im = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(im)
    words(pen, r, side // 14, side // 20, side * 12 // 14, side // 18, write)
    share = r.uniform(0.5, 0.66)
    box, corner = round(side * share), r.randrange(4)
    x = side // 24 if corner % 2 else side - box - side // 24
    y = side // 7 if corner // 2 else side - box - side // 24
    w = side - box - side // 8
    for i in range(3):
        chart(pen, r, side - w - side // 24 if corner % 2 else side // 24, side // 6 + i * side * 2 // 7, w, colours)
    rest = side - box - side // 7 - side // 10
    chart(pen, r, x + 2, side - rest if corner // 2 else side // 7, min(box, rest * 3 // 2), colours)
    if r.random() < 0.6:
        pen.rectangle((x, y, x + box, y + box), fill=mix(ground, WHITE, 0.6))
    shapes = [s._replace(points=[(a + x, b + y) for a, b in s.points]) for s in place(parts, r, box, 0.88, 0.97)]
    outlined(pen, shapes, dark(colours[0], 0.6) if r.random() < 0.5 else write, max(2, side // 90))
    return im


def sketch(parts: list[Part], r: Random, side: int) -> Image.Image:
    """Pencil: each outline drawn twice by a trembling hand, hatching in the darker parts, no colour."""
    paper, offsets = r.randrange(226, 252), waves(r, side / 80)
    im, hatch = Image.new("L", (side, side), paper), Image.new("L", (side, side), paper)
    pen, lines = ImageDraw.Draw(im), ImageDraw.Draw(hatch)
    slope, gap = r.uniform(0.4, 1.4) * r.choice((-1, 1)), max(4, side // r.randrange(28, 42))
    for x in range(-2 * side, 3 * side, gap):
        lines.line((x, 0, x + round(slope * side), side), fill=r.randrange(110, 170))
    for s in place(parts, r, side, 0.7, 0.95):
        grey, width = r.randrange(20, 80), max(1, side // (150 if s.detail else 84))
        if s.width:
            for _ in range(2):
                pen.line(tremble(s.points, False, r, offsets), fill=grey, width=min(max(width, s.width // 2), side // 48))
            continue
        tone = sum(s.fill) // 3
        box = box_of(s, side)
        pen.polygon(s.points, fill=paper)
        if tone < 150 and box[2] > box[0] and box[3] > box[1]:
            im.paste(hatch.crop(box), box[:2], mask_of(s, box))
        if tone < 80 and box[2] - box[0] < side // 7:
            pen.polygon(s.points, fill=100)
        for _ in range(2):
            pen.line(tremble(s.points, True, r, offsets), fill=grey + r.randrange(40), width=width)
    im = ImageChops.add(im, noise(r, side, 1, 26), 1, -128)
    return Image.merge("RGB", (im, im, im))


def quickdraw(parts: list[Part], r: Random, side: int) -> Image.Image:
    """Twenty seconds with a mouse: a few thick shaky strokes, main outlines only."""
    im, offsets = Image.new("L", (side, side), 255), waves(r, side / 42)
    pen, width, ink = ImageDraw.Draw(im), max(3, round(side * r.uniform(0.017, 0.03))), r.randrange(0, 50)
    for s in place(parts, r, side, 0.72, 0.95):
        if s.detail:
            continue
        box = box_of(s, side)
        if not s.width and max(box[2] - box[0], box[3] - box[1]) < side // 14:
            pen.polygon(s.points, fill=ink)
            continue
        pts = tremble(s.points, not s.width, r, offsets)
        if not s.width:
            pen.polygon(pts, fill=255)
        stroke(pen, pts, ink, width)
    return Image.merge("RGB", (im, im, im))

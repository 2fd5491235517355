"""The demonstration data: 60 drawn object classes in six domains, from a seed, with Pillow alone.

`draw` makes one picture, `write_dataset` a folder `<root>/<domain>/<class>/0000.png` in DomainNet's layout. All
randomness comes from `random.Random(text)`, so the pictures are the same on every machine with Pillow 11.2.1 or newer
(older ones fill polygons a little differently: a few pixels in some of the pictures).

    python -m ucdr_ref.demo --out data/toy --per-class 20
    python -m ucdr_ref.demo --sheet sheet.png
"""
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw

from .goods import GOODS
from .nature import NATURE
from .places import PLACES
from .styles import clipart, infograph, painting, quickdraw, real, sketch

VERSION = 1  # of the drawings: a folder drawn by another version is not taken for a complete one
SHAPES = {**NATURE, **GOODS, **PLACES}
STYLES = {f.__name__: f for f in (real, painting, clipart, infograph, sketch, quickdraw)}
DOMAINS = tuple(STYLES)
CLASSES = tuple(sorted(SHAPES))
# Every held-out class has relatives among the training classes: giraffe - horse, truck - bus, violin - guitar, ...
_VAL = ("lighthouse", "mushroom", "owl", "pants", "rabbit", "shovel", "strawberry", "table")
_TEST = ("axe", "church", "cupcake", "giraffe", "helicopter", "palm_tree", "pear", "penguin", "shark", "teapot", "truck",
         "violin")
SPLIT = {"train": tuple(c for c in CLASSES if c not in _VAL + _TEST), "val": _VAL, "test": _TEST}


def check_known(values: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError, naming the first of `values` that is not among the `known` ones."""
    for value in values:
        if value not in known:
            raise ValueError(f"no drawn {what} is called {value!r}; choose from: {', '.join(known)}")


def draw(class_name: str, domain: str, seed: int | str, size: int = 96) -> Image.Image:
    """One RGB picture of `size` x `size` pixels; the same arguments give the same bytes on every machine.

    Raises ValueError for a class or domain that is not in `CLASSES` or `DOMAINS`, or a size outside 32 to 4096 pixels.
    """
    check_known([class_name], CLASSES, "class")
    check_known([domain], DOMAINS, "domain")
    if not 32 <= size <= 4096:
        raise ValueError(f"a picture of {size} pixels cannot be drawn; ask for 32 to 4096")
    r = Random(f"{seed}/{domain}/{class_name}")
    return STYLES[domain](SHAPES[class_name](r), r, 2 * size).reduce(2)


def write_dataset(root: str | Path, classes: Sequence[str] = CLASSES, domains: Sequence[str] = DOMAINS,
                  per_class: int = 20, size: int = 96, seed: int = 0, workers: int = 0) -> Path:
    """Draw `<root>/<domain>/<class>/0000.png` ... and `<root>/toy.json`, which records the settings; returns `root`.

    Image `i` is `draw(class, domain, f"{seed}/{i}", size)`. Everything is drawn into a sibling folder that takes the
    name `root` only when complete. Nothing happens if `root` already holds these very settings. `workers` 0 picks one
    process, or one per core for large sets. Raises ValueError if `root` holds anything else or a setting is unusable.
    """
    root = Path(os.path.abspath(root))
    check_known(classes, CLASSES, "class")
    check_known(domains, DOMAINS, "domain")
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; at least one image per class and domain is needed")
    settings = {"version": VERSION, "classes": list(classes), "domains": list(domains), "per_class": per_class,
                "size": size, "seed": seed}
    if is_complete(root, settings):
        return root
    total = len(classes) * len(domains) * per_class
    workers = workers or (min(8, os.cpu_count() or 1) if total >= 3000 else 1)
    root.parent.mkdir(parents=True, exist_ok=True)
    with naming(root), TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as holder, ExitStack() as stack:
        draft = Path(holder) / root.name
        draft.mkdir()
        job, jobs = partial(write_class, draft, per_class, size, seed), list(product(domains, classes))
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            stack.callback(pool.shutdown, cancel_futures=True)
            done = pool.map(job, jobs, chunksize=4)
        else:
            done = map(job, jobs)
        for n, _ in enumerate(done, 1):
            if sys.stderr.isatty() or n == len(jobs):
                end = "\n" if n == len(jobs) else "\r"
                print(f"drawing {root.name}: {n * per_class}/{total}", end=end, file=sys.stderr, flush=True)
        (draft / "toy.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        try:
            if root.exists():
                root.rmdir()
            os.replace(draft, root)
        except OSError:  # somebody else was faster: fine if it is the same data
            if not is_complete(root, settings):
                raise
    return root


@contextmanager
def naming(root: Path) -> Iterator[None]:
    """A full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not draw {root} ({error.strerror or error}); free space or choose another folder") from error


def is_complete(root: Path, settings: dict) -> bool:
    """Whether `root` holds drawn data of these settings; False if there is nothing, ValueError if something else."""
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    record = root / "toy.json"
    if not record.is_file():
        raise ValueError(f"{root} holds no drawn data; for images of your own add --dataset folder")
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is not readable as JSON ({error}); name another folder or delete this one") from None
    if found != settings:
        raise ValueError(f"{root} holds drawn data of other settings (see toy.json there); name another folder or delete it")
    return True


def write_class(root: Path, per_class: int, size: int, seed: int, job: tuple[str, str]) -> None:
    """Draw one (domain, class) folder below `root`."""
    domain, name = job
    folder = root / domain / name
    folder.mkdir(parents=True)
    for i in range(per_class):
        draw(name, domain, f"{seed}/{i}", size).save(folder / f"{i:04d}.png", compress_level=3)


def contact_sheet(classes: Sequence[str] = CLASSES, seed: int = 0, size: int = 64, across: int = 3) -> Image.Image:
    """One picture of every class in every domain, under the class names, in `across` columns of classes."""
    rows, wide, tall = -(-len(classes) // across), (size + 1) * len(DOMAINS) + 8, size + 14
    sheet = Image.new("RGB", (across * wide, rows * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(classes):
        x, y = i // rows * wide, i % rows * tall
        pen.text((x + 2, y), name.replace("_", " "), fill="black")
        for j, domain in enumerate(DOMAINS):
            sheet.paste(draw(name, domain, seed, size), (x + j * (size + 1), y + 12))
    return sheet

"""The drawn data: the same bytes everywhere, every class in every domain, folders that are complete or not there."""
import hashlib

import PIL
import pytest
from PIL import Image

from ucdr_ref.demo import drawing as toy
from ucdr_ref.demo.__main__ import main
from ucdr_ref.demo.drawing import CLASSES, DOMAINS, SPLIT, draw, write_dataset

DIGESTS = {"real": "e07e08c3650f9f1e", "painting": "4aba6a84fd2712d2", "clipart": "c561870874da7e1d",
           "infograph": "1f9c109a7538e3bf", "sketch": "9d8a1a85768fa1bd", "quickdraw": "b931835cde2f3c48"}


def digest(domain, classes):
    return hashlib.sha256(b"".join(draw(name, domain, 0).tobytes() for name in classes)).hexdigest()[:16]


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_bytes_on_every_machine(domain):
    assert digest(domain, CLASSES[::6]) == DIGESTS[domain], f"drawn with Pillow {PIL.__version__}; 11.2.1 or newer is needed"


def test_every_class_in_every_domain():
    for domain in DOMAINS:
        for name in CLASSES:
            image = draw(name, domain, "any", 64)
            assert image.mode == "RGB" and image.size == (64, 64)
            low, high = image.convert("L").getextrema()
            assert high - low > 60, f"{name} in {domain} is hardly visible"


def test_split_is_disjoint_and_complete():
    assert sorted(sum(SPLIT.values(), ())) == [*CLASSES] and len(set(CLASSES)) == 60
    assert [len(SPLIT[part]) for part in ("train", "val", "test")] == [40, 8, 12]


@pytest.mark.parametrize("arguments, word", [
    (("unicorn", "real", 0), "unicorn"), (("cat", "oil", 0), "oil"), (("cat", "real", 0, 8), "8 pixels")])
def test_mistakes_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        draw(*arguments)


def test_dataset_is_what_draw_draws_and_is_not_drawn_twice(tmp_path, monkeypatch):
    settings = dict(classes=("owl", "axe"), domains=("sketch", "real"), per_class=3, size=64, seed=5)
    root = write_dataset(tmp_path / "a" / "b", **settings)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
    assert files == sorted(f"{d}/{c}/{i:04d}.png" for d in ("sketch", "real") for c in ("owl", "axe") for i in range(3))
    with Image.open(root / "sketch" / "owl" / "0002.png") as stored:
        assert stored.tobytes() == draw("owl", "sketch", "5/2", 64).tobytes()
    twin = write_dataset(tmp_path / "twin", workers=2, **settings)
    assert all((twin / f).read_bytes() == (root / f).read_bytes() for f in files)
    monkeypatch.setattr(toy, "draw", None)
    assert write_dataset(root, **settings) == root


def test_dataset_goes_into_an_empty_folder_only(tmp_path, capsys):
    settings = dict(classes=("owl",), domains=("sketch",), size=64)
    (tmp_path / "empty").mkdir()
    root = write_dataset(tmp_path / "empty", per_class=1, **settings)
    with pytest.raises(ValueError, match="other settings"):
        write_dataset(root, per_class=2, **settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no drawn data"):
        write_dataset(tmp_path / "mine", per_class=1, **settings)
    assert main(["--out", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    settings = dict(classes=("owl", "axe"), domains=("sketch",), per_class=4, size=64)
    drawn = []

    def stop_at_the_sixth(*arguments):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(toy, "draw", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", **settings)
    assert list(tmp_path.iterdir()) == []

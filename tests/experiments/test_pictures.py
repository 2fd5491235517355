from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from ucdr_ref.experiments import report as pictures
from ucdr_ref.experiments.report import FRAME, FRAMES, GAP, LINE, fit, sheet
from ucdr_ref.machine.files import WriteError

SIZE = 40


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for i, colour in enumerate([(0, 0, 255), (255, 255, 0), (0, 255, 255)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 8), colour).save(paths[-1])
    return paths


def test_frames_and_thumbnails_are_where_they_belong(images: list[str], tmp_path: Path) -> None:
    hits = [True, False, None]
    rows = [(images[0], "first", [(path, hit) for path, hit in zip(images, hits)]),
            (images[1], "second", [(images[2], False, "0.5")])]
    sheet(rows, tmp_path / "sheet.png", size=SIZE)
    with Image.open(tmp_path / "sheet.png") as page:
        wide, tall = SIZE + 2 * FRAME + GAP, SIZE + 2 * FRAME + LINE + GAP
        for i, (query, _, results) in enumerate(rows):
            for j, (path, *marks) in enumerate([(query,), *results]):
                x, y = GAP + j * wide + (SIZE // 2 if j else 0), GAP + i * tall
                with Image.open(path) as image:
                    assert page.getpixel((x + FRAME + SIZE // 2, y + FRAME + SIZE // 2)) == image.getpixel((4, 4))
                frame = FRAMES[marks[0]] if j else (255, 255, 255)
                for corner in [(x, y), (x + SIZE + 2 * FRAME - 1, y + SIZE + 2 * FRAME - 1)]:
                    assert page.getpixel(corner) == frame
        assert page.crop((GAP, GAP + SIZE + 2 * FRAME, GAP + SIZE, GAP + tall)).getextrema()[0][0] < 128  # the caption


def test_missing_images_and_odd_captions_do_not_stop_it(images: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    unreadable = [(str(tmp_path / name), None) for name in ("gone.png", "bad.png")]
    rows = [(images[0], "\udcff\n\u732b \u00e9" * 30, unreadable), (images[1], "", [])]
    sheet(rows, tmp_path / "sheet.jpg", size=SIZE)
    with Image.open(tmp_path / "sheet.jpg") as page:
        assert page.format == "JPEG"


def test_captions_keep_their_end() -> None:
    font = ImageFont.load_default()
    assert fit("short", font, 500) == "short"
    cut = fit("a/very/long/path/to/an/image.png", font, 60)
    assert cut.startswith("..") and "a/very/long/path/to/an/image.png".endswith(cut[2:]) and len(cut) > 4
    assert font.getlength(cut) <= 60


def test_the_old_picture_survives(images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "sheet.png"
    target.write_bytes(b"old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.Image.Image, "save", full)
    with pytest.raises(WriteError, match="No space left"):
        sheet([(images[0], "", [])], target)
    assert target.read_bytes() == b"old" and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["sheet.txt", "sheet", "sheet.fli"])
def test_unknown_endings_and_no_rows_are_errors(images: list[str], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="ending"):
        sheet([(images[0], "", [])], tmp_path / name)
    with pytest.raises(ValueError, match="at least one query; got 0"):
        sheet([], tmp_path / "sheet.png")

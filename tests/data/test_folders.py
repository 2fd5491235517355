"""What is found below a folder, and what is said about the rest."""
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ucdr_ref.data.benchmarks import DATASETS
from ucdr_ref.data.folders import Tree, compare_counts, folder_key, list_images, match, scan


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def scanned(root: Path, domains: Mapping[str, Sequence[str]] = {}) -> tuple[Tree, list[str]]:  # noqa: B006
    notes: list[str] = []
    return scan(str(root), domains, notes), notes


def names_in(root: Path) -> list[str]:
    return [name for name, *_ in list_images(str(root))]


def test_listing_takes_images_only(tmp_path):
    names = ["UPPER.JPG", "a.png", "sub/deep/b.webp", "sub/c.tif"]
    touch(tmp_path, *names, "notes.txt", ".hidden.png", ".git/a.png", "folder.png/x.txt")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "link.png").symlink_to("a.png")
    assert names_in(tmp_path) == sorted([*names, "link.png"])
    info = os.stat(tmp_path / "UPPER.JPG")
    assert list_images(str(tmp_path))[0][1:] == (0, info.st_mtime_ns, info.st_ctime_ns)


def test_links_to_folders_are_followed_and_loops_refused(tmp_path):
    gallery = touch(tmp_path / "gallery", "sub/b.png")
    touch(tmp_path / "elsewhere", "a.png")
    (gallery / "once").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (gallery / "sub" / "twice").symlink_to("../once", target_is_directory=True)
    assert names_in(gallery) == ["once/a.png", "sub/b.png", "sub/twice/a.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(gallery / "sub", target_is_directory=True)
    with pytest.raises(ValueError, match="this link leads back to a folder in which it lies"):
        names_in(gallery)


def test_what_cannot_be_listed_or_holds_no_image_is_named(tmp_path):
    for call in (names_in, scanned):
        with pytest.raises(FileNotFoundError, match="absent"):
            call(tmp_path / "absent")
    touch(tmp_path / "phone", "a/1.HEIC", "a/2.heic", "b/3.heic")
    with pytest.raises(ValueError, match=r"phone: no images below this folder \(no readable format: .heic\)"):
        names_in(tmp_path / "phone")
    touch(tmp_path / "data", "photo/a/1.HEIC", "sketch/a/2.HEIC")
    with pytest.raises(ValueError, match=r"no images in <domain>/<class>/\* \(no readable format: .heic\)"):
        scanned(tmp_path / "data")
    touch(tmp_path / "data", "photo/b/1.png")
    (tmp_path / "data/photo/c").mkdir()
    with pytest.raises(ValueError, match="2 class folders without images, such as .*photo/a .no readable format: .heic."):
        scanned(tmp_path / "data")
    touch(tmp_path / "deep", "photo/a/1.png", "photo/b/2020/1.png")
    with pytest.raises(ValueError, match="1 class folders without images, such as .*photo/b; move images in subfolders up"):
        scanned(tmp_path / "deep")


def test_runs_are_no_data(tmp_path):
    """--data-root . with the default run folder, a run among the domains and one among the classes."""
    touch(tmp_path, "photo/a/1.png", "photo/b/1.png", "photo/c/config.json", "photo/c/2.png")
    for run in ("runs/toy-0000", "mine", "photo/kept"):
        touch(tmp_path / run, "config.json", "run.json", "queries.png", "pictures/sheet.png")
    assert {domain: list(classes) for domain, classes in scanned(tmp_path)[0].items()} == {"photo": ["a", "b", "c"]}
    assert names_in(tmp_path) == ["photo/a/1.png", "photo/b/1.png", "photo/c/2.png"]


def test_deeper_images_and_unknown_endings_are_counted(tmp_path):
    touch(tmp_path, "elsewhere/a/1.png", "elsewhere/b/1.png", "data/photo/a/1.png", "data/photo/b/1.png")
    (tmp_path / "data" / "sketch").symlink_to(tmp_path / "elsewhere")
    touch(tmp_path / "data", "photo/a/deeper/1.png", "photo/a/deeper/still/2.png", "photo/3.png", "photo/b/x.heic",
          "photo/b/notes.txt", "photo/b/.hidden", ".git/a/1.png")
    tree, notes = scanned(tmp_path / "data")
    assert {domain: list(classes) for domain, classes in tree.items()} == {"photo": ["a", "b"], "sketch": ["a", "b"]}
    assert notes == ["note     5 files are no images at <domain>/<class>/<image> and are not used, such as "
                     f"{tmp_path}/data/photo/3.png"]
    (tmp_path / "elsewhere" / "a" / "loop").symlink_to(tmp_path / "data")  # data/sketch/a/loop/sketch/a/loop ...
    with pytest.raises(ValueError, match="loop: this link leads back to a folder in which it lies"):
        scanned(tmp_path / "data")


def test_named_domains_must_be_there_and_hold_images(tmp_path):
    touch(tmp_path, "photo/a/1.png", "painting/1.png")
    assert list(scanned(tmp_path)[0]) == list(scanned(tmp_path, {"photo": ("photos", "photo")})[0]) == ["photo"]
    with pytest.raises(ValueError, match="no images in painting/<class>/.*one level too deep"):
        scanned(tmp_path, {"photo": ("photo",), "painting": ("painting",)})
    with pytest.raises(ValueError, match="no images in sketch or png/<class>/.; there are the folders painting, photo; did the archive"):
        scanned(tmp_path, {"sketch": ("sketch", "png")})


def test_names_that_are_one_and_names_that_differ():
    for names in (("t-shirt", "T shirt", "t_shirt", "T--Shirt "), ("killer+whale", "Killer_Whale"),
                  ("café", unicodedata.normalize("NFD", "Café"))):
        assert len(set(map(folder_key, names))) == 1
    names = ["a", "ab", "a b", "...", "!", "猫", "狗", "कि", "का", os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "caf"]
    assert len(set(map(folder_key, names))) == len(names)


def test_a_class_has_the_name_of_its_first_domain():
    tree = {"icon": {"T-Shirt": ["i"], "hot_dog": ["j"]}, "photo": {"t_shirt": ["p"], "Hot Dog": ["q"], "new": ["r"]}}
    notes: list[str] = []
    assert match(tree, notes, [], {}) == {"icon": {"T-Shirt": ["i"], "hot_dog": ["j"]},
                                          "photo": {"T-Shirt": ["p"], "hot_dog": ["q"], "new": ["r"]}}
    assert notes == ["note     class folders spelt in two ways are one class each: 't_shirt' (photo) = 'T-Shirt', "
                     "'Hot Dog' (photo) = 'hot_dog'"]
    with pytest.raises(ValueError, match="domain photo: the folders 'hot dog' and 'hot_dog' are one class"):
        match({"photo": {"hot dog": ["a"], "hot_dog": ["b"]}}, [], [], {})


def test_counts_stand_beside_the_published_ones():
    tree = {name: {"a": ["x"] * count} for name, count in DATASETS["domainnet"].counts["original"].items()}
    lines = compare_counts(tree, DATASETS["domainnet"].counts)
    assert lines[0] == "data     clipart         48,837 images, 1 classes; as published (original); cleaned 48,129 (+708)"
    assert lines[-1] == "data     total          596,010 images; as published (original); cleaned 586,575 (+9,435)"
    assert compare_counts({"photo": {"a": ["x"]}}, {})[0] == "data     photo                1 images, 1 classes"

"""Folders of classes by name or WordNet id."""
from pathlib import Path

import pytest

from ucdr_ref.data.class_folders import ClassFolder, scan_class_folder
from ucdr_ref.sre.wordnet import read_classes

NAMES, IDS = ["killer whale", "t-shirt", "cow"], ["n00000001", "n00000002", "n00000003"]
AWA2 = Path(__file__).parents[2] / "ucdr_ref" / "sre" / "graphs" / "awa2.txt"


def folder(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def found(scanned: ClassFolder) -> list[tuple[str, str]]:
    return [(path, NAMES[label]) for (path, *_), label in zip(scanned.files, scanned.labels, strict=True)]


def test_folder_names_match_classes(tmp_path):
    root = folder(tmp_path / "data", "Killer+Whale/1.png", "T_shirt/1.png", "n00000003/sub/2.png", "n00000003/1.png")
    scanned = scan_class_folder("--target", root, NAMES, IDS)
    assert found(scanned) == [("Killer+Whale/1.png", "killer whale"), ("T_shirt/1.png", "t-shirt"), ("n00000003/1.png", "cow"),
                              ("n00000003/sub/2.png", "cow")]
    assert scanned.skipped == []


def test_a_name_with_an_id_is_told_by_the_id_or_else_by_the_name(tmp_path):
    root = folder(tmp_path, "renamed-n00000001/1.png", "t-shirt-n99999999/1.png", "unicorn-n00000000/1.png")
    scanned = scan_class_folder("--source", root, NAMES, IDS, {0, 1})
    assert scanned.labels == [0, 1] and scanned.skipped == ["unicorn-n00000000"]


def test_classes_of_one_name_are_told_by_their_ids(tmp_path):
    root = folder(tmp_path, "n00000001/1.png", "n00000002/1.png")
    assert scan_class_folder("--target", root, ["crane", "crane"], IDS[:2]).labels == [0, 1]
    folder(tmp_path, "crane/1.png")
    with pytest.raises(ValueError, match="one of the 2 classes; there are crane"):
        scan_class_folder("--target", root, ["crane", "crane"], IDS[:2])


def test_animals_as_published_and_further_source_folders(tmp_path):
    lines = read_classes(AWA2)
    names, ids = [line.name for line in lines], [line.id for line in lines]
    seen = {k for k, line in enumerate(lines) if line.split == "seen"}
    assert (len(names), len(seen)) == (50, 40)
    everything = [f"Animals_with_Attributes2/JPEGImages/{name.replace(' ', '+').replace('_', '+')}/1.jpg" for name in names]
    folder(tmp_path, *everything, "Animals_with_Attributes2/classes.txt")
    root, inner = (scan_class_folder("--target", str(tmp_path / "Animals_with_Attributes2" / part), names, ids)
                   for part in ("", "JPEGImages"))
    assert sorted(root.labels) == list(range(50)) and root == inner  # and so have one digest
    folder(tmp_path / "web", *(f"{line.name}/1.jpg" for k, line in enumerate(lines) if k in seen), "unicorn/1.jpg", "sheep/1.jpg")
    (tmp_path / "models3d").symlink_to(tmp_path / "web")
    source = scan_class_folder("--source", str(tmp_path / "models3d"), names, ids, seen)
    assert source.skipped == ["sheep", "unicorn"] and sorted(source.labels) == sorted(seen)


@pytest.mark.parametrize(("names", "only", "message"), [
    (("cow/1.png", "ox/1.png", "horse/1.png"), None, "named after one of the 3 classes; there are horse, ox"),
    (("1.png", "cow/1.png"), None, "expected <folder>/<class>/<image>, .* there are 1.png"),
    (("cow/1.png", "t-shirt/1.png"), {0}, "named after one of the 1 classes; there are cow, t-shirt"),
    (("cow/1.txt",), None, "no images below this folder .no readable format: .txt"),
])
def test_mistakes_in_folders(names, only, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scan_class_folder("--target", folder(tmp_path, *names), NAMES, IDS, only)


def test_a_missing_folder_is_named_with_its_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match="--source .*absent: no such folder"):
        scan_class_folder("--source", str(tmp_path / "absent"), NAMES, IDS)

"""Every dataset as it comes out of its archive: all class names, the real folder names, one tiny image's bytes throughout."""
from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from tests.helpers import tiny_state_dict
from ucdr_ref.config import PRESETS, resolve
from ucdr_ref.experiments import retrieval
from ucdr_ref.experiments.datasets import DATASETS, alias_list, class_list, compared, folder_key
from ucdr_ref.experiments.protocols import DOMAINNET_DOMAINS, Protocol, build
from ucdr_ref.experiments.trees import scan

DOMAINNET = [name for part in ("train", "val", "test") for name in class_list(f"domainnet-{part}")]
TUBERLIN = [name for part in ("train", "val", "test") for name in class_list(f"tuberlin-{part}")]
COUNT = 3


def tiny_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 30)).save(file, format="png")
    return file.getvalue()


PNG = tiny_png()


def put(root: Path, folder: str, names: Iterable[str], count: int = COUNT) -> None:
    for name in names:
        (root / folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / name / f"{i}.png").write_bytes(PNG)


def raw_names(domain: str) -> list[str]:
    """TU-Berlin's folder names as in the archive."""
    raw = {name: folder for folder, name in alias_list(f"tuberlin-{domain}").items()}
    return [raw.get(name, name) for name in TUBERLIN]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("archives")
    for domain in DOMAINNET_DOMAINS:
        put(root / "domainnet", domain, DOMAINNET)
        (root / "domainnet" / f"{domain}_train.txt").touch()
    sketchy = [{"hot_air_balloon": "hot-air_balloon", "jack_o_lantern": "jack-o-lantern"}.get(name, name)
               for name in class_list("sketchy-all")]
    for part in ("sketch", "photo"):
        put(root / "sketchy", f"256x256/{part}/tx_000000000000", sketchy)
        put(root / "sketchy", f"256x256/{part}/tx_000100000000", sketchy[:2])
    put(root / "sketchy", "EXTEND_image_sketchy", sketchy)
    put(root / "tuberlin", "png", raw_names("sketches"))
    put(root / "tuberlin", "ImageResized", raw_names("images"))
    (root / "tuberlin" / "png" / "filelist.txt").write_text("airplane/1.png\n")
    tidy = (("domainnet", DOMAINNET_DOMAINS, DOMAINNET), ("tuberlin", ("sketches", "images"), TUBERLIN),
            ("sketchy", ("sketch", "extended_photo"), class_list("sketchy-all")))
    for dataset, domains, names in tidy:
        for domain in domains:
            put(root / "tidy" / dataset, domain, names)
    torch.save(tiny_state_dict(), root / "clip.pt")
    return {name: root / name for name in ("domainnet", "sketchy", "tuberlin", "tidy", "clip.pt")}


def files(protocol: Protocol) -> list[object]:
    lists = [protocol.train, protocol.validation.query, *protocol.validation.galleries.values()]
    for test in protocol.tests:
        lists += [test.query, *test.galleries.values()]
    return [[(*row[1:], os.path.basename(row[0])) for row in zip(part.paths, part.classes, part.domains)] for part in lists]


BENCHMARKS = [name for name, values in PRESETS.items() if values["dataset"] in ("domainnet", "sketchy", "tuberlin")]
assert len(BENCHMARKS) == 8


@pytest.mark.parametrize("preset", BENCHMARKS)
def test_an_archive_trains_two_steps_and_has_the_files_of_the_tidy_tree(preset, archives, tmp_path, monkeypatch, capsys):
    dataset = PRESETS[preset]["dataset"]
    raw, tidy = (build(resolve({"data_root": str(root)}, preset)) for root in (archives[dataset], archives["tidy"] / dataset))
    assert files(raw) == files(tidy) and raw.class_names == tidy.class_names
    whole = retrieval.balanced_batches
    monkeypatch.setattr(retrieval, "balanced_batches", lambda *call: whole(*call)[:2])
    call = ["--preset", preset, "--data-root", str(archives[dataset]), "--weights", str(archives["clip.pt"]), "--run",
            str(tmp_path / "run"), "--source-batch", "10", "--target-batch", "10", "--target-epochs", "1", "--workers", "0",
            "--per-class", "2", "--context-vectors", "2", "--prompt-length", "1", "--device", "cpu"]
    assert train.main([*call, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for domain, folders in DATASETS.get(preset, DATASETS[dataset if dataset != "sketchy" else preset]).domains.items():
        assert f"data     {domain:<14}" in printed, folders
    assert "differs from" in printed and not (tmp_path / "run").exists()
    assert train.main(call) == 0
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 5  # two steps a phase, one validation


def test_sketchys_augmented_copies_are_ignored_and_named(archives, tmp_path):
    protocol = build(resolve({"data_root": str(archives["sketchy"])}, "sketchy/eccv"))
    assert [line for line in protocol.notes if "only tx_000000000000 is used, not tx_000100000000" in line]
    assert all("tx_000000000000" in path for path in protocol.tests[0].query.paths)
    inner = tmp_path / "256x256"  # the folder below, with the extended photos beside its domains
    inner.symlink_to(archives["sketchy"] / "256x256")
    (tmp_path / "EXTEND_image_sketchy").symlink_to(archives["sketchy"] / "EXTEND_image_sketchy")
    assert files(build(resolve({"data_root": str(tmp_path)}, "sketchy/eccv"))) == files(protocol)


def test_every_alias_is_needed_or_a_spelling_and_leads_to_a_class():
    for domain in ("sketches", "images"):
        aliases = alias_list(f"tuberlin-{domain}")
        assert set(aliases.values()) <= set(TUBERLIN) and len(set(aliases.values())) == len(aliases)
        assert len(set(map(folder_key, raw_names(domain)))) == len(TUBERLIN) == 250


def test_mismatches_are_named_in_every_domain(archives, tmp_path):
    put(tmp_path, "png", [name for name in raw_names("sketches") if name not in ("ant", "bee")] + ["aunt", "wasp"], 1)
    put(tmp_path, "ImageResized", [name for name in raw_names("images") if name != "zebra"], 1)
    with pytest.raises(ValueError) as error:
        build(resolve({"data_root": str(tmp_path)}, "tuberlin"))
    said = str(error.value)
    assert "domain sketches: no folder for ant, bee; folders that are no class: aunt, wasp" in said
    assert "domain images: no folder for zebra; folders that are no class: none" in said
    assert "expected 250" not in said


def test_further_folders_are_left_out_and_named(tmp_path):
    for domain in ("sketches", "images"):
        put(tmp_path, domain, [*TUBERLIN, "unicorn"], 1)
    protocol = build(resolve({"data_root": str(tmp_path)}, "tuberlin"))
    assert sum("no class of TU-Berlin are not used: unicorn" in line for line in protocol.notes) == 2
    assert "unicorn" not in protocol.train.classes


# the cleaned DomainNet

def write_lists(root: Path, folder: Path, left_out: tuple[str, int]) -> None:
    folder.mkdir()
    for domain in DOMAINNET_DOMAINS:
        lines = [f"{domain}/{name}/{i}.png {k}\n" for k, name in enumerate(DOMAINNET) for i in range(COUNT)
                 if (name, i) != left_out]
        for part, rows in (("train", lines[::2]), ("test", lines[1::2])):
            (folder / f"{domain}_{part}.txt").write_text("".join(rows))


def test_file_lists_leave_out_what_they_do_not_name(archives, tmp_path):
    write_lists(archives["domainnet"], tmp_path / "lists", ("zebra", 1))
    given = {"data_root": str(archives["domainnet"]), "file_lists": str(tmp_path / "lists")}
    protocol = build(resolve(given, "domainnet/sketch"))
    whole = build(resolve({**given, "file_lists": ""}, "domainnet/sketch"))
    gone = {Path(path).relative_to(archives["domainnet"]).as_posix() for path in set(whole.train.paths) - set(protocol.train.paths)}
    assert {"clipart/zebra/1.png", "painting/zebra/1.png"} <= gone and all("zebra" in name or "real" in name for name in gone)
    assert any(f"{6 * (345 * COUNT - 1):,} images" in line for line in protocol.notes)

    path = tmp_path / "lists" / "real_test.txt"
    before = path.read_text()
    path.write_text(before + "real/zebra/77.png 344\n")
    with pytest.raises(ValueError, match="1 listed images of real are not in .*: real/zebra/77.png"):
        build(resolve(given, "domainnet/sketch"))
    path.write_text(before + "zebra 344\n")
    with pytest.raises(ValueError, match=r"real_test.txt, line \d+: 'zebra 344'; expected real/<class>/<image> <number>"):
        build(resolve(given, "domainnet/sketch"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no real_test.txt"):
        build(resolve(given, "domainnet/sketch"))
    with pytest.raises(ValueError, match="--file-lists .* is for --dataset domainnet, and this is tuberlin"):
        build(resolve({"file_lists": "x"}, "tuberlin"))


def test_counts_say_which_version_they_are():
    row = DATASETS["domainnet"]
    for version, total in (("original", 596010), ("cleaned", 586575)):
        lines = compared({name: (count, 345) for name, count in row.versions[version].items()}, row)
        assert len(lines) == 7 and f"{total:,} images; as published ({version})" in lines[-1]
        assert "as published (original, cleaned)" in lines[3] and "quickdraw" in lines[3]  # the same in both
    lines = compared({"clipart": (48130, 345)}, row)
    assert "48,130 images, 345 classes; differs from original 48,837 (-707), cleaned 48,129 (+1)" in lines[0]
    sketchy = compared({"sketch": (75481, 125), "extended_photo": (73002, 125)}, DATASETS["sketchy/eccv"])
    assert "as published (download)" in sketchy[0] and "(download, papers)" in sketchy[1]
    assert "as published" not in compared({"photo": (3, 2)}, None)[0]


# own folders

def test_spellings_of_a_class_are_one_class_across_domains(tmp_path):
    import unicodedata
    names = ["T-Shirt", "hot_dog", unicodedata.normalize("NFC", "café"), "d", "e", "猫", "狗"]
    other = ["t_shirt", "Hot Dog", unicodedata.normalize("NFD", "Café"), "D", "e", "猫", "狗"]
    put(tmp_path, "photo", names)
    put(tmp_path, "sketch", other)
    put(tmp_path, "icon", other)
    flags = {"dataset": "folder", "data_root": str(tmp_path)}
    protocol = build(resolve(flags))
    found = {name for part in (protocol.train, protocol.tests[0].query, protocol.validation.query) for name in part.classes}
    assert len(found) == 7 and found == set(other)  # the first domain's spelling
    (line,) = [line for line in protocol.notes if "spelt in two ways" in line]
    assert "'T-Shirt' (photo) = 't_shirt'" in line
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["T SHIRT", "e", "猫"], "val": ["hot-dog", "狗"], "test": ["d"]}))
    assert build(resolve({**flags, "class_split": str(split)})).class_names == ["t_shirt", "e", "猫"]
    put(tmp_path, "photo", ["hot dog"])
    with pytest.raises(ValueError, match="domain photo: the folders 'hot dog' and 'hot_dog' are one class"):
        build(resolve(flags))


def test_deeper_images_and_unknown_endings_are_counted_links_followed_and_loops_refused(tmp_path):
    put(tmp_path / "data", "photo", "abcd")
    put(tmp_path / "elsewhere", "", "abcd")
    (tmp_path / "data" / "sketch").symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "data", "photo/a", ["deeper", "deeper/still"], 1)
    for name in ("x.heic", "notes.txt", ".hidden"):
        (tmp_path / "data" / "photo" / "b" / name).touch()
    notes: list[str] = []
    tree = scan(str(tmp_path / "data"), None, notes)
    assert sorted(tree) == ["photo", "sketch"] and {len(paths) for paths in tree["sketch"].values()} == {COUNT}
    assert len(notes) == 2 and "note     2 images lie deeper" in notes[0] and "note     2 files have unknown" in notes[1]
    assert "a/deeper/0.png" in notes[0] and "notes.txt" in notes[1]
    (tmp_path / "elsewhere" / "a" / "loop").symlink_to(tmp_path / "data")  # data/sketch/a/loop/sketch/a/loop ...
    with pytest.raises(ValueError, match="loop: this link leads back to .*data, in which it lies"):
        scan(str(tmp_path / "data"))
    put(tmp_path / "deep", "photo/a", ["only"], 1)
    with pytest.raises(ValueError, match="a: a class folder without images, but .*only.0.png lies deeper"):
        scan(str(tmp_path / "deep"))

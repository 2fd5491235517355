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
from ucdr_ref.experiments import class_folders, retrieval
from ucdr_ref.experiments.class_folders import SHIPPED
from ucdr_ref.experiments.datasets import DATASETS, alias_list, class_list, compared, folder_key
from ucdr_ref.experiments.protocols import Protocol, build
from ucdr_ref.experiments.trees import scan
from ucdr_ref.sre.graph import Graph, save_graph

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
    for domain in DATASETS["domainnet"].domains:
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
    tidy = (("domainnet", DATASETS["domainnet"].domains, DOMAINNET), ("tuberlin", ("sketches", "images"), TUBERLIN),
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
    assert "expected 250" not in said and "too deep" not in said
    put(tmp_path / "deep", "tuberlin/png", raw_names("sketches"), 1)
    put(tmp_path / "deep", "tuberlin/ImageResized", raw_names("images"), 1)
    with pytest.raises(FileNotFoundError, match="no domain folder 'sketches' or 'png'; there are tuberlin; did the archive"):
        build(resolve({"data_root": str(tmp_path / "deep")}, "tuberlin"))


def test_further_folders_are_left_out_and_named(tmp_path):
    for domain in ("sketches", "images"):
        put(tmp_path, domain, [*TUBERLIN, "unicorn"], 1)
    protocol = build(resolve({"data_root": str(tmp_path)}, "tuberlin"))
    assert sum("no class of TU-Berlin are not used: unicorn" in line for line in protocol.notes) == 2
    assert "unicorn" not in protocol.train.classes


# the cleaned DomainNet

def write_lists(root: Path, folder: Path, left_out: tuple[str, int]) -> None:
    folder.mkdir()
    for domain in DATASETS["domainnet"].domains:
        lines = [f"{domain}/{name}/{i}.png {k}\n" for k, name in enumerate(DOMAINNET) for i in range(COUNT)
                 if (name, i) != left_out]
        for part, rows in (("train", lines[::2]), ("test", lines[1::2])):
            (folder / f"{domain}_{part}.txt").write_text("".join(rows))


def test_file_lists_leave_out_what_they_do_not_name(archives, tmp_path):
    write_lists(archives["domainnet"], tmp_path / "lists", ("zebra", 1))
    given = {"data_root": str(archives["domainnet"]), "file_lists": str(tmp_path / "lists")}
    protocol = build(resolve(given, "domainnet/sketch"))
    whole = build(resolve({**given, "file_lists": ""}, "domainnet/sketch"))
    lost = set(whole.train.paths) - set(protocol.train.paths)
    gone = {Path(path).relative_to(archives["domainnet"]).as_posix() for path in lost}
    assert {"clipart/zebra/1.png", "painting/zebra/1.png"} <= gone and all("zebra" in name for name in gone)
    assert any(f"{6 * (345 * COUNT - 1):,} images" in line for line in protocol.notes)

    path = tmp_path / "lists" / "real_test.txt"
    before = path.read_text()
    path.write_text(before + "real/zebra/77.png 344\n")
    with pytest.raises(ValueError, match="1 listed images of real are not in .*: real/zebra/77.png"):
        build(resolve(given, "domainnet/sketch"))
    path.write_text(before + "zebra 344\n")
    with pytest.raises(ValueError, match=r"real_test.txt, line \d+: 'zebra 344'; expected real/<class>/<image> <number>"):
        build(resolve(given, "domainnet/sketch"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="real_test.txt is not UTF-8 text"):
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
    put(tmp_path, "", ["data", "data/photo"], 1)  # above the class folders
    for name in ("x.heic", "notes.txt", ".hidden"):
        (tmp_path / "data" / "photo" / "b" / name).touch()
    notes: list[str] = []
    tree = scan(str(tmp_path / "data"), None, notes)
    assert sorted(tree) == ["photo", "sketch"] and {len(paths) for paths in tree["sketch"].values()} == {COUNT}
    assert len(notes) == 2 and "note     4 images lie elsewhere than" in notes[0] and "note     2 files have unknown" in notes[1]
    assert "data/0.png" in notes[0] and "notes.txt" in notes[1]
    (tmp_path / "elsewhere" / "a" / "loop").symlink_to(tmp_path / "data")  # data/sketch/a/loop/sketch/a/loop ...
    with pytest.raises(ValueError, match="loop: this link leads back to .*data, in which it lies"):
        scan(str(tmp_path / "data"))
    put(tmp_path / "deep", "photo/a", ["only"], 1)
    with pytest.raises(ValueError, match="a: a class folder without images, but .*only.0.png lies deeper"):
        scan(str(tmp_path / "deep"))
    put(tmp_path / "flat", "photo", "abcd")
    put(tmp_path / "flat", "", ["painting"], 1)
    assert sorted(scan(str(tmp_path / "flat"))) == ["photo"]
    with pytest.raises(ValueError, match="flat: found no images in painting/<class>/"):
        scan(str(tmp_path / "flat"), {"photo": ["photo"], "painting": ["painting"]})


# SRE-CLIP

def sre_call(root: Path, archives: dict[str, Path], *more: str) -> list[str]:
    return ["--weights", str(archives["clip.pt"]), "--run", str(root / "run"), "--sre-iterations", "2",
            "--sre-hidden", "16", "--workers", "0", "--device", "cpu", *more]


def test_animals_as_published_with_further_source_folders(archives, tmp_path, capsys):
    lines = (SHIPPED / "awa2.txt").read_text().splitlines()[1:]
    names = {split: [line.split()[2] for line in lines if line.startswith(split)] for split in ("seen", "unseen")}
    assert [len(part) for part in names.values()] == [40, 10]
    everything = [name.replace("_", "+") for part in names.values() for name in part]
    put(tmp_path, "Animals_with_Attributes2/JPEGImages", everything, 1)
    (tmp_path / "Animals_with_Attributes2" / "classes.txt").touch()
    put(tmp_path, "web", [*names["seen"], "unicorn", names["unseen"][0]], 1)
    (tmp_path / "models3d").symlink_to(tmp_path / "web")
    call = sre_call(tmp_path, archives, "--preset", "i2awa", "--source", str(tmp_path / "web"), str(tmp_path / "models3d"),
                    "--target", str(tmp_path / "Animals_with_Attributes2"))
    assert train.main([*call, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("2 class folders outside the seen classes are not used: sheep, unicorn") == 2
    assert "40 images, 40 classes" in said and "50 images, 50 classes" in said and "without a source image" not in said
    assert train.main(call) == 0 and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    graph, unseen = class_folders.graph_and_unseen(resolve({}, "i2awa"))
    root, inner = ((class_folders.scan_folder("--target", str(tmp_path / "Animals_with_Attributes2" / part), graph))
                   for part in ("", "JPEGImages"))
    assert root == inner  # and so have one digest


def test_source_folders_named_by_class_and_wordnet_id(archives, tmp_path, capsys):
    """As 3D2 names them: the id decides, and where the graph has another one, the name."""
    lines = [line.split()[:3] for line in (SHIPPED / "awa2.txt").read_text().splitlines()[1:]]
    seen = [f"{name}-{synset}" for split, synset, name in lines if split == "seen"]
    put(tmp_path, "3D2", ["renamed-" + seen[0].rpartition("-")[2], seen[1][:-8] + "99999999", *seen[2:], "unicorn-n00000000"], 1)
    put(tmp_path, "target", [name for _, _, name in lines], 1)
    assert train.main([*sre_call(tmp_path, archives, "--preset", "i2awa", "--source", str(tmp_path / "3D2"),
                                 "--target", str(tmp_path / "target")), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "40 images, 40 classes" in said and "1 class folders outside the seen classes are not used: unicorn-n00000000" in said


# 59 of ILSVRC's classes in a row and the other crane: their ids, as in its list.
BIRDS = """02002556 white_stork|02002724 black_stork|02006656 spoonbill|02007558 flamingo|02009229 little_blue_heron
02009912 American_egret|02011460 bittern|02012849 crane|02013706 limpkin|02017213 European_gallinule|02018207 American_coot
02018795 bustard|02025239 ruddy_turnstone|02027492 red-backed_sandpiper|02028035 redshank|02033041 dowitcher
02037110 oystercatcher|02051845 pelican|02056570 king_penguin|02058221 albatross|02066245 grey_whale|02071294 killer_whale
02074367 dugong|02077923 sea_lion|02085620 Chihuahua|02085782 Japanese_spaniel|02085936 Maltese_dog|02086079 Pekinese
02086240 Shih-Tzu|02086646 Blenheim_spaniel|02086910 papillon|02087046 toy_terrier|02087394 Rhodesian_ridgeback
02088094 Afghan_hound|02088238 basset|02088364 beagle|02088466 bloodhound|02088632 bluetick|02089078 black-and-tan_coonhound
02089867 Walker_hound|02089973 English_foxhound|02090379 redbone|02090622 borzoi|02090721 Irish_wolfhound
02091032 Italian_greyhound|02091134 whippet|02091244 Ibizan_hound|02091467 Norwegian_elkhound|02091635 otterhound
02091831 Saluki|02092002 Scottish_deerhound|02092339 Weimaraner|02093256 Staffordshire_bullterrier
02093428 American_Staffordshire_terrier|02093647 Bedlington_terrier|02093754 Border_terrier|02093859 Kerry_blue_terrier
02093991 Irish_terrier|02094114 Norfolk_terrier|03126707 crane"""
WEB = [("n" + line.split()[0], line.split()[1]) for line in BIRDS.replace("\n", "|").split("|")]


def test_webvision_folders_are_classes_by_id(archives, tmp_path, capsys):
    assert len(WEB) == 60 and [name for _, name in WEB].count("crane") == 2
    ids, names = zip(*WEB)
    nodes = [*(name.replace("_", " ") for name in names), "animal", "artifact"]
    edges = [(k, 60 if k < 59 else 61) for k in range(60)]
    save_graph(Graph([*ids, "n00015388", "n00021939"], nodes, [[name] for name in nodes], edges, 60, "notice"),
               tmp_path / "graph.json")
    put(tmp_path, "ILSVRC", [*ids[:40], "n01440764"], 1)
    put(tmp_path, "webvision", ids, 1)
    (tmp_path / "unseen.txt").write_text("\n".join(ids[40:]))
    call = sre_call(tmp_path, archives, "--preset", "i2webv", "--graph", str(tmp_path / "graph.json"), "--unseen",
                    str(tmp_path / "unseen.txt"), "--source", str(tmp_path / "ILSVRC"), "--target", str(tmp_path / "webvision"))
    assert train.main([*call, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "60 classes (20 unseen)" in said and "60 images, 60 classes" in said and "not used: n01440764" in said
    assert train.main(call) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"][0]["classes"] == 60
    for file in ("per_class.csv", "report.html"):
        text = (tmp_path / "run" / file).read_text()
        assert "crane (n02012849)" in text and "crane (n03126707)" in text, file

    graph, unseen = class_folders.graph_and_unseen(resolve({"graph": str(tmp_path / "graph.json"),
                                                            "unseen": str(tmp_path / "unseen.txt")}, "i2webv"))
    assert unseen == list(range(40, 60))
    target = class_folders.scan_folder("--target", str(tmp_path / "webvision"), graph)
    assert target.labels == [*range(60)]  # the cranes are two classes
    (tmp_path / "unseen.txt").write_text("crane\n")
    with pytest.raises(ValueError, match="unseen.txt: crane names several classes; give the id too"):
        class_folders.graph_and_unseen(resolve({"graph": str(tmp_path / "graph.json"), "unseen": str(tmp_path / "unseen.txt")},
                                               "i2webv"))
    with pytest.raises(ValueError, match="none of the graph's 60 classes: crane;"):
        put(tmp_path, "named", ["crane"], 1)
        class_folders.scan_folder("--target", str(tmp_path / "named"), graph)

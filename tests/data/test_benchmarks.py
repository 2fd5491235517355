"""Which images are trained on, queried and ranked: every dataset as its archive unpacks, the draws, own folders."""
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import touch_images
from ucdr_ref.config import PRESETS, resolve
from ucdr_ref.data.benchmarks import DATASETS, Protocol, alias_list, build_protocol, class_list
from ucdr_ref.demo.drawing import DOMAINS, SPLIT

N = 10
SPLITS = {name: row.splits() for name, row in DATASETS.items()}
CLASSES = {name: sum(splits.values(), []) for name, splits in SPLITS.items()}


def protocol_of(dataset: str, root: Path, **flags: object) -> Protocol:
    return build_protocol(resolve({"dataset": dataset, "data_root": str(root), **flags}))


def raw_names(domain: str) -> list[str]:
    """TU-Berlin's folder names as in the archive."""
    raw = {name: folder for folder, name in alias_list(f"tuberlin-{domain}").items()}
    return [raw.get(name, name) for name in CLASSES["tuberlin"]]


@pytest.fixture(scope="module")
def tidy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("tidy"), {}
    for name, row in DATASETS.items():
        if name != "sketchy-random":
            first, *others = row.domains or DOMAINS
            made[name] = touch_images(root / name, [first], CLASSES[name], N)
            for domain in others:
                (root / name / domain).symlink_to(first)
    made["folder"] = touch_images(root / "folder", ("photo", "sketch", "icon"), [f"class {i}" for i in range(60)], N)
    return made | {"sketchy-random": made["sketchy"]}


@pytest.fixture(scope="module")
def archives(tidy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As the archives unpack; DomainNet's is the tidy tree."""
    root = tmp_path_factory.mktemp("archives")
    sketchy = [{"hot_air_balloon": "hot-air_balloon", "jack_o_lantern": "jack-o-lantern"}.get(name, name)
               for name in CLASSES["sketchy"]]
    unchanged = [f"256x256/{part}/tx_000000000000" for part in ("sketch", "photo")]
    touch_images(root / "sketchy", [*unchanged, "EXTEND_image_sketchy"], sketchy, N)
    touch_images(root / "sketchy", ["256x256/sketch/tx_000100000000"], sketchy[:2], 1)
    touch_images(root / "tuberlin", ["png"], raw_names("sketches"), N)
    touch_images(root / "tuberlin", ["ImageResized"], raw_names("images"), N)
    return {name: root / name.split("-")[0] for name in ("sketchy", "sketchy-random", "tuberlin")} | {"domainnet": tidy["domainnet"]}


def lists(protocol: Protocol) -> list[object]:
    return [[(*row[1:], os.path.basename(row[0])) for row in zip(part.paths, part.classes, part.domains)]
            for part in protocol.lists().values()]


@pytest.mark.parametrize("preset,seen", [
    ("sketchy", "sketch"), ("sketchy-random", "sketch"), ("tuberlin", "sketches"), ("domainnet/sketch", "quickdraw")])
def test_an_archive_has_the_files_of_the_tidy_tree(preset, seen, archives, tidy):
    dataset = PRESETS[preset]["dataset"]
    raw = build_protocol(resolve({"data_root": str(archives[dataset])}, preset))
    if archives[dataset] != tidy[dataset]:
        tree = build_protocol(resolve({"data_root": str(tidy[dataset])}, preset))
        assert lists(raw) == lists(tree) and raw.class_names == tree.class_names
    for domain in DATASETS[dataset].domains:
        assert any(line.startswith(f"data     {domain:<14}") and re.search(r"; (original|download) [\d,]+ \(-", line) for line in raw.notes)
    assert ("only tx_000000000000 is used, not tx_000100000000" in "".join(raw.notes)) == ("sketchy" in preset)
    assert raw.validation.query_domain == seen and PRESETS[preset].get("held_out", "sketch") not in raw.domain_names
    assert {name[10:]: row["seen"] for name, row in PRESETS.items() if name.startswith("domainnet/")} == {
        "sketch": "quickdraw", "quickdraw": "sketch", "painting": "infograph", "infograph": "painting", "clipart": "painting"}


def test_mismatches_are_named(tmp_path):
    touch_images(tmp_path, ["png"], [*(name for name in raw_names("sketches") if name not in ("ant", "bee")), "aunt", "wasp"], 1)
    touch_images(tmp_path, ["ImageResized"], raw_names("images"), 1)
    with pytest.raises(ValueError, match="domain sketches: no folder for ant, bee; folders of no class: aunt, wasp"):
        protocol_of("tuberlin", tmp_path)
    touch_images(tmp_path, ["png"], ["ant", "bee"], 1)
    protocol = protocol_of("tuberlin", tmp_path, held_out="none")
    assert any("sketches: folders of no class are not used: aunt, wasp" in line for line in protocol.notes)
    assert not {"aunt", "wasp"} & set(protocol.train.classes)


@pytest.mark.parametrize("dataset,sizes,metric", [
    ("domainnet", (245, 55, 45), "mAP@200"), ("sketchy", (93, 11, 21), "mAP@200"), ("sketchy-random", (90, 10, 25), "mAP@all"),
    ("tuberlin", (200, 20, 30), "mAP@all"), ("toy", (40, 8, 12), "mAP@200")])
def test_splits_have_the_published_numbers_of_classes(dataset, sizes, metric, tidy):
    assert dataset != "toy" or {part: tuple(names) for part, names in SPLITS["toy"].items()} == SPLIT
    assert tuple(map(len, SPLITS[dataset].values())) == sizes and len(set(CLASSES[dataset])) == sum(sizes)
    held_out = "sketch" if dataset in ("domainnet", "toy") else "none"
    protocol = protocol_of(dataset, tidy[dataset], held_out=held_out)
    assert protocol.class_names == SPLITS[dataset]["train"] and protocol.metric == metric
    assert set(protocol.validation.query.classes) == set(SPLITS[dataset]["val"])
    assert set(protocol.tests[0].query.classes) == set(SPLITS[dataset]["test"])
    if dataset == "domainnet":
        return
    both = protocol_of(dataset, tidy[dataset], held_out=held_out, train_classes="train+val", selection="last")  # D10
    assert len(both.class_names) == sizes[0] + sizes[1] and both.validation is both.metric is None
    with pytest.raises(ValueError, match="no validation classes .* add --selection last"):
        protocol_of(dataset, tidy[dataset], held_out=held_out, train_classes="train+val")


def test_domainnet_holds_out_domain_and_classes(tidy):
    protocol = protocol_of("domainnet", tidy["domainnet"], held_out="quickdraw")
    assert protocol.domain_names == ["clipart", "infograph", "painting", "real", "sketch"]
    ucdr, ud = protocol.tests
    train, _, test = SPLITS["domainnet"].values()
    assert (ucdr.protocol, ucdr.query_domain) == ("UCDR", "quickdraw") and set(ucdr.query.domains) == {"quickdraw"}
    assert set(ucdr.galleries["unseen"].classes) == set(test) and set(ucdr.galleries["unseen"].domains) == {"real"}
    mixed = ucdr.galleries["mixed"]
    assert len(mixed) == 45 * N + 245 and set(mixed.classes) == {*test, *train}  # 10 - int(0.92 x 10) = 1 (D10)
    assert not set(mixed.paths) & set(protocol.train.paths)
    assert set(protocol.train.classes) == set(train) and len(protocol.train) == 245 * (4 * N + N - 1)
    assert list(dict.fromkeys(ud.query.classes)) == class_list("domainnet-train")[:45]  # in the order of the list
    assert len(ud.query) == 45  # 10 % of 10 for quickdraw
    assert not set(ud.galleries["seen"].paths) & set(protocol.train.paths)  # D7


@pytest.mark.parametrize("held_out,share", [("sketch", 0.25), ("quickdraw", 0.10)])
def test_released_draws_are_numpys_by_the_id_of_the_class(held_out, share, tidy):
    root = tidy["domainnet"]
    protocol = protocol_of("domainnet", root, held_out=held_out, variant="released")
    ucdr, ud = protocol.tests
    trained = {path for path, domain in zip(protocol.train.paths, protocol.train.domains) if domain == "real"}
    expected = {"trained": set(), "kept": set(), "query": set(), "gallery": set()}
    for i, name in enumerate(class_list("domainnet-train")):
        files, queries = (sorted(map(str, (root / domain / name).iterdir())) for domain in ("real", held_out))
        np.random.seed(i)
        of_training = np.random.choice(files, int(0.92 * N), replace=False)
        expected["trained"] |= set(of_training)
        expected["kept"] |= set(files) - set(of_training)
        if i < 45:
            for part, paths in (("query", queries), ("gallery", files)):
                np.random.seed(i)
                expected[part] |= set(np.random.choice(paths, int(share * N), replace=False))
    unseen = set(ucdr.galleries["unseen"].paths)
    assert expected == {"trained": trained, "kept": set(ucdr.galleries["mixed"].paths) - unseen, "query": set(ud.query.paths),
                        "gallery": set(ud.galleries["seen"].paths)}
    assert protocol.validation.query == ucdr.query and protocol.validation.galleries == {"mixed": ucdr.galleries["mixed"]}  # D5
    assert protocol.metric == "mAP@200"


def test_splits_depend_on_neither_the_seed_nor_the_order_of_the_folder(tidy, monkeypatch):
    for dataset in ("toy", "folder"):
        before = protocol_of(dataset, tidy[dataset])
        assert protocol_of(dataset, tidy[dataset], seed=7) == before
        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", lambda *call, walk=os.walk, **more: (
                (folder, folders, files[::-1]) for folder, folders, files in walk(*call, **more)))
            assert protocol_of(dataset, tidy[dataset]) == before


# own folders

def split_file(root: Path, **parts: object) -> str:
    (root / "split.json").write_text(json.dumps(parts))
    return str(root / "split.json")


def test_drawn_split_and_given_split(tidy, tmp_path):
    drawn = protocol_of("folder", tidy["folder"])
    assert (drawn.gallery_domain, drawn.tests[0].query_domain, drawn.validation.query_domain) == ("photo", "sketch", "icon")
    parts = [set(part) for part in (drawn.class_names, drawn.validation.query.classes, drawn.tests[0].query.classes)]
    assert [len(part) for part in parts] == [42, 6, 12] and len(set.union(*parts)) == 60
    split = split_file(tmp_path, train=["CLASS-1", "class 2"], val=["class_3"], test=["class 4"])
    given = protocol_of("folder", tidy["folder"], class_split=split, held_out="icon", seen="sketch")
    split = split_file(tmp_path, seen=["CLASS-1", "class 2"], val_unseen=["class_3"], unseen=["class 4"])
    assert protocol_of("folder", tidy["folder"], class_split=split, held_out="icon", seen="sketch") == given
    assert given.class_names == ["class 1", "class 2"] and set(given.tests[0].galleries["unseen"].classes) == {"class 4"}
    assert any("note     56 class folders are not in the class split and not used: class 0, class 10" in line
               for line in given.notes)
    assert given.metric is None and any("gallery of one class cannot choose" in line for line in given.notes)
    assert protocol_of("folder", tidy["folder"], domains=("sketch", "photo")).domain_names == ["photo"]
    seen = protocol_of("folder", tidy["folder"], held_out="none", seen="sketch")
    assert seen.tests[0].protocol == "UcCDR" and seen.domain_names == ["icon", "photo", "sketch"]


def test_a_folder_called_sketch_in_capitals_is_sketch_and_names_may_not_be_utf8(tmp_path):
    names = [*"abcdefg", os.fsdecode(b"caf\xe9")]
    protocol = protocol_of("folder", touch_images(tmp_path, ("Photo", "Sketch", "QuickDraw"), names, 1), gallery="photo")
    assert {*protocol.class_names, *protocol.validation.query.classes, *protocol.tests[0].query.classes} == set(names)
    assert (protocol.gallery_domain, protocol.tests[0].query_domain, len(protocol.digests()["train"][1])) == ("Photo", "Sketch", 64)
    assert protocol.notes[-1] == "note     colours inverted (D14): QuickDraw, Sketch"
    without = protocol_of("folder", tmp_path, gallery="photo", stroke_domains=("none",))
    assert without.notes[-1] == "note     colours inverted (D14): of no domain"


def test_a_name_of_capitals_is_held_out_as_it_is_given(tmp_path):
    protocol = protocol_of("folder", touch_images(tmp_path, ("Art", "Photo", "Zine"), "abcdefgh", 1), held_out="Art")
    assert (protocol.tests[0].query_domain, protocol.validation.query_domain) == ("Art", "Zine")


def test_domains_are_told_apart_and_need_training_images(tmp_path, tidy):
    with pytest.raises(ValueError, match=r"--data-root '': no such folder"):
        protocol_of("folder", "")
    classes = [f"c{i}" for i in range(8)]
    root = touch_images(tmp_path / "data", ("photo", "sketch", "icon"), classes, 2)
    train = protocol_of("folder", root).class_names
    touch_images(root, ("clipart",), sorted({*classes} - {*train}), 2)  # nothing to train on
    assert protocol_of("folder", root).domain_names == ["icon", "photo"]
    (root / "Sketch").symlink_to(root / "icon")
    with pytest.raises(ValueError, match="expected different domains .* Sketch, clipart, icon, photo, sketch"):
        protocol_of("folder", root)


def test_a_gallery_of_one_class_chooses_no_epoch(tmp_path):
    shutil.rmtree(touch_images(tmp_path / "data", ("photo", "sketch", "icon"), "abcdefgh", 2) / "photo" / "d")
    split = split_file(tmp_path, train=["a", "b"], val=["c", "d"], test=["e", "f"])
    protocol = protocol_of("folder", tmp_path / "data", class_split=split)
    assert set(protocol.validation.query.classes) == {"c", "d"} and protocol.metric is None


@pytest.mark.parametrize("flags", [
    dict(held_out="paintings"), dict(gallery="x"), dict(held_out="photo"), dict(seen="sketch"), dict(held_out="none", seen="photo")])
def test_wrong_domains_are_one_sentence(flags, tidy):
    with pytest.raises(ValueError, match="--held-out .* expected different domains .* out of icon, photo, sketch"):
        protocol_of("folder", tidy["folder"], **flags)


@pytest.mark.parametrize(("text", "message"), [
    ('{"train": ["class 1"], "val": ["CLASS_1"], "test": ["class 2"]}', "does not fit .*'class_1'.; expected .*each once"),
    ('{"train": ["class 1", "class 5"], "val": ["class 2"], "test": ["x"]}', "does not fit .*folder .*'x'"),
    ("[" * 100_000, "split.json"), ('{"train": 3}', "in lists train, val and test"),
    ('{"train": ["class 1"], "val": ["class 2"], "test": ["class 3"]}', "1 training classes"),
    ('{"train": ["class 1", "class 2"], "val": ["class 3"], "test": []}', "no image left for UCDR query, UCDR gallery unseen;")])
def test_wrong_splits_are_explained(text, message, tidy, tmp_path):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        protocol_of("folder", tidy["folder"], class_split=str(tmp_path / "split.json"))


def test_flags_of_own_folders_are_for_them_alone(tidy):
    for flags in (dict(domains=("sketch",)), dict(class_split="x.json")):
        with pytest.raises(ValueError, match="are not for --dataset domainnet"):
            protocol_of("domainnet", tidy["domainnet"], **flags)
    with pytest.raises(ValueError, match="0 training classes have images; give two or more"):
        protocol_of("folder", touch_images(tidy["folder"].parent / "few", ("photo", "sketch"), "abc", 1))

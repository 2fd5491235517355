"""What is trained on, what is queried, what is ranked: every protocol on folders of empty files."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import touch_images
from ucdr_ref.config import resolve
from ucdr_ref.experiments.datasets import DATASETS, class_list
from ucdr_ref.experiments.protocols import build
from ucdr_ref.experiments.trees import scan


@pytest.fixture(scope="module")
def domainnet(tmp_path_factory) -> Path:
    names = [name for part in ("train", "val", "test") for name in class_list(f"domainnet-{part}")]
    return touch_images(tmp_path_factory.mktemp("domainnet"), DATASETS["domainnet"].domains, names, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return touch_images(tmp_path_factory.mktemp("folder"), ("photo", "sketch", "icon"), [f"class_{i}" for i in range(20)], 12)


def config(dataset, root, **flags):
    return resolve({"dataset": dataset, "data_root": str(root), **flags})


def test_domainnet_holds_out_domain_and_classes(domainnet):
    protocol = build(config("domainnet", domainnet, held_out="quickdraw"))
    assert len(protocol.class_names) == 245 and protocol.domain_names == ["clipart", "infograph", "painting", "real", "sketch"]
    ucdr, ud = protocol.tests
    test, train = set(class_list("domainnet-test")), set(class_list("domainnet-train"))
    assert (ucdr.protocol, ucdr.query_domain) == ("UCDR", "quickdraw") and set(ucdr.query.classes) == test
    assert set(ucdr.query.domains) == {"quickdraw"} and len(ucdr.query) == 45 * 8
    assert set(ucdr.galleries["unseen"].classes) == test and set(ucdr.galleries["unseen"].domains) == {"real"}
    mixed = ucdr.galleries["mixed"]
    assert len(mixed) == 45 * 8 + 245 and set(mixed.classes) == test | train  # one of eight is 8 %, at least one
    assert not set(mixed.paths) & set(protocol.train.paths)
    assert set(protocol.train.classes) == train and len(protocol.train) == 245 * (4 * 8 + 7)
    assert set(ud.query.classes) == set(class_list("domainnet-train")[:45]) and len(ud.query) == 45  # 10 % of 8, at least one
    assert not set(ud.galleries["seen"].paths) & set(protocol.train.paths)  # D7
    validation = protocol.validation
    assert set(validation.query.classes) == set(class_list("domainnet-val")) and validation.query_domain == "painting"
    assert not set(validation.query.classes) & (test | train)


def test_released_choices_of_the_protocol(domainnet):
    protocol = build(config("domainnet", domainnet, held_out="sketch", variant="released"))
    ucdr, ud = protocol.tests
    assert protocol.validation.query == ucdr.query and protocol.selected == ("mixed", "mAP@200")  # D5
    assert protocol.validation.galleries == {"mixed": ucdr.galleries["mixed"]}
    assert len(ud.query) == 45 * 2 and set(ud.galleries["seen"].paths) <= set(protocol.train.paths)  # D7
    both = build(config("domainnet", domainnet, train_classes="train+val", selection="last"))  # D10
    assert len(both.class_names) == 300 and both.validation is None
    with pytest.raises(ValueError, match="--selection last"):
        build(config("domainnet", domainnet, train_classes="train+val"))


def test_splits_do_not_depend_on_the_order_of_the_folder(domainnet, monkeypatch):
    import os
    before = build(config("domainnet", domainnet))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    assert build(config("domainnet", domainnet)) == before


@pytest.mark.parametrize("split,train,val,test,metric", [("eccv", 93, 11, 21, "mAP@200"), ("random", 90, 10, 25, "mAP@all")])
def test_sketchy(tmp_path, split, train, val, test, metric):
    root = touch_images(tmp_path, ("sketch", "extended_photo"), class_list("sketchy-all"), 2)
    protocol = build(config("sketchy", root, sketchy_split=split))
    published = set(class_list(f"sketchy-val-{split}"))
    assert len(protocol.class_names) == train and set(protocol.validation.query.classes) == published and len(published) == val
    assert not published & set(protocol.class_names) and protocol.selected == ("unseen", metric)
    (uc,) = protocol.tests
    assert (uc.protocol, uc.query_domain, len(set(uc.query.classes))) == ("UcCDR", "sketch", test)
    assert set(uc.galleries["unseen"].domains) == {"extended_photo"} and list(uc.galleries) == ["unseen"]
    assert protocol.domain_names == ["extended_photo", "sketch"]
    for flags in (dict(selection="last", train_classes="train+val"), dict(variant="released")):
        released = build(config("sketchy", root, sketchy_split=split, **flags))
        assert set(released.class_names) == set(protocol.class_names) | published
        assert released.selected == (None if "selection" in flags else ("unseen", metric))
    assert len(build(config("sketchy", root, sketchy_split=split, selection="last")).class_names) == train


@pytest.mark.parametrize("dataset,sizes", [("domainnet", (245, 55, 45)), ("sketchy/eccv", (93, 11, 21)),
                                           ("sketchy/random", (90, 10, 25)), ("tuberlin", (200, 20, 30))])
def test_the_lists_have_the_published_numbers_of_classes(dataset, sizes):
    splits = DATASETS[dataset].splits()
    assert tuple(len(splits[part]) for part in ("train", "val", "test")) == sizes
    assert len(set(sum(splits.values(), []))) == sum(sizes)


def test_the_sketches_of_two_domains_can_be_held_out(tmp_path):
    root = touch_images(tmp_path, ("sketch", "extended_photo"), class_list("sketchy-all"), 2)
    protocol = build(config("sketchy", root, held_out="sketch"))
    assert protocol.domain_names == ["extended_photo"] and protocol.tests[0].protocol == "UCDR"
    assert protocol.validation.query_domain == "extended_photo"  # no other is seen
    with pytest.raises(ValueError, match="--held-out extended_photo is the gallery domain"):
        build(config("sketchy", root, held_out="extended_photo"))


def test_tuberlin_accepts_other_spellings(tmp_path):
    names = [name for part in ("train", "val", "test") for name in class_list(f"tuberlin-{part}")]
    names = [name.replace("t_shirt", "t-shirt").replace("_(", " (") for name in names]
    root = touch_images(tmp_path, ("sketches", "images"), names, 1)
    protocol = build(config("tuberlin", root))
    assert len(protocol.class_names) == 200 and len(set(protocol.tests[0].query.classes)) == 30
    assert "t_shirt" in protocol.tests[0].query.classes and protocol.selected == ("unseen", "mAP@all")
    assert len(build(config("tuberlin", root, variant="released")).class_names) == 220


def test_folder_drawn_split_and_given_split(folder, tmp_path):
    drawn = build(config("folder", folder))
    assert (drawn.gallery_domain, drawn.tests[0].query_domain, drawn.validation.query_domain) == ("photo", "sketch", "icon")
    parts = [set(drawn.class_names), set(drawn.validation.query.classes), set(drawn.tests[0].query.classes)]
    assert [len(part) for part in parts] == [14, 2, 4] and len(set.union(*parts)) == 20
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"seen": ["class_1", "class_2"], "val_unseen": ["class_3"], "unseen": ["class_4"]}))
    given = build(config("folder", folder, class_split=str(split), held_out="icon", seen="sketch", per_class=5))
    assert given.class_names == ["class_1", "class_2"] and set(given.tests[0].galleries["unseen"].classes) == {"class_4"}
    assert len(given.tests[0].query) == 5
    assert build(config("folder", folder, domains=("sketch", "photo"))).domain_names == ["photo"]
    seen_domain = build(config("folder", folder, held_out="none", seen="sketch"))
    assert seen_domain.tests[0].protocol == "UcCDR" and seen_domain.domain_names == ["icon", "photo", "sketch"]


def test_bad_roots_and_flags_are_explained(folder, tmp_path):
    cases = [
        (dict(data_root=str(tmp_path / "absent")), "absent: no such folder"),
        (dict(data_root=str(tmp_path)), "found no images.*one level too deep"),
        (dict(held_out="paintings"), "--held-out paintings: no such domain.*icon, photo, sketch"),
        (dict(domains=("photo", "sketches")), "no domain folder 'sketches'"),
        (dict(gallery="x"), "--gallery x: no such domain"), (dict(held_out="photo"), "is the gallery domain"),
        (dict(seen="sketch"), "--seen sketch is held out"),
        (dict(held_out="none", seen="photo"), "--seen photo is the gallery domain.* icon, photo, sketch"),
        (dict(class_split=str(tmp_path / "no.json")), "no.json does not exist; --class-split"),
    ]
    for flags, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build(config("folder", flags.pop("data_root", folder), **flags))
    for text, message in (('{"train": ["class_1"], "val": ["class_1"], "test": ["class_2"]}', "more than one part"),
                          ('{"train": ["class_1", "class_5"], "val": ["class_2"], "test": ["class_99"]}', "no folder.*class_99"),
                          ("[" * 100000, "expected a JSON file"), ('{"train": 3}', "expected a JSON file"),
                          ('{"train": ["class_1"], "val": ["class_2"], "test": ["class_3"]}', "1 training classes")):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            build(config("folder", folder, class_split=str(tmp_path / "split.json")))


def test_domains_are_for_folder_datasets(domainnet):
    with pytest.raises(ValueError, match="--domains sketch is for --dataset folder, and this is domainnet"):
        build(config("domainnet", domainnet, domains=("sketch",)))
    with pytest.raises(ValueError, match="--class-split x.json is for --dataset folder, and this is domainnet"):
        build(config("domainnet", domainnet, class_split="x.json"))


def test_classes_without_a_folder_are_named(tmp_path):
    touch_images(tmp_path, DATASETS["domainnet"].domains, ["dog", "cat"], 1)
    with pytest.raises(ValueError, match="no folder for The_Eiffel_Tower.* and 243 more; .*no class: none$"):
        build(config("domainnet", tmp_path))
    (tmp_path / "real" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a class folder without images"):
        scan(str(tmp_path))


def test_no_query_left(tmp_path):
    touch_images(tmp_path, ("photo", "icon"), ["a", "b", "c", "d"], 2)
    touch_images(tmp_path, ("sketch",), ["a", "b"], 2)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["a", "b"], "val": ["c"], "test": ["d"]}))
    with pytest.raises(ValueError, match="UCDR with queries of sketch: no query left"):
        build(config("folder", tmp_path, class_split=str(split)))

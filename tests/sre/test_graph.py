from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ucdr_ref.sre import graph
from ucdr_ref.sre.graph import canonical, load_graph, normalized_adjacency
from ucdr_ref.sre.wordnet import WordNet, build_graph, main, read_classes

PACKAGE = Path(graph.__file__).parent
INSTALLED = Path("/usr/share/wordnet")
HEADER = "  1 Licence of the excerpt.  \n  2 Keep this notice.  \n"
# name: (lemmas, hypernyms, instance hypernyms); written in this order, so that offsets grow with it
EXCERPT = {
    "entity": (["entity"], [], []),
    "animal": (["animal", "beast"], ["entity"], []),
    "pet": (["pet"], ["animal"], []),
    "canine": (["canine", "canid"], ["animal"], []),
    "dog": (["dog", "domestic_dog", "Canis_familiaris"], ["pet", "canine"], []),
    "frank": (["frank", "dog"], ["entity"], []),
    "puppy": (["puppy"], ["dog"], []),
    "polar_bear": (["polar_bear"], ["animal"], []),
    "lassie": (["Lassie"], [], ["dog"]),
}


def write_wordnet(folder: Path, header: str = HEADER) -> dict[str, str]:
    """Writes data.noun and index.noun with true byte offsets; returns {name: synset id}."""
    offsets = dict.fromkeys(EXCERPT, 0)

    def line(name: str) -> str:
        lemmas, hypernyms, instances = EXCERPT[name]
        words = " ".join(f"{lemma} 0" for lemma in lemmas)
        pointers = [("~", "puppy"), *(("@", other) for other in hypernyms), *(("@i", other) for other in instances)]
        shown = " ".join(f"{symbol} {offsets[other]:08d} n 0000" for symbol, other in pointers)
        return f"{offsets[name]:08d} 05 n {len(lemmas):02x} {words} {len(pointers):03d} {shown} | a gloss | with a bar  \n"

    for _ in range(2):  # offsets have eight digits, so the second pass only fills them in
        position = len(header)
        for name in EXCERPT:
            offsets[name] = position
            position += len(line(name))
    folder.mkdir(exist_ok=True)
    (folder / "data.noun").write_text(header + "".join(line(name) for name in EXCERPT))
    index: dict[str, list[int]] = {}
    for name in EXCERPT:
        for lemma in EXCERPT[name][0]:
            index.setdefault(lemma.lower(), []).append(offsets[name])
    rows = [f"{lemma} n {len(senses)} 2 @ ~ {len(senses)} 0 {' '.join(f'{o:08d}' for o in senses)}  \n"
            for lemma, senses in sorted(index.items())]
    (folder / "index.noun").write_text(header + "".join(rows))
    return {name: f"n{offset:08d}" for name, offset in offsets.items()}


def write_classes(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_closure_of_an_excerpt(tmp_path: Path) -> None:
    ids = write_wordnet(tmp_path / "wn")
    classes = read_classes(write_classes(tmp_path / "c.txt", "# comment", "", "puppy", f"{ids['dog']} hound", "Polar+Bear"))
    built = build_graph(WordNet(tmp_path / "wn"), classes)
    # breadth-first after the classes; canine.n.01 before pet.n.01
    order = ["puppy", "dog", "polar_bear", "canine", "pet", "animal", "entity"]
    assert built.ids == [ids[name] for name in order]
    assert built.names == ["puppy", "hound", "Polar Bear", "canine", "pet", "animal", "entity"]
    assert built.lemmas[1] == ["dog", "domestic dog", "Canis familiaris"]
    assert built.edges == [(0, 1), (1, 3), (1, 4), (2, 5), (3, 5), (4, 5), (5, 6)]
    assert built.classes == 3
    assert built.notice == "Licence of the excerpt.\nKeep this notice."


def test_names_take_their_first_sense_and_the_others_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = write_wordnet(tmp_path / "wn")
    classes = write_classes(tmp_path / "c.txt", "Polar+Bear", "DOG", f"{ids['pet']} dog")
    assert main(["--wordnet", str(tmp_path / "wn"), "--classes", str(classes), "--out", str(tmp_path / "g.json")]) == 0
    assert load_graph(tmp_path / "g.json").ids[:3] == [ids["polar_bear"], ids["dog"], ids["pet"]]
    *listed, counts = capsys.readouterr().out.splitlines()
    assert listed == ["DOG: the first of 2 senses is taken; `nXXXXXXXX name` takes another",
                      f"  {ids['dog']} dog, domestic_dog, Canis_familiaris: a gloss | with a bar",
                      f"  {ids['frank']} frank, dog: a gloss | with a bar"]
    assert counts.endswith("g.json: 3 classes, 6 nodes, 6 edges")


def test_a_first_sense_without_a_hypernym_needs_an_id(tmp_path: Path) -> None:
    ids = write_wordnet(tmp_path / "wn")
    with pytest.raises(ValueError, match=rf"no hypernym: lassie \({ids['lassie']}\); give `nXXXXXXXX name`"):
        build_graph(WordNet(tmp_path / "wn"), read_classes(write_classes(tmp_path / "c.txt", "dog", "lassie")))
    lines = read_classes(write_classes(tmp_path / "c.txt", f"{ids['lassie']} lassie"))
    assert build_graph(WordNet(tmp_path / "wn"), lines).edges == []


def test_splits_in_a_class_list(tmp_path: Path) -> None:
    lines = read_classes(write_classes(tmp_path / "c.txt", "seen n00000001 killer_whale", "unseen n00000002 cow",
                                       "n00000003 polar bear", "seen grey seal", "unseen"))
    assert lines == [("seen", "n00000001", "killer_whale"), ("unseen", "n00000002", "cow"), (None, "n00000003", "polar bear"),
                     ("seen", None, "grey seal"), (None, None, "unseen")]


def test_class_list_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    with pytest.raises(FileNotFoundError, match="c.txt does not exist"):
        read_classes(path)
    for lines, message in ((["# only"], "lists no class"), (["n00000001 crane", "n00000001"], "twice: n00000001"),
                           (["cow", "polar_bear", "horse", "Polar bear"], "twice: polar bear")):
        with pytest.raises(ValueError, match=message):
            read_classes(write_classes(path, *lines))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="c.txt is not UTF-8 text"):
        read_classes(path)
    path.write_text("cow\n", encoding="utf-8-sig")  # as Windows' editor writes it
    assert read_classes(path) == [(None, None, "cow")]


def test_ids_tell_classes_of_one_name_apart_and_need_no_name(tmp_path: Path) -> None:
    ids = write_wordnet(tmp_path / "wn")
    lines = read_classes(write_classes(tmp_path / "c.txt", f"seen {ids['dog']} dog", f"unseen {ids['frank']} dog", ids["pet"]))
    assert [line.name for line in lines] == ["dog", "dog", ""]
    graph = build_graph(WordNet(tmp_path / "wn"), lines)
    assert graph.ids[:3] == [ids["dog"], ids["frank"], ids["pet"]] and graph.names[:3] == ["dog", "dog", "pet"]


def test_classes_missing_in_wordnet_are_all_listed(tmp_path: Path) -> None:
    ids = write_wordnet(tmp_path / "wn")
    wordnet = WordNet(tmp_path / "wn")
    lines = read_classes(write_classes(tmp_path / "c.txt", "unicorn", "dog", "n99999999 yeti", "n00000001 kraken", "snark"))
    with pytest.raises(ValueError, match=r"no hypernym: unicorn, yeti \(n99999999\), kraken \(n00000001\), snark; give"):
        build_graph(wordnet, lines)
    lines = read_classes(write_classes(tmp_path / "c.txt", "dog", f"{ids['dog']} hound"))
    with pytest.raises(ValueError, match="dog and hound are one WordNet synset"):
        build_graph(wordnet, lines)


def test_wordnet_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="index.noun does not exist; install"):
        WordNet(tmp_path)
    ids = write_wordnet(tmp_path)
    text = (tmp_path / "data.noun").read_text()
    for broken in (text.replace("@ ", "@ @ "), text.replace("01 entity 0", "00         "), text[:-60]):
        (tmp_path / "data.noun").write_text(broken)
        with pytest.raises(ValueError, match="data.noun: '.*' is no line of WordNet 3.0"):
            WordNet(tmp_path)
    (tmp_path / "data.noun").write_text(text.replace(f"@ {ids['entity'][1:]}", "@ 99999999"))
    with pytest.raises(ValueError, match="data.noun lacks synsets that other lines name"):
        WordNet(tmp_path)
    (tmp_path / "index.noun").write_text(HEADER + "dog n two\n")
    with pytest.raises(ValueError, match="index.noun: 'dog n two' is no line"):
        WordNet(tmp_path)


def test_command_writes_a_graph_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wordnet(tmp_path / "wn")
    classes, out = write_classes(tmp_path / "c.txt", "puppy", "polar_bear"), tmp_path / "deep" / "graph.json"
    arguments = ["--wordnet", str(tmp_path / "wn"), "--classes", str(classes), "--out", str(out)]
    assert main(arguments) == 0
    assert "2 classes, 7 nodes, 7 edges" in capsys.readouterr().out
    assert load_graph(out) == build_graph(WordNet(tmp_path / "wn"), read_classes(classes))
    before = out.read_text()
    write_classes(classes, "snark")
    assert main(arguments) == 2 and out.read_text() == before
    captured = capsys.readouterr().err
    assert captured.startswith("error: no noun of WordNet 3.0") and captured.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "ucdr_ref.sre.wordnet", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == captured


@pytest.mark.parametrize("change, message", [
    ({"edges": [[0, 9]]}, r"edge \[0, 9\] leaves the 2 nodes"),
    ({"edges": [[-1, 0]]}, r"edge \[-1, 0\] leaves"),
    ({"edges": [[0, True]]}, "whole numbers"),
    ({"edges": [[0]]}, "is not a class graph"),
    ({"edges": [[0, "1"]]}, "whole numbers"),
    ({"classes": 3}, "2 ids, 2 names, 2 lists of lemmas, 3 classes"),
    ({"classes": 0}, "0 classes"),
    ({"classes": None}, "whole numbers"),
    ({"names": ["a"]}, "2 ids, 1 names"),
    ({"names": ["a", 2]}, "expected text"),
    ({"lemmas": 3}, "is not a class graph"),
    ({"width": 3}, "is not a class graph"),
])
def test_malformed_graphs(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "g.json"
    fields = {"ids": ["n1", "n2"], "names": ["a", "b"], "lemmas": [["a"], ["b"]], "edges": [[0, 1]], "classes": 1,
              "notice": ""}
    path.write_text(json.dumps(fields))
    assert load_graph(path).edges == [(0, 1)]
    path.write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=message):
        load_graph(path)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    with pytest.raises(FileNotFoundError, match="g.json does not exist; build it"):
        load_graph(path)
    for content in (b"{", b"[1, 2]", b"3", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="g.json is not a class graph"):
            load_graph(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="g.json is not UTF-8 text .*; build it"):
        load_graph(path)


def test_adjacency_equals_a_slow_loop() -> None:
    edges, nodes = [(0, 3), (1, 3), (2, 4), (4, 3)], 6
    expected = torch.eye(nodes)
    for child, parent in edges:
        expected[child, parent] += 1
        expected[parent, child] += 1
    expected /= expected.sum(dim=1, keepdim=True)
    adjacency = normalized_adjacency(edges, nodes)
    assert adjacency.is_sparse
    assert_close(adjacency.to_dense(), expected)
    assert_close(normalized_adjacency([], 2).to_dense(), torch.eye(2))
    x = torch.randn(nodes, 3, requires_grad=True)
    (adjacency @ x).square().sum().backward()
    assert_close(x.grad, expected.T @ (2 * expected @ x.detach()))


def test_shipped_awa2_graph() -> None:
    lines = read_classes(PACKAGE / "graphs" / "awa2.txt")
    shipped = load_graph(PACKAGE / "graphs" / "awa2.json")
    assert list(map(canonical, shipped.names[:shipped.classes])) == [canonical(line.name) for line in lines]
    assert (shipped.classes, len(shipped.ids), len(shipped.edges)) == (50, 106, 108)
    assert shipped.ids[:50] == [line.id for line in lines]
    assert sum(line.split == "unseen" for line in lines) == 10
    assert len(set(shipped.ids)) == 106 and shipped.names[-1] in ("entity", "physical entity")
    assert "Princeton University" in shipped.notice and "without fee or" in shipped.notice


@pytest.mark.skipif(not (INSTALLED / "data.noun").is_file(), reason="WordNet 3.0 (Debian: wordnet-base) is not installed")
def test_awa2_closure_from_wordnet_is_the_shipped_graph() -> None:
    wordnet = WordNet(INSTALLED)
    for name in ("awa2", "toy"):
        assert build_graph(wordnet, read_classes(PACKAGE / "graphs" / f"{name}.txt")) == load_graph(PACKAGE / "graphs" / f"{name}.json")

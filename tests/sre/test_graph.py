"""Class lists, WordNet's closure and the graph's JSON file, on an excerpt of WordNet written here."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ucdr_ref.sre import graph
from ucdr_ref.sre.graph import canonical, load_graph
from ucdr_ref.sre.wordnet import WordNet, build_graph, main, read_classes

GRAPHS = Path(graph.__file__).parent / "graphs"
INSTALLED = Path("/usr/share/wordnet")
HEADER = "  1 Licence of the excerpt.  \n  2 Keep this notice.  \n"
# (lemmas, hypernyms, instance hypernyms) by name
EXCERPT = {
    "entity": (["entity"], [], []),
    "animal": (["animal", "beast"], ["entity"], []),
    "pet": (["pet"], ["animal"], []),
    "canine": (["canine", "canid"], ["animal"], []),
    "dog": (["dog", "domestic_dog", "Canis_familiaris"], ["pet", "canine"], []),
    "frank": (["frank", "dog"], ["entity"], []),
    "puppy": (["puppy"], ["dog"], []),
    "polar_bear": (["polar_bear"], ["animal"], []),
    "lassie": (["Lassie"], [], ["dog"])}
IDS = {name: f"n{100 + 7 * k:08d}" for k, name in enumerate(EXCERPT)}


@pytest.fixture
def excerpt(tmp_path: Path) -> Path:
    """A folder of data.noun and index.noun."""
    folder = tmp_path / "wn"
    folder.mkdir()
    data, senses = HEADER, dict[str, list[str]]()
    for name, (lemmas, hypernyms, instances) in EXCERPT.items():
        pointers = [("~", "puppy"), *(("@", other) for other in hypernyms), *(("@i", other) for other in instances)]
        shown = " ".join(f"{symbol} {IDS[other][1:]} n 0000" for symbol, other in pointers)
        data += (f"{IDS[name][1:]} 05 n {len(lemmas):02x} {' '.join(f'{lemma} 0' for lemma in lemmas)} "
                 f"{len(pointers):03d} {shown} | a gloss | with a bar  \n")
        for lemma in lemmas:
            senses.setdefault(lemma.lower(), []).append(IDS[name][1:])
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(HEADER + "".join(
        f"{lemma} n {len(ids)} 2 @ ~ {len(ids)} 0 {' '.join(ids)}  \n" for lemma, ids in sorted(senses.items())))
    return folder


def write_classes(folder: Path, *lines: str) -> Path:
    (folder / "c.txt").write_text("\n".join(lines) + "\n")
    return folder / "c.txt"


def test_closure_of_an_excerpt(excerpt: Path, tmp_path: Path) -> None:
    lines = "# comment", "", "puppy", f"seen {IDS['dog']} hound", "Polar+Bear", IDS["frank"]
    built = build_graph(WordNet(excerpt), read_classes(write_classes(tmp_path, *lines)))
    # breadth-first after the classes; canine before pet
    assert built.ids == [IDS[name] for name in ("puppy", "dog", "polar_bear", "frank", "canine", "pet", "animal", "entity")]
    assert built.names == ["puppy", "hound", "Polar Bear", "frank", "canine", "pet", "animal", "entity"]
    assert built.lemmas[1] == ["dog", "domestic dog", "Canis familiaris"]
    assert built.edges == [(0, 1), (1, 4), (1, 5), (2, 6), (3, 7), (4, 6), (5, 6), (6, 7)]
    assert built.classes == 4 and built.notice == "Licence of the excerpt.\nKeep this notice."


def test_lines_of_a_class_list(tmp_path: Path) -> None:
    lines = read_classes(write_classes(tmp_path, "seen n00000001 killer_whale", "unseen n00000002 cow", "n00000003 polar bear",
                                       "seen grey seal", "unseen", "n00000004", "n00000005 cow"))
    assert lines == [("seen", "n00000001", "killer_whale"), ("unseen", "n00000002", "cow"), (None, "n00000003", "polar bear"),
                     ("seen", None, "grey seal"), (None, None, "unseen"), (None, "n00000004", ""), (None, "n00000005", "cow")]
    (tmp_path / "c.txt").write_text("cow\n", encoding="utf-8-sig")  # as Windows' editor writes it
    assert read_classes(tmp_path / "c.txt") == [(None, None, "cow")]


@pytest.mark.parametrize("lines, message", [
    (["# only"], "lists no class"), (["n00000001 crane", "n00000001"], "twice: n00000001"),
    (["cow", "polar_bear", "seen Polar bear"], "twice: polar bear")])
def test_mistakes_in_a_class_list(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_classes(write_classes(tmp_path, *lines))


@pytest.mark.parametrize("lines, message", [
    (["unicorn", "dog", "n99999999 yeti", "snark"], r"hypernym: unicorn, yeti \(n99999999\), snark; give `nXXXXXXXX name`"),
    (["dog", "lassie"], rf"no hypernym: lassie \({IDS['lassie']}\); give"),  # the dog of that name comes first
    (["dog", f"{IDS['dog']} hound"], "dog and hound are one WordNet synset")])
def test_classes_that_wordnet_does_not_tell(excerpt: Path, tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_graph(WordNet(excerpt), read_classes(write_classes(tmp_path, *lines)))
    wanted = read_classes(write_classes(tmp_path, f"{IDS['lassie']} lassie"))
    assert build_graph(WordNet(excerpt), wanted).edges == []


def test_broken_wordnet_files(excerpt: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="index.noun does not exist; install"):
        WordNet(tmp_path)
    path, text = excerpt / "data.noun", (excerpt / "data.noun").read_text()
    for broken in (text.replace("@ ", "@ @ "), text.replace("01 entity 0", "00         "), text[:-60]):
        path.write_text(broken)
        with pytest.raises(ValueError, match="data.noun: '.*' is no line of WordNet 3.0"):
            WordNet(excerpt)
    path.write_text(text.replace(f"@ {IDS['entity'][1:]}", "@ 99999999"))
    with pytest.raises(ValueError, match="data.noun lacks synsets that other lines name"):
        WordNet(excerpt)
    (excerpt / "index.noun").write_text(HEADER + "dog n two\n")
    with pytest.raises(ValueError, match="index.noun: 'dog n two' is no line"):
        WordNet(excerpt)


def test_the_command_writes_a_graph_and_lists_senses(excerpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes, out = write_classes(tmp_path, "Polar+Bear", "DOG", f"{IDS['pet']} dog"), tmp_path / "deep" / "graph.json"
    arguments = ["--wordnet", str(excerpt), "--classes", str(classes), "--out", str(out)]
    assert main(arguments) == 0
    assert load_graph(out) == build_graph(WordNet(excerpt), read_classes(classes))
    assert capsys.readouterr().out.splitlines() == [
        "DOG: the first of 2 senses is taken; `nXXXXXXXX name` takes another",
        f"  {IDS['dog']} dog, domestic_dog, Canis_familiaris: a gloss | with a bar",
        f"  {IDS['frank']} frank, dog: a gloss | with a bar", f"{out}: 3 classes, 6 nodes, 6 edges"]
    before = out.read_text()
    write_classes(tmp_path, "snark")
    done = subprocess.run([sys.executable, "-m", "ucdr_ref.sre.wordnet", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no noun of WordNet 3.0") and done.stderr.count("\n") == 1
    assert out.read_text() == before


@pytest.mark.parametrize("change, message", [
    ({"edges": [[0, 9]]}, "edges between nodes 0 to 9 of 2"), ({"edges": [[-1, 0]]}, "nodes -1 to 0"),
    ({"edges": [[0, True]]}, "whole numbers"), ({"edges": [[0]]}, "is not a class graph"), ({"edges": [[0, "1"]]}, "whole numbers"),
    ({"classes": 3}, "2 ids, 2 names, 2 lists of lemmas, 3 classes"), ({"classes": 0}, "0 classes"),
    ({"classes": None}, "whole numbers"), ({"names": ["a"]}, "2 ids, 1 names"), ({"names": ["a", 2]}, "must be text"),
    ({"lemmas": 3}, "is not a class graph"), ({"width": 3}, "is not a class graph")])
def test_malformed_graphs(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "g.json"
    fields = {"ids": ["n1", "n2"], "names": ["a", "b"], "lemmas": [["a"], ["b"]], "edges": [[0, 1]], "classes": 1, "notice": ""}
    path.write_text(json.dumps(fields))
    assert load_graph(path).edges == [(0, 1)]
    path.write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=message):
        load_graph(path)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    with pytest.raises(FileNotFoundError, match="g.json does not exist; build it"):
        load_graph(path)
    for content, message in ((b"{", "class graph"), (b"[1, 2]", "class graph"), (b"{}", "class graph"), (b"\xff", "UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"g.json is not a?.*{message}.*; build it"):
            load_graph(path)


def test_shipped_awa2_graph() -> None:
    lines, shipped = read_classes(GRAPHS / "awa2.txt"), load_graph(GRAPHS / "awa2.json")
    assert (shipped.classes, len(set(shipped.ids)), len(shipped.ids), len(shipped.edges)) == (50, 106, 106, 108)
    assert shipped.ids[:50] == [line.id for line in lines]
    assert list(map(canonical, shipped.names[:50])) == [canonical(line.name) for line in lines]
    assert sum(line.split == "unseen" for line in lines) == 10
    assert "Princeton University" in shipped.notice and "without fee or" in shipped.notice


@pytest.mark.skipif(not (INSTALLED / "data.noun").is_file(), reason="WordNet 3.0 (Debian: wordnet-base) is not installed")
def test_closures_from_wordnet_are_the_shipped_graphs() -> None:
    wordnet = WordNet(INSTALLED)
    for name in ("awa2", "toy"):
        assert build_graph(wordnet, read_classes(GRAPHS / f"{name}.txt")) == load_graph(GRAPHS / f"{name}.json")

"""Class lists, WordNet's closure and the graph's JSON file, on an excerpt of WordNet written here."""
import json
import re
from pathlib import Path

import pytest

from ucdr_ref.sre import graph
from ucdr_ref.sre.graph import Graph, load_graph
from ucdr_ref.sre.wordnet import WordNet, build_graph, main, read_classes, unseen_classes

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


def test_closure_of_an_excerpt(excerpt, tmp_path):
    lines = "# comment", "", "puppy", f"seen {IDS['dog']} hound", "Polar+Bear", IDS["frank"]
    built = build_graph(WordNet(excerpt), read_classes(write_classes(tmp_path, *lines)))
    # breadth-first after the classes; canine before pet
    assert built.ids == [IDS[name] for name in ("puppy", "dog", "polar_bear", "frank", "canine", "pet", "animal", "entity")]
    assert built.names == ["puppy", "hound", "Polar Bear", "frank", "canine", "pet", "animal", "entity"]
    assert built.edges == [(0, 1), (1, 4), (1, 5), (2, 6), (3, 7), (4, 6), (5, 6), (6, 7)]
    assert built.classes == 4 and built.notice == "Licence of the excerpt.\nKeep this notice."


def test_lines_of_a_class_list(tmp_path):
    lines = read_classes(write_classes(tmp_path, "seen n00000001 killer_whale", "unseen n00000002 cow", "n00000003 polar bear",
                                       "seen grey seal", "unseen", "n00000004", "n00000005 cow"))
    assert lines == [("seen", "n00000001", "killer_whale"), ("unseen", "n00000002", "cow"), (None, "n00000003", "polar bear"),
                     ("seen", None, "grey seal"), (None, None, "unseen"), (None, "n00000004", ""), (None, "n00000005", "cow")]
    (tmp_path / "c.txt").write_text("cow\n", encoding="utf-8-sig")  # as Windows' editor writes it
    assert read_classes(tmp_path / "c.txt") == [(None, None, "cow")]


def test_unseen_classes_of_a_file(tmp_path):
    graph = Graph(["n00000001", "n00000002", "n00000003", "n00000004"], ["crane", "Cow", "crane", "bird"], [], [(0, 3)], 3, "")
    for lines, message in ((["crane"], "crane is none or several of the graph's classes; an id"),
                           (["bird"], "bird is none"), (["n00000009 cow"], "n00000009 is none")):
        with pytest.raises(ValueError, match=message):
            unseen_classes(graph, write_classes(tmp_path, *lines))
    assert unseen_classes(graph, write_classes(tmp_path, "n00000003 crane", "seen n00000001", "unseen cow", "cow")) == [1, 2]


@pytest.mark.parametrize("lines, message", [
    (["unicorn", "dog", "n99999999 yeti", "snark"], r"before: unicorn, yeti n99999999, snark; give `nXXXXXXXX name`"),
    (["dog", "lassie"], rf"without hypernym.*: lassie {IDS['lassie']}; give"),
    (["dog", f"{IDS['dog']} hound"], rf"listed before: hound {IDS['dog']};")])
def test_classes_that_wordnet_does_not_tell(excerpt, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        build_graph(WordNet(excerpt), read_classes(write_classes(tmp_path, *lines)))
    wanted = read_classes(write_classes(tmp_path, f"{IDS['lassie']} lassie"))
    assert build_graph(WordNet(excerpt), wanted).edges == []


def test_broken_wordnet_files(excerpt, tmp_path):
    with pytest.raises(FileNotFoundError, match="index.noun does not exist; install"):
        WordNet(tmp_path)
    data, index = (excerpt / "data.noun").read_text(), (excerpt / "index.noun").read_text()
    for broken in ((data[:-200], index), (data.replace(f"@ {IDS['entity'][1:]}", "@ 99999999"), index), (data, HEADER + "dog n two\n")):
        for name, text in zip(("data.noun", "index.noun"), broken):
            (excerpt / name).write_text(text)
        with pytest.raises(ValueError, match="does not hold the whole of WordNet 3.0's nouns; install"):
            WordNet(excerpt)


def test_the_command_writes_a_graph_and_lists_senses(excerpt, tmp_path, capsys):
    classes, out = write_classes(tmp_path, "Polar+Bear", "DOG", f"{IDS['pet']} dog"), tmp_path / "graph.json"
    arguments = ["--wordnet", str(excerpt), "--classes", str(classes), "--out", str(out)]
    main(arguments)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "DOG: the first of 2 senses is taken", f"{IDS['dog']} a gloss | with a bar", f"{IDS['frank']} a gloss | with a bar",
        f"{out}: 3 classes, 6 nodes, 6 edges"]
    assert load_graph(out) == build_graph(WordNet(excerpt), read_classes(classes))
    before = out.read_text()
    write_classes(tmp_path, "snark")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert re.fullmatch("error: not in WordNet.*: snark; give .*\n", capsys.readouterr().err)
    assert out.read_text() == before


def test_files_that_are_no_graph(tmp_path):
    path = tmp_path / "g.json"
    with pytest.raises(FileNotFoundError, match="g.json does not exist; build it"):
        load_graph(path)
    fields = {"ids": ["n1", "n2"], "names": ["a", "b"], "lemmas": [["a"], ["b"]], "edges": [[0, 1]], "classes": 1, "notice": ""}
    path.write_text(json.dumps(fields))
    assert load_graph(path).edges == [(0, 1)]
    changes: list[dict] = [{"edges": [[0, 9]]}, {"edges": [[-1, 0]]}, {"edges": [[0]]}, {"edges": [[0, "1"]]}, {"classes": 3},
                           {"classes": 0}, {"classes": None}, {"names": ["a"]}, {"ids": 3}, {"lemmas": []}, {"width": 3}]
    for content in (b"{", b"[1, 2]", b"{}", b"\xff", *(json.dumps(fields | change).encode() for change in changes)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="g.json is not .*; build it"):
            load_graph(path)


def test_shipped_awa2_graph():
    lines, shipped = read_classes(GRAPHS / "awa2.txt"), load_graph(GRAPHS / "awa2.json")
    assert (shipped.classes, len(set(shipped.ids)), len(shipped.ids), len(shipped.edges)) == (50, 106, 106, 108)
    assert unseen_classes(shipped, GRAPHS / "awa2.txt") == list(range(40, 50))
    assert shipped.ids[:50] == [line.id for line in lines]
    assert shipped.names[:50] == [line.name.replace("_", " ") for line in lines]
    assert "Princeton University" in shipped.notice and "without fee or" in shipped.notice


@pytest.mark.skipif(not (INSTALLED / "data.noun").is_file(), reason="WordNet 3.0 (Debian: wordnet-base) is not installed")
def test_closures_from_wordnet_are_the_shipped_graphs():
    wordnet = WordNet(INSTALLED)
    for name in ("awa2", "toy"):
        assert build_graph(wordnet, read_classes(GRAPHS / f"{name}.txt")) == load_graph(GRAPHS / f"{name}.json")

"""WordNet 3.0's noun files -> hypernym closure of a class list -> class graph, as JSON (see `graph`).

    python -m ucdr_ref.sre.wordnet --wordnet DIR --classes FILE --out graph.json

DIR holds `data.noun` and `index.noun` (Debian package `wordnet-base`: /usr/share/wordnet).
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..clip.weights import read_text
from .graph import Graph, canonical, duplicates, save_graph

SYNSET_ID = re.compile(r"n\d{8}")


class ClassLine(NamedTuple):
    split: str | None  # `seen`, `unseen` or not given
    id: str | None
    name: str


class WordNet:
    """WordNet 3.0's nouns; a synset's id is `n` and its eight digits in the files."""

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError for a missing file, ValueError for a line that is not WordNet's."""
        self.lemmas: dict[str, list[str]] = {}  # {synset: its words, `_` within}
        self.hypernyms: dict[str, list[str]] = {}  # {synset: direct ones}
        self.glosses: dict[str, str] = {}
        self.senses: dict[str, list[str]] = {}  # {lemma: synsets, the most frequent first}
        advice = "; install Debian's wordnet-base (/usr/share/wordnet) or unpack WordNet 3.0's database files"
        for name, add in (("index.noun", self.add_lemma), ("data.noun", self.add_synset)):
            path, licence = Path(folder, name), []
            for line in read_text(path, advice).splitlines():
                if line.startswith("  "):
                    licence.append(re.sub(r"^\s*\d+ ", "", line).strip())  # without the line's number
                    continue
                try:
                    add(line)
                except (ValueError, IndexError):
                    raise ValueError(f"{path}: {line[:60]!r} is no line of WordNet 3.0") from None
        self.notice = "\n".join(licence)
        if not self.lemmas.keys() >= {*chain(*self.senses.values(), *self.hypernyms.values())}:
            raise ValueError(f"{path} lacks synsets that other lines name; is it whole?")

    def add_lemma(self, line: str) -> None:
        """`lemma n S ... (offset)*S`, S senses"""
        lemma, _, count, *rest = line.split()
        self.senses[lemma] = ["n" + offset for offset in rest[-int(count):]]

    def add_synset(self, line: str) -> None:
        """`offset file n W (lemma id)*W P (symbol offset part source)*P | gloss`, W in base 16"""
        fields, gloss = line.split(" | ", maxsplit=1)
        offset, _, _, count, *rest = fields.split()
        words = 2 * int(count, 16)
        lemmas, pointers = rest[:words:2], rest[words + 1:]
        if not lemmas or len(pointers) != 4 * int(rest[words]):
            raise ValueError
        self.lemmas["n" + offset], self.glosses["n" + offset] = lemmas, gloss.strip()
        self.hypernyms["n" + offset] = [  # `@`; an instance's `@i` does not count
            "n" + target for symbol, target in zip(pointers[::4], pointers[1::4]) if symbol == "@"]

    def find(self, line: ClassLine) -> list[str]:
        """The id of a class, or else the ids of its name's senses."""
        return [line.id] if line.id else self.senses.get(canonical(line.name).replace(" ", "_"), [])


def read_classes(path: str | Path) -> list[ClassLine]:
    """Lines `[seen|unseen] [nXXXXXXXX] name`; after an id the name may be missing. `#` starts a comment line.

    Raises FileNotFoundError, or ValueError for a file without a class, and a class (by id where there is one)
    listed twice: classes with different ids may have one name.
    """
    lines: list[ClassLine] = []
    for text in read_text(path, "; expected a text file with one class per line").splitlines():
        words = text.split()
        if not words or words[0].startswith("#"):
            continue
        split = words.pop(0) if words[0] in ("seen", "unseen") and len(words) > 1 else None
        synset = words.pop(0) if SYNSET_ID.fullmatch(words[0]) else None
        lines.append(ClassLine(split, synset, " ".join(words)))
    if not lines:
        raise ValueError(f"{path} lists no class; expected one per line")
    if twice := duplicates([line.id or canonical(line.name) for line in lines]):
        raise ValueError(f"{path} lists classes twice: {', '.join(twice)}")
    return lines


def unseen_classes(graph: Graph, path: str | Path) -> list[int]:
    """The indices of the graph's classes in a file's lines, but for those that are marked `seen`.

    Raises as `read_classes`, and ValueError for what is no class, or the name of several.
    """
    lines = {line.id or canonical(line.name): line.split for line in read_classes(path)}
    names = [canonical(name) for name in graph.names[:graph.classes]]
    index = {name: k for k, name in enumerate(names) if names.count(name) == 1}
    index |= {synset: k for k, synset in enumerate(graph.ids[:graph.classes])}
    if missing := [key for key in lines if key not in index]:
        raise ValueError(f"{path}: not the name of one of the graph's {graph.classes} classes: "
                         f"{', '.join(missing)[:300]}; where several have it, give an id, `nXXXXXXXX name`")
    return sorted(index[key] for key, split in lines.items() if split != "seen")


def build_graph(wordnet: WordNet, classes: Sequence[ClassLine]) -> Graph:
    """The classes in their order, then their ancestors breadth-first, hypernyms in the order of their lemmas.

    A class without an id is its name's first sense, one without a name gets its synset's first lemma. Raises
    ValueError that lists the classes not found and those whose first sense has no hypernym (for `crane` the
    writer Stephen Crane), or classes of one synset.
    """
    ids, refused = [], []
    for line in classes:
        synset = next(iter(wordnet.find(line)), "")
        ids.append(synset)
        if synset not in wordnet.lemmas or not (line.id or wordnet.hypernyms[synset]):
            refused.append(f"{line.name} ({synset})" if synset else line.name)
    if refused:
        raise ValueError(f"no noun of WordNet 3.0, or the first sense has no hypernym: {', '.join(refused)}; "
                         "give `nXXXXXXXX name`")
    if twice := duplicates(ids):
        same = [line.name for line, synset in zip(classes, ids) if synset == twice[0]]
        raise ValueError(f"classes {' and '.join(same)} are one WordNet synset ({twice[0]}); keep one")

    number = {synset: k for k, synset in enumerate(ids)}
    edges = []
    for child, synset in enumerate(ids):  # grows while it is walked
        for parent in sorted(wordnet.hypernyms[synset], key=lambda synset: (wordnet.lemmas[synset], synset)):
            if parent not in number:
                number[parent] = len(ids)
                ids.append(parent)
            edges.append((child, number[parent]))
    lemmas = [[word.replace("_", " ") for word in wordnet.lemmas[synset]] for synset in ids]
    names = [words[0] for words in lemmas]
    for k, line in enumerate(classes):
        names[k] = re.sub("[_+]+", " ", line.name) or names[k]
    return Graph(ids, names, lemmas, edges, len(classes), wordnet.notice)


def list_senses(wordnet: WordNet, line: ClassLine) -> None:
    """Prints the senses of a name that has several, with ids to choose from; the first is taken."""
    senses = wordnet.find(line)
    if len(senses) > 1:
        print(f"{line.name}: the first of {len(senses)} senses is taken; `nXXXXXXXX name` takes another")
        for synset in senses:
            print(f"  {synset} {', '.join(wordnet.lemmas[synset])}: {wordnet.glosses[synset]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.sre.wordnet",
                                     description="hypernym closure of a class list")
    parser.add_argument("--wordnet", required=True, metavar="DIR", help="folder of data.noun and index.noun")
    parser.add_argument("--classes", required=True, metavar="FILE",
                        help="per line: [seen|unseen] [nXXXXXXXX] name; a name alone takes its first sense")
    parser.add_argument("--out", required=True, metavar="FILE", help="the graph, as JSON")
    args = parser.parse_args(argv)
    try:
        wordnet, classes = WordNet(args.wordnet), read_classes(args.classes)
        for line in classes:
            list_senses(wordnet, line)
        graph = build_graph(wordnet, classes)
        save_graph(graph, args.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {graph.classes} classes, {len(graph.ids)} nodes, {len(graph.edges)} edges")
    return 0


if __name__ == "__main__":
    sys.exit(main())

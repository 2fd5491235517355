"""Class list -> hypernym closure in WordNet 3.0's noun files -> class graph, as JSON.

    python -m ucdr_ref.sre.wordnet --wordnet DIR --classes FILE --out graph.json
"""
import argparse
import re
from pathlib import Path
from typing import NamedTuple

from ..clip.weights import read_text
from .graph import Graph, canonical, save_graph


class ClassLine(NamedTuple):
    split: str | None  # `seen`, `unseen` or not given
    id: str | None
    name: str


class WordNet:
    """WordNet 3.0's nouns; a synset's id is `n` and its eight digits in the files.

    Raises FileNotFoundError, or ValueError for files that are not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.lemmas: dict[str, list[str]] = {}  # {synset: its words, `_` within}
        self.glosses: dict[str, str] = {}  # {synset: its meaning}
        self.hypernyms: dict[str, list[str]] = {}  # {synset: direct ones}
        self.senses: dict[str, list[str]] = {}  # {lemma: synsets, the most frequent first}
        advice = "; install Debian's wordnet-base (/usr/share/wordnet)"
        index = read_text(Path(folder, "index.noun"), advice).splitlines()
        data = read_text(Path(folder, "data.noun"), advice).splitlines()
        licence = [line for line in data if line.startswith("  ")]  # both begin with it
        self.notice = "\n".join(re.sub(r"^\s*\d+ ", "", line).strip() for line in licence)
        try:
            for line in index[len(licence):]:  # lemma n S ... (offset)*S, S senses
                lemma, _, count, *rest = line.split()
                self.senses[lemma] = ["n" + offset for offset in rest[-int(count):]]
            for line in data[len(licence):]:
                # offset file n W (lemma id)*W P (symbol offset part source)*P | gloss, W in base 16
                fields, _, gloss = line.partition(" | ")
                offset, _, _, count, *rest = fields.split()
                words, synset = 2 * int(count, 16), "n" + offset
                pointers = zip(rest[words + 1::4], rest[words + 2::4])
                self.lemmas[synset], self.glosses[synset] = rest[:words:2], gloss
                # An instance's `@i` does not count.
                self.hypernyms[synset] = ["n" + target for symbol, target in pointers if symbol == "@"]
            if not self.lemmas.keys() >= set().union(*self.senses.values(), *self.hypernyms.values()):
                raise ValueError
        except ValueError:
            raise ValueError(f"{folder} does not hold the whole of WordNet 3.0's nouns{advice}") from None

    def find(self, line: ClassLine) -> list[str]:
        """A class's id, or else the senses of its name"""
        return [line.id] if line.id else self.senses.get(canonical(line.name).replace(" ", "_"), [])


def read_classes(path: str | Path) -> list[ClassLine]:
    """Lines `[seen|unseen] [nXXXXXXXX] name`, the name optional after an id; `#` starts a comment line"""
    lines = []
    for text in read_text(path).splitlines():
        words = text.split()
        if not words or words[0].startswith("#"):
            continue
        split = words.pop(0) if words[0] in ("seen", "unseen") and len(words) > 1 else None
        synset = words.pop(0) if re.fullmatch(r"n\d{8}", words[0]) else None
        lines.append(ClassLine(split, synset, " ".join(words)))
    return lines


def unseen_classes(graph: Graph, path: str | Path) -> list[int]:
    """Indices of the graph's classes that a file's lines name, without those marked `seen`; ValueError"""
    names = [canonical(name) for name in graph.names[:graph.classes]]
    index = {name: k for k, name in enumerate(names) if names.count(name) == 1}
    index |= {synset: k for k, synset in enumerate(graph.ids[:graph.classes])}
    lines = {line.id or canonical(line.name): line.split for line in read_classes(path)}
    if missing := [key for key in lines if key not in index]:
        raise ValueError(f"{path}: {missing[0]} is none or several of the graph's classes; an id names one")
    return sorted(index[key] for key, split in lines.items() if split != "seen")


def build_graph(wordnet: WordNet, classes: list[ClassLine]) -> Graph:
    """The classes in their order, then their ancestors breadth-first, hypernyms in the order of their lemmas.

    A class without an id is its name's first sense. Raises ValueError for classes not found or listed twice,
    and a first sense without hypernym.
    """
    number: dict[str, int] = {}  # of a node
    refused = []
    for line in classes:
        synset = next(iter(wordnet.find(line)), "")
        if synset not in wordnet.lemmas or synset in number or not (line.id or wordnet.hypernyms[synset]):
            refused.append(f"{line.name} {synset}".strip())
        number[synset] = len(number)
    if refused:
        raise ValueError("not in WordNet, a first sense without hypernym, or listed before: "
                         f"{', '.join(refused)}; give `nXXXXXXXX name`")

    ids, edges = list(number), []
    for child, synset in enumerate(ids):  # grows while it is walked
        for parent in sorted(wordnet.hypernyms[synset], key=lambda synset: wordnet.lemmas[synset]):
            if parent not in number:
                number[parent] = len(ids)
                ids.append(parent)
            edges.append((child, number[parent]))
    lemmas = [[word.replace("_", " ") for word in wordnet.lemmas[synset]] for synset in ids]
    names = [words[0] for words in lemmas]
    for k, line in enumerate(classes):
        names[k] = re.sub("[_+]+", " ", line.name) or names[k]
    return Graph(ids, names, lemmas, edges, len(classes), wordnet.notice)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wordnet", required=True, metavar="DIR", help="folder of data.noun and index.noun")
    parser.add_argument("--classes", required=True, metavar="FILE", help="[seen|unseen] [nXXXXXXXX] name")
    parser.add_argument("--out", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        wordnet, classes = WordNet(args.wordnet), read_classes(args.classes)
        for line in classes:
            if len(senses := wordnet.find(line)) > 1:
                listed = [f"{synset} {wordnet.glosses[synset]}" for synset in senses]
                print(f"{line.name}: the first of {len(senses)} senses is taken", *listed, sep="\n  ")
        graph = build_graph(wordnet, classes)
        save_graph(graph, args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.out}: {graph.classes} classes, {len(graph.ids)} nodes, {len(graph.edges)} edges")


if __name__ == "__main__":
    main()

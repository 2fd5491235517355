"""WordNet 3.0's noun files -> hypernym closure of a class list -> class graph, as JSON.

    python -m ucdr_ref.sre.wordnet --wordnet DIR --classes FILE --out graph.json

DIR holds `data.noun` and `index.noun` (Debian package `wordnet-base`: /usr/share/wordnet).
"""
from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..clip.tensorfile import read_text, regular_file
from .graph import Graph, canonical, duplicates

SYNSET_ID = re.compile(r"n\d{8}")


class ClassLine(NamedTuple):
    split: str | None  # `seen`, `unseen` or not given
    id: str | None
    name: str


class WordNet:
    """WordNet 3.0's nouns. A synset's id is `n` and its byte offset in `data.noun`, where it is read."""

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError for a missing file, ValueError for a malformed line of `index.noun`."""
        advice = "; install Debian's wordnet-base (/usr/share/wordnet) or unpack WordNet 3.0's database files"
        self.path, index = regular_file(Path(folder, "data.noun"), advice), Path(folder, "index.noun")
        self.data = io.BytesIO(self.path.read_bytes())
        self.senses: dict[str, list[str]] = {}  # ids of a lemma's synsets
        for number, line in enumerate(read_text(index, advice).splitlines(), start=1):
            if line.startswith("  "):  # licence header
                continue
            try:
                lemma, _, count, *rest = line.split()
                self.senses[lemma] = [f"n{int(offset):08d}" for offset in rest[-int(count):]]
            except ValueError:
                raise ValueError(f"{index}, line {number}: {line[:60]!r} is not WordNet 3.0's") from None

    def notice(self) -> str:
        """The licence in the header of `data.noun`, its line numbers removed."""
        lines = self.data.getvalue()[:8192].decode("utf-8", errors="replace").splitlines()
        header = [re.sub(r"^\s*\d+ ", "", line).strip() for line in lines if line.startswith("  ")]
        return "\n".join(header) or "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved."

    def line(self, synset: str) -> bytes:
        self.data.seek(int(synset[1:]))
        return self.data.readline()

    def has(self, synset: str) -> bool:
        return self.line(synset).startswith(f"{synset[1:]} ".encode())

    def synset(self, synset: str) -> tuple[list[str], list[str]]:
        """Lemmas and direct hypernyms (`@`, without an instance's `@i`) of a synset id."""
        try:
            number, _, kind, count, *rest = self.line(synset).decode().split(" | ")[0].split()
            words = 2 * int(count, 16)
            lemmas, pointers = rest[:words:2], rest[words + 1:]
            if not lemmas or ("n" + number, kind, len(pointers)) != (synset, "n", 4 * int(rest[words])):
                raise ValueError
            links = zip(pointers[::4], pointers[1::4])
            return lemmas, [f"n{int(target):08d}" for symbol, target in links if symbol == "@"]
        except (ValueError, IndexError):
            raise ValueError(f"{self.path} has no noun synset at byte {synset[1:]}: expected WordNet 3.0's "
                             "own file, unchanged") from None

    def synset_name(self, synset: str) -> str:
        """`first_lemma.n.SENSE`, by which the hypernyms of a synset are sorted."""
        lemma = self.synset(synset)[0][0].lower()
        senses = self.senses.get(lemma, [])
        return f"{lemma}.n.{senses.index(synset) + 1 if synset in senses else 0:02d}"

    def first_sense(self, name: str) -> str | None:
        """Id of the first noun sense of a name (spaces, `_` or `+` between words), if it has one."""
        senses = self.senses.get(canonical(name).replace(" ", "_"))
        return senses[0] if senses else None


def read_classes(path: str | Path) -> list[ClassLine]:
    """Lines `[seen|unseen] nXXXXXXXX [name]` or `name`; empty lines and `#` comments are skipped.

    Raises FileNotFoundError, or ValueError for a file without a class, and a class (by id where there is one)
    listed twice: classes with different ids may have one name.
    """
    lines: list[ClassLine] = []
    for text in read_text(path, "; expected a text file with one class per line").splitlines():
        words = text.split()
        if not words or words[0].startswith("#"):
            continue
        marked = words[0] in ("seen", "unseen") and SYNSET_ID.fullmatch(" ".join(words[1:2]))
        split = words.pop(0) if marked else None
        synset = words.pop(0) if SYNSET_ID.fullmatch(words[0]) else None
        lines.append(ClassLine(split, synset, " ".join(words)))
    if not lines:
        raise ValueError(f"{path} lists no class; expected one per line")
    if twice := duplicates([line.id or canonical(line.name) for line in lines]):
        raise ValueError(f"{path} lists classes twice: {', '.join(twice)}")
    return lines


def build_graph(wordnet: WordNet, classes: Sequence[ClassLine]) -> Graph:
    """Hypernym closure: the classes in their order, their ancestors breadth-first; edges by child.

    A class without an id takes the first noun sense of its name, one without a name the first word of its
    synset. Hypernyms of a synset follow their synset names' order.
    Raises ValueError that lists every class missing in WordNet, or two classes that are one synset.
    """
    ids: list[str] = []
    missing = []
    for line in classes:
        synset = line.id or wordnet.first_sense(line.name)
        if synset and wordnet.has(synset):
            ids.append(synset)
        else:
            missing.append(f"{line.name} ({line.id})" if line.id else line.name)
    if missing:
        raise ValueError(f"missing among WordNet 3.0's nouns: {', '.join(missing)}; give `nXXXXXXXX name`")
    if twice := duplicates(ids):
        same = [line.name for line, synset in zip(classes, ids) if synset == twice[0]]
        raise ValueError(f"classes {' and '.join(same)} are one WordNet synset ({twice[0]}); keep one")

    number = {synset: k for k, synset in enumerate(ids)}
    lemmas: list[list[str]] = []
    edges: list[tuple[int, int]] = []
    for child, synset in enumerate(ids):  # grows while it is walked: breadth-first
        words, hypernyms = wordnet.synset(synset)
        lemmas.append([word.replace("_", " ") for word in words])
        for parent in sorted(hypernyms, key=wordnet.synset_name):
            if parent not in number:
                number[parent] = len(ids)
                ids.append(parent)
            edges.append((child, number[parent]))
    names = [words[0] for words in lemmas]
    for k, line in enumerate(classes):
        names[k] = re.sub(r"[_+]+", " ", line.name) or names[k]
    return Graph(ids, names, lemmas, edges, len(classes), wordnet.notice())


def save_graph(graph: Graph, path: str | Path) -> None:
    """Writes JSON, one field per line, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(graph).items())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("{\n" + fields + "\n}\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.sre.wordnet",
                                     description="hypernym closure of a class list")
    parser.add_argument("--wordnet", required=True, metavar="DIR", help="folder of data.noun and index.noun")
    parser.add_argument("--classes", required=True, metavar="FILE",
                        help="per line: [seen|unseen] [nXXXXXXXX] name")
    parser.add_argument("--out", required=True, metavar="FILE", help="the graph, as JSON")
    args = parser.parse_args(argv)
    try:
        graph = build_graph(WordNet(args.wordnet), read_classes(args.classes))
        save_graph(graph, args.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {graph.classes} classes, {len(graph.ids)} nodes, {len(graph.edges)} edges")
    return 0


if __name__ == "__main__":
    sys.exit(main())

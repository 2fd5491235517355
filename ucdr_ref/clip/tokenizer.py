"""CLIP's byte-pair tokenizer on the standard library (Radford et al. 2021, section 2.4): text in, ids out.

The 49,408 ids are those of openai/CLIP. The merges in `bpe_merges.txt.gz` are OpenAI's (MIT, see
`bpe_merges.LICENSE`). OpenAI's tokenizer cleans text with `ftfy` and splits it with `regex`; without them

- mojibake is not guessed at: "cafÃ©" stays and does not become "café"; `ftfy`'s other repairs are done;
- a letter or number younger than the running Python's Unicode table counts as a symbol;
- terminal colour codes, entities in capitals ("&EACUTE;") and those escaped more than three times over stay.
"""
from __future__ import annotations

import functools
import gzip
import html
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

MERGES = Path(__file__).with_name("bpe_merges.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"

# `'s` and its like, and the special tokens, win over the runs below at the position where they begin.
_WHOLE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_RUN = re.compile("L+|N|S+")
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")


@functools.cache
def _vocabulary() -> tuple[dict[int, str], dict[str, int], dict[tuple[str, str], int]]:
    """Byte -> symbol, symbol -> id, symbol pair -> merge rank; the merges are read once, on first use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    if not MERGES.is_file():
        raise FileNotFoundError(f"{MERGES} is missing; copy it along with tokenizer.py")
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    words = [*symbols.values(), *(f"{symbol}</w>" for symbol in symbols.values()), *map("".join, merges)]
    ids = {word: i for i, word in enumerate([*words, START, END])}
    return symbols, ids, {pair: rank for rank, pair in enumerate(merges)}


@functools.cache
def _repairs() -> dict[int, str]:
    """The part of `ftfy.fix_text` that maps one character to a fixed replacement."""
    controls = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    ligatures = [0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
    widths = [0x3000, *range(0xFF01, 0xFFEF)]
    table = dict.fromkeys(controls, "")
    table |= {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
    table |= {code: unicodedata.normalize("NFKC", chr(code)) for code in ligatures + widths}
    table |= dict.fromkeys([0x82, 0x91, 0x92, 0x2BC, *range(0x2018, 0x201C)], "'")
    table |= dict.fromkeys([0x84, 0x93, 0x94, *range(0x201C, 0x2020)], '"')
    return table | {0x149: "'n", 0xFB05: "\u017ft"}


def _clean(text: str) -> str:
    """Repaired, in NFC, without HTML entities, single spaces, lower case."""
    # Joins surrogate pairs; a lone surrogate, which has no bytes in UTF-8, becomes U+FFFD.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # As in ftfy: from the first line with a "<" on, entities wait until after the repairs.
    tagged = text.rfind("\n", 0, text.find("<")) + 1 if "<" in text else len(text)
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text[:tagged]) + text[tagged:]
    text = unicodedata.normalize("NFC", text.translate(_repairs()))
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _kind(char: str) -> str:
    """`L` letter, `N` number, ` ` separator, `S` anything else."""
    # CLIP's pattern, which ignores case, never matches a lone U+0345: it folds to a letter and is none.
    if char in " \u0345":
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "S"


def _split(text: str) -> Iterator[str]:
    """Cleaned text -> the words, single numbers and runs of symbols that are encoded one by one."""
    kinds = "".join(map(_kind, text))
    at = 0
    while at < len(text):
        match = _WHOLE.match(text, at) or _RUN.match(kinds, at)
        end = match.end() if match else at + 1
        if match:
            yield text[at:end]
        at = end


@functools.lru_cache(maxsize=2**15)
def _bpe(word: str) -> tuple[int, ...]:
    """Ids of one word: merges the pair of the lowest rank, everywhere, until no pair has a rank."""
    symbols, ids, ranks = _vocabulary()
    if word in (START, END):
        return (ids[word],)
    parts = [symbols[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged = parts[:1]
        for part in parts[1:]:
            if (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return tuple(ids[part] for part in parts)


def encode(text: str) -> list[int]:
    """Ids of `text` between the start-of-text id 49406 and the end-of-text id 49407."""
    ids = _vocabulary()[1]
    return [ids[START], *itertools.chain.from_iterable(map(_bpe, _split(_clean(text)))), ids[END]]


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Ids of b texts (or of one), [b, L] int64, padded with 0.

    A text of more than `context_length` ids is a ValueError; with `truncate` it is cut before end-of-text.
    """
    rows = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(rows), context_length, dtype=torch.long)
    for row, text in zip(result, rows):
        ids = encode(text)
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(f"the text {text[:80]!r} has {len(ids)} tokens, more than the "
                                 f"{context_length} that CLIP reads: shorten it")
            ids = ids[: context_length - 1] + ids[-1:]
        row[: len(ids)] = torch.tensor(ids)
    return result

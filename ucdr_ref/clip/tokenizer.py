"""CLIP's byte-pair tokenizer (Radford et al. 2021, section 2.4) on the standard library; OpenAI's merges.

OpenAI's cleans text with `ftfy` and splits it with `regex`. Without them mojibake ("cafÃ©"), terminals'
colour codes, and HTML entities in capitals or escaped more than three times stay; letters and numbers younger
than Python's Unicode table count as symbols.
"""
import functools
import gzip
import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

MERGES = Path(__file__).with_name("bpe_merges.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"

# _WHOLE matches text and wins; _RUN matches the kinds of its characters.
_WHOLE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_RUN = re.compile("L+|N|S+")
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")


@functools.cache
def _vocabulary() -> tuple[dict[int, str], dict[str, int], dict[tuple[str, str], int]]:
    """Byte -> symbol, symbol -> id, symbol pair -> merge rank."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    words = [*symbols.values(), *(f"{symbol}</w>" for symbol in symbols.values()), *map("".join, merges)]
    ids = {word: i for i, word in enumerate([*words, START, END])}
    return symbols, ids, {pair: rank for rank, pair in enumerate(merges)}


@functools.cache
def _repairs() -> dict[int, str]:
    """What `ftfy.fix_text` puts for single characters."""
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
    # As in ftfy: from the first line with a "<" on, entities wait until the repairs are done.
    tagged = text.rfind("\n", 0, text.find("<")) + 1 if "<" in text else len(text)
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text[:tagged]) + text[tagged:]
    text = unicodedata.normalize("NFC", text.translate(_repairs()))
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _kind(char: str) -> str:
    """`L` letter, `N` number, ` ` separator, `S` anything else."""
    if char in " \u0345":  # CLIP's pattern, which ignores case, finds no kind for U+0345
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "S"


def _split(text: str) -> Iterator[str]:
    """Cleaned text -> words, single numbers and runs of symbols."""
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
    """Ids of a word: merges the pair of the lowest rank, everywhere, until no pair has a rank."""
    symbols, ids, ranks = _vocabulary()
    if word in (START, END):
        return (ids[word],)
    parts = [symbols[byte] for byte in word.encode("utf-8", "replace")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
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
    """Ids of a text, between start-of-text (49406) and end-of-text (49407)."""
    ids = _vocabulary()[1]
    words = _split(_clean(text))
    return [ids[START], *(number for word in words for number in _bpe(word)), ids[END]]


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """b texts (or one) -> ids [b, L], padded with 0; ValueError for a longer text, unless `truncate`."""
    rows = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(rows), context_length, dtype=torch.long)
    for row, text in zip(result, rows):
        ids = encode(text)
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(f"{text[:80]!r}: {len(ids)} tokens, CLIP reads {context_length}; shorten it")
            ids = ids[: context_length - 1] + ids[-1:]
        row[: len(ids)] = torch.tensor(ids)
    return result

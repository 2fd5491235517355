"""The tokenizer against open_clip_torch's (skipped where that is not installed), against golden ids, and its errors."""
import gzip
import hashlib
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch

from ucdr_ref.clip import tokenizer
from ucdr_ref.clip.tokenizer import encode, tokenize

ROOT = Path(__file__).resolve().parents[2]

# Computed with open_clip_torch 3.3.0.
GOLDEN = {
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "it's 2024: I'll wait!": [585, 568, 273, 271, 273, 275, 281, 328, 1342, 1885, 256],
    "½ Ⅷ 10km": [33613, 158, 227, 371, 272, 271, 4590],
    "café cafe\u0301": [15304, 15304],
    "it’s “quoted” ﬁne": [585, 568, 257, 27706, 257, 3797],
    "&lt;b&gt; salt &amp; pepper": [283, 321, 285, 6611, 261, 8253],
    "🐶 dog 👨\u200d👩\u200d👧": [10631, 1929, 25023, 26304, 964, 356],
    "一只狗的照片": [19759, 222, 34517, 103, 163, 233, 245, 163, 248, 226, 163, 227, 100, 163, 231, 485],
    "صورة كلب": [27271, 48242, 20915, 33499, 14251, 35330],
    "कुत्ता": [22067, 39653, 27263, 19389, 27263, 13343],
    "İstanbul'ſ": [328, 16384, 11231, 6, 129, 379],
    "a\u0345b \u0345": [320, 321],
}

TEXTS = [
    "it's I'll we've he'd I'm they're don't can't rock'n'roll 'tis dogs' o'clock 's''s'sss DON'T SHE'LL",
    "it\u2019s \u2018quoted\u2019 \u201cdouble\u201d \u201alow\u201b \u201elow\u201f '\u017f long s, I'\u017ft",
    "salt &amp; pepper, &lt;b&gt;, &quot;x&quot;, caf&eacute;, &#8217;s, &amp;amp;lt;, &nbsp;&copy 2020, &no; & &",
    "\ufb01ne \ufb02oor o\ufb03ce \ufb05 \u0132ssel \u0149 \u01c6 ＦＵＬＬ\u3000ｗｉｄｔｈ！ Ｉ\u2019ｍ \uffe3",
    "\u0130stanbul ISTANBUL \u0131stanbul STRASSE stra\u00dfe ΣΊΣΥΦΟΣ \u212a \u017f",
    "C1 \x80 \x85 \x82low\x91 \x91quoted\x92 \x93double\x94 \x99 \x81",
]

# Where dropping ftfy shows: (text, what ftfy reads it as).
UNREPAIRED = [("cafÃ© menu", "café menu"), ("\x1b[31mred\x1b[0m dog", "red dog"), ("P&EACUTE;REZ", "PÉREZ"),
              ("&amp;amp;amp;lt; x", "< x")]
BLOCKS = [(0x20, 0x7F), (0, 0x20), (0x80, 0x370), (0x300, 0x370), (0x370, 0x900), (0x900, 0x2000), (0x2000, 0x2C00),
          (0x3000, 0x3100), (0x4E00, 0xD7A4), (0xE000, 0x10000), (0x1F000, 0x1FB00), (0x10000, 0x110000)]
PIECES = ["'s", "'T", "\u2019re", "'LL", "'\u017f", "&amp;", "&lt;", "&eacute;", "&amp;quot;", "&nbsp;", "&#8217;", "&copy",
          "<|endoftext|>", "<|StartOfText|>", " ", "  ", "\t", "\n", "\u00a0", "½", "Ⅷ", "🐶\u200d🌈", "c\u0327\u0301", "the"]


def random_strings(count: int = 600) -> list[str]:
    """Every other string mixes all blocks, the others two."""
    rng, strings = random.Random(0), []
    for i in range(count):
        blocks, parts = BLOCKS if i % 2 else rng.sample(BLOCKS, 2), []
        for _ in range(rng.randint(1, 16)):
            code = rng.randrange(*rng.choice(blocks))
            parts.append(rng.choice(PIECES) if rng.random() < 0.12 else chr(code))
        strings.append("".join(parts))
    return strings


def merges() -> list[str]:
    return gzip.decompress(tokenizer.MERGES.read_bytes()).decode("utf-8").splitlines()


def whole_words() -> list[str]:
    """1,000 common English words: the merges that end a word, by rank."""
    words = [line.replace(" ", "").removesuffix("</w>") for line in merges() if line.endswith("</w>")]
    return [word for word in words if re.fullmatch("[a-z]{4,}", word)][:1000]


def class_names() -> list[str]:
    lines = [line for path in sorted([*(ROOT / "ucdr_ref").rglob("splits/*.txt"), *(ROOT / "ucdr_ref").rglob("graphs/*.txt")])
             for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return sorted({line.split()[-1] for line in lines if line})


@pytest.fixture
def reference() -> Any:
    """open_clip's tokenizer as it is, but for the special tokens, which it spells otherwise than OpenAI."""
    peer = pytest.importorskip("open_clip.tokenizer")
    regex = pytest.importorskip("regex")
    simple = peer.SimpleTokenizer()
    for theirs, openai in (("<start_of_text>", tokenizer.START), ("<end_of_text>", tokenizer.END)):
        simple.encoder[openai] = simple.encoder[theirs]
        simple.cache[openai] = openai
    contractions_on = simple.pat.pattern.split("|", 2)[2]
    assert contractions_on == r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    simple.pat = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|" + contractions_on, regex.IGNORECASE)
    return simple


def inner(text) -> list[int]:
    ids = encode(text)
    assert (ids[0], ids[-1]) == (49406, 49407)
    return ids[1:-1]


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text):
    assert encode(text) == [49406, *GOLDEN[text], 49407]


def test_merges_are_the_published_ones():
    digest = hashlib.sha256(gzip.decompress(tokenizer.MERGES.read_bytes())).hexdigest()
    assert digest == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    published = Path(pytest.importorskip("open_clip.tokenizer").default_bpe()).read_bytes()
    assert merges() == gzip.decompress(published).decode("utf-8").split("\n")[1:48895]


def test_class_names_and_common_words_equal_reference(reference):
    """Words also capitalised, reversed and run together, since most are a single token by themselves."""
    names, words = class_names(), whole_words()
    assert len(names) > 300 and len(words) == 1000 and {"with", "house"} < {*words}
    texts = [f"a photo of {name.replace('_', ' ')} from real domain." for name in names]
    for word, other in zip(words, words[1:] + words[:1]):
        texts += [word.title(), word[::-1], f"{word}{other}'s {other}-{word}"]
    assert [text for text in [*names, *texts, *words] if inner(text) != reference.encode(text)] == []


def test_scripts_signs_and_special_tokens_equal_reference(reference):
    for text in (*TEXTS, "<|endoftext|>", "a <|StartOfText|>b<|endoftext|>'s", "<|\u017ftartoftext|>", "!<|endoftext|>"):
        assert inner(text) == reference.encode(text), text
    assert inner("a <|endoftext|> b") == [320, 49407, 321]


def test_what_only_ftfy_repairs(reference):
    for text, repaired in UNREPAIRED:
        assert reference.encode(text) == inner(repaired) != inner(text), text


def test_random_strings_equal_reference_but_for_what_is_documented(reference, monkeypatch):
    """The reference's ftfy guesses no encodings and its regex has Python's letters and numbers."""
    ftfy, regex = pytest.importorskip("ftfy"), pytest.importorskip("regex")
    fix, config = ftfy.fix_text, ftfy.TextFixerConfig(fix_encoding=False)
    monkeypatch.setattr(ftfy, "fix_text", lambda text: fix(text, config))
    unassigned = (char for char in map(chr, range(0x110000)) if unicodedata.category(char) == "Cn")
    younger = "".join(regex.findall(r"[\p{L}\p{N}]", "".join(unassigned)))
    new = f"(?-i:[{regex.escape(younger)}])" if younger else "(?!)"
    pattern = reference.pat.pattern.replace(r"[^\s\p{L}\p{N}]+", rf"(?:[^\s\p{{L}}\p{{N}}]|{new})+")
    pattern = pattern.replace(r"|[\p{L}]+|[\p{N}]|", rf"|(?:(?!{new})\p{{L}})+|(?!{new})\p{{N}}|")
    reference.pat = regex.compile(pattern, regex.IGNORECASE)
    assert [text for text in random_strings() if inner(text) != reference.encode(text)] == []


def test_tokenize_pads_with_zeros():
    ids = tokenize(["a photo of a dog", ""], context_length=9)
    assert ids.dtype == torch.long
    assert ids.tolist() == [[49406, 320, 1125, 539, 320, 1929, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0, 0, 0, 0]]
    assert tokenize("a dog").shape == (1, 77)
    assert tokenize([]).shape == (0, 77)


def test_a_text_that_is_too_long_is_refused_or_cut():
    assert tokenize("dog " * 75)[0, -1] == 49407
    with pytest.raises(ValueError, match=r"'dog dog.*': 78 tokens, CLIP reads 77; shorten it"):
        tokenize(["a cat", "dog " * 76])
    assert tokenize("a photo of a dog", context_length=5, truncate=True).tolist() == [[49406, 320, 1125, 539, 49407]]

"""Oracles are double loops over sorted Python lists; float64 distances come from explicit differences."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import fill
from ucdr_ref import metrics
from ucdr_ref.metrics import (
    average_precision,
    class_means,
    retrieval,
    search,
    squared_distances,
    zero_shot_accuracy,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "map_released.json").read_text())


def slow_ranking(query: Tensor, gallery: Tensor) -> list[list[int]]:
    """Gallery indices per query by (squared distance as float32, index)."""
    rankings = []
    for q in query.double().tolist():
        distances = [np.float32(math.fsum((x - y) ** 2 for x, y in zip(q, g))) for g in gallery.double().tolist()]
        rankings.append(sorted(range(len(distances)), key=lambda j: (distances[j], j)))
    return rankings


def slow_ap(hits: list[bool], divisor: float) -> float:
    seen, total = 0, 0.0
    for rank, hit in enumerate(hits, start=1):
        if hit:
            seen += 1
            total += seen / rank
    return total / divisor if divisor else 0.0


def slow_retrieval(query: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {name: [] for name in ("AP", "relevant", "Prec", "AP@all", "Prec@100")}
    curves: list[list[float]] = []
    cut, hundred, no_relevant = min(k, len(gallery)), min(100, len(gallery)), 0
    for label, ranking in zip(labels.tolist(), slow_ranking(query, gallery)):
        hits = [gallery_labels[j].item() == label for j in ranking]
        rows["AP"].append(slow_ap(hits[:cut], sum(hits[:cut])))
        rows["relevant"].append(slow_ap(hits[:cut], min(sum(hits), cut)))
        rows["Prec"].append(sum(hits[:cut]) / cut)
        rows["AP@all"].append(slow_ap(hits, sum(hits)))
        rows["Prec@100"].append(sum(hits[:hundred]) / hundred)
        curves.append([sum(hits[:rank]) / rank for rank in range(1, max(cut, hundred) + 1)])
        no_relevant += not any(hits)
    return {**rows, "precision": [mean(column) for column in zip(*curves)], "no_relevant": no_relevant}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def random_case(seed: int, q: int, g: int, e: int, classes: int, ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With ties, coordinates are 0 or 1, so equal distances (and equal vectors) abound."""
    rng = torch.Generator().manual_seed(seed)
    query, gallery = torch.randn(q, e, generator=rng), torch.randn(g, e, generator=rng)
    if ties:
        query, gallery = (query > 0).float(), (gallery > 0).float()
    labels, gallery_labels = (torch.randint(0, classes, (n,), generator=rng) for n in (q, g))
    return query, labels, gallery, gallery_labels


@pytest.mark.parametrize(
    ("q", "g", "classes", "k"),
    [
        pytest.param(7, 150, 4, 20, id="plain"),
        pytest.param(7, 130, 4, 1, id="k = 1"),
        pytest.param(5, 30, 3, 200, id="gallery smaller than k"),
        pytest.param(4, 60, 1, 10, id="one class only"),
        pytest.param(30, 12, 40, 5, id="most classes absent"),
        pytest.param(1, 1, 1, 3, id="one and one"),
        pytest.param(6, 110, 3, 100, id="k = 100"),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
def test_retrieval_equals_double_loop(q: int, g: int, classes: int, k: int, ties: bool, chunk: int | None) -> None:
    query, labels, gallery, gallery_labels = random_case(q * g + k, q, g, 5, classes, ties)
    expected = slow_retrieval(query, labels, gallery, gallery_labels, k)
    result = retrieval(query, labels, gallery, gallery_labels, k=k, chunk=chunk)
    for key in ("AP", "AP@all", "precision"):
        assert result[key].tolist() == pytest.approx(expected[key], abs=1e-6)
    named = {
        f"mAP@{k}": "AP",
        f"mAP@{k}/relevant": "relevant",
        f"Prec@{k}": "Prec",
        "mAP@all": "AP@all",
        "Prec@100": "Prec@100",
    }
    for key, name in named.items():
        assert result[key] == pytest.approx(mean(expected[name]), abs=1e-6), key
    assert (result["queries"], result["gallery"], result["no_relevant"]) == (q, g, expected["no_relevant"])
    assert (result["k"], result["k_used"]) == (k, min(k, g))
    for suffix in ("", "@all"):
        per_class = result[f"per_class{suffix}"]
        assert list(per_class) == sorted(set(labels.tolist()))
        for label, value in per_class.items():
            own = [ap for ap, own_label in zip(expected[f"AP{suffix}"], labels.tolist()) if own_label == label]
            assert value == pytest.approx(mean(own), abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["tag"])
def test_released_numbers(case: dict[str, Any]) -> None:
    tag, classes, dim = case["tag"], case["classes"], case["dim"]
    i, j = torch.arange(case["queries"]), torch.arange(case["gallery"])
    labels, gallery_labels = (7 * i + 3) % classes, (5 * j * j + j) % classes
    gallery_labels[gallery_labels == case["absent_class"]] = (case["absent_class"] + 1) % classes
    centres = fill(f"{tag}.centres", (classes, dim), case["separation"])
    query = centres[labels] + fill(f"{tag}.q", (len(i), dim), 1)
    gallery = centres[gallery_labels] + fill(f"{tag}.g", (len(j), dim), 1)
    result = retrieval(query, labels, gallery, gallery_labels)
    for key in ("mAP@200", "Prec@200", "mAP@all", "Prec@100"):
        assert result[key] == pytest.approx(case[key.replace("Prec", "prec")], abs=1e-5), key
    assert result["AP"].tolist() == pytest.approx(case["ap200_per_query"], abs=1e-5)
    # The recorded count is of the queries labelled with the absent class. In two cases the gallery labels miss
    # further classes, and there the recorded AP is 0 too.
    assert int((labels == case["absent_class"]).sum()) == case["queries_without_relevant"]
    assert result["no_relevant"] == sum(label not in gallery_labels for label in labels)
    assert result["no_relevant"] == case["ap200_per_query"].count(0.0)


def test_average_precision_by_hand() -> None:
    hits = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    by_hand = [(1 / 1 + 2 / 3) / 2, 0.0, (1 / 2 + 2 / 3 + 3 / 4) / 3]
    assert average_precision(hits).tolist() == pytest.approx(by_hand)
    assert average_precision(hits.int()).tolist() == pytest.approx(by_hand)
    relevant = torch.tensor([10, 3, 3])  # more than the list holds: divided by its length, 4
    standard = average_precision(hits, relevant).tolist()
    assert standard == pytest.approx([(1 / 1 + 2 / 3) / 4, 0.0, by_hand[2]])
    assert average_precision(hits.view(3, 1, 4)).shape == (3, 1)


def test_published_and_standard_divisor_differ_as_stated() -> None:
    gallery = torch.arange(6.0)[:, None]
    result = retrieval(torch.zeros(1, 1), torch.tensor([1]), gallery, torch.tensor([1, 0, 1, 1, 1, 1]), k=2)
    assert result["mAP@2"] == 1.0 and result["mAP@2/relevant"] == 0.5 and result["Prec@2"] == 0.5


def test_class_means() -> None:
    assert class_means(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([7, 3, 7])) == {3: 2.0, 7: 3.5}


def test_distances_are_the_rounded_sums_and_independent_of_company() -> None:
    """Near copies, exact copies and a large common offset: where q^2 + g^2 - 2qg loses its digits."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(40, 37, generator=rng)
    gallery = torch.cat([base, base + 1e-4 * torch.randn(40, 37, generator=rng), base, base * 1e3, base + 300])
    query = torch.cat([base[:6], gallery[-6:]])
    whole = squared_distances(query, gallery)
    for i, q in enumerate(query.double().tolist()):
        exact = [math.fsum((x - y) ** 2 for x, y in zip(q, g)) for g in gallery.double().tolist()]
        assert whole[i].tolist() == pytest.approx(exact, rel=1e-7, abs=0)
    assert whole[:6, :6].diagonal().tolist() == [0.0] * 6
    assert torch.equal(whole[:, :40], whole[:, 80:120])  # copies tie bit for bit
    for size in (1, 7, 64):
        parts = [squared_distances(query[i : i + 1], rows) for i in range(len(query)) for rows in gallery.split(size)]
        assert torch.equal(torch.cat(parts, dim=1).view_as(whole), whole)


def test_undecided_roundings_take_the_reference_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not vacuous: with an offset every pair is undecided; and cutting the pairs into blocks changes nothing."""
    rng = torch.Generator().manual_seed(1)
    query, gallery = torch.randn(3, 9, generator=rng) + 1e7, torch.randn(5, 9, generator=rng) + 1e7
    seen = []
    original = metrics._halving_sum
    monkeypatch.setattr(metrics, "_halving_sum", lambda x: seen.append(len(x)) or original(x))
    first = squared_distances(query, gallery)
    assert sum(seen) == 15
    monkeypatch.setattr(metrics, "MEMORY_BUDGET", 1)
    assert torch.equal(squared_distances(query, gallery), first) and seen[-15:] == [1] * 15


def test_copies_keep_gallery_order() -> None:
    """A thousand copies of one vector among others: ranks follow the index, whatever the block sizes of the product."""
    rng = torch.Generator().manual_seed(2)
    vector, query = torch.randn(1, 64, generator=rng), torch.randn(3, 64, generator=rng)
    far = 50 + torch.randn(400, 64, generator=rng)
    gallery = torch.cat([far, vector.expand(1000, 64)])[torch.randperm(1400, generator=rng)]
    copies = (gallery == vector).all(1).nonzero()[:, 0]
    for chunk in (None, 1, 13, 256):
        _, indices = search(query, gallery, k=700, chunk=chunk)
        assert torch.equal(indices, copies[:700].expand(3, 700))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("g", "k"), [(50, 1), (50, 10), (50, 50), (7, 20)])
def test_search_equals_full_sort(ties: bool, g: int, k: int) -> None:
    query, _, gallery, _ = random_case(g + k, 6, g, 5, 3, ties)
    expected = torch.tensor(slow_ranking(query, gallery))[:, :k]
    exact = ((query.double()[:, None] - gallery.double()) ** 2).sum(-1).sqrt().gather(1, expected)
    for chunk in (None, 1, 4, 49, 50, 1000):
        distances, indices = search(query, gallery, k, chunk)
        assert torch.equal(indices, expected)
        assert distances.dtype == torch.float32 and torch.allclose(distances.double(), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_search_reads_a_memory_map(tmp_path: Path, dtype: type) -> None:
    query, _, gallery, _ = random_case(9, 3, 80, 8, 2, ties=False)
    np.save(tmp_path / "gallery.npy", gallery.numpy().astype(dtype))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    distances, indices = search(query, mapped, k=9, chunk=11)
    expected = search(query, torch.from_numpy(np.array(mapped)), k=9)
    assert torch.equal(distances, expected[0]) and torch.equal(indices, expected[1])


def defined_search(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By the definition alone: every pair's sum of squared differences, rounded, in a stable sort."""
    pairs = [metrics._halving_sum((q - gallery.double()) ** 2).float() for q in query.double()]
    squares, indices = torch.stack(pairs).sort(dim=1, stable=True)
    return squares[:, :k].sqrt(), indices[:, :k]


def near_tie_case(name: str) -> tuple[Tensor, Tensor]:
    """Queries [3, 24] and a gallery [700, 24] in which float32 products mislead, overflow or vanish."""
    rng = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(3, 24, generator=rng), torch.randn(700, 24, generator=rng)
    if name == "one ulp":  # rows that differ from the query in one last digit of one coordinate, in random order
        gallery[100:] = query.repeat(200, 1)
        column = torch.randint(0, 24, (600, 1), generator=rng)
        moved = gallery[100:].gather(1, column)
        gallery[100:].scatter_(1, column, torch.nextafter(moved, torch.full_like(moved, 9.0)))
    elif name == "offset":  # distances of 1e-2 between vectors of length 5e4
        query, gallery = query * 1e-2 + 1e4, gallery * 1e-2 + 1e4
    elif name == "lengths":  # from 1e-15 to 1e15
        gallery *= 10 ** torch.linspace(-15, 15, 700)[torch.randperm(700, generator=rng), None]
    elif name == "tiny":  # whose squares float32 does not hold
        query, gallery = query * 1e-24, gallery * 1e-24
    elif name == "huge":
        query, gallery = query * 1e18, gallery * 1e18
    elif name == "zero":
        query[0], gallery[::3] = 0, 0
    elif name == "copies":
        gallery[5:] = gallery[torch.randint(0, 5, (695,), generator=rng)]
    elif name == "nearest last":
        gallery = gallery[(gallery - query[0]).norm(dim=1).argsort(descending=True)]
    return query, gallery


NEAR_TIES = ("random", "one ulp", "offset", "lengths", "tiny", "huge", "zero", "copies", "nearest last")


@pytest.mark.parametrize("case", NEAR_TIES)
@pytest.mark.parametrize("k", [1, 4, 30])
def test_the_float32_scan_changes_no_bit(case: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = near_tie_case(case)
    expected = defined_search(query, gallery, k)
    seen = []
    original = metrics._candidates
    monkeypatch.setattr(metrics, "_candidates", lambda *a: seen.append(len(original(*a))) or original(*a))
    for chunk in (None, 91, 256, 699):
        for threads, block_bytes in ((1, 2**19), (1, 7 * 96), (2, 2**19)):
            monkeypatch.setattr(metrics, "SCAN_BYTES", block_bytes)
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            for rows, lengths in ((gallery, None), (gallery.numpy(), None), (gallery, metrics.row_lengths(gallery))):
                found = search(query, rows, k, chunk, lengths)
                assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0]), (chunk, block_bytes)
    assert seen
    if case == "random" and k == 4:
        assert max(seen) < 70  # of up to 700: the scan does leave rows out


def test_the_scan_needs_its_error_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_scan_error", lambda e: (0.0, 0.0))
    query, gallery = near_tie_case("offset")
    for k in (1, 4, 30):
        assert not torch.equal(search(query, gallery, k)[1], defined_search(query, gallery, k)[1]), k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_scan_takes_every_float(dtype: torch.dtype) -> None:
    query, gallery = near_tie_case("random")
    for q in (query, query.double() + 1e-9, query.to(dtype)):
        rows = (gallery.double() + 1e-9).to(dtype)
        expected = defined_search(q, rows, 4)
        arrays = [rows, rows.clone().requires_grad_()] + ([rows.numpy()] if dtype != torch.bfloat16 else [])
        for array in arrays:
            found = search(q, array, 4, chunk=300)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_the_scan_reads_a_map_where_it_lies(tmp_path: Path) -> None:
    """A read-only map is read where it lies, without a warning or a copy; an array read backwards is copied."""
    query, gallery = near_tie_case("random")
    np.save(tmp_path / "gallery.npy", gallery.numpy())
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (mapped, mapped[:, :-1], mapped[::2], mapped[::-1]):
            found = search(query[:, :rows.shape[1]], rows, 4, chunk=50)
            expected = defined_search(query[:, :rows.shape[1]], torch.from_numpy(np.array(rows)), 4)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert metrics._tensor(mapped).data_ptr() == mapped.ctypes.data


def test_reduced_precision_products_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, and a product that rounds its inputs to bfloat16 or to TF32's ten bits."""
    query, gallery = near_tie_case("random")
    expected = defined_search(query, gallery, 4)
    original, used = torch.mm, []
    candidates = metrics._candidates
    monkeypatch.setattr(metrics, "_candidates", lambda *a: used.append(True) or candidates(*a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(search(query, gallery, 4)[1], expected[1])
    used.clear()
    for low_bits in (2**13, 2**16):
        def rounded(x: Tensor, bits: int = low_bits) -> Tensor:
            return ((x.view(torch.int32) + bits // 2) & -bits).view(torch.float32)

        monkeypatch.setattr(torch, "mm", lambda a, b, out: original(rounded(a), rounded(b), out=out))
        assert torch.equal(search(query, gallery, 4)[1], expected[1]) and not used
    monkeypatch.setattr(torch, "mm", original)
    assert torch.equal(search(query, gallery, 4)[1], expected[1]) and used


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e19, 1e200])
def test_the_scan_refuses_what_is_not_finite(value: float) -> None:
    query, gallery = near_tie_case("random")
    gallery = gallery.double()
    gallery[[402, 405], 1] = value
    for rows in (gallery, gallery.float(), gallery.numpy()):
        with pytest.raises(ValueError, match=r"^2 of 300 gallery feature rows .* row 402\)"):
            search(query, rows, 4, chunk=300)


def test_kept_lengths_change_no_bit_and_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query reads the gallery once then; rows in any order, also where the first look says nothing."""
    monkeypatch.setattr(metrics, "FIRST_LOOK", 20)
    for case in NEAR_TIES:
        query, gallery = near_tie_case(case)
        for rows in (gallery, gallery.numpy(), gallery.double() + 1e-9):
            lengths = metrics.row_lengths(rows)
            assert torch.equal(lengths, torch.as_tensor(rows).float().norm(dim=1))
            for number in (1, 3):
                expected = defined_search(query[:number], torch.as_tensor(rows), 4)
                for found in (search(query[:number], rows, 4, lengths=lengths), search(query[:number], rows, 4)):
                    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), case
    with pytest.raises(ValueError, match=r"row_lengths\(gallery\), of shape \[700\]; got \[699\]"):
        search(query, gallery, 4, lengths=lengths[1:])
    gallery[402] = math.nan
    with pytest.raises(ValueError, match=r"^1 of 700 gallery feature rows .* row 402\)"):
        metrics.row_lengths(gallery)


def test_search_and_retrieval_agree() -> None:
    query, labels, gallery, gallery_labels = random_case(11, 8, 90, 4, 3, ties=True)
    result = retrieval(query, labels, gallery, gallery_labels, k=15)
    _, indices = search(query, gallery, k=15, chunk=17)
    hits = gallery_labels[indices] == labels[:, None]
    assert torch.equal(average_precision(hits), result["AP"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e19])
def test_non_finite_features_are_an_error(value: float) -> None:
    query, labels, gallery, gallery_labels = random_case(1, 4, 9, 3, 2, ties=False)
    broken = gallery.clone()
    broken[[2, 5], 1] = value
    with pytest.raises(ValueError, match=r"^2 of 9 gallery feature rows .* row 2\)"):
        retrieval(query, labels, broken, gallery_labels)
    with pytest.raises(ValueError, match=r"^1 of 3 gallery feature rows .* row 5\)"):
        search(query, torch.cat([gallery[:3], broken[3:]]), 2, chunk=3)
    with pytest.raises(ValueError, match=r"^2 of 9 query feature rows .* row 2\)"):
        retrieval(broken, gallery_labels, gallery, gallery_labels)


def test_wrong_shapes_are_an_error() -> None:
    query, labels, gallery, gallery_labels = random_case(1, 4, 9, 3, 2, ties=False)
    for arguments, match in [
        ((query[:0], labels[:0], gallery, gallery_labels), "query features must be a non-empty"),
        ((query, labels, gallery[:0], gallery_labels[:0]), "gallery features must be a non-empty"),
        ((query[0], labels[:1], gallery, gallery_labels), "query features must be a non-empty"),
        ((query, labels[:3], gallery, gallery_labels), r"4 query features need labels of shape \[4\]; got \[3\]"),
        ((query, labels, gallery, gallery_labels[:, None]), r"9 gallery features need labels of shape \[9\]"),
        ((query, labels, gallery[:, :2], gallery_labels), "of one width"),
    ]:
        with pytest.raises(ValueError, match=match):
            retrieval(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        retrieval(query, labels, gallery, gallery_labels, k=0)
    with pytest.raises(ValueError, match="at least 1"):
        search(query, gallery, 3, chunk=0)
    with pytest.raises(ValueError, match="gallery features must be a non-empty"):
        search(query, gallery[:0], 3)
    with pytest.raises(ValueError, match="of one width"):
        search(query, np.zeros((4, 2), np.float32), 3)


def test_arrays_and_lists_do_as_tensors_do() -> None:
    query, labels, gallery, gallery_labels = random_case(3, 4, 30, 5, 3, False)
    for expected, found in ((retrieval(query, labels, gallery, gallery_labels),
                             retrieval(query.numpy(), labels.tolist(), gallery.numpy(), gallery_labels.numpy())),
                            (search(query, gallery, 3), search(query.numpy(), gallery.numpy(), 3))):
        assert str(expected) == str(found)


@pytest.mark.parametrize(("logits", "labels", "unseen"), [
    (torch.zeros(2, 3), [0, 1], torch.tensor([True, False, False])), (torch.zeros(2, 3), [0, -1], [1]),
    (torch.zeros(2, 3), [0, 3], [1]), (torch.zeros(2, 3), [0, 1], [-1]), (torch.full((2, 3), torch.nan), [0, 1], [1])])
def test_accuracy_of_what_is_no_classification_is_refused(logits: Tensor, labels: list[int], unseen: Any) -> None:
    with pytest.raises(ValueError, match=r"expected logits \[b, 3\] without NaN, and labels and unseen_ids of 0 to 2"):
        zero_shot_accuracy(logits, labels, unseen)


def test_accuracies_equal_a_slow_loop() -> None:
    torch.manual_seed(3)
    logits, labels, unseen = torch.randn(60, 6), torch.randint(0, 5, (60,)), [1, 4]
    labels[labels == 2] = 3  # class 2 and class 5 have no image
    logits[torch.arange(60), labels] += 1
    hits: dict[str, dict[int, list[bool]]] = {"zsl": {}, "unseen": {}, "seen": {}}
    for row, y in zip(logits.tolist(), labels.tolist()):
        right = max(range(6), key=row.__getitem__) == y
        hits["unseen" if y in unseen else "seen"].setdefault(y, []).append(right)
        if y in unseen:
            hits["zsl"].setdefault(y, []).append(max(unseen, key=row.__getitem__) == y)
    result = zero_shot_accuracy(logits, labels, unseen)
    for name, classes in hits.items():
        assert result["instance"][name] == pytest.approx(np.mean([hit for one in classes.values() for hit in one]))
        assert result["class"][name] == pytest.approx(np.mean([np.mean(one) for one in classes.values()]))
    assert result["instance"]["seen"] != pytest.approx(result["class"]["seen"])
    for values in result.values():
        assert values["h"] == pytest.approx(2 / (1 / values["unseen"] + 1 / values["seen"]))


def test_accuracies_without_hits_or_images() -> None:
    wrong = zero_shot_accuracy(torch.eye(3)[[1, 0]], torch.tensor([0, 2]), [2])
    assert wrong["class"] == {"zsl": 1.0, "unseen": 0.0, "seen": 0.0, "h": 0.0}
    none = zero_shot_accuracy(torch.eye(3), torch.tensor([0, 1, 0]), [2])
    assert np.isnan(none["instance"]["unseen"]) and np.isnan(none["class"]["h"]) and none["class"]["seen"] == 0.75

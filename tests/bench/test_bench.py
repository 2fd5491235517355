"""The benchmarks' own arithmetic: what is timed is the same work, and what is required is what is checked."""
from __future__ import annotations

import json

import pytest
import torch

from tests import plain
from ucdr_ref import metrics
from ucdr_ref.bench import peers
from ucdr_ref.bench import speed as bench

TINY = ["--arch", "tiny", "--batch", "6", "--classes", "9", "--context", "2", "--steps", "1", "--device", "cpu"]


@pytest.mark.parametrize("q, g", [(7, 300), (40, 60)])
def test_both_peers_of_the_metrics_compute_them(q, g):
    """With a gallery smaller than k, and with a query class that the gallery lacks."""
    query, query_labels, gallery, gallery_labels = bench.random_features(q, g, 16, classes=9)
    query_labels[0] = 99
    ours = metrics.retrieval(query, query_labels, gallery, gallery_labels)
    for peer in (plain.retrieval, peers.batched_sort):
        found = peer(query, query_labels, gallery, gallery_labels)
        assert {name: ours[name] for name in found} == pytest.approx(found, rel=1e-6)
        assert 0.05 < found["mAP@200"] < 0.95


def case(threads, queries, ours, faiss, blas):
    return {"threads": threads, "queries": queries, **{
        f"{side}_{unit}": value for unit in ("cpu_s", "wall_s")
        for side, value in zip(("ours", "faiss", "blas", "once"), (ours, faiss, blas, 9.0))}}


def test_required_figures():
    sizes = dict(bench.PUBLISHED, arch="ViT-B/32", device="cpu", search_sizes=bench.SEARCH)

    def met(part: str, changed: dict | None = None, **sides) -> list[bool]:
        return [check["met"] for check in bench.checks(part, sides, {**sizes, **(changed or {})})]

    def side(cpu, memory):
        return {"cpu_s": cpu, "wall_s": 1.0, "memory_gib": memory}

    assert met("phase1", ours=side(10, 2), plain=side(20, 4)) == [True, True]
    assert met("phase1", ours=side(10, 2), plain=side(19, 3)) == [False, False]
    assert met("phase2", ours=side(10, 2), plain=side(29, 4)) == [False, True]
    assert met("phase2", {"arch": "ViT-B/16"}, ours=side(10, 2), plain=side(29, 4)) == [True, True]
    assert met("phase2", {"batch": 16}, ours=side(9, 9), plain=side(1, 1)) == []
    assert met("metrics", ours=side(24.9, 1.8), sort=side(1, 1)) == [True, True]
    assert met("metrics", ours=side(25.1, 1.9), sort=side(1, 1)) == [False, False]
    assert met("encode", ours={"passes": 1.06}) == [False]
    cases = [case(1, 1, 3.0, 4.0, 9.0), case(2, 1, 5.0, 6.0, 7.0), case(2, 10, 5.0, 6.0, 4.0)]
    assert met("search", both={"cases": cases}) == [True, True, False]  # against the faster of the two ways
    assert [ratio["wall"] for ratio in peers.search_ratios(cases)] == [3 / 4, 5 / 4, 5 / 4]  # its best threads


def test_command(tmp_path, capsys, monkeypatch):
    """All parts in this process; that a part runs in a process of its own is tested below."""
    monkeypatch.setattr(bench, "isolated", bench.measure)
    file, threads = tmp_path / "bench.json", torch.get_num_threads()
    assert bench.main([*TINY, "--sizes", "20", "30", "8", "--search-sizes", "300", "8", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in bench.PARTS) and "required" not in out and torch.get_num_threads() == threads
    written = json.loads(file.read_text())
    assert written["all_met"] and written["versions"]["torch"] == torch.__version__
    assert set(written["parts"]["metrics"]["ratios"]) == {"plain / ours", "sort / ours"}
    cost = written["parts"]["encode"]["ours"]
    assert cost["adapter_passes"] == cost["adapter_s_per_image"] / cost["pass_s_per_image"] > 1
    assert cost["passes"] == pytest.approx(1 + cost["fit_s"] / cost["images"] / cost["pass_s_per_image"])
    if "both" in written["parts"]["search"]:
        assert out.count("ours / FAISS") == 6
    monkeypatch.setattr(bench, "checks", lambda *_: [{"what": "x", "value": 1.0, "bound": ">= 2", "met": False}])
    assert bench.main([*TINY, "--part", "phase1"]) == 1
    assert "required >= 2: MISSED" in capsys.readouterr().out


def test_a_part_runs_in_a_fresh_process():
    sizes = dict(arch="tiny", batch=2, classes=3, domains=2, context=2, steps=1, device="cpu", precision="fp32")
    before = torch.get_rng_state()  # which the weights of this part would move
    assert bench.isolated("phase1", "ours", sizes)["cpu_s"] > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_search_and_faiss_find_the_same():
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is in requirements-dev.txt")
    query, _, gallery, _ = bench.random_features(20, 3000, 32)
    index = faiss.IndexFlatL2(32)
    index.add(gallery.numpy())
    expected = index.search(query.numpy(), 10)[1].tolist()
    for norms in (None, metrics.squared_norms(gallery)):
        assert metrics.search(query, gallery, 10, norms)[1].tolist() == expected
    threshold = faiss.cvar.distance_compute_blas_threshold
    assert len(bench.measure_search(300, 8)["cases"]) == 6 and faiss.cvar.distance_compute_blas_threshold == threshold


def test_search_without_faiss(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main(["--part", "search", "--device", "cpu"]) == 0
    assert "faiss-cpu is not installed" in capsys.readouterr().out


def test_user_mistakes(capsys, tmp_path):
    assert bench.main([*TINY, "--device", "cuda:77"]) == 2
    assert "error: " in capsys.readouterr().err
    for flags in (["--batch", "0"], ["--json", str(tmp_path / "nowhere" / "a.json")], ["--json", str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):  # before anything is measured
            bench.main([*TINY, *flags])

"""What is timed is the same work on both sides; every part runs; tables hold its numbers."""
import json

import pytest
import torch

from tests import plain
from ucdr_ref import metrics
from ucdr_ref.bench import peers, speed

SMALL = dict(batch=6, classes=9, domains=2, sizes=[20, 30, 8], search_sizes=[300, 8])


@pytest.mark.parametrize("q, g", [(7, 300), (40, 60)])
def test_plain_and_batched_metrics_equal_retrieval(q, g):
    """With a gallery smaller than k, and with a query class that the gallery lacks; the loop also with ties."""
    query, query_labels, gallery, gallery_labels = peers.random_features(q, g, 16, classes=9)
    query_labels[0] = 99
    ours = metrics.retrieval(query, query_labels, gallery, gallery_labels)
    batched = peers.batched_retrieval(query, query_labels, gallery, gallery_labels)
    assert {name: ours[name] for name in batched} == pytest.approx(batched, rel=1e-4)
    gallery[1::3] = gallery[0]
    loop = plain.retrieval(query, query_labels, gallery, gallery_labels)
    ours = metrics.retrieval(query, query_labels, gallery, gallery_labels)
    assert {name: ours[name] for name in loop} == pytest.approx(loop, rel=1e-6)
    assert 0.05 < loop["mAP@200"] < 0.95


def test_both_readers_give_the_same_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PHOTOS", 3)
    paths = peers.write_photos(str(tmp_path))
    [ours], [theirs] = (peers.read_photos(side, paths, 64) for side in ("ours", "plain"))
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-6)


def test_all_parts(tmp_path, capsys, monkeypatch):
    """In this process; FAISS's settings and the number of threads are as they were."""
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is in requirements-dev.txt")
    threads, threshold = torch.get_num_threads(), faiss.cvar.distance_compute_blas_threshold
    monkeypatch.setattr(speed, "isolated", speed.measure_part)
    monkeypatch.setattr(speed, "PUBLISHED", SMALL)
    monkeypatch.setattr(peers, "PHOTOS", 3)
    file = tmp_path / "speed.json"
    assert speed.main(["--arch", "tiny", "--json", str(file), "--machine", "Xeon"]) == 0
    written, out = json.loads(file.read_text()), capsys.readouterr().out
    assert list(written["parts"]) == list(speed.SIDES) and written["versions"]["torch"] == torch.__version__
    assert speed.table(written["parts"]) in out and peers.search_table(written["parts"]["search"]["cases"]) in out
    for part, sides in speed.SIDES.items():
        found = written["parts"][part]
        assert found["measured"]["machine"] == "Xeon" and found["measured"]["load"] >= 0
        assert part in ("search", "passes") or all(found[side]["cpu_s"] > 0 and found[side]["memory_gib"] > 0 for side in sides)
    assert written["parts"]["passes"]["ours"].keys() == {"tower_s_per_image", "adapter_s_per_image"}
    assert [(case["queries"], case["threads"]) for case in written["parts"]["search"]["cases"]] == [
        (q, t) for t in (1, 2) for q in (1, 10, 100)]
    assert (torch.get_num_threads(), faiss.cvar.distance_compute_blas_threshold) == (threads, threshold)

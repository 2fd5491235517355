"""The plain transcription computes what the package computes, and each exact saving changes nothing."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests import plain as bench_plain
from ucdr_ref import metrics
from ucdr_ref.bench import costs
from ucdr_ref.bench import speed as bench
from ucdr_ref.clip import linear as linear_module
from ucdr_ref.config import Config
from ucdr_ref.demo.pretrain import random_clip
from ucdr_ref.ucdr.adapter import UCDRAdapter

CLASSES, DOMAINS = ["cat", "alarm_clock", "The_Eiffel_Tower", "dog"], ["clipart", "real", "sketch"]


@pytest.mark.parametrize("q, g", [(7, 300), (40, 60)])
def test_plain_metrics_equal_retrieval(q, g):
    """Saving 6, with a gallery smaller than k, with ties, and with a query class that the gallery lacks."""
    query, query_labels, gallery, gallery_labels = bench.random_features(q, g, 16, classes=9)
    gallery[1::3], query_labels[0] = gallery[0], 99
    plain = bench_plain.retrieval(query, query_labels, gallery, gallery_labels)
    ours = metrics.retrieval(query, query_labels, gallery, gallery_labels)
    assert {name: ours[name] for name in plain} == pytest.approx(plain, rel=1e-6)
    assert 0.05 < plain["mAP@200"] < 0.95


def test_image_flops_equal_a_count(monkeypatch):
    monkeypatch.setattr(linear_module, "ONEDNN", False)  # whose operations are not counted
    shape = bench.SHAPES["tiny"]
    torch.manual_seed(0)
    clip = random_clip(**bench.SHAPES["tiny"])
    ours = UCDRAdapter(clip, CLASSES, DOMAINS, Config(context_vectors=4)).requires_grad_(False)
    images = torch.randn(3, 3, 32, 32)
    formula = 3 * bench.image_flops("encode", shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # older PyTorch counts no other on a CPU
        ours.encode(images)
    d, rows = 64, len(CLASSES) + len(DOMAINS)
    generator = 2 * (rows * d * d) + 3 * 2 * (2 * 2 * d * d + 2 * rows * d)  # W_p; W_i, W_o twice; scores and sums
    projection = 3 * 2 * d * shape["embed_dim"]  # the formula grants one to the query pass, which needs none
    assert counter.get_total_flops() == pytest.approx(formula + generator - projection, rel=1e-6)


def test_random_clip_has_a_scale_that_trains():
    torch.manual_seed(0)
    clip = random_clip(**bench.SHAPES["tiny"])
    features = clip.encode_image(torch.randn(4, 3, 32, 32))
    assert 0.3 < features.std() < 3 and (F.normalize(features) @ F.normalize(features).T)[0, 1] < 0.999


def result(cpu: float, memory: float, wall: float = 1.0, **more: float) -> dict[str, float]:
    return {"cpu_s": cpu, "wall_s": wall, "memory_gib": memory, **more}


def test_required_figures():
    sizes = dict(bench.PUBLISHED, arch="ViT-B/32", device="cpu")

    def met(part: str, ours: dict, plain: dict, **changed) -> list[bool]:
        return [check["met"] for check in bench.checks(part, ours, plain, {**sizes, **changed})]

    assert met("phase1", result(10, 2), result(20, 4)) == [True, True]
    assert met("phase1", result(10, 2), result(19, 3)) == [False, False]
    assert met("phase2", result(10, 2), result(29, 4)) == [False, True]
    assert met("phase2", result(10, 2), result(29, 4), arch="ViT-B/16") == [True, True]
    assert met("phase2", result(10, 2), result(10, 2), batch=16) == met("encode", result(1, 1), result(1, 1)) == []
    assert met("metrics", result(40, 1.8, 24.9), result(1, 1)) == [True, True]
    assert met("metrics", result(24, 1.8, 60), result(1, 1)) == [True, True]  # a busy machine
    assert met("metrics", result(40, 1.9, 25.1), result(1, 1)) == [False, False]
    gpu = dict(arch="ViT-B/16", device="cuda", precision="bf16")
    assert met("encode", result(1, 1, matmul_share=0.49), result(1, 1), **gpu) == [False]


TINY = ["--arch", "tiny", "--batch", "6", "--classes", "9", "--context", "2", "--steps", "1", "--device", "cpu"]


def test_command(tmp_path, capsys, monkeypatch):
    """All parts in this process; that a part runs in a process of its own is tested below."""
    monkeypatch.setattr(bench, "isolated", bench.measure)
    file = tmp_path / "bench.json"
    assert bench.main([*TINY, "--sizes", "20", "30", "8", "--search-sizes", "300", "8", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    last = out[out.index("plain / ours"):]
    assert all(part in last for part in bench.PARTS)
    written = json.loads(file.read_text())
    assert written["all_met"] and written["versions"]["torch"] == torch.__version__
    assert all(side["cpu_s"] > 0 and side["memory_gib"] > 0
               for part in written["parts"].values() if "plain" in part for side in (part["ours"], part["plain"]))
    assert written["parts"]["closed-form"]["ours"]["passes"] > 1
    monkeypatch.setattr(bench, "checks", lambda *_: [{"what": "x", "value": 1.0, "bound": ">= 2", "met": False}])
    assert bench.main([*TINY, "--part", "encode"]) == 1
    assert "required >= 2: MISSED" in capsys.readouterr().out


def test_a_part_runs_in_a_fresh_process():
    sizes = dict(arch="tiny", batch=2, classes=3, domains=2, context=2, steps=1, device="cpu", precision="fp32")
    before = torch.get_rng_state()  # which the weights of this part would move
    assert bench.isolated("encode", "ours", sizes)["cpu_s"] > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_cost_of_a_closed_form_is_pass_and_fit(capsys, monkeypatch):
    sizes = dict(batch=2, precision="fp32", steps=1, sizes=[5, 40, 32])
    cost = costs.measure_closed_form(bench.SHAPES["tiny"], sizes, torch.device("cpu"))
    assert cost["images"] == 40 and cost["fit_s_per_image"] == cost["fit_s"] / 40 > 0
    assert cost["passes"] == pytest.approx(1 + cost["fit_s_per_image"] / cost["pass_s_per_image"])
    monkeypatch.setattr(bench, "isolated", lambda *_: {**cost, "passes": 1.06})
    assert bench.main(["--part", "closed-form", "--device", "cpu"]) == 1
    assert "required <= 1.05: MISSED" in capsys.readouterr().out


def test_both_readers_give_the_same_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "PHOTOS", 3)
    paths = costs.write_photos(str(tmp_path))
    [ours], [plain] = (list(costs.reader(side, paths, 64)) for side in ("ours", "plain"))
    assert ours.dtype == torch.float32 and torch.allclose(ours, plain, atol=1e-6)


def test_search_beside_faiss(capsys, monkeypatch):
    """Every case is printed, required at the stated size alone, and leaves the numbers of threads as they were."""
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is in requirements-dev.txt")
    threshold, ways, search = faiss.cvar.distance_compute_blas_threshold, set(), faiss.IndexFlatL2.search

    def spied(*arguments):
        ways.add(faiss.cvar.distance_compute_blas_threshold)
        return search(*arguments)

    monkeypatch.setattr(faiss.IndexFlatL2, "search", spied)
    monkeypatch.setattr(bench, "isolated", bench.measure)
    arguments, threads = ["--part", "search", "--device", "cpu", "--search-sizes", "300", "8"], torch.get_num_threads()
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"search {q} queries, {t} threads" in out for t in (1, 2) for q in (1, 10, 100)) and "required" not in out
    assert torch.get_num_threads() == threads
    found = bench.measure_search(300, 8)
    assert found["faiss"] == faiss.__version__ and faiss.cvar.distance_compute_blas_threshold == threshold
    assert ways == {1, threshold} and {"faiss_cpu_s", "blas_cpu_s"} <= found["cases"][0].keys()
    for faster, slower in (("faiss", "blas"), ("blas", "faiss")):  # ours must beat the faster of the two
        slow = [dict(case, ours_wall_s=2.0, **{f"{faster}_wall_s": 1.0, f"{slower}_wall_s": 9.0}) for case in found["cases"]]
        monkeypatch.setattr(bench, "measure_search", lambda g, e, slow=slow: {"faiss": "1", "cases": slow})
        assert bench.main(arguments[:4]) == 1
        assert capsys.readouterr().out.count("required <= 1: MISSED") == 6


def test_search_and_faiss_find_the_same():
    """What is timed is the same work: FAISS's ten nearest are ours."""
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is in requirements-dev.txt")
    query, _, gallery, _ = bench.random_features(20, 3000, 32)
    index = faiss.IndexFlatL2(32)
    index.add(gallery.numpy())
    expected = index.search(query.numpy(), 10)[1].tolist()
    for norms in (None, metrics.squared_norms(gallery)):
        assert metrics.search(query, gallery, 10, norms)[1].tolist() == expected


def test_search_without_faiss(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main(["--part", "search", "--device", "cpu"]) == 0
    assert "faiss-cpu is not installed" in capsys.readouterr().out


def test_user_mistakes(capsys, tmp_path):
    assert bench.main([*TINY, "--device", "cuda:77"]) == 2
    assert "try --device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--batch", "0"])
    for file in (tmp_path / "nowhere" / "a.json", tmp_path):
        with pytest.raises(SystemExit, match="2"):  # before anything is measured
            bench.main([*TINY, "--json", str(file)])
        assert "a folder that exists" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    for error, told in ((RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lacked memory (DefaultCPU"),
                        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lacked memory (CUDA"),
                        (BrokenProcessPool(), "was killed")):
        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(bench, "measure", fails)
        assert bench.main([*TINY, "--part", "encode"]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and f"encode (ours) {told}" in shown and "lower --batch" in shown
    error = RuntimeError("shapes do not fit")
    monkeypatch.setattr(bench, "measure", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="shapes"):  # a fault of ours keeps its traceback
        bench.main([*TINY, "--part", "encode"])

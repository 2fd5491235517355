"""ucdr_ref: reference implementations of UCDR-Adapter (WACV 2025) and the SRE-CLIP adapter (arXiv
2510.21808).

The `__init__` of each subpackage says what to read first; a part imports only those before it (experiments
also demo, where drawn data is asked for):

    clip         CLIP's towers, tokenizer, weight files; stands alone
    metrics      retrieval metrics, accuracies, exact search; stands alone
    ucdr         paper 1: losses, prompts, adapter; needs clip
    sre          paper 2: losses, adapter, class graph; needs clip
    cli, config, distributed   commands and files; options; device, seeds, processes
    data         image files to batches and features, benchmarks
    training     the loop and its checkpoints
    experiments  run folders, tables, search: where everything meets
    demo, bench  drawn data and its CLIP; measurements; both may be deleted

Shapes in docstrings: `b` batch, `n` patches (or images), `d` vision width, `e` embedding, `t` text width, `m`
context vectors, `p` prompt length, `c` training classes, `s` source domains, `q` queries, `g` gallery, `r`
triplet pairs; for SRE-CLIP also `h` adapter width, `N` graph nodes (classes first), `w` class-vector width.
Tags such as `D1` and `S1` mark the lines where paper and released code differ; docs/ledger.md lists them.
"""
__version__ = "0.1.0"

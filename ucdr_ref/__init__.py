"""ucdr_ref: reference implementations of UCDR-Adapter (WACV 2025) and the SRE-CLIP adapter (arXiv 2510.21808).

Shapes in docstrings: `b` batch, `n` patches, `d` vision width, `e` embedding, `t` text width, `m` context vectors, `p` prompt
length, `c` training classes, `s` source domains, `q` queries, `g` gallery, `r` triplet pairs; for SRE-CLIP also `h` adapter
width, `N` graph nodes (classes first), `w` class-vector width. Tags such as `D1` and `S1` mark the lines where paper and released
code differ; the ledger in the README lists them.
"""
__version__ = "0.1.0"

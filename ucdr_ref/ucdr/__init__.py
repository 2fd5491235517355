"""UCDR-Adapter (Jiang et al., WACV 2025): universal cross-domain retrieval by image alone, in two phases.

Read `losses`, `prompts`, `adapter` beside the paper; `closed_form` needs no training. The letters at
the equations: (T) learnable text template, (P) source prompts, (E) source encoding with the true domain and
class, (M) momentum encoder and class queues, (A) target prompt generator, (G) target encoding.
"""

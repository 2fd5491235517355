"""SRE-CLIP adapter (Yu et al., arXiv 2510.21808): domain-adaptive zero-shot classification by a class graph.

Read `losses`, then `adapter` beside the paper; `graph` and `wordnet` make what it is built of.
"""

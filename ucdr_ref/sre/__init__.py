"""SRE-CLIP (Yu et al., arXiv 2510.21808): domain-adaptive zero-shot classification by a graph of classes.

Read `losses`, then `adapter` beside the paper.
"""

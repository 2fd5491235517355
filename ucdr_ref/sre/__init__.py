"""SRE-CLIP adapter (Yu et al., arXiv 2510.21808): domain-adaptive zero-shot classification by a class graph.

Read `losses`, then `adapter` beside the paper; `graph`, `wordnet`, `class_vectors` make what it is built of.
"""
from .adapter import SRECLIP, Batch
from .graph import Graph, load_graph, normalised_adjacency
from .options import Options

__all__ = ["Batch", "Graph", "Options", "SRECLIP", "load_graph", "normalised_adjacency"]

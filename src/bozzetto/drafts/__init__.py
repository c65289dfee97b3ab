"""Drafts: what a drafter proposes and what a rule decides. Pure tensors. There are two kinds of token."""

from bozzetto.drafts.draft import Draft, Verdict
from bozzetto.drafts.tree import Layout, Tree

CODES, VECTORS = "codes", "vectors"  # of a codebook; continuous ones

__all__ = ["CODES", "VECTORS", "Draft", "Layout", "Tree", "Verdict"]

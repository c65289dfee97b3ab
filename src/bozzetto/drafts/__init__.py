"""Drafts: what a drafter proposes and what a rule decides. Pure tensors."""

from bozzetto.drafts.draft import Draft, Verdict
from bozzetto.drafts.tree import Layout, Tree

__all__ = ["Draft", "Layout", "Tree", "Verdict"]

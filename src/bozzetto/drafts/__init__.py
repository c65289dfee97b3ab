"""Drafts: what a drafter proposes and what a rule decides. Pure tensors."""

from bozzetto.drafts.chain import Draft, Verdict
from bozzetto.drafts.path import PathDraft, PathVerdict
from bozzetto.drafts.tree import Layout, Tree

__all__ = ["Draft", "Layout", "PathDraft", "PathVerdict", "Tree", "Verdict"]

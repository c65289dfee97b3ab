"""Drafts: what a drafter proposes and what a rule decides. Pure tensors."""

from bozzetto.drafts.chain import Draft, Verdict

__all__ = ["Draft", "Verdict"]

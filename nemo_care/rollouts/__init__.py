"""Rollouts: sampling groups of completions."""

from nemo_care.groups.answer_span import answer_token_span

__all__ = ["answer_token_span"]

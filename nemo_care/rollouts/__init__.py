"""Rollouts: groups of sampled completions and what is read off their tokens."""

from nemo_care.groups.answer_span import answer_token_span

__all__ = ["answer_token_span"]

"""Rollouts with vLLM: engines in separate processes, which receive the policy's weights."""

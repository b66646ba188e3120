"""Rollouts with vLLM: engines in processes of their own, and the policy's weights sent to them."""

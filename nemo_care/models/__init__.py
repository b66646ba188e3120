"""Qwen2.5-VL on Megatron Core: model, layer specs, weights, log-probabilities, EMA."""

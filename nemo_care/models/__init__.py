"""Video-language models on Megatron Core: layers, weights, log-probabilities, EMA; families."""

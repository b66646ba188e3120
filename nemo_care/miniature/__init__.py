"""A tiny world and a tiny Qwen2.5-VL: the whole system as a real run on a laptop."""

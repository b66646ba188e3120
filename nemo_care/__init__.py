"""Post-train large video-language models with GRPO-CARE on Megatron Core."""

__version__ = "0.1.0"

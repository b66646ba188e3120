"""Post-train large video-language models with GRPO-CARE on Megatron Core."""

from nemo_care.megatron.te_import import check_before_megatron

__version__ = "0.1.0"

check_before_megatron()

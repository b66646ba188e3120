"""Code that depends on Megatron Core's internals: review it when you raise the pinned version."""

"""What follows Megatron Core's internals, pinned to its version: read it when you raise that."""

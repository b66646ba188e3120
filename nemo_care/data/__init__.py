"""From files on disk to prompts: samples, decoding, tokens, positions, the training stream."""

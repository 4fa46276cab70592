"""What tests, `make run` and `llava-mini verify` share: seeded checkpoints, tiny tokenizers, the goldens runner."""

"""Adapters made of adapters: `scale`, `add`, `resize`, `combine`, and `extract` from two checkpoints."""

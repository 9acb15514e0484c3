"""Readable Flax models that load Hugging Face checkpoints, one file per architecture."""

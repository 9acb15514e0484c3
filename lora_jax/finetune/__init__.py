"""Fine-tuning, from a model's directory and a file of data to an adapter that serves: what `lora-jax train` does.

In the order that data flows: `settings` (what is asked) → `sources` (files to records) → `rendering` (a record to
tokens, and which of them count) → `rows` (examples to arrays of one length, and these to batches) → `dataset` (all of
that, with a part held out) → `task` (model and loss) → `job` (all of it, trained by `lora_jax.training`) → `report`
(what is shown).
"""

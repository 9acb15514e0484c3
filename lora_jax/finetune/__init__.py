"""Fine-tuning, from a model's directory and a file of data to an adapter that serves: what `lora-jax train` does.

In the order that data flows: `settings` (what is asked; `values` and `configuration` read it from flags and files) →
`sources` (files to records) → `kinds` (which columns are meant, and whether they hold what they should) → `rendering`
(a record to tokens, and which of them count; by `tokenizer`, by `chat` where there are messages, by `documents` where
text is long) → `holding` (a part is held out) → `fitting` (what is longer than a row) → `rows` (examples to arrays, and
these to batches) → `dataset` (all of that; `preview` shows an example) → `task` (model and loss) → `prepare` (what
trains, by `variant` and `targets`; how, by `optimizing`; where, by `placing`; its `programs`) → `job` (all of it,
trained by `lora_jax.training`; `evaluations`, `journal` and `progress` are its hooks, `folder` what it finds and leaves
on the disk) → `export` → `report`.
"""

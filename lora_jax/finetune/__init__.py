"""Fine-tuning, from a model's directory and a file of data to an adapter that serves: what `lora-jax train` does.

In the order that data flows: `settings` (what is asked; `values` and `configuration` read it from flags and files) →
`data` (files to batches) → `base` (the model) and `task` (its loss) → `prepare` (what trains, by `variant` and
`targets`; how, by `optimizing`; where, by `placing`; its `programs`) → `job` (all of it, trained by
`lora_jax.training`; `evaluations`, `journal` and `progress` are its hooks, `folder` what it finds and leaves on the
disk) → `export` → `report`. `inventory` says before it what can be adapted, `prompts` and `answers` after it what came
of it.
"""

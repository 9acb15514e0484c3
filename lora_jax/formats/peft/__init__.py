"""PEFT's adapters, a folder of adapter_config.json and adapter_model.safetensors, for any model that has a name map.

`save` and `load` are the two directions; both go through `factors` (which tensor of PEFT's is which factor of ours) and
`describe` (which fields of PEFT's say what a variant of ours says).

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from lora_jax.formats.peft.load import load as load
from lora_jax.formats.peft.save import save as save

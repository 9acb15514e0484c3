"""Maps: where other libraries' models in JAX have what Hugging Face's modules in PyTorch have, one file per library.

Each is data, a list of names as `lora_jax.formats.names` describes them, for the weights of checkpoints and for PEFT's
adapters alike.
"""

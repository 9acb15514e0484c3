"""`lora-jax demo`: adapt a pretrained sentence encoder to a new task, with LoRA and with what else one could train."""

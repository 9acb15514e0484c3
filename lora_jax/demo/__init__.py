"""`lora-jax demo`: adapt a pretrained sentence encoder to a new task, and compare LoRA with what else one could train."""

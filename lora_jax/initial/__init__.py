"""How LoRA's factors begin where that depends on the weight, its inputs or its gradient: one file for each way."""

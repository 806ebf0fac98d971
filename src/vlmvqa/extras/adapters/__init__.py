"""LoRA, DoRA and QLoRA adapters for both model families."""

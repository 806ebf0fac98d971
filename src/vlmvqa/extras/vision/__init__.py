"""Further vision encoders, projectors and inputs: chosen layers, fused encoders, fewer tokens, tiles, letterboxing."""

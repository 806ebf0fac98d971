"""Further vision encoders and projectors: chosen layers, fused encoders, fewer tokens per image."""

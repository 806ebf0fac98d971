"""The model as classes of transformers: config, processor and model; `vlmvqa.hf` registers them."""

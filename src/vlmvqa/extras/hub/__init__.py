"""Datasets in parquet form, from the Hugging Face Hub or a folder, and upload of a trained model."""

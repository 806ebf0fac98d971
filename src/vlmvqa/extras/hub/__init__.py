"""Datasets in parquet format, from the Hugging Face Hub or a folder, and upload of trained models."""

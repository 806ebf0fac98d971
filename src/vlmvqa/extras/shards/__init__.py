"""Splits packed into parquet shards with one row per image."""

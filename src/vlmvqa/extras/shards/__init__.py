"""A split packed into parquet files with one row per image."""

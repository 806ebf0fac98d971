"""Dataset readers: one module per benchmark, imported by name (`data.source`)."""

"""HTML report of a run, model card, comparison of two runs, and attribution maps."""

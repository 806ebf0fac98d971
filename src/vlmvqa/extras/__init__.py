"""Optional features, each in its own package. The core imports none of them at module level."""

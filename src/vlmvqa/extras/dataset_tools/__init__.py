"""Download a benchmark's archives and check its splits."""

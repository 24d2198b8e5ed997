"""One script for the first minutes on a GPU: see bench/FIRST_LIGHT.md."""

"""The `ssd-jax` command line."""

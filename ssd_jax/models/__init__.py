"""The decoder: one set of pure functions for all supported families."""

"""Drafters: each proposes tokens as a `Draft`, cheaply, for the target to verify."""

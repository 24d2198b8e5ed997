"""Decoding loops that run on the device: prefill, then one loop a method."""

"""Choosing the options of speculative speculative decoding from measurements on this machine."""

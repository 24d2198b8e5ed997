"""Other engines on the same weights and prompts: `ssd-jax bench peers --help`.

Each engine runs as a process of its own, in its own environment, and speaks the protocol of
`protocol.py`. Files whose name ends in `_peer.py` are those processes; they and what they import
need nothing but Python 3.11 and their engine.
"""

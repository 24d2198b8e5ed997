"""`python -m ssd_jax` is `ssd-jax`."""

import sys

from ssd_jax.cli.entry import run

sys.exit(run())

"""`python -m ssd_jax` is `ssd-jax`."""

import sys

from ssd_jax.cli.main import main

sys.exit(main())

"""`ssd-jax bench simulate ACTION ...`, or `python -m bench.simulate ACTION ...`."""

import sys
from collections.abc import Sequence

from bench.simulate.command import simulate_command
from ssd_jax.errors import SsdJaxError


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit code."""
    return simulate_command(argv)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SsdJaxError as error:
        print(f"simulate: {error}", file=sys.stderr)
        sys.exit(2)

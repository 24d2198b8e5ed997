"""`python -m bench.simulate ACTION ...`."""

import argparse
import sys

from bench.simulate.command import add_simulate_arguments, run_simulate
from ssd_jax.errors import SsdJaxError


def main() -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate",
        description="What rounds of speculation cost and bring, on machines at hand and not.",
    )
    add_simulate_arguments(parser)
    args = parser.parse_args()
    try:
        return run_simulate(args)
    except SsdJaxError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Convert a Hugging Face checkpoint: the same as `ssd-jax convert`, as a script.

Usage: python checkpoints/convert.py SRC DST [--dtype float32|bfloat16] [--overwrite]
"""

import argparse
import sys

from ssd_jax.cli.convert import add_convert_arguments, run_convert
from ssd_jax.errors import SsdJaxError


def main() -> int:
    """Exit code: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint for ssd-jax.")
    add_convert_arguments(parser)
    try:
        run_convert(parser.parse_args())
    except SsdJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

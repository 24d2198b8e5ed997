"""The process of one case: calls its function and writes each row the moment it is told."""

import argparse
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from ssd_jax.json_text import to_json


def main() -> None:
    """Run one case: function, options as JSON, file for the rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("function", help="package.module:function")
    parser.add_argument("options", help="keyword options, as JSON")
    parser.add_argument("rows", type=Path, help="file to which rows are appended, a line each")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()

    with given.rows.open("a") as rows:

        def tell(what: str, figure: str, ok: bool = True, **details: Any) -> None:  # noqa: ANN401
            """One row: what was looked at, what was found, and whether that is right."""
            rows.write(to_json({"what": what, "figure": figure, "ok": bool(ok), **details}))
            rows.write("\n")
            rows.flush()

        code = 0
        try:
            module, _, name = given.function.partition(":")
            function = getattr(importlib.import_module(module), name)
            function(tell=tell, dry_run=given.dry_run, **json.loads(given.options))
        except Exception:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the kernel interpreter that still wait would keep the process alive.
    os._exit(code)


if __name__ == "__main__":
    main()

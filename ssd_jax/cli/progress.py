"""Progress of long work on stderr, as bars that count bytes."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def byte_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how many bytes of a stage are done, out of how many: a bar a stage."""
    columns = TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show

"""A progress bar over Hessian-vector products."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Products per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


class ProductProgress:
    """Shows products done, their rate and the time left; silent where standard error is not a terminal.

    Parameters
    ----------
    total : int
        Number of products expected.
    enabled : bool
        False for never showing anything.
    """

    def __init__(self, total: int, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("Hessian products"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and (console.is_terminal or console.is_jupyter)),
        )
        self._task = self._progress.add_task("", total=total)

    def update(self, products: int) -> None:
        """Take note of so many products in all."""
        self._progress.update(self._task, completed=products)

    def __enter__(self) -> ProductProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

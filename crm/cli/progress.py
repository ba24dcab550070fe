"""Progress of a sweep: one live line per worker on a terminal, occasional plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from crm.cli.options import duration
from crm.records import State

EVERY = 20.0  # seconds between plain lines about what runs


class Board:
    """Shows the states of all cells; `with Board() as board: ... board.show(states)`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr if quiet else sys.stdout, highlight=False, quiet=quiet)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.before: dict[str, State] = {}
        self.told = 0.0
        self.began = time.monotonic()
        self.work_before: float | None = None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        self.console.print(escape(text), soft_wrap=True)

    def show(self, states: dict[str, State]) -> None:
        """Takes the newest state of every cell."""
        self._tell_changes(states)
        if self.live:
            self.live.update(self._lines(states))
        elif time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            running = [f"{label} {_share(state)}" for label, state in states.items() if state.name == "running"]
            if running:
                self.console.print(f"{self._summary(states)}: {escape(', '.join(running))}", soft_wrap=True)

    def _tell_changes(self, states: dict[str, State]) -> None:
        """A line for each cell that has come to an end since the last look; these stay on the screen."""
        for label, state in states.items():
            old = self.before.get(label)
            if old is not None and old.name != state.name and state.name in ("done", "failed"):
                score = f", val mIoU {state.miou:.1f}" if state.miou is not None else ""
                text = f"{state.name}: {label}{score}" if state.name == "done" else f"failed: {label}: {state.reason}"
                self.console.print(escape(text), soft_wrap=True)
        self.before = dict(states)

    def _lines(self, states: dict[str, State]) -> Table:
        """One line per running worker and a summary below."""
        table = Table.grid(padding=(0, 2))
        for label, state in states.items():
            if state.name == "running":
                score = "" if state.miou is None else f"val mIoU {state.miou:.1f}"
                table.add_row(escape(label), _bar(state.share), f"{state.step}/{state.steps}", score,
                              f"eta {duration(state.eta)}" if state.eta is not None else "starting")  # fmt: skip
        table.add_row(self._summary(states))
        return table

    def _summary(self, states: dict[str, State]) -> str:
        done = sum(state.name == "done" for state in states.values())
        work = sum(1.0 if state.name == "done" else state.share for state in states.values())
        if self.work_before is None:
            self.work_before = work  # what an earlier call did says nothing of this one's speed
        elapsed = time.monotonic() - self.began
        gained = work - self.work_before
        left = duration(elapsed / gained * (len(states) - work)) if gained > 0.02 * len(states) else "unknown"
        return f"{done} of {len(states)} done, {duration(elapsed)} so far, {left} to go"


def _bar(share: float, width: int = 20) -> str:
    full = round(share * width)
    return "━" * full + "─" * (width - full)


def _share(state: State) -> str:
    score = f" val {state.miou:.1f}" if state.miou is not None else ""
    return f"{state.step}/{state.steps}{score}"

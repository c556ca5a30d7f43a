"""Where the commands print."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    """rich's, but that a reader who has gone away is for the command line to notice, and not the end of the process with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

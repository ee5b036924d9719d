"""How long the running step has taken, which decides health and whether requests are refused."""

import time

from starling.errors import EngineStoppedError


class StepWatch:
    """One thread begins and ends steps; any thread may ask. `hang_after_s` is how long a step may take."""

    def __init__(self, hang_after_s: float) -> None:
        self._hang_after_s = hang_after_s
        self._began_s: float | None = None

    def begin(self) -> None:
        self._began_s = time.monotonic()

    def end(self) -> None:
        self._began_s = None

    @property
    def hangs(self) -> bool:
        """A step has been running for `hang_after_s` or longer."""
        began = self._began_s
        return began is not None and time.monotonic() - began >= self._hang_after_s

    def refuse_if_hung(self) -> None:
        """Raises EngineStoppedError while a step hangs."""
        if self.hangs:
            raise EngineStoppedError(
                "The engine hangs in a step and takes no requests. Try again; if this persists, restart the container."
            )

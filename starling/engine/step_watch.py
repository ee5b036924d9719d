"""How long the running step has taken: what health and the refusal of requests go by."""

import time

from starling.errors import EngineStoppedError


class StepWatch:
    """One thread begins and ends steps; any thread asks. `hang_after_s` is how long a step may take."""

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
                "The engine hangs in a step and takes no requests. Ask again; if this stays, restart the container."
            )

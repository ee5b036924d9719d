"""Stop sequences over a stream of text: never leaked, and nothing held back longer than needed."""

from collections.abc import Iterable


class StopMatcher:
    """A stage of the stream. `feed` returns the text that is safe to show; after a match, nothing more."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        assert all(self._stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        # The stop that completes first wins, as if the text had arrived one character at a time.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            safe, self._held = self._held[:at], ""
            return safe
        keep = self._possible_start()
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe

    def flush(self) -> str:
        """What was held back when the text ended without completing a stop."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for size in range(longest, 0, -1):
            suffix = self._held[-size:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return size
        return 0

"""What the server writes to the container's log: everyone's warnings, and our own info lines."""

import logging


def configure() -> None:
    """Log to stderr, one line per event. Idempotent."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("starling").setLevel(logging.INFO)

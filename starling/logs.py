"""What the server writes to the container's log: warnings of everybody, and our own lines."""

import logging


def configure() -> None:
    """To stderr, one line an event. Calling it again changes nothing."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("starling").setLevel(logging.INFO)

"""A request that is cancelled as it is handed over: nobody holds its stream, and it ends all the same."""

from contextlib import closing
from pathlib import Path

import pytest

from starling.engine.engine import TokenStream
from starling.request import Request
from starling.service import Service
from starling.settings import Settings


def test_what_was_submitted_ends_when_its_caller_never_gets_it(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[TokenStream] = []

    def cancelled(stream: TokenStream, *_: object) -> None:
        streams.append(stream)
        raise KeyboardInterrupt  # as Cog's CancelationException: no Exception

    monkeypatch.setattr("starling.service.Generation", cancelled)
    with closing(Service.from_folder(demo_folder, Settings())) as service:
        with pytest.raises(KeyboardInterrupt):
            service.generate(Request.parse(prompt="Hello", min_tokens=2000, max_tokens=2000))
        (stream,) = streams
        while (delivery := stream.get(timeout_s=60)) is not None and delivery.finish is None:
            pass
        assert delivery is not None and delivery.finish == "cancelled"
        assert (service.occupancy["running"], service.occupancy["waiting"]) == (0, 0)

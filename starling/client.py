"""Ask a running server over HTTP, and read its answer as it is generated."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote

import httpx
from httpx_sse import EventSource

from starling.errors import StarlingError

# A slot is freed slightly after its answer ends, so a request to a full server is retried for this long.
BUSY_RETRY_S = 2.0
BUSY_PAUSE_S = 0.05
# A proxy set in the environment is for reaching other machines, but httpx would use it for loopback addresses too.
LOOPBACK_WITHOUT_PROXY = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}


class AnswerError(StarlingError):
    """The request was refused or failed, or the server cannot be reached; the message says why.

    `kind`: the name of the exception in the server, such as RequestError, if the answer failed there.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """One streamed prediction. Iterate over its text once; the other fields are final when that ends."""

    def __init__(self, events: EventSource) -> None:
        self.id = ""
        self.status = "starting"  # then "processing", and at the end "succeeded", "failed" or "canceled"
        self.metrics: dict[str, Any] = {}
        self._events = events

    def __iter__(self) -> Iterator[str]:
        """Chunks of text. Raises AnswerError if the prediction fails or the connection closes before it completes."""
        for event in self._events.iter_sse():
            data = json.loads(event.data)
            match event.event:
                case "start":
                    self.id, self.status = data["id"], data["status"]
                case "output":
                    yield data["chunk"]
                case "error":
                    raise AnswerError(data["error"])
                case "completed":
                    self.status, self.metrics = data["status"], data.get("metrics", {})
                    if self.status == "failed":
                        raise _failure(data["error"])
                    return
        raise AnswerError("The server closed the connection before the answer was complete")


class Client:
    """A server at a base URL, such as http://127.0.0.1:5000. Safe to use from many threads.

    Raises AnswerError if that is not a valid URL.
    """

    def __init__(self, url: str, timeout_s: float = 600) -> None:
        limits = httpx.Limits(max_connections=None)
        try:
            self._http = httpx.Client(base_url=url, timeout=timeout_s, limits=limits, mounts=LOOPBACK_WITHOUT_PROXY)
            if self._http.base_url.scheme not in ("http", "https"):
                raise httpx.InvalidURL("it does not begin with http:// or https://")
        except httpx.InvalidURL as error:
            raise AnswerError(f"{url!r} is not a valid URL ({error}); use one like http://127.0.0.1:5000") from error

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def stream(self, **inputs: Any) -> Iterator[Answer]:
        """Start a prediction. Leaving the block before the answer has ended cancels it on the server.

        Raises AnswerError if the request is refused, no server answers, the connection breaks, or the inputs cannot be
        sent as JSON.
        """
        headers = {"Accept": "text/event-stream"}
        try:
            request = self._http.build_request("POST", "/predictions", json={"input": inputs}, headers=headers)
        except ValueError as error:
            raise AnswerError(
                f"The inputs cannot be sent ({error}): text must be valid Unicode, and numbers finite"
            ) from error
        began_s = time.monotonic()
        while True:
            try:
                with closing(self._http.send(request, stream=True)) as response:
                    if response.is_success:
                        yield Answer(EventSource(response))
                        return
                    if response.status_code != httpx.codes.CONFLICT or time.monotonic() - began_s > BUSY_RETRY_S:
                        raise AnswerError(_refusal(response))
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
            time.sleep(BUSY_PAUSE_S)

    def cancel(self, prediction_id: str) -> bool:
        """True if there was such a prediction to cancel. Raises AnswerError if the server cannot say."""
        try:
            response = self._http.post(f"/predictions/{quote(prediction_id, safe='')}/cancel")
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_success or response.status_code == httpx.codes.NOT_FOUND:
            return response.is_success
        raise AnswerError(_refusal(response))

    def _unreachable(self, error: httpx.TransportError) -> AnswerError:
        remedy = ". Is a server running there?" if isinstance(error, httpx.ConnectError) else ""
        return AnswerError(f"The connection to {self._http.base_url} failed: {error}{remedy}")


def _failure(error: str) -> AnswerError:
    """What a failed prediction says, "NoRoomError: message", and Cog before it "Prediction failed: …"."""
    ours = re.fullmatch(r"(?s)(?:Prediction failed: (?:Generator iteration error: )?)?(\w+Error): (.*)", error)
    return AnswerError(ours[2], kind=ours[1]) if ours else AnswerError(error)


def _refusal(response: httpx.Response) -> str:
    """Why a request was refused, in one line."""
    if response.status_code == httpx.codes.NOT_ACCEPTABLE:
        return f"The server is still starting, or its setup has failed: see {response.url.join('/health-check')}"
    text = response.read().decode(errors="replace")
    try:
        body = json.loads(text)
        faults = [f"{detail['loc'][-1]}: {detail['msg']}" for detail in body.get("detail", [])]
    except (ValueError, AttributeError, KeyError, TypeError):
        body, faults = {}, []
    reason = "; ".join(faults) or body.get("error") or text or f"{response.reason_phrase} from {response.url}"
    return f"{response.status_code} {reason}"

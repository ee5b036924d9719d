"""The hub, or a mirror with the same protocol, through huggingface_hub.

Addresses, metadata, tokens, redirects and the HTTP session are huggingface_hub's. The bytes are read here: its own
download starts over in every process and loses up to 10 MB at each disconnect, so 4 GB on a bad line may never finish.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import httpx2  # huggingface_hub's HTTP client, which it installs: its errors pass through
from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked so
    build_hf_headers,
    parse_ratelimit_headers,
)

from starling import __version__
from starling.errors import WeightsError
from starling.weights.address import checked, without_secrets
from starling.weights.source import FileFaultError, Offer, RetryPolicy, SourceUnavailableError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT_S = 300.0  # the hub limits requests per five minutes, and may ask to wait as long
# Less than this in `stall_s` is a stall, and less than this between two failures is no progress.
MIN_PROGRESS_BYTES = 64 << 10


class _TransientError(Exception):
    """A failure that may pass: the connection was cut, too slow, or refused for now."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Hub:
    """The files of `repository` at `revision`. `endpoint`: a mirror's URL, or None for the hub or HF_ENDPOINT."""

    def __init__(self, repository: str, revision: str, endpoint: str | None, retry: RetryPolicy) -> None:
        if is_offline_mode():
            raise WeightsError(
                f"HF_HUB_OFFLINE is set, so {repository} may not be downloaded. "
                "Unset it, or name a local folder that holds the files."
            )
        # Otherwise building the request's headers calls the public hub, even when a mirror is named.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        address = checked(endpoint or constants.ENDPOINT)
        self._repository = repository
        self._revision = revision
        self._endpoint = address if endpoint else None
        # The caller's token is for the hub (or HF_ENDPOINT); a mirror named only to us does not get to see it.
        self._token = False if endpoint else None
        self._retry = retry
        self.name = without_secrets(address)

    def offer(self, name: str) -> Offer:
        def ask() -> Offer:
            metadata = get_hf_file_metadata(
                self._url(name),
                token=self._token,
                timeout=self._retry.stall_s,
                library_name="starling",
                library_version=__version__,
                endpoint=self._endpoint,
            )
            if metadata.commit_hash not in {None, self._revision}:
                raise FileFaultError(
                    f"{name}: {self.name} serves revision {metadata.commit_hash}, not {self._revision}"
                )
            if metadata.size is None:
                raise FileFaultError(f"{name}: {self.name} does not say how large it is")
            tag = metadata.etag or ""  # other servers may send anything
            return Offer(
                size=metadata.size,
                sha256=tag if re.fullmatch("[0-9a-f]{64}", tag) else None,
                git_blob_sha1=tag if re.fullmatch("[0-9a-f]{40}", tag) else None,
            )

        return self._with_retries(name, ask, progress_bytes=lambda: 0)

    def fetch(self, name: str, partial: Path, size: int, advance: Callable[[int], None]) -> None:
        with partial.open("ab") as file:
            self._with_retries(name, lambda: self._stream(name, file, size, advance), progress_bytes=file.tell)

    def _with_retries(self, name: str, action: Callable[[], Result], progress_bytes: Callable[[], int]) -> Result:
        failures = 0
        while True:
            before_bytes = progress_bytes()
            try:
                return self._with_our_errors(name, action)
            except _TransientError as error:
                if progress_bytes() - before_bytes >= MIN_PROGRESS_BYTES:
                    failures = 0
                failures += 1
                if failures >= self._retry.attempts:
                    raise SourceUnavailableError(
                        f"{name}: {self.name}: {error}; gave up after {failures} attempts"
                    ) from error
                wait_s = max(error.wait_s, self._retry.first_wait_s * 2 ** (failures - 1))
                logger.info("%s: %s; trying again in %.0f s", name, error, min(wait_s, LONGEST_WAIT_S))
                time.sleep(min(wait_s, LONGEST_WAIT_S))

    def _with_our_errors(self, name: str, action: Callable[[], Result]) -> Result:
        """Turns the libraries' errors into ours. Theirs may contain signed addresses, so only parts are kept."""
        try:
            return action()
        except (HfHubHTTPError, httpx2.HTTPStatusError) as error:
            self._raise_for(name, error.response)
        except httpx2.TimeoutException as error:
            raise _TransientError(f"nothing arrived for {self._retry.stall_s:g} s") from error
        except httpx2.TransportError as error:
            raise _TransientError(without_secrets(str(error)) or type(error).__name__) from error
        except httpx2.HTTPError as error:
            raise FileFaultError(f"{name}: {self.name}: {without_secrets(str(error))}") from error

    def _raise_for(self, name: str, response: httpx2.Response) -> NoReturn:
        status = response.status_code
        if status in RETRIED_STATUSES:
            raise _TransientError(f"it answers {status}", wait_s=_asked_wait_s(response.headers))
        remedy = {
            401: "the repository is private or does not exist",
            403: "access is not granted to you",
            404: f"{self._repository} has no such file at revision {self._revision}",
        }.get(status, "a hub does not answer like this; is the address right?")
        raise FileFaultError(f"{name}: {self.name} answers {status}: {remedy}")

    def _stream(self, name: str, file: BinaryIO, size: int, advance: Callable[[int], None]) -> None:
        """One connection: append to `file` until it holds `size` bytes."""
        have = file.tell()
        headers = build_hf_headers(token=self._token, library_name="starling", library_version=__version__) | {
            "Accept-Encoding": "identity"
        }
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = httpx2.Timeout(self._retry.stall_s)
        with get_session().stream("GET", self._url(name), headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                _empty(file, advance)
                raise _TransientError(f"it has no byte {have}")
            if response.status_code >= 400:
                self._raise_for(name, response)
            if have and not _continues_at(response, have):
                _empty(file, advance)  # the server sends the file from its beginning
            pace = _Pace(self._retry.stall_s)
            for chunk in response.iter_raw():
                if file.tell() + len(chunk) > size:
                    raise FileFaultError(f"{name}: {self.name} sends more than the {size} bytes expected")
                file.write(chunk)
                file.flush()  # what has arrived survives this process
                advance(len(chunk))
                pace.count(len(chunk))
        if file.tell() < size:
            raise _TransientError(f"the connection ended at byte {file.tell()} of {size}")

    def _url(self, name: str) -> str:
        return hf_hub_url(self._repository, name, revision=self._revision, endpoint=self._endpoint)


class _Pace:
    """Detects a server that sends, but next to nothing: a read timeout alone would never fire."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._start_s = time.monotonic()
        self._bytes = 0

    def count(self, count_bytes: int) -> None:
        self._bytes += count_bytes
        if self._bytes >= MIN_PROGRESS_BYTES:
            self._start_s, self._bytes = time.monotonic(), 0
        elif time.monotonic() - self._start_s > self._window_s:
            raise _TransientError(f"only {self._bytes} bytes arrived in {self._window_s:g} s")


def _continues_at(response: httpx2.Response, offset: int) -> bool:
    return response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _asked_wait_s(headers: Mapping[str, str]) -> float:
    """How long the server asks us to wait: the hub in RateLimit, others in Retry-After."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0


def _empty(file: BinaryIO, advance: Callable[[int], None]) -> None:
    advance(-file.tell())
    file.seek(0)
    file.truncate()

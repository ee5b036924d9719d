"""The address of a hub or a mirror: checked before anything is asked of it, and shown without what may open it."""

import re
from urllib.parse import urlsplit

import httpx2  # what huggingface_hub speaks HTTP with, and installs

from starling.errors import WeightsError

ENDS = r'\s"<>'  # where an address ends in a text; one that is `checked` holds none of them


def checked(address: str) -> str:
    """`address`, its scheme in lower case, without slashes at its end.

    Raises WeightsError when it is none of http or https. What may be a password's is not in its message.
    """
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    if scheme not in ("http", "https"):
        known = rest and re.fullmatch("[a-z][a-z0-9+.-]*", scheme)
        raise WeightsError(
            f"The source of weights begins with {f'{scheme}://' if known else 'no scheme'}. "
            "Give an address that begins with http:// or https://, or a folder."
        )
    address = f"{scheme}://{rest}"
    if not _can_be_asked(address):
        shown = f"{scheme}://…" if set(rest) & set("@?#") else address
        raise WeightsError(
            f"{shown!r} is no source of weights: it has no host, or a port or a character that no address has. "
            "Give http://HOST:PORT/PATH; in a user or password, write what is neither letter nor digit as %XX."
        )
    return address.rstrip("/")


def without_secrets(text: str) -> str:
    """Addresses in `text` lose what may sign or open them: the user part, the query and the fragment."""
    return re.sub(rf"(?i)(https?://)(?:[^{ENDS}/?#]*@)?([^{ENDS}?#]*)[^{ENDS}]*", r"\1\2", text)


def _can_be_asked(address: str) -> bool:
    """Whether both parsers that read it take it, and everything before an @ for user and password."""
    if re.search(f"[{ENDS}]", address):
        return False
    try:
        httpx2.URL(address)
        url = urlsplit(address)
        return bool(url.hostname) and url.port != 0 and "@" not in url.path + url.query + url.fragment
    except (ValueError, httpx2.InvalidURL):
        return False

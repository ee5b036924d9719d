"""The address of a hub or a mirror: checked before any request to it, and shown without secrets."""

import re
from urllib.parse import urlsplit

import httpx2  # huggingface_hub's HTTP client, which it installs

from starling.errors import WeightsError

ENDS = r'\s"<>'  # characters that end an address in a text; a `checked` address has none of them


def checked(address: str) -> str:
    """`address` with its scheme in lower case and without trailing slashes.

    Raises WeightsError if it is not a valid http or https address. The message leaves out whatever may be a password.
    """
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    if scheme not in ("http", "https"):
        known = rest and re.fullmatch("[a-z][a-z0-9+.-]*", scheme)
        raise WeightsError(
            f"The source of weights {f'begins with {scheme}://' if known else 'has no scheme'}. "
            "Give an address that begins with http:// or https://, or a folder."
        )
    address = f"{scheme}://{rest}"
    if not _is_valid(address):
        shown = f"{scheme}://…" if set(rest) & set("@?#") else address
        raise WeightsError(
            f"{shown!r} is not a source of weights: it has no host, or an invalid port or character. "
            "Give http://HOST:PORT/PATH; in a user name or password, percent-encode (%XX) all but letters and digits."
        )
    return address.rstrip("/")


def without_secrets(text: str) -> str:
    """`text` with its addresses stripped of what may hold secrets: the user part, the query and the fragment."""
    return re.sub(rf"(?i)(https?://)(?:[^{ENDS}/?#]*@)?([^{ENDS}?#]*)[^{ENDS}]*", r"\1\2", text)


def _is_valid(address: str) -> bool:
    """Whether both parsers that will read it accept it, and take everything before an @ as user and password."""
    if re.search(f"[{ENDS}]", address):
        return False
    try:
        httpx2.URL(address)
        url = urlsplit(address)
        return bool(url.hostname) and url.port != 0 and "@" not in url.path + url.query + url.fragment
    except (ValueError, httpx2.InvalidURL):
        return False

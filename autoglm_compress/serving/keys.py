"""The keys that a server asks its clients for."""

import hmac
import ipaddress
from pathlib import Path

from autoglm_compress.errors import UserError


def read_keys(file: Path) -> tuple[bytes, ...]:
    """The keys of a file, one in each line; empty lines are left out.

    Raises:
        UserError: the file cannot be read, or has no key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--api-key-file {file}: cannot be read: {reason}.") from None
    keys = tuple(line.strip().encode() for line in lines if line.strip())
    if not keys:
        raise UserError(f"--api-key-file {file}: is empty: expected a key in each line.")
    return keys


def require_key_for(host: str, keys: tuple[bytes, ...]) -> None:
    """Raise UserError if others than this machine could reach the server and no key is asked for."""
    if not keys and not _is_loopback(host):
        raise UserError(f"--host {host}: other machines can reach it. Give --api-key-file, or use --host 127.0.0.1.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_allowed(authorization: str, keys: tuple[bytes, ...]) -> bool:
    """Whether the header `Authorization` has one of the keys. The time it takes tells nothing about them."""
    kind, _, given = authorization.partition(" ")
    same = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
    return not keys or (kind.lower() == "bearer" and any(same))

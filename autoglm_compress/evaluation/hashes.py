"""What records of an evaluation know things by."""

import hashlib

LENGTH = 20


def hash_of(text: str, length: int = LENGTH) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]

"""Formats of numbers in tables, on the terminal and on the page."""

import math

KV_TOKENS = 1000
"""The length that the size of a key-value cache is given for."""


def human(count: float) -> str:
    """A number with a decimal prefix, such as 8.19G."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * limit:  # a number that rounds up to the next prefix gets that prefix
            return f"{count / limit:.3g}{suffix}"
    return f"{count:.0f}"


def size(count: float) -> str:
    """Bytes, such as 8.19 GB."""
    number = human(count)
    return f"{number[:-1]} {number[-1]}B" if number[-1].isalpha() else f"{number} B"


def plain(value: float, digits: int = 4) -> str:
    """A number with a number of significant digits. Large numbers are whole, with commas."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e7 else f"{value:.{digits}g}"


def signed(value: float) -> str:
    """A difference of perplexities with its sign."""
    return ("+" if value > 0 else "") + two_places(value).replace("-", "−")


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference of shares in points of percent, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def two_places(value: float) -> str:
    """A perplexity with two decimals, or fewer if it is large."""
    return f"{value:.2f}" if abs(value) < 10_000 else plain(value)


def duration(seconds: float) -> str:
    """Seconds, from a minute on with minutes and from an hour on with hours."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

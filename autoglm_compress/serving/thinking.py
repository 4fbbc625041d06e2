"""What a model thinks, apart from what it answers, where the engine leaves both in one text."""

from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass
class ThoughtSplitter:
    """Splits a text that comes in pieces, however it is cut: thoughts stand at its beginning, between the markers."""

    _held: str = ""
    _state: str = "before"

    def feed(self, piece: str) -> tuple[str, str]:
        """What is known to be thought, and what is known to be answered, with this piece."""
        self._held += piece
        thought = ""
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._held, self._state = begun[len(OPEN) :], "inside"
            elif OPEN.startswith(begun):
                return "", ""
            else:
                self._state = "after"
        if self._state == "inside":
            thought, closed, rest = self._held.partition(CLOSE)
            if not closed:
                kept = _beginning_of(CLOSE, thought)
                self._held = thought[len(thought) - kept :]
                return thought[: len(thought) - kept], ""
            self._held, self._state = rest, "after"
        answer, self._held = self._held, ""
        return thought, answer

    def end(self) -> tuple[str, str]:
        """What was held back in case that a marker followed."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "inside" else ("", held)


def _beginning_of(marker: str, text: str) -> int:
    """How many characters at the end of a text are the beginning of a marker."""
    return next(count for count in range(len(marker) - 1, -1, -1) if text.endswith(marker[:count]))

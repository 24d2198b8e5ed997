"""Stop strings: cut a stream of text where one of them appears."""

from ssd_jax.errors import RequestError


class StopMatcher:
    """Search for stop strings in text that comes in pieces.

    The result does not depend on how the text is cut into pushes: the match that is complete first
    wins, and of several that are complete at the same character the one that starts first.

    Raises:
        RequestError: a stop string is empty, or not text.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(
                f"Expected stop strings of at least one character each, got {stops!r}; "
                "leave the empty ones out."
            )
        self._stops = tuple(stops)
        self._max_held = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """Stop string that was found, or None."""
        return self._matched

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can no longer be part of a stop string, and whether one has been found.

        On a match that is the text before it; from then on every push gives an empty text.
        """
        if self._matched is not None:
            return "", True
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        matches = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if matches:
            _, start, self._matched = min(matches)
            self._held = ""
            return text[:start], True
        num_final = len(text) - self._held_len(text)
        self._held = text[num_final:]
        return text[:num_final], False

    def flush(self) -> str:
        """Text that was held as the possible start of a stop string."""
        text, self._held = self._held, ""
        return text

    def _held_len(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

"""The text of a growing completion: where it must stop, and what of it is certain."""

from collections.abc import Callable

INCOMPLETE = "\ufffd"
"""What stands for bytes that are no character, or not yet."""


class Transcript:
    """Follows a completion's tokens; tells when a stop string is complete, and gives new certain text."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]) -> None:
        self._decode, self._stop = decode, stop
        self._num_read = self._num_given = 0

    def stop_count(self, tokens: list[int]) -> int | None:
        """How many tokens complete the first stop string; None if there is none yet.

        Only tokens that are new since the last call are looked at one by one, and only where they matter.
        """
        first_new, self._num_read = self._num_read + 1, len(tokens)
        if not self._stop or self._stop_start(self._decode(tokens)) is None:
            return None
        counts = range(first_new, len(tokens) + 1)
        return next(count for count in counts if self._stop_start(self._decode(tokens[:count])) is not None)

    def text(self, tokens: list[int]) -> str:
        """The completion's text, up to the first stop string in it."""
        text = self._decode(tokens)
        return text[: self._stop_start(text)]

    def new_text(self, tokens: list[int], *, is_finished: bool) -> str:
        """What can be said of the text beyond what was given before.

        Until all is known, an incomplete character at the end and what may begin a stop string are held back.
        """
        text = self.text(tokens)
        if not is_finished:
            text = text.rstrip(INCOMPLETE)
            text = text[: len(text) - self._num_possible_stop(text)]
        start, self._num_given = self._num_given, max(self._num_given, len(text))
        return text[start:]

    def _stop_start(self, text: str) -> int | None:
        return min((start for stop in self._stop if (start := text.find(stop)) >= 0), default=None)

    def _num_possible_stop(self, text: str) -> int:
        """The length of the longest end of the text that begins a stop string."""
        lengths = (count for stop in self._stop for count in range(1, len(stop)) if text.endswith(stop[:count]))
        return max(lengths, default=0)

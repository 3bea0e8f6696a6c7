"""Detection of stop strings in a completion that is being generated."""

from collections.abc import Callable

REPLACEMENT_CHARACTER = "\ufffd"
"""The character that the tokenizer returns for the bytes of an invalid or incomplete character."""


class StopStrings:
    """The stop strings of one completion that is being generated.

    The methods find the first stop string, and determine which part of the text is final. `decode` is a function that
    returns the text of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]) -> None:
        self._decode, self._stop = decode, stop
        self._num_searched = self._num_streamed = 0

    def stop_count(self, tokens: list[int]) -> int | None:
        """Return the number of tokens up to the end of the first stop string; None if there is no stop string.

        First, the whole text is searched. If it contains a stop string, the tokens that are new since the last call are
        then searched one by one.
        """
        first_new, self._num_searched = self._num_searched + 1, len(tokens)
        if not self._stop or self._stop_start(self._decode(tokens)) is None:
            return None
        counts = range(first_new, len(tokens) + 1)
        return next(count for count in counts if self._stop_start(self._decode(tokens[:count])) is not None)

    def text(self, tokens: list[int]) -> str:
        """Return the text of the completion. If the text contains a stop string, the part before it is returned."""
        text = self._decode(tokens)
        return text[: self._stop_start(text)]

    def new_text(self, tokens: list[int], *, is_finished: bool) -> str:
        """Return the text that has become final since the last call of this method.

        The end of an unfinished completion is not final if it is an incomplete character, or if it may be the beginning
        of a stop string.
        """
        text = self.text(tokens)
        if not is_finished:
            text = text.rstrip(REPLACEMENT_CHARACTER)
            text = text[: len(text) - self._num_possible_stop(text)]
        start, self._num_streamed = self._num_streamed, max(self._num_streamed, len(text))
        return text[start:]

    def _stop_start(self, text: str) -> int | None:
        return min((start for stop in self._stop if (start := text.find(stop)) >= 0), default=None)

    def _num_possible_stop(self, text: str) -> int:
        """Return the length of the longest suffix of the text that may be the beginning of a stop string."""
        lengths = (count for stop in self._stop for count in range(1, len(stop)) if text.endswith(stop[:count]))
        return max(lengths, default=0)

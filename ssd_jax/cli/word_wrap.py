"""Text that comes in pieces, broken at words for a terminal; what is shown is never taken back."""

from collections.abc import Callable

from rich.cells import cell_len

_JOINER = "\u200d"
_NOT_FIRST = frozenset("，。、！？；：）」』】》”’…ー々")  # noqa: RUF001 (do not begin a line)
_FENCES = ("```", "~~~")


class WordWrap:
    """Breaks lines between words, and between wide characters, which are written without spaces.

    A word is held until its end is known, so it appears where it will stay. Lines of a fenced code
    block, and words wider than the terminal, are left to the terminal. `width` is asked for each
    word: columns of the terminal as it is then.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._spaces = ""
        self._word = ""
        self._fence = ""  # which the block that we are in began with
        self._at_start = True  # no word yet in this line of the text

    def push(self, text: str) -> str:
        """What can be shown now, breaks put in."""
        return "".join(map(self._next, text))

    def flush(self) -> str:
        """What was held; the text is over, or a pause comes."""
        spaces = self._spaces
        shown = self._end_word()
        return shown if shown else spaces

    def _next(self, character: str) -> str:
        if character == "\n":
            shown = self._end_word()
            self._column, self._spaces, self._at_start = 0, "", True
            return f"{shown}\n"
        if character in " \t":
            shown = self._end_word()
            self._spaces += character
            return shown
        shown = self._end_word() if self._begins_unit(character) else ""
        self._word += character
        return shown

    def _begins_unit(self, character: str) -> bool:
        """Whether a line may be broken before a character that follows the held ones directly."""
        if not self._word or self._word[-1] == _JOINER or character in _NOT_FIRST:
            return False
        if cell_len(self._word + character) == cell_len(self._word):  # an accent, half of a flag
            return False
        return cell_len(character) == 2 or cell_len(self._word[-1]) == 2

    def _end_word(self) -> str:
        """The held word, behind its spaces or a break."""
        word, self._word = self._word, ""
        if not word:
            return ""
        spaces, self._spaces = self._spaces.expandtabs(8), ""
        if self._at_start:
            self._meet_fence(word)
        width, needed = max(1, self._width()), cell_len(word)
        fits = self._column + len(spaces) + needed <= width
        if self._fence or self._at_start or fits or self._column == 0:
            self._at_start = False
            self._column = self._column + len(spaces) + needed
            if self._column > width:  # the terminal goes on in its next line
                self._column = (self._column - 1) % width + 1
            return spaces + word
        self._column = min(needed, (needed - 1) % width + 1)
        return f"\n{word}"

    def _meet_fence(self, word: str) -> None:
        """A line's first word may begin or end a block of code."""
        kind = word[:3]
        if self._fence:
            if kind == self._fence and not word.strip(kind[0]):
                self._fence = ""
                self._at_start = False
        elif kind in _FENCES and kind[0] not in word.lstrip(kind[0]):
            self._fence = kind

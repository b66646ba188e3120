"""Text for the screen: what data, a model or a file name holds must not act on the terminal.

All output of a command goes through `say`, `console` or, beside a progress bar, `printable`.
"""

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
# Marks, embeddings, overrides and isolates that turn the direction of the text after them; line and
# paragraph separators.
_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
# Halves of surrogate pairs: JSON and file names can hold them, no output can.
_SURROGATES = range(0xD800, 0xE000)
_SPELT_OUT = {code: ascii(chr(code))[1:-1] for code in (*_CONTROLS, *_DIRECTIONS, *_SURROGATES)}
_PRINTABLE = {code: text for code, text in _SPELT_OUT.items() if chr(code) not in "\n\t"}


def printable(text: object) -> str:
    """The text with its control characters spelt out; line breaks and tabs stay.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    return str(text).translate(_PRINTABLE)


def one_line(text: object) -> str:
    """The text with all control characters spelt out, line breaks too."""
    return str(text).translate(_SPELT_OUT)


def say(text: object = "", *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a text, made printable, at once; to stdout where no `file` is given."""
    print(printable(text), file=file or sys.stdout, end=end, flush=True)


def console(**settings: Any) -> "Console":
    """A console that takes no text for markup and prints nothing that acts on the terminal.

    `settings` are those of rich's Console.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                # Control segments are rich's own.
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    return SafeConsole(markup=False, emoji=False, highlight=False, **settings)


def plain(text: object, style: str = "") -> "Text":
    """A text for a table's cell or title: as wide as it is printed, and never markup."""
    from rich.text import Text

    return Text(printable(text), style=style)

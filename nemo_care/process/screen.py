"""Text for the screen: content of data, models and file names must not control the terminal.

All output of a command uses `say`, `console` or, beside a progress bar, `printable`.
"""

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
# Marks, embeddings, overrides and isolates that change the direction of the following text; line
# and paragraph separators.
_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
# Halves of surrogate pairs: JSON and file names can contain them, but they can't be printed.
_SURROGATES = range(0xD800, 0xE000)
_SPELT_OUT = {code: ascii(chr(code))[1:-1] for code in (*_CONTROLS, *_DIRECTIONS, *_SURROGATES)}
_PRINTABLE = {code: text for code, text in _SPELT_OUT.items() if chr(code) not in "\n\t"}


def printable(text: object) -> str:
    """Escape the control characters of a text, except line breaks and tabs.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    return str(text).translate(_PRINTABLE)


def one_line(text: object) -> str:
    """Escape all control characters of a text, including line breaks."""
    return str(text).translate(_SPELT_OUT)


def say(text: object = "", *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a text, made printable, and flush; to stdout by default."""
    print(printable(text), file=file or sys.stdout, end=end, flush=True)


def console(**settings: Any) -> "Console":
    """Return a console that ignores markup in texts and escapes control characters.

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
    """Return a table cell or title with its printed width, and without markup."""
    from rich.text import Text

    return Text(printable(text), style=style)

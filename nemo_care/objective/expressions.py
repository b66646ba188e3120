r"""Compare mathematical expressions, such as `\sqrt{8}` and `2\sqrt{2}`.

For the problem type `math`, which is not in the paper. Math-Verify compares, in a separate process
(see `math_process`): an answer can be anything, and some expressions take unbounded time or memory.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import warnings
from functools import cache

from nemo_care.objective import math_process
from nemo_care.objective.quantities import (
    LONGEST,
    plain_characters,
    quantities_equal,
    read_quantity,
)

# The process limits its own CPU time, which does not depend on the load of the machine. This is the
# limit for a process that does not run at all.
_WALL_SECONDS = 120.0
_START_SECONDS = 120.0

_FUNCTIONS = frozenset(
    [
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan"),
        *("sinh", "cosh", "tanh", "exp", "log", "sqrt", "max", "min", "gcd", "lcm"),
        *("det", "abs", "mod", "lim"),
    ]
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_TEXT = re.compile(r"\\(?:text|textrm|mathrm|textbf|mathbf)\s*\{[^{}]*\}")
_DELIMITERS = re.compile(r"\$+|\\[()\[\]]")
_PERCENT = re.compile(r"(.*?)\s*\\?%\s*", re.DOTALL)
_SYMBOLS = {"√": r"\sqrt", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "∞": r"\infty "}


def same_expression(answer: str, solution: str) -> bool:
    """Whether two texts are equal as mathematics.

    Two numbers (fractions, decimals, per cent, powers of ten) compare exactly, or with a relative
    tolerance of 1e-6 if either has decimals. A text that repeats the solution is equal to it. The
    rest is compared by Math-Verify. Words, and texts longer than 1000 characters, are not
    expressions. Bounded: a comparison that takes more than 2 seconds of CPU time or 4 GiB counts as
    unequal, with a warning.

    Raises:
        RuntimeError: the comparing process does not start.
    """
    out, gt = read_expression(answer), read_expression(solution)
    if out is None or gt is None:
        return False
    if out == gt:
        return True
    first, second = read_quantity(out), read_quantity(gt)
    if first and second and not _letters(first.unit + second.unit):
        return quantities_equal(first, second)
    result = _comparer(os.getpid()).equal(_as_latex(out), _as_latex(gt))
    if result is None:
        warnings.warn(
            f"comparing {answer[:80]!r} with the solution {solution[:80]!r} was stopped after "
            f"{math_process.CPU_SECONDS:g} seconds of CPU time or "
            f"{math_process.MEMORY_BYTES >> 30} GiB; it counts as unequal",
            RuntimeWarning,
            stacklevel=2,
        )
    return bool(result)


def read_expression(text: str) -> str | None:
    """Return the expression without `$` and surrounding white space; None if it can't be one.

    That is: empty, longer than 1000 characters, with words that are not functions, or with
    unbalanced braces. Whether Math-Verify can read the rest is found when it is compared.
    """
    if len(text) > LONGEST:
        return None
    text = " ".join(_DELIMITERS.sub(" ", plain_characters(text)).split())
    words = _WORD.findall(_TEXT.sub("", text))
    if not text or any(word.lower() not in _FUNCTIONS for word in words):
        return None
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return None
    return text if depth == 0 else None


def _letters(unit: str) -> bool:
    """Whether it is a unit other than per cent: `12 m` can be a product."""
    return unit.replace("%", "") != ""


def _as_latex(text: str) -> str:
    """Convert to what Math-Verify's LaTeX reader accepts: numbers as fractions, no per cent
    signs."""
    for sign, command in _SYMBOLS.items():
        text = text.replace(sign, command)
    quantity = read_quantity(text)
    if quantity is not None and not _letters(quantity.unit):
        number = quantity.number / 100 if quantity.unit else quantity.number
        return rf"\frac{{{number.numerator}}}{{{number.denominator}}}"
    percent = _PERCENT.fullmatch(text)
    return rf"\frac{{{percent[1]}}}{{100}}" if percent else text


class _Comparer:
    """The comparing process, started on first use and again if a comparison has ended it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def equal(self, answer: str, solution: str) -> bool | None:
        """Whether they are equal; None if that was not decided within the limits."""
        with self._lock:
            process = self._process or self._start()
            request = json.dumps([answer, solution]) + "\n"
            try:
                assert process.stdin is not None
                process.stdin.write(request.encode())
                process.stdin.flush()
                reply = _read_line(process, _WALL_SECONDS)
            except BrokenPipeError:
                reply = ""
            if reply not in ("0", "1"):
                self.close()
                return None
            return reply == "1"

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        # A fork closes its copies of its parent's pipes at its exit.
        if process is not None and self._pid == os.getpid():
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the file's folder contains modules with names of the standard library.
        process = subprocess.Popen(
            [sys.executable, "-P", math_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._process = process
        if _read_line(process, _START_SECONDS) != math_process.READY:
            self._process = None
            process.kill()
            _, errors = process.communicate()
            last = (errors.decode(errors="replace").strip().splitlines() or ["no reply"])[-1]
            raise RuntimeError(
                f"the process that compares mathematical expressions does not start ({last}): "
                "is math-verify installed?"
            )
        return process


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Read the next line of its output; incomplete if the process has ended or time is over."""
    assert process.stdout is not None
    output, deadline, line = process.stdout.fileno(), time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([output], [], [], left)[0]:
            break
        part = os.read(output, 100)
        if not part:
            break
        line += part
    return line.decode().strip()


@cache
def _comparer(pid: int) -> _Comparer:
    """Return this process's own comparer: a fork must not share the pipes of its parent."""
    return _Comparer()

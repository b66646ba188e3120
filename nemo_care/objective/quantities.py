r"""Numbers as people write them, with units: `12 cm`, `50%`, `$\frac{1}{2}$`, `−3`, `１２`.

For the problem types `quantity` and `math`, which are not in the paper; its numerical and
regression rewards read plain numbers only (`parse_number`). All parsing uses regular expressions in
linear time on texts of at most `LONGEST` characters, so that no answer can make it slow.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

LONGEST = 1000
"""Length limit, in characters, of a text that is read as a number, quantity or expression."""

TOLERANCE = Fraction(1, 10**6)
"""Relative tolerance for equal numbers, if either was written with decimals."""

# Between numbers without decimals, for the rounding of unit conversions.
_CONVERSION_ERROR = Fraction(1, 10**9)

_CHARACTERS = str.maketrans(
    {**dict.fromkeys("−‐‑‒–﹣－", "-"), "\N{FRACTION SLASH}": "/", "∕": "/", "⋅": "·", "，": ","}
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞]")
_ONE_MATH = re.compile(r"\$\$?([^$]*)\$\$?")
# LaTeX to its printed form, in this order.
_PRINTED = [
    (re.compile(pattern), printed)
    for pattern, printed in (
        (r"\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[,;:! ]|~|\\quad(?![A-Za-z])", " "),
        (r"\^\s*\{\s*([-+]?\d+)\s*\}", r"^\1"),
        (r"\\(?:text|textrm|mathrm|rm|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\%", "%"),
        (r"\{,\}", ","),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
        (r"\\times(?![A-Za-z])", "×"),
        (r"\\cdot(?![A-Za-z])", "·"),
        (r"\\mu(?![A-Za-z])", "μ"),
        (r"\\Omega(?![A-Za-z])", "Ω"),
        (r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2"),
        (r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2"),
    )
]
_NUMBER = r"""
    (?P<sign>[-+]?)\s*
    (?: (?: (?P<whole>\d{1,30})\s+ )? (?P<above>\d{1,30})\s*/\s*(?P<below>\d{1,30})
      | (?P<digits>\d{1,3}(?:,\d{3}){1,30}(?![\d,])|\d{0,300}) (?P<decimals>\.\d{0,300})?
        (?: [eE](?P<exponent>[-+]?\d{1,3}) )?
        (?: \s*[×x*·]\s*10\s*\^\s*(?P<power>[-+]?\d{1,3}) )?
    )
"""
# Products and quotients of names with small powers: Pint would compute m^9^9^9^9.
# Possessive, and with a separator between names, so that a text can be matched in one way only.
_NAME = r"[A-Za-zΑ-Ωα-ωÅ°%]{1,40}+(?:\s?(?:\^|\*\*)\s?-?\d{1,2})?+"
_UNIT = rf"{_NAME}(?:(?:\s?[/*·]\s?|\s){_NAME}){{0,7}}"
_QUANTITY = re.compile(rf"\s*{_NUMBER}\s*(?P<unit>{_UNIT})?\s*", re.VERBOSE)


@dataclass(frozen=True)
class Quantity:
    """A number and its unit as written; the unit is empty for a plain number.

    `exact`: whether the number was written without decimals and exponent.
    """

    number: Fraction
    exact: bool
    unit: str = ""


def plain_characters(text: str) -> str:
    """Replace full-width digits, Unicode minus signs and the like by ASCII."""
    if text.isascii():
        return text
    # NFKC would turn 3² into 32, and 1½ into 11/2.
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _VULGAR_FRACTION.sub(r" \g<0>", text)
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)


def read_quantity(text: str) -> Quantity | None:
    """Read the whole text as one number with or without a unit; None for anything else."""
    if len(text) > LONGEST:
        return None
    text = _ONE_MATH.sub(r"\1", plain_characters(text))
    for pattern, printed in _PRINTED:
        text = pattern.sub(printed, text)
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number = _number(match)
    unit = " ".join((match["unit"] or "").split())
    exact = match["decimals"] is None and match["exponent"] is None and match["power"] is None
    return None if number is None else Quantity(number, exact, unit)


def same_quantity(answer: str, solution: str) -> bool:
    """Whether two texts say the same quantity: `0.12 m` is `12 cm`, `50%` is `0.5`.

    Units are converted by Pint; units unknown to Pint must be spelled alike, ignoring case. A
    number without a unit is not the same as one with a unit.
    """
    out, gt = read_quantity(answer), read_quantity(solution)
    return out is not None and gt is not None and quantities_equal(out, gt)


def quantities_equal(out: Quantity, gt: Quantity) -> bool:
    """Whether numbers are equal, exactly or within `TOLERANCE` if either has decimals, with
    units."""
    if out.unit == gt.unit or _same_unknown_unit(out.unit, gt.unit):
        return _close(out.number, gt.number, Fraction(0) if out.exact and gt.exact else TOLERANCE)
    first, second = _in_base_units(out), _in_base_units(gt)
    if first is None or second is None or first[1] != second[1]:
        return False
    exact = out.exact and gt.exact
    return _close(first[0], second[0], _CONVERSION_ERROR if exact else TOLERANCE)


def _number(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["above"] is not None:
        if int(match["below"]) == 0:
            return None
        return sign * (
            int(match["whole"] or 0) + Fraction(int(match["above"]), int(match["below"]))
        )
    digits, decimals = match["digits"].replace(",", ""), (match["decimals"] or "")[1:]
    if not digits and not decimals:
        return None
    exponent = int(match["exponent"] or 0) + int(match["power"] or 0) - len(decimals)
    return sign * int(digits + decimals) * Fraction(10) ** exponent


def _same_unknown_unit(out: str, gt: str) -> bool:
    return out.lower() == gt.lower() and _unit(gt) is None


def _close(a: Fraction, b: Fraction, tolerance: Fraction) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _in_base_units(quantity: Quantity) -> tuple[Fraction, Any] | None:
    """Return the number in SI base units, and its dimension; None if the unit is unknown."""
    unit = _unit(quantity.unit)
    if unit is None:
        return None
    try:
        converted = _registry().Quantity(float(quantity.number), unit).to_base_units()
        return Fraction(float(converted.magnitude)), converted.dimensionality
    except (ArithmeticError, ValueError):
        # Too large for a float.
        return None


@cache
def _registry() -> Any:
    import pint

    return pint.UnitRegistry(cache_folder=None)


def _unit(text: str) -> Any:
    """Return Pint's unit, None for an unknown one; `Meters` is `meters`."""
    import pint

    for spelling in dict.fromkeys((text, text.lower())):
        try:
            return _registry().parse_units(spelling)
        # Pint's parser raises many kinds of errors for texts that are not units.
        except (pint.errors.PintError, ArithmeticError, AssertionError, LookupError, TypeError,
                ValueError, AttributeError, RecursionError):  # fmt: skip
            continue
    return None

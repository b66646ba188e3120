"""Convert the solutions of annotations to the form that rewards compare, or refuse them.

A reward compares texts strictly, so a solution in a different form than the answers yields a sample
on which every completion scores 0, without any error. A solution with a clear meaning is
normalised; one that does not score when it is itself the answer is refused.
"""

import re
from collections.abc import Callable, Mapping

from nemo_care.objective.quantities import LONGEST, plain_characters
from nemo_care.objective.rewards import parse_number
from nemo_care.objective.text import ANSWER_CLOSE, ANSWER_OPEN, extract_answer

Accuracy = Callable[[str, str, str], float]
"""Scores a completion; takes problem_type, completion and solution."""

# The score that the best answer must reach: below 1 for the 1e-9 in the regression's formula.
_FULL = 0.99
# ROUGE-2 is 0 for a text of one word, which has no word pairs.
_FULL_OF_ONE_WORD = 0.66
_NUMBERS = ("numerical", "regression")
_REMEDY = (
    "use problem_type quantity for units and per cent, math for fractions and LaTeX, or write a "
    "plain number"
)
_LETTER = re.compile(
    r"(?:(?:the\s)?(?:correct\s)?(?:answer|option|choice)(?:\sis)?\s?:?\s)?"
    r"[(\[]?\s?([a-z])\s?[)\].:]{0,2}",
    re.IGNORECASE,
)
_LETTER_AND_TEXT = re.compile(r"[(\[]?([a-z])\s?[)\].:]{1,2}\s?(.+)", re.IGNORECASE)


def normalised_solution(problem_type: str, solution: str, options: Mapping[str, str]) -> str:
    """Return the solution in the form that the reward compares; as it is if its meaning is unclear.

    Surrounding white space and `<answer>` tags are removed. A multiple-choice solution such as
    `(B)`, `B.`, `b`, `B. its text` or an option's text becomes the letter of the only option that
    it can mean. In numbers, Unicode's minus signs and full-width digits become ASCII.
    """
    wrapped = extract_answer(solution)
    text = solution.strip() if wrapped is None else wrapped
    if problem_type == "multiple choice" and text not in options:
        letters = _letters_meant(text, options)
        return letters.pop() if len(letters) == 1 else text
    if problem_type in _NUMBERS and parse_number(text) is None:
        plain = plain_characters(text[:LONGEST])
        return plain if parse_number(plain) is not None else text
    return text


def why_no_answer_scores(
    problem_type: str, solution: str, options: Mapping[str, str], accuracy: Accuracy
) -> str | None:
    """Return why no answer can match a normalised solution; None if it scores as an answer.

    `accuracy` is the function that scores completions: `accuracy_reward` in training,
    `evaluation_accuracy` in validation.
    """
    if not solution:
        return "is empty"
    if problem_type == "multiple choice" and options and solution not in options:
        return f"is none of the option letters {', '.join(options)}"
    best = accuracy(problem_type, f"{ANSWER_OPEN}{solution}{ANSWER_CLOSE}", solution)
    if best >= _FULL or (best >= _FULL_OF_ONE_WORD and is_one_word(problem_type, solution)):
        return None
    if problem_type in _NUMBERS and parse_number(solution) is None:
        return (
            f"is no finite number, so that no answer can be right under {problem_type}: {_REMEDY}"
        )
    if problem_type == "regression":
        return (
            "is so close to 0 that the regression reward, which divides by it, is "
            f"{best:.2g} for the right answer: use problem_type numerical"
        )
    if problem_type == "quantity":
        return "can't be read as one number with or without a unit, such as 12 cm or 50%"
    if problem_type == "math":
        return (
            f"can't be read as a mathematical expression of at most {LONGEST} characters without "
            "words: use problem_type free-form for text"
        )
    return (
        f"scores {best:.2g} when it is given as the answer itself, so that no answer can be right"
    )


def is_one_word(problem_type: str, solution: str) -> bool:
    """Whether it is free text of one word, which scores at most 2/3 (see `rouge_f1`)."""
    from nemo_care.objective.words import rouge_words

    return problem_type == "free-form" and len(rouge_words(solution)) == 1


def _letters_meant(text: str, options: Mapping[str, str]) -> set[str]:
    """Return every option that the text may mean; without options, the letter in it."""
    text = _folded(text)
    match = _LETTER.fullmatch(text)
    if not options:
        # The letter's case is the question's choice; only the characters around it are removed.
        return {match[1]} if match else set()
    meant = {letter for letter in options if match and letter.lower() == match[1].lower()}
    texts = {letter: _folded(option) for letter, option in options.items()}
    same = {letter for letter, option in texts.items() if option == text}
    meant |= same or {letter for letter, o in texts.items() if o.lower() == text.lower()}
    found = _LETTER_AND_TEXT.fullmatch(text)
    if found:
        letter_and_text = (found[1].lower(), found[2].lower())
        meant |= {
            letter for letter, o in texts.items() if (letter.lower(), o.lower()) == letter_and_text
        }
    return meant


def _folded(text: str) -> str:
    """Return the text on one line, with single spaces and ASCII spellings."""
    return " ".join(plain_characters(text).split())

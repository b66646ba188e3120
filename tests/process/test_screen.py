"""What data, a model or a file name says reaches the screen as text, and does not act there."""

import io
import sys

import pytest
from rich.console import Console as RichConsole

from nemo_care.data.samples import Skipped
from nemo_care.process.screen import console, one_line, plain, printable, say
from nemo_care.recipe.schema import Recipe
from nemo_care.reporting.tables import evaluation_table, validation_table
from nemo_care.training.console import Console

# Clears the screen; sets the clipboard; a link; back to the line's start; an 8-bit escape; turns
# the text's direction; half of a surrogate pair; a separator of lines; rich's markup and emoji.
HOSTILE = (
    "\x1b[2J",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1b]8;;http://evil.example\x1b\\",
    "\rready",
    "\x9b31m",
    "\u202egnp",
    "\u2066x\u2069",
    "\ud83d",
    "\u2028",
    "\x7f\x08",
    "[/x]",
    "[red]",
    "[link=http://evil.example]a[/link]",
    ":smile:",
)
ATTACK = "a" + "|".join(HOSTILE) + "z"


def assert_harmless(text: str) -> None:
    unsafe = [c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]
    unsafe += [c for c in text if c in "\u202e\u2066\u2069\u2028" or 0xD800 <= ord(c) < 0xE000]
    assert not unsafe
    text.encode("utf-8")


def test_printable_spells_out_what_acts_and_keeps_the_rest():
    assert_harmless(printable(ATTACK))
    assert printable("\x1b[2J\r\u202e\ud83d") == r"\x1b[2J\r\u202e\ud83d"
    for kept in ("naïve – 視頻 🎬 👩\u200d👧 می\u200cخواهم", "two\n\tlines", "[/x] :smile:"):
        assert printable(kept) == kept
    assert one_line("two\n\tlines") == r"two\n\tlines"


def test_say_prints_a_text_that_nothing_can_encode(capsys):
    say(ATTACK)
    say(ATTACK, file=sys.stderr)
    printed = capsys.readouterr()
    assert printed.out == printed.err == printable(ATTACK) + "\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_console_prints_no_text_raw(is_terminal):
    from rich.table import Table

    out = io.StringIO()
    table = Table(title=plain(ATTACK))
    table.add_column(ATTACK)
    table.add_row(ATTACK)
    table.add_row(plain(ATTACK))
    screen = console(file=out, width=500, force_terminal=is_terminal, soft_wrap=True)
    screen.print(ATTACK)
    screen.print(plain(ATTACK, "yellow"))
    screen.print(table)
    text = out.getvalue()
    if is_terminal:  # rich's own colours, and none else
        assert "\x1b[33m" in text
        for own in ("\x1b[33m", "\x1b[1m", "\x1b[3m", "\x1b[0m"):
            text = text.replace(own, "")
    assert_harmless(text)
    # rich itself leaves out the bell and the like of plain strings.
    assert text.count(printable(ATTACK)) == 3
    assert text.count(printable("\x1b[2J|\x1b]52")) == 6


def level(**values):
    return {"accuracy": 0.5, "consistency_rate": 0.5, "format_rate": 1.0, "count": 3, **values}


def test_levels_of_any_name_are_shown_in_the_tables():
    levels = {ATTACK: level(by_task_type={ATTACK: level()})}
    for made in (validation_table(levels, levels), evaluation_table(levels)):
        # Also on a console that is not ours and takes strings for markup.
        for screen in (console, RichConsole):
            out = io.StringIO()
            screen(file=out, width=600).print(made)
            assert_harmless(out.getvalue())
            assert printable(ATTACK) in out.getvalue()


@pytest.fixture
def shown(capfd):
    recipe = Recipe()
    recipe.trainer.show_completion_every = 1
    return Console(recipe, active=True), lambda: "".join(capfd.readouterr())


def test_a_step_shows_hostile_samples_and_completions_as_text(shown):
    screen, output = shown
    row = {
        "prompt_id": ATTACK,
        "completion": ATTACK + "\nand more",
        "accuracy": 1.0,
        "format": 1.0,
        "reward/" + ATTACK: 0.5,
        "answer_likelihood": None,
        "bonus": 0.0,
    }
    metrics = {"timing/step": 1.0}
    with screen.steps(0):
        screen.step(1, metrics, [row], [Skipped(0, ATTACK + "\nstep 9", ATTACK)])
    text = output()
    assert_harmless(text)
    assert text.count(printable(ATTACK)) == 5
    assert "\nand more" in text  # a completion's own lines
    assert "\nstep 9" not in text  # an id does not pass for a line of ours


def test_a_validation_with_a_level_like_markup_is_shown(shown):
    screen, output = shown
    screen.validation(0, {ATTACK: level(), "[/x]": level()})
    screen.bad_lines([Skipped(None, "f:1", ATTACK)])
    text = output()
    assert_harmless(text)
    assert text.count(printable(ATTACK)) == 2
    assert "[/x] accuracy 0.500" in text


def test_an_error_is_one_line_of_text_whatever_it_quotes(capfd):
    from nemo_care.errors import InputError, RunFailed
    from nemo_care.ranks.launch import guarded

    def fail(error):
        raise error

    assert guarded(fail, InputError(f"{ATTACK}\nnemo-care: all is well")) == 2
    text = capfd.readouterr().err
    assert_harmless(text)
    assert text.count("\n") == 1
    for error in (RunFailed(ATTACK), ValueError(ATTACK)):
        assert guarded(fail, error) == 1
        text = capfd.readouterr().err
        assert_harmless(text)
        assert printable(ATTACK) in text

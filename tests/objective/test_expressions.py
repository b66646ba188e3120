"""Quantities and mathematical expressions: the problem types beside the paper's."""

import os
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest

from nemo_care.objective import expressions, math_process
from nemo_care.objective.expressions import same_expression
from nemo_care.objective.quantities import read_quantity
from nemo_care.objective.rewards import accuracy_reward


def score(problem_type: str, answer: str, solution: str) -> float:
    return accuracy_reward(problem_type, f"<answer>{answer}</answer>", solution)


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("12", 12, ""),
        ("-3", -3, ""),
        ("−3", -3, ""),
        ("１２", 12, ""),
        ("３．５", Fraction(7, 2), ""),
        ("1,234", 1234, ""),
        ("1,234.5", Fraction(2469, 2), ""),
        (".5", Fraction(1, 2), ""),
        ("1/2", Fraction(1, 2), ""),
        ("1 1/2", Fraction(3, 2), ""),
        ("1½", Fraction(3, 2), ""),
        (r"$\frac{1}{2}$", Fraction(1, 2), ""),
        (r"\(\dfrac{3}{4}\)", Fraction(3, 4), ""),
        (r"2\frac12", Fraction(5, 2), ""),
        ("1.5e3", 1500, ""),
        (r"1.5 \times 10^{-3}", Fraction(3, 2000), ""),
        ("2 × 10³", 2000, ""),
        ("12 cm", 12, "cm"),
        ("12cm", 12, "cm"),
        (r"$12\,\mathrm{cm}$", 12, "cm"),
        (r"9.8 \text{ m/s}^2", Fraction(49, 5), "m/s ^2"),
        ("3 m/s²", 3, "m/s^2"),
        ("50%", 50, "%"),
        (r"50\%", 50, "%"),
        ("５０％", 50, "%"),
        (r"20^\circ C", 20, "°C"),
        ("12 apples", 12, "apples"),
    ],
)
def test_numbers_and_units_are_read_in_all_their_spellings(text, number, unit):
    quantity = read_quantity(text)
    assert (quantity.number, quantity.unit) == (number, unit)
    assert score("quantity", text, text) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "cm", "nan", "inf", "twelve", "1/0", "12 cm 3", "2 m + 3 cm", "1_000", "12,34", "$5"),
        *("1e9999", "9" * 2000, "9^9^9^9", "1 m^9^9^9^9", "1 m**9**9**9", "3 or 4", "1.2.3"),
    ],
)
def test_what_is_not_one_number_is_no_quantity(text):
    assert read_quantity(text) is None
    assert score("quantity", text, "12 cm") == 0
    assert score("quantity", text, text) == 0


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        ("0.12 m", "12 cm", 1),
        ("12 centimeters", "12 cm", 1),
        ("12 CM", "12 cm", 1),
        ("12", "12 cm", 0),
        ("12 m", "12 cm", 0),
        ("12 kg", "12 cm", 0),
        ("12.001 cm", "12 cm", 0),
        ("50%", "0.5", 1),
        ("1/2", "50 percent", 1),
        ("50", "50%", 0),
        ("180 s", "3 minutes", 1),
        ("18 km/h", "5 m/s", 1),
        ("68 degF", "20 °C", 1),
        ("1/3", "0.333333", 1),
        ("0.33", "1/3", 0),
        ("1000001", "1000000", 0),
        ("12 Apples", "12 apples", 1),
        ("12 pears", "12 apples", 0),
        ("−12 cm", "-12 cm", 1),
    ],
)
def test_quantities_compare_across_units(answer, solution, expected):
    assert score("quantity", answer, solution) == expected


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        ("0.5", r"$\frac{1}{2}$", 1),
        ("50%", r"\frac12", 1),
        ("１／２", "0.5", 1),
        ("−3", "-3", 1),
        (r"2\sqrt{2}", r"\sqrt{8}", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        ("$x\n+ 1$", "1+x", 1),
        ("x²", "x^{2}", 1),
        ("x=5", "5", 1),
        ("{2,1}".replace("{", r"\{").replace("}", r"\}"), r"\{1,2\}", 1),
        ("(2,1)", "(1,2)", 0),
        ("3 or 7", "7", 0),
        ("5, 6, 7", "7", 0),
        ("the answer is 7", "7", 0),
        ("olleh", "hello", 0),
        ("hello", "hello", 0),
        # Not as a product of letters with Euler's number in it.
        ("1e5", "100000", 1),
        ("12 m", "12 cm", 0),
        ("1/3", "0.3333333", 1),
        ("1/3", "0.33", 0),
        (r"\frac{1}{", "1", 0),
        ("5!", "120", 1),
    ],
)
def test_expressions_compare_as_mathematics(answer, solution, expected):
    assert score("math", answer, solution) == expected


HOSTILE = [
    "9**9**9**9",
    pytest.param("9^{9^{9^{9}}}", marks=pytest.mark.slow),
    pytest.param("((((9!)!)!)!)", marks=pytest.mark.slow),
    r"\sqrt{" * 100 + "2" + "}" * 100,
    "(" * 400 + "x" + ")" * 400,
    pytest.param("(x+1)^{5000}", marks=pytest.mark.slow),
    r"\int_0^1 x^{x} dx",
    "1+" * 400 + "x",
    r"\frac{" * 60 + "x" + "}{2}" * 60,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:20])
@pytest.mark.filterwarnings("ignore:comparing")
def test_hostile_expressions_are_given_up_in_time(answer):
    start = time.monotonic()
    assert score("math", answer, "x + 5") == 0
    # The process's CPU time is limited, not the time of a machine that is busy with other things.
    assert time.monotonic() - start < 60
    # And the next one is compared as ever.
    assert score("math", "5 + x", "x + 5") == 1


def test_a_comparison_that_was_given_up_says_so_and_the_next_is_made():
    with pytest.warns(RuntimeWarning, match=r"10000000!.*stopped after 2 seconds"):
        assert not same_expression("10000000!", "x + 5")
    assert same_expression("5 + x", "x + 5")


def test_threads_share_the_process_and_get_their_own_replies():
    results = {}

    def compare(number: int) -> None:
        results[number] = same_expression(f"{number} + y", f"y + {number // 2 * 2}")

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number % 2 == 0 for number in range(12)}


def test_a_fork_compares_in_a_process_of_its_own():
    assert same_expression("z + 1", "1 + z")
    child = os.fork()
    if child == 0:
        os._exit(0 if same_expression("z + 2", "2 + z") and not same_expression("z", "2z") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_expression("z + 3", "3 + z")


def test_the_process_ends_with_the_one_that_started_it():
    code = (
        "import os;"
        "from nemo_care.objective import expressions;"
        "expressions.same_expression('x + 1', '1 + x');"
        "print(expressions._comparer(os.getpid())._process.pid, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -9
    deadline = time.monotonic() + 20
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_does_not_start_is_an_error_and_no_score(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("raise ModuleNotFoundError('No module named math_verify')\n")
    monkeypatch.setattr(math_process, "__file__", str(program))
    with pytest.raises(RuntimeError, match=r"does not start \(.*No module named math_verify"):
        expressions._Comparer().equal("x", "y")

"""The pages of `nemo-care view` in a real browser: clicks, keys, filters, search, two runs."""

import random
import re

import numpy as np
import pytest
from browser import CHROMIUM, browser
from made_media import encode_video, picture
from made_rollouts import ATTACK, groups, make_rollouts, row
from made_runs import make_run

from nemo_care.reporting.report import write_report
from nemo_care.reporting.view.pages import write_view

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_error_is_on_the_console(page):
    page.errors.clear()
    page.resize(1280, 900)
    yield
    assert page.errors == []


def made_row(prompt, place, **changes):
    """A right answer of 2 tokens that is consistent, unless `changes` say otherwise."""
    usual = {
        "completion": "<think> so </think> <answer>B</answer>",
        "accuracy": 1.0,
        "format": 1.0,
        "ended": True,
        "has_answer": True,
        "consistent": True,
        "reward": 2.0,
        "bonus": 0.5,
        "advantage": 0.5,
        "answer_likelihood": 0.5,
    }
    return row(prompt, place, random.Random(0), **(usual | changes))


WRONG = {"accuracy": 0.0, "reward": 1.0, "advantage": -0.5, "bonus": 0.0}
STEP_1 = [
    made_row(0, 0, answer_likelihood=0.75,
             completion="<think> needle here </think> <answer>B</answer>"),
    made_row(0, 1, answer_likelihood=0.25, consistent=False, reward=1.5),
    made_row(0, 2, **WRONG, completion="<think> no </think> <answer>C</answer>"),
    made_row(1, 0, **WRONG, ended=False, has_answer=False, completion="<think> went on and"),
    made_row(1, 1, **WRONG),
    made_row(2, 0, advantage=0.0),
    made_row(2, 1, advantage=0.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    frames = np.stack([picture(28, 28, seed) for seed in range(8)])
    video = str(encode_video(root / "a.mp4", frames, 2))
    texts = ["<think>", " sure", " not</think> <answer>", "B</answer>", "<|im_end|>"]
    tokens = {"token_texts": texts,
              "log_probs": [0.0, -0.01, -4.0, -1.0, None],
              "completion": "<think> sure not</think> <answer>B</answer>"}  # fmt: skip
    step_2 = [
        made_row(0, 0, **tokens, videos=[video, "/gone.mp4"], frame_times=[[0.0, 1.5], [0.0]],
                 pair_likelihood=[0.5, 0.125]),
        made_row(0, 1, pair_likelihood=[None, 0.75]),
        *[made_row(5, 0, completion=ATTACK, question=ATTACK, prompt_id=ATTACK)],
    ]  # fmt: skip
    care = make_rollouts(root / "care", {1: STEP_1, 2: step_2, 7: [made_row(9, 0)]})
    grpo = make_rollouts(root / "grpo", {1: [made_row(0, 0, completion="the other run said this")],
                                         2: [made_row(5, 0)]})  # fmt: skip
    write_view(care, None, root / "one", 10)
    write_view(care, grpo, root / "two", 10)
    return root


def opened(page, folder, name, hash="#step=1"):
    page.open((folder / name / "index.html").as_uri() + hash)
    return page


def shown_places(page):
    return page.texts(".completion .badges > span:first-child")


def test_a_group_shows_what_was_asked_said_and_earned(page, folder):
    opened(page, folder, "one")
    assert page.texts("#count") == ["7 of 7 completions in 3 of 3 groups"]
    assert page.texts("section.group h2") == ["clip-0", "clip-1", "clip-2"]
    assert page.texts(".options li.right") == ["B. up ✓"] * 3
    # Sorted by reward.
    assert shown_places(page)[:3] == ["#0", "#1", "#2"]
    first = page.texts(".completion")[0]
    for part in ("right", "consistent", "reward", "bonus", "advantage", "+0.5"):
        assert part in first
    # 0.75 against 0.5, the mean of the right answers of this group.
    assert "likelihood 0.75 (+0.25 to the mean)" in first
    assert page.js("document.querySelector('.bar b').style.left") == "calc(50% - 1px)"
    assert page.texts(".part.reasoning")[0].strip() == "needle here"
    assert page.texts(".part.answer")[0] == "B"


def test_filters_are_clicked_and_combined(page, folder):
    opened(page, folder, "one")
    counts = {
        name: page.texts(f"[data-filter={name}]")[0]
        for name in ("noSignal", "inconsistent", "wrong", "truncated", "unanswered")
    }
    assert counts == {
        "noSignal": "without signal 2",
        "inconsistent": "right but inconsistent 1",
        "wrong": "wrong 3",
        "truncated": "truncated 1",
        "unanswered": "no answer 1",
    }
    page.click("[data-filter=wrong]")
    page.wait("document.querySelectorAll('.completion').length === 3")
    assert page.texts("#count") == ["3 of 7 completions in 2 of 3 groups"]
    page.click("[data-filter=truncated]")
    page.wait("document.querySelectorAll('.completion').length === 1")
    assert page.texts("section.group h2") == ["clip-1"]
    # The others of the group are a click away.
    assert page.texts("button.others") == ["1 other completions"]
    page.click("button.others")
    page.wait("document.querySelectorAll('.completion').length === 2")
    page.click("[data-filter=wrong]")
    page.click("[data-filter=truncated]")
    page.click("[data-filter=noSignal]")
    page.wait("document.querySelectorAll('section.group').length === 1")
    assert page.texts("section.group h2") == ["clip-2"]
    page.click("[data-filter=noSignal]")
    page.click("[data-filter=inconsistent]")
    page.wait("document.querySelectorAll('.completion').length === 1")
    assert shown_places(page) == ["#1"]


def test_search_looks_into_completions_and_questions(page, folder):
    opened(page, folder, "one")
    page.click("#search")
    page.type("NEEDLE")
    page.wait("document.querySelectorAll('.completion').length === 1")
    assert page.texts(".part.reasoning")[0].strip() == "needle here"
    page.js("document.querySelector('#search').select()")
    page.type("disc 2 go")
    page.wait("document.querySelectorAll('.completion').length === 2")
    assert page.texts("section.group h2") == ["clip-2"]
    # What is shown is in the address.
    assert "q=disc+2+go" in page.js("location.hash")
    page.js("document.querySelector('#search').select()")
    page.type("nowhere to be found")
    page.wait("document.querySelectorAll('section.group').length === 0")
    assert page.texts("#count") == ["0 of 7 completions in 0 of 3 groups"]


def test_steps_are_changed_by_buttons_keys_and_the_curve(page, folder):
    opened(page, folder, "one", "")
    # The newest first.
    assert page.js("document.querySelector('#step').value") == "7"
    page.click("#before")
    page.wait("document.querySelector('#step').value === '2'")
    page.js("document.activeElement.blur()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
    page.wait("document.querySelector('#step').value === '1'")
    assert page.js("document.querySelector('#before').disabled")
    page.click("#curve rect:nth-child(2)")
    page.wait("document.querySelector('#step').value === '2'")


def test_the_same_prompt_is_shown_across_steps(page, folder):
    opened(page, folder, "one")
    assert page.texts("button.elsewhere") == ["same prompt in 2 steps"]
    page.click("button.elsewhere")
    page.wait("document.querySelectorAll('section.group').length === 2")
    assert page.texts("section.group .heading > .soft") == ["step 1", "step 2"]
    assert page.texts("section.group h2") == ["clip-0", "clip-0"]
    page.click("#leave")
    page.wait("document.querySelectorAll('section.group').length === 3")


def test_frames_tokens_and_pairs_are_shown(page, folder):
    opened(page, folder, "one", "#step=2")
    page.wait("document.querySelectorAll('.frame').length === 2")
    assert page.texts("figcaption") == ["0.0 s", "1.5 s"]
    width, image = page.js(
        "[document.querySelector('.frame').offsetWidth, "
        "getComputedStyle(document.querySelector('.frame')).backgroundImage]"
    )
    assert width == 84
    assert "media/" in image
    assert "video /gone.mp4: missing: there is no such file on this machine" in page.texts(".media")
    # Unlikely tokens are tinted, likely ones and those of unknown probability are not.
    tints = page.js(
        "[...document.querySelector('.completion').querySelectorAll('.part span')]"
        ".map((e) => [e.textContent, e.style.backgroundColor, e.title])"
    )
    assert tints[0] == ["<think>", "", "probability 1"]
    assert tints[2] == [" not", "rgba(213, 94, 0, 0.52)", "probability 0.0183"]
    assert tints[-1] == ["<|im_end|>", "", "probability unknown"]
    page.click("#tint")
    page.wait("![...document.querySelectorAll('.part span')].some((e) => e.style.backgroundColor)")
    assert page.texts(".heat td") == ["0.50", "0.13", "–", "0.75"]
    title = page.js("document.querySelectorAll('.heat td')[1].title")
    assert title == "answer of #0 after the reasoning of #1: 0.125"


def test_hostile_text_stays_text(page, folder):
    opened(page, folder, "one", "#step=2")
    texts = page.texts(".question, .part, h2")
    hostile = [text for text in texts if "<script>" in text]
    assert len(hostile) == 3
    for text in hostile:
        assert "[bold]not bold[/bold]" in text
        assert "\\x1b[2J" in text
        assert "\\u202e" in text
        assert "שלום עולם" in text
    assert page.js("document.title") == "care · completions"
    assert page.js("document.querySelectorAll('main script, main img').length") == 0


def test_two_runs_are_side_by_side_by_prompt(page, folder):
    opened(page, folder, "two")
    rows = page.js(
        "[...document.querySelectorAll('.pair')].map((row) => [...row.children].map((cell) => "
        "[cell.className, cell.getBoundingClientRect().left]))"
    )
    assert [[kind for kind, _ in row] for row in rows] == [
        ["group", "group"], ["group", "absent"], ["group", "absent"]
    ]  # fmt: skip
    left, right = (place for _, place in rows[0])
    assert right > left + 500
    assert "the other run said this" in page.texts(".pair section.group")[1]
    # One below the other on a telephone, and nothing is wider than it.
    page.resize(390, 844)
    places = page.js(
        "[...document.querySelector('.pair').children].map((e) => e.getBoundingClientRect().left)"
    )
    assert places[0] == places[1]
    assert page.js("document.documentElement.scrollWidth <= 390")
    page.click("#compare")
    page.wait("document.querySelectorAll('.pair.two').length === 0")
    assert page.texts("section.group h2") == ["clip-0", "clip-1", "clip-2"]


@pytest.mark.slow  # a machine with other work exceeds its bounds
def test_10_000_completions_are_there_in_3_seconds_and_searched_at_once(page, tmp_path):
    """Of one step, and of a hundred."""
    one = make_rollouts(tmp_path / "one", {1: groups(0, range(1250), 8)})
    many = make_rollouts(
        tmp_path / "many", {step: groups(step, range(12), 8) for step in range(1, 105)}
    )
    for name, run, hash in (("one", one, ""), ("many", many, "#step=all")):
        write_view(run, None, tmp_path / f"out-{name}", 0)
        seconds = page.open((tmp_path / f"out-{name}" / "index.html").as_uri() + hash)
        assert page.js("document.querySelectorAll('section.group').length") >= 12
        count = page.texts("#count")[0]
        assert int(count.split(" of ")[1].split()[0].replace(",", "")) >= 9984
        print(f"{name}: {count} in {seconds:.2f} s")
        assert seconds < 3
        searched = page.js(
            "(async () => { const start = performance.now(); await go({query: 'red square'});"
            " return performance.now() - start; })()"
        )
        print(f"{name}: searched in {searched:.0f} ms")
        assert searched < 1000
        # Scrolling to the end draws more.
        before = page.js("document.querySelectorAll('section.group').length")
        page.js("scrollTo(0, document.body.scrollHeight)")
        page.wait(f"document.querySelectorAll('section.group').length > {before}")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture
def report_page(page, report):
    page.call("Page.navigate", url=report.as_uri())
    page.wait("document.readyState === 'complete' && document.querySelector('.chart')")
    return page


def test_the_report_opens_without_an_error_and_shows_values_on_hover(report_page):
    page = report_page
    titles = page.texts(".chart figcaption strong")
    assert titles[:3] == ["Accuracy", "Consistency", "Answer likelihood"]
    hovered = page.js(
        "(() => { const box = document.querySelector('.chart svg').getBoundingClientRect();"
        " return document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2)"
        ".textContent; })()"
    )
    assert re.fullmatch(r"step \d+: [\d.]+", hovered)
    # All other curves are folded.
    assert not page.js("[...document.querySelectorAll('details')].some((e) => e.open)")
    page.click("details:nth-of-type(2) summary")
    page.wait("document.querySelector('details:nth-of-type(2)').open")
    page.resize(390, 844)
    assert page.js("document.documentElement.scrollWidth <= 390")
    # Texts of charts are scaled with them.
    assert page.js("12 * document.querySelector('.chart text').getScreenCTM().a") >= 10


def background(page):
    return page.js("getComputedStyle(document.body).backgroundColor")


@pytest.fixture
def printing(page):
    """Let the page of a reader who prefers dark pages be as it is printed, after a call."""
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    yield lambda: page.call("Emulation.setEmulatedMedia", media="print", features=dark)
    page.call("Emulation.setEmulatedMedia", media="", features=[])


def test_a_printed_report_is_light_and_without_what_is_folded(report_page, printing):
    page = report_page
    assert {"All curves", "Recipe"} <= set(page.texts("h2"))
    printing()
    assert background(page) == "rgb(255, 255, 255)"
    # A section of which nothing is left has no heading either.
    headings = page.texts("h2")
    assert {"Validation", "Run", "Sampled completions"} <= set(headings)
    assert not {"All curves", "Recipe"} & set(headings)
    page.js("document.querySelectorAll('details')[1].open = true")
    assert "All curves" in page.texts("h2")
    assert len(page.texts("details")) == 1


def test_a_printed_view_has_its_frames_bars_and_what_was_chosen(page, folder, printing):
    opened(page, folder, "one", "#step=2&filters=wrong,truncated")
    assert page.texts("#shown") == []
    printing()
    assert page.texts("#shown") == ["step 2 · wrong · truncated"]
    assert page.texts("#filters, #steps, #curve") == []
    page.js("go({filters: []})")
    page.wait("document.querySelectorAll('.frame').length === 2")
    assert background(page) == "rgb(255, 255, 255)"
    adjusted = page.js(
        "[...document.querySelectorAll('.frame, .bar i, .part span, .heat td')]"
        ".map((e) => getComputedStyle(e).printColorAdjust)"
    )
    assert len(adjusted) > 10
    assert set(adjusted) == {"exact"}


def test_a_printed_view_says_what_is_not_drawn_yet(page, printing, tmp_path):
    run = make_rollouts(tmp_path / "run", {1: groups(0, range(40), 2)})
    write_view(run, None, tmp_path / "out", 0)
    page.open((tmp_path / "out" / "index.html").as_uri())
    printing()
    drawn = page.js("document.querySelectorAll('section.group').length")
    (note,) = page.texts("#rest")
    assert note.startswith(f"Not printed: {40 - drawn} more prompts")

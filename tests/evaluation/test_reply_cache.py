"""A judge's replies outlive it, and nothing that was answered is asked again."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from made_endpoint import PATIENCE, Endpoint, ask, completion, says, serving

from nemo_care.errors import InputError
from nemo_care.evaluation.llm_judge import LLMJudge
from nemo_care.evaluation.reply_cache import ReplyCache
from nemo_care.recipe.evaluation import LLMJudgeConfig


def test_replies_are_kept_for_the_next_judge(endpoint, judge):
    endpoint.answer = lambda request: says(
        "INCONSISTENT" if "right, 1" in request["messages"][0]["content"] else "CONSISTENT"
    )
    first = ask(judge(), completion(0), completion(1))
    asked = len(endpoint.requests)
    # Neither a slash nor what does not reach the model makes another question.
    same = judge(base_url=f"{endpoint.url}/", concurrency=2, max_retries=0)
    assert ask(same, completion(0), completion(1)) == first
    assert [verdict.consistent for verdict in first] == [True, False]
    assert len(endpoint.requests) == asked == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"model": "judge-2"},
        {"prompt_template": "{reasoning} {answer}"},
        {"temperature": 0.1},
        {"temperature": None},
    ],
    ids=str,
)
def test_other_settings_ask_again(endpoint, judge, keys):
    ask(judge())
    ask(judge(**keys))
    assert len(endpoint.requests) == 2


def test_other_endpoint_is_asked_again(endpoint, judge):
    ask(judge())
    with serving() as other:
        ask(judge(base_url=other.url))
        assert len(other.requests) == 1


PROGRAM = """
import sys
from pathlib import Path
from made_endpoint import ask, completion
from nemo_care.evaluation.llm_judge import LLMJudge
from nemo_care.recipe.evaluation import LLMJudgeConfig

url, cache, concurrency, first, last = sys.argv[1:]
config = LLMJudgeConfig(base_url=url, model="judge-1", concurrency=int(concurrency))
judge = LLMJudge(config, Path(cache))
verdicts = ask(judge, *map(completion, range(int(first), int(last))))
assert all(verdict.consistent for verdict in verdicts)
judge.close()
"""


def started(endpoint: Endpoint, cache: Path, concurrency: int, first: int, last: int):
    arguments = [endpoint.url, str(cache), str(concurrency), str(first), str(last)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment)


def test_killed_half_way_keeps_what_was_answered(endpoint, judge, tmp_path):
    def answer(request):
        if len(endpoint.requests) > 5:
            endpoint.released.wait(PATIENCE)
        return says("CONSISTENT")

    endpoint.answer = answer
    # One at a time: the sixth request says that five replies have been dealt with.
    process = started(endpoint, tmp_path / "cache.sqlite", 1, 0, 10)
    assert endpoint.wait_for(lambda: len(endpoint.requests) == 6)
    process.kill()
    process.wait()
    endpoint.answer = lambda request: says("CONSISTENT")
    verdicts = ask(judge(), *map(completion, range(10)))
    assert all(verdict.consistent for verdict in verdicts)
    assert len(endpoint.requests) == 6 + 5


def test_processes_and_judges_share_a_file_at_the_same_time(endpoint, judge, tmp_path):
    cache = tmp_path / "folder" / "cache.sqlite"
    processes = [started(endpoint, cache, 4, *span) for span in ((0, 40), (20, 60))]
    verdicts = ask(judge(cache), *map(completion, range(60, 100)))
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]
    verdicts += ask(judge(cache), *map(completion, range(100)))
    assert all(verdict.consistent for verdict in verdicts)
    asked = len(endpoint.requests)
    assert len(set(endpoint.texts())) == 100
    ask(judge(cache), *map(completion, range(100)))
    assert len(endpoint.requests) == asked


def foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (thing TEXT)")


def torn_database(path: Path) -> None:
    LLMJudge(LLMJudgeConfig(base_url="http://localhost/v1", model="m"), path).close()
    path.write_bytes(path.read_bytes()[:100] + b"torn" * 1000)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("kept", lambda path: path.write_text("notes of mine\n")),
        ("kept", lambda path: path.mkdir()),
        ("kept/below", lambda path: path.parent.write_text("a file, not a folder")),
        ("kept", foreign_database),
        ("kept", torn_database),
    ],
    ids=["text", "folder", "no folder", "foreign", "torn"],
)
def test_file_that_is_no_cache_is_refused_and_left_alone(judge, tmp_path, name, make):
    path = tmp_path / name
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError) as caught:
        judge(path)
    assert str(path) in str(caught.value)
    assert "evaluation.llm.cache" in str(caught.value)
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("reply", ["x'00ff'", "CAST(x'ff' AS TEXT)"], ids=["bytes", "not UTF-8"])
def test_reply_that_is_no_text_is_refused(tmp_path, reply):
    path = tmp_path / "kept"
    cache = ReplyCache(path)
    with sqlite3.connect(path) as database:
        database.execute(f"INSERT INTO llm_judge_replies VALUES ('question', {reply})")
    with pytest.raises(InputError, match=str(path)):
        cache.get("question")
    cache.close()


def test_file_that_is_damaged_within_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "kept"
    cache = ReplyCache(path)
    for number in range(500):
        cache.put(f"question {number}", "a reply " * 20)
    cache.close()
    content = bytearray(path.read_bytes())
    content[8192:-4096] = b"\xff" * (len(content) - 12288)
    path.write_bytes(content)
    cache = ReplyCache(path)
    with pytest.raises(InputError, match=str(path)):
        [cache.get(f"question {number}") for number in range(500)]
    cache.close()

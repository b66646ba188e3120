"""The folder of `nemo-care view`: what is written, from whatever a run holds."""

import http.client
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from made_media import encode_video, picture
from made_rollouts import ATTACK, ESCAPE, groups, make_rollouts, row
from made_runs import make_run
from PIL import Image

from nemo_care.cli import main
from nemo_care.errors import InputError
from nemo_care.reporting.view.groups import step_groups
from nemo_care.reporting.view.pages import PROGRAM, write_view


def written(file: Path) -> list:
    """The arguments of the call that a data file makes."""
    text = file.read_text("ascii")
    return json.loads("[" + re.fullmatch(r"view\.\w+\((.*)\);\n", text, re.DOTALL)[1] + "]")


def read_back(tmp_path: Path, rows: list[dict]) -> list[dict]:
    run = make_rollouts(tmp_path / "run", {1: rows})
    return step_groups(run / "rollouts/step_000001.jsonl", 0.1)


def test_completions_are_sorted_by_reward_and_marked(tmp_path):
    rng = random.Random(0)
    rows = [
        row(0, 0, rng, reward=1.0, accuracy=1.0, consistent=False, answer_likelihood=0.25),
        row(0, 1, rng, reward=2.5, accuracy=1.0, consistent=True, answer_likelihood=0.75),
        row(0, 2, rng, reward=0.0, accuracy=0.05, consistent=None, answer_likelihood=0.9),
        row(0, 3, rng, reward=None, accuracy=None, ended=False, has_answer=False,
            answer_likelihood=None),
    ]  # fmt: skip
    (group,) = read_back(tmp_path, rows)
    assert [one["place"] for one in group["completions"]] == [1, 0, 2, 3]
    flags = [
        set(one["flags"]) & {"inconsistent", "wrong", "unanswered"} for one in group["completions"]
    ]
    assert flags == [set(), {"inconsistent"}, {"wrong"}, {"unanswered"}]
    assert "truncated" in group["completions"][3]["flags"]
    # The bonus compares with the mean over the right answers.
    assert (group["meanLikelihood"], group["meanOfRight"]) == (0.5, True)
    assert [option for option in group["options"] if option[2]] == [["B", "up", True]]
    assert ["brevity", rows[1]["reward/brevity"]] in group["completions"][0]["rewards"]


def test_groups_are_without_signal_where_every_advantage_is_0(tmp_path):
    rows = [*groups(1, [0], advantage=0.0), *groups(2, [1])]
    assert [group["noSignal"] for group in read_back(tmp_path, rows)] == [True, False]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<think>a</think><answer>B</answer>", ["tags", "reasoning", "tags", "answer", "tags"]),
        ("no tags at all", ["other"]),
        ("<answer>B</answer><think>late</think>", ["tags", "answer", "other"]),
        ("<think>a <answer>B</answer></think>", ["other", "answer", "tags"]),
        ("<answer></answer>", ["tags", "tags"]),
        ("", []),
    ],
)
def test_reasoning_and_answer_are_set_apart_with_and_without_tokens(tmp_path, text, kinds):
    rng = random.Random(0)
    # Tokens that cross the edges of all parts.
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    tokens = {"token_texts": [*pieces, "<|im_end|>"], "log_probs": [-1.0] * (len(pieces) + 1)}
    rows = [row(0, 0, rng, completion=text), row(0, 1, rng, completion=text, **tokens)]
    (group,) = read_back(tmp_path, rows)
    plain, tinted = sorted(group["completions"], key=lambda one: one["place"])
    assert "".join(part for _, part in plain["parts"]) == text
    assert [kind for kind, _ in plain["parts"]] == kinds
    assert "".join(t for _, part in tinted["parts"] for t, _ in part) == text + "<|im_end|>"


def test_tokens_that_do_not_belong_to_the_text_are_left_out(tmp_path):
    rng = random.Random(0)
    rows = [row(0, 0, rng, completion="abc", token_texts=["x"], log_probs=[-1.0])]
    (group,) = read_back(tmp_path, rows)
    assert group["completions"][0]["parts"] == [["other", "abc"]]


def test_pages_refer_to_nothing_outside_and_hold_no_markup_of_the_data(tmp_path):
    rows = groups(0, [0], completion=ATTACK, question=ATTACK, prompt_id=ATTACK, solution=ATTACK,
                  options={"<b>": ATTACK}, **{f"reward/{ATTACK}": 1.0})  # fmt: skip
    run = make_rollouts(tmp_path / "<b>run", {1: rows})
    view = write_view(run, None, tmp_path / "out", 0)
    page = view.page.read_text()
    assert "&lt;b&gt;run" in page
    assert "<b>" not in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {
        "view.css", "data:,", "steps/index.js", "steps/media.js", *PROGRAM
    }  # fmt: skip
    for file in view.folder.rglob("*.js"):
        text = file.read_text("utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    _, _, (group,) = written(view.folder / "steps/run0/step_1.js")
    shown = group["completions"][0]["parts"][0][1]
    assert "<script>" in shown
    assert "[bold]" in shown
    assert "שלום" in shown
    # The terminal's and the text direction's controls are spelt out.
    assert ESCAPE not in shown
    assert "\\x1b[2J" in shown
    assert "\\u202e" in shown


def test_rollouts_of_older_versions_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    view = write_view(run, None, tmp_path / "out", 10)
    assert view.completions == 8
    _, _, found = written(view.folder / "steps/run0/step_12.js")
    assert found[0]["question"] is None
    assert found[0]["options"] == found[0]["media"] == []
    assert [one["reward"] for one in found[0]["completions"]] == [2.5, 0.0]


def test_the_index_names_the_steps_of_each_prompt_and_run(tmp_path):
    care = make_rollouts(tmp_path / "care", {step: groups(step, [0, step]) for step in (1, 2, 3)})
    grpo = make_rollouts(tmp_path / "grpo", {1: groups(9, [0])})
    out = tmp_path / "out"
    write_view(care, grpo, out, 0)
    (index,) = written(out / "steps/index.js")
    assert [one["name"] for one in index["runs"]] == ["care", "grpo"]
    assert index["runs"][0]["prompts"] == [["clip-0", [1, 2, 3]]]
    assert [one["step"] for one in index["runs"][0]["steps"]] == [1, 2, 3]
    assert (out / "steps/run1/step_1.js").exists()
    # Written again of one run: nothing is left of the other.
    write_view(care, None, out, 0)
    assert not (out / "steps/run1").exists()


def test_frames_are_drawn_once_newest_first_and_missing_ones_named(tmp_path):
    frames = np.stack([picture(28, 56, seed) for seed in range(8)])
    videos = [encode_video(tmp_path / f"{number}.mp4", frames, 2) for number in range(3)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    picture_file = tmp_path / "a.png"
    Image.new("RGB", (28, 28), "red").save(picture_file)

    def seen(number, path, **more):
        return groups(
            number, [number], 1, videos=[str(path)], frame_times=[[0.0, 1.0, 2.0]], **more
        )

    steps = {number + 1: seen(number, path) for number, path in enumerate(videos)}
    steps[4] = [*seen(5, tmp_path / "gone.mp4"), *seen(6, tmp_path / "broken.mp4"),
                *groups(7, [7], 1, images=[str(picture_file)])]  # fmt: skip
    run = make_rollouts(tmp_path / "run", steps)
    out = tmp_path / "out"
    view = write_view(run, None, out, 3)
    assert (view.drawn, view.missing, len(view.left)) == (2, 2, 2)
    (reasons,) = written(out / "steps/media.js")
    sheets = {step: written(out / f"steps/run0/step_{step}.js")[2] for step in steps}
    assert reasons[sheets[4][0]["media"][0]["sheet"]].startswith("missing: there is no such file")
    assert "broken.mp4" in reasons[sheets[4][1]["media"][0]["sheet"]]
    assert reasons[sheets[1][0]["media"][0]["sheet"]] == "not drawn yet"
    drawn = out / "media" / sheets[3][0]["media"][0]["sheet"]
    sheet = Image.open(drawn)
    # Three frames of 56 x 28 side by side, twice as large.
    assert sheet.size == (3 * 112, 56)
    at_one_second = np.asarray(sheet.resize((168, 28)))[:, 56:112].astype(int)
    distances = [np.abs(at_one_second - frame).mean() for frame in frames]
    assert np.argmin(distances) == 2
    made = drawn.stat().st_mtime_ns
    # The next call draws what is left, and keeps the rest.
    assert write_view(run, None, out, 9).left == {}
    assert drawn.stat().st_mtime_ns == made
    assert len(list((out / "media").iterdir())) == 4


def test_what_can_not_be_viewed_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty and holds no pages"):
        write_view(run, None, foreign, 0)
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]
    (run / "rollouts/step_000001.jsonl").write_text('{"completion": 5}\n{}\n')
    with pytest.raises(InputError, match=r"step_000001\.jsonl:1"):
        write_view(run, None, tmp_path / "out", 0)
    for file in (run / "rollouts").iterdir():
        file.unlink()
    assert main(["view", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_server_listens_on_this_machine_alone_and_draws_on_demand(tmp_path, rank_server):
    frames = np.stack([picture(28, 28, seed) for seed in range(8)])
    video = encode_video(tmp_path / "a.mp4", frames, 2)
    rows = groups(0, [0], 1, videos=[str(video)], frame_times=[[0.0, 1.0]])
    run = make_rollouts(tmp_path / "run", {1: rows})
    arguments = ["-m", "nemo_care", "view", str(run), "--media", "0", "--serve", "0"]
    server = rank_server.start(1, arguments)
    end = time.monotonic() + 60
    while "http://" not in server.text(0) and time.monotonic() < end:
        time.sleep(0.05)
    lines = server.text(0).splitlines()
    port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", lines[2])[1])
    assert "1 not drawn yet" in lines[0]
    try:
        addresses = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        listening = [line.split()[1] for line in addresses.splitlines() if " 0A " in line]
        assert [one for one in listening if one.endswith(f":{port:04X}")] == [
            f"0100007F:{port:04X}"
        ]
        sheet = next(iter(written(run / "view/steps/media.js")[0]))

        def get(path: str, host: str = f"localhost:{port}") -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert get("/index.html")[0] == 200
        status, content = get(f"/media/{sheet}")
        assert (status, content[:3]) == (200, b"\xff\xd8\xff")
        assert get("/../../recipe.yaml")[0] == 404
        assert get("/index.html", host="evil.example")[0] == 403
    finally:
        os.kill(server.pids[0], signal.SIGINT)
    assert server.wait() == [130]

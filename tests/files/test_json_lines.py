"""Our own files: what is torn is left out, what is broken is named, and writing repairs the end."""

import json
import os
import re

import pytest

from nemo_care.errors import InputError
from nemo_care.files.json_lines import (
    append_lines,
    complete_lines,
    read_object,
    read_text,
    replace_lines,
)

BROKEN = {
    "torn": b'{"step": 2, "note": "half',
    "no object": b"[2]",
    "a number": b"2",
    "missing": b'{"other": 2}',
    "text for number": b'{"step": "2"}',
    "bool for number": b'{"step": true}',
    "null for number": b'{"step": null}',
    "fraction": b'{"step": 2.5}',
    "not UTF-8": b'{"step": 2, "note": "\xff\xfe"}',
    "surrogate as UTF-8": b'{"step": 2, "note": "\xed\xa0\x80"}',
    "UTF-16": '{"step": 2}'.encode("utf-16"),
    "zeros": b"\0" * 40,
    "deep": b"[" * 100_000,
    "long number": b'{"step": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_broken_line_in_the_middle_is_named_with_file_and_line(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}:2: ") as caught:
        complete_lines(file, {"step": int})
    assert "correct or remove the line" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_last_line_is_torn_only_without_its_line_break(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n'
    for torn in (b'{"step": 2', "{é".encode()[:-1], b"\0" * 9):
        file.write_bytes(whole + torn)
        assert complete_lines(file, {"step": int}) == [{"step": 1}]
        file.write_bytes(whole + torn + b"\n")
        with pytest.raises(InputError, match=":2: "):
            complete_lines(file, {"step": int})
    # An editor leaves out the last line break; a kill may have come right before it.
    file.write_bytes(whole + b'{"step": 2}')
    assert complete_lines(file, {"step": int}) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"a": 1}\n{"a": "tor', [{"a": 1}, {"a": 3}]),
        (b'{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}, {"a": 3}]),
        (b'{"a": "tor', [{"a": 3}]),
        (b"", [{"a": 3}]),
    ],
)
def test_record_after_a_torn_line_is_not_lost_with_it(tmp_path, before, after):
    file = tmp_path / "starts.jsonl"
    file.write_bytes(before)
    append_lines(file, [{"a": 3}])
    assert complete_lines(file) == after


def test_half_of_a_surrogate_pair_comes_back(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    records = [{"completion": "\ud83d and \u2028 and é"}]
    replace_lines(file, records)
    append_lines(file, records)
    assert complete_lines(file) == records * 2
    file.read_text(encoding="utf-8")


def test_kinds_of_parts_and_alternatives(tmp_path):
    file = tmp_path / "summary.json"
    kinds = {"start": dict[str, dict] | None, "times": list[float]}

    def read(**values):
        file.write_text(json.dumps(values))
        return read_object(file, remedy="remove it", required=kinds)

    assert read(start=None, times=[1, 2.5])["times"] == [1, 2.5]
    assert read(start={"L1": {}}, times=[])
    for values, said in (
        ({"start": [], "times": []}, '"start" is not an object'),
        ({"start": {"L1": 1}, "times": []}, "in which each value is an object or null"),
        ({"start": None, "times": [True]}, '"times" is not a list in which each value is a number'),
        ({"start": None}, '"times" is missing'),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .*{re.escape(said)}") as e:
            read(**values)
        assert str(e.value).endswith("; remove it")


def test_object_that_is_torn_is_named_with_its_line(tmp_path):
    file = tmp_path / "evaluation.json"
    file.write_text('{\n  "L1": {\n    "accu')
    with pytest.raises(InputError, match=r"evaluation\.json:3: not valid JSON .*; remove it$"):
        read_object(file, remedy="remove it")
    file.write_bytes(b'{\n"L1": "\xff"}')
    with pytest.raises(InputError, match=r"evaluation\.json:2: not UTF-8; remove it$"):
        read_object(file, remedy="remove it")


def test_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for read in (complete_lines, lambda file: read_text(file, remedy="remove it")):
        with pytest.raises(InputError, match=r"metrics\.jsonl: can't be read \(Is a directory\)"):
            read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_written_files_have_the_mode_of_any_new_file(tmp_path, umask):
    import torch

    from nemo_care.files.tensors import save_tensors

    before = os.umask(umask)
    try:
        replace_lines(tmp_path / "a.jsonl", [])
        append_lines(tmp_path / "b.jsonl", [])
        save_tensors(tmp_path / "c.safetensors", {"weight": torch.zeros(2)})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes

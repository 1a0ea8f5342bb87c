"""Errors that a user can cause are told in one line, whatever the user gave."""

from __future__ import annotations

import pickle

import pytest

from knowledge_compression.building import build
from knowledge_compression.errors import BadInput, DataUnavailable


@pytest.mark.parametrize("name", ["two\nlines", "a\rreturn", "next\x85line", "a\u2028separator", "\x1b[31mred"])
def test_a_setting_of_any_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(BadInput) as refusal:
        build("part", {"_target_": "knowledge_compression.compression.methods.rtn.Rtn", name: 1})
    assert str(refusal.value).splitlines() == [str(refusal.value)] and "\x1b" not in str(refusal.value)
    assert f"part.{name.encode('unicode_escape').decode()}" in str(refusal.value)


def test_what_is_printable_stays_as_it_is() -> None:
    said = "no file é “quoted” \\n ünd 漢字"
    assert str(BadInput(said)) == said


def test_an_error_survives_being_sent_to_another_process() -> None:
    back = pickle.loads(pickle.dumps(DataUnavailable("no file\there")))
    assert type(back) is DataUnavailable and str(back) == "no file\\there"

"""The journal: what was written to it is found again, and a line that a crash cut short is not believed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.execute.journal import Entries, Journal, Record, read_all, read_entries

NAME = "journal-0.jsonl"
A, B = Record(3, 17, "ab" * 32, {"w": "cd" * 32}), Record(0, 18)


def written(path) -> Entries:
    journal = Journal(path.parent, "key")
    journal.learned("replicas_compared", 5)
    journal.finished("release/a b.pt", A)
    journal.finished("c", B)
    journal.close()
    journal.close()
    return read_entries(path)


def test_there_and_back(tmp_path):
    found = written(tmp_path / NAME)
    assert found.key == "key"
    assert found.files == {"release/a b.pt": A, "c": B}
    assert found.facts == {"replicas_compared": 5}


def test_none(tmp_path):
    assert read_entries(tmp_path / NAME) == Entries()


@settings(max_examples=60, deadline=None)
@given(part=st.floats(0, 1), tail=st.sampled_from([b"", b"\0" * 40, b"{}", b"\xff\xfe", b"[1]\n", b'{"file": 3}\n']))
def test_a_journal_that_was_cut_is_believed_up_to_there_and_goes_on(tmp_path_factory, part, tail):
    path = tmp_path_factory.mktemp("journal") / NAME
    whole = written(path)
    data = path.read_bytes()
    path.write_bytes(data[: round(part * len(data))] + tail)
    found = read_entries(path)
    assert found.files.items() <= whole.files.items()
    journal = Journal(path.parent, "key", known=found)
    journal.finished("later", B)
    journal.close()
    again = read_entries(path)
    assert again.key == "key"
    assert again.files == {**found.files, "later": B}
    assert again.facts == found.facts


@pytest.mark.parametrize("first", [b"", b"\n", b"{}\n", b'{"journal": 999, "key": "k"}\n', b"nonsense\n"])
def test_no_journal_of_ours(tmp_path, first):
    (tmp_path / NAME).write_bytes(first + b'{"file": "a", "size": 1, "mtime_ns": 2}\n')
    assert read_entries(tmp_path / NAME).files == {}
    assert read_entries(tmp_path / NAME).key == ""


def test_another_key_begins_anew(tmp_path):
    written(tmp_path / NAME)
    journal = Journal(tmp_path, "other")
    journal.close()
    assert read_entries(tmp_path / NAME).key == "other"
    assert read_entries(tmp_path / NAME).files == {}


def test_the_journals_of_several_processes(tmp_path):
    for rank, (key, name) in enumerate([("key", "a"), ("key", "b"), ("old", "c")]):
        journal = Journal(tmp_path, key, rank)
        journal.finished(name, A)
        journal.close()
    (tmp_path / "journal-3.jsonl").write_text("nonsense")
    assert read_all(tmp_path) == Entries("key", {"a": A, "b": A})
    assert read_all(tmp_path / "none") == Entries()

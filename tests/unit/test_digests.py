"""SHA-256 of files written in any order: that of the finished file, whoever wrote what and when."""

from __future__ import annotations

import hashlib
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.execute import digests as module
from shardtool.execute.digests import Digests, FileDigest, Span, hash_file, sha256
from shardtool.execute.files import Files, Finished
from shardtool.formats.stored import Skeleton

SIZE = 400


def cut(data: bytes, places: list[int]) -> list[tuple[int, bytes]]:
    """The pieces of a byte string between places."""
    edges = [0, *sorted(set(places)), len(data)]
    return [(low, data[low:high]) for low, high in pairwise(edges) if high > low]


@settings(max_examples=40, deadline=None)
@given(
    data=st.binary(min_size=SIZE, max_size=SIZE),
    places=st.lists(st.integers(1, SIZE - 1), max_size=12),
    seed=st.randoms(use_true_random=False),
    patches=st.lists(st.tuples(st.integers(0, SIZE - 4), st.binary(min_size=4, max_size=4)), max_size=3),
    hole=st.booleans(),
    writers=st.integers(1, 3),
    block=st.sampled_from([1, 7, 64, 1 << 20]),
)
def test_any_order_of_writing(tmp_path_factory, data, places, seed, patches, hole, writers, block):
    """Pieces out of order by several threads, some bytes changed later, perhaps a piece that nobody writes (zeros)."""
    path = tmp_path_factory.mktemp("digests")
    pieces = cut(data, places)
    seed.shuffle(pieces)
    if hole and len(pieces) > 1:
        pieces.pop()
    spans = [Span(3, 50, "a"), Span(50, 50, "none"), Span(60, SIZE, "b")]
    found: dict[str, Finished] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        digests = Digests({"file": spans}, threads=2)
        files = Files(path, {"file": Skeleton(SIZE, ())}, digests=digests, finished=lambda f: found.update({f.name: f}))

        def write(turn: int) -> None:
            for offset, piece in pieces[turn::writers]:
                files.write("file", piece, offset)

        threads = [threading.Thread(target=write, args=(turn,)) for turn in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for offset, piece in patches:
            files.write("file", piece, offset)
        files.close(sync=True)
    written = (path / "file").read_bytes()
    assert found["file"].size == SIZE == len(written)
    assert found["file"].digest == FileDigest(
        hashlib.sha256(written).hexdigest(),
        {s.name: hashlib.sha256(written[s.start : s.end]).hexdigest() for s in spans},
    )


def test_what_is_written_in_order_is_not_read_back(tmp_path, monkeypatch):
    found: list[Finished] = []
    digests = Digests()
    files = Files(tmp_path, {"a": Skeleton(6, ((0, b"ab"),))}, digests=digests, finished=found.append)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read back"))
    files.write_both("a", memoryview(b"cd"), bytearray(b"ef"), 2)
    files.close(sync=True)
    assert found[0].digest == FileDigest(sha256(b"abcdef"), {})


def test_what_is_written_early_is_read_back_when_its_turn_comes(tmp_path):
    """And not only at the end: the front is ahead of a file that is still written."""
    reads = threading.Event()

    class Watched(Digests):
        def _read_back(self, *arguments):
            super()._read_back(*arguments)
            reads.set()

    found: list[Finished] = []
    files = Files(tmp_path, {"a": Skeleton(9, ())}, digests=Watched(), finished=found.append)
    files.write("a", b"def", 3)
    files.write("a", b"abc", 0)
    assert reads.wait(10)
    files.write("a", b"ghi", 6)
    files.close(sync=True)
    assert found[0].digest == FileDigest(sha256(b"abcdefghi"), {})


@pytest.mark.parametrize("durable", [True, False])
def test_every_file_is_told_of(tmp_path, durable):
    found: list[Finished] = []
    skeletons = {name: Skeleton(4, ((0, b"<"), (3, b">"))) for name in ("one", "two", "sub/three")}
    skeletons["empty"] = Skeleton(0, ())
    files = Files(tmp_path, skeletons, durable=durable, digests=Digests(threads=1), finished=found.append)
    for name in ("two", "one", "sub/three"):
        files.write(name, b"xy", 1)
    files.finish("one")
    files.close(sync=True)
    told = {item.name: item.digest.sha256 for item in found if item.digest}
    assert told == {name: sha256(b"<xy>") for name in ("one", "two", "sub/three")} | {"empty": sha256(b"")}
    for item in found:
        assert (tmp_path / item.name).stat().st_mtime_ns == item.mtime_ns


def test_a_run_that_gives_up_tells_of_nothing_more(tmp_path):
    found: list[Finished] = []
    files = Files(tmp_path, {"a": Skeleton(4, ())}, digests=Digests(), finished=found.append)
    files.write("a", b"cd", 2)
    files.close(sync=False)
    files.close(sync=False)
    assert found == []


def test_a_failure_while_hashing_is_the_run_s(tmp_path):
    def refuse(_: Finished) -> None:
        raise OSError(28, "no space for the journal")

    files = Files(tmp_path, {"a": Skeleton(1, ((0, b"x"),))}, digests=Digests(), finished=refuse)
    with pytest.raises(OSError, match="no space for the journal"):
        files.close(sync=True)
    files.close(sync=False)


def test_a_file_that_lost_bytes_meanwhile(tmp_path):
    files = Files(tmp_path, {"a": Skeleton(8, ())}, digests=Digests())
    files.write("a", b"late", 4)
    os.truncate(tmp_path / "a", 2)
    with pytest.raises(OSError, match="shorter than it was"):
        files.close(sync=True)
    files.close(sync=False)


def test_the_hash_of_a_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert hash_file(tmp_path / "a", block=7) == sha256(b"abc" * 1000)

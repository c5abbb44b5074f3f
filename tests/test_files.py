"""capsroute._files: a file is written whole or not at all, whoever else writes it."""

import errno
import os

import pytest

from capsroute._files import remove_unfinished, write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match=f"disk full: '{path}'$"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("parent", "error"), [("none", FileNotFoundError), ("file", NotADirectoryError)])
def test_an_error_names_the_file_that_was_to_be_written(tmp_path, parent, error):
    (tmp_path / "file").touch()
    path = tmp_path / parent / "report.html"
    with pytest.raises(error, match=f": '{path}'$"):
        write_atomically(path, b"")


def test_two_writers_at_once_publish_whole_files_both(tmp_path, monkeypatch):
    path, fsync = tmp_path / "file", os.fsync

    def meanwhile(fd):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"of another")
        assert path.read_bytes() == b"of another"
        fsync(fd)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, b"the first to begin, and the last to end")
    assert path.read_bytes() == b"the first to begin, and the last to end"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a[1].json"
    with monkeypatch.context() as patch:  # killed: nothing is cleaned up
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(type(path), "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"half")
    others = [".a1.json.0.unfinished", ".b.json.0.unfinished", "a[1].json"]
    for name in others:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    remove_unfinished(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == others

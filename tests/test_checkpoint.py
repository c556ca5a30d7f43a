"""Files that are whole or absent."""

import errno
import os

import pytest

from fastprimer import checkpoint
from fastprimer.checkpoint import write_atomically


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "the disk is full")))
            with pytest.raises(OSError, match=r"full: '.*file'"):
                write_atomically(path, b"new, and longer")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_a_file_has_the_permissions_asked_for_and_a_link_stays_one(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "file", b"secret")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600

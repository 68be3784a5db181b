"""Results appear whole or not at all."""

import os
import stat

import pytest

from gptjax.files import whole_file, write_whole


def test_text_is_utf8_in_any_locale(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, ["月", "光"])
    assert path.read_bytes() == "月光".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def broken():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_mode_is_kept_and_links_are_followed(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_pipe_is_written_into(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(path) as file:
        file.write(b"text")
    assert os.read(reader, 10) == b"text"
    assert stat.S_ISFIFO(path.stat().st_mode)
    os.close(reader)


def test_the_longest_name_that_a_file_may_have(tmp_path):
    path = tmp_path / ("x" * 255)
    write_whole(path, "text")
    assert path.read_text() == "text"

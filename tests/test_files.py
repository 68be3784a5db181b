"""Results appear whole or not at all."""

import errno
import os
import stat
import subprocess

import pytest

from gptjax import failures, files
from gptjax.errors import UserError
from gptjax.files import whole_directory, whole_file, write_whole


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


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt), whole_directory(final) as directory:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with whole_directory(final, replace=True) as directory:
            (directory / "a").write_text(text)
    with whole_directory(final) as directory:
        (directory / "a").write_text("three")
    assert (final / "a").read_text() == "two"
    assert list(tmp_path.iterdir()) == [final]


def test_what_a_killed_process_left_is_swept_and_what_is_at_work_is_not(tmp_path):
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    mine = files.beside(tmp_path / "a.json")
    left = mine.with_name(mine.name.replace(f".{os.getpid()}@", f".{ended}@"))
    far, long_gone = (left.with_name(left.name.replace("@", f"@{host}-")) for host in ("far", "gone"))
    for path in (mine, left, far):
        path.write_text("half")
    long_gone.mkdir()
    os.utime(long_gone, (0, 0))
    files.sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, far}
    files.sweep(tmp_path / "nothing")


def test_a_full_disk_is_told_with_path_space_and_what_to_do(tmp_path):
    with pytest.raises(OSError) as error, whole_file(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    text = files.explain(error.value)
    assert text.startswith(f"{tmp_path / 'a.bin'}: the disk is full (")
    assert text.endswith("MiB free). Make room; the same command then goes on")
    assert failures.describe(error.value) == (1, f"failed: {text}")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EDQUOT, "the quota of the disk is used up. Make room, or have the quota raised"),
        (errno.EIO, "the disk reports an error. See what the system's log says of it (dmesg), or use another disk"),
        (errno.ESTALE, "the network disk has lost it. Have it mounted again"),
    ],
)
def test_what_else_a_disk_refuses_ends_as_a_full_one_does(tmp_path, code, words):
    with pytest.raises(OSError) as error, whole_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise OSError(code, os.strerror(code))
    told = f"failed: {tmp_path / 'a.bin'}: {words}; the same command then goes on"
    assert failures.describe(error.value) == (1, told)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_on_a_disk_and_its_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPTJAX_CACHE", "~/cache")
    assert files.cache() == tmp_path / "cache" and files.cache(f"{tmp_path}/mine") == tmp_path / "mine"
    monkeypatch.setenv("GPTJAX_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="GPTJAX_CACHE: 'gs://bucket/cache' is in an object store; a path on this"):
        files.cache()

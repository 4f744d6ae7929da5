"""Files that are replaced in one step."""

import pytest

from datamodules.files import atomic_write, atomic_writer


@pytest.mark.parametrize(("content", "expected"), [("é\n", "é\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_the_whole_content_is_written(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    atomic_write(path, content)
    assert path.read_bytes() == expected
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_writer(path) as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "file", "x")


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_writer(path) as first:
        first.write(b"first")
        with atomic_writer(path) as second:  # the same process and the same path
            second.write(b"the second")
        assert path.read_bytes() == b"the second"
        first.write(b" and last")
    assert path.read_bytes() == b"first and last"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]

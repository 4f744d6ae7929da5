"""Files replaced in one step."""

import pytest

from datamodules.errors import one_line
from datamodules.files import atomic_write, atomic_writer


@pytest.mark.parametrize(("content", "expected"), [("é\n", "é\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_the_whole_content_is_there(tmp_path, content, expected):
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


def test_an_error_is_one_line_and_never_empty():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert one_line("x" * 500, limit=3) == "xxx"

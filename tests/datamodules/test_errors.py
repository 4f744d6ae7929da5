"""Texts of errors on one line."""

from datamodules.errors import one_line


def test_an_error_is_one_line_and_never_empty():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert one_line("x" * 500, limit=3) == "xxx"

"""Names of reports are safe and distinct as results in one folder."""

import pytest

from commands.analyze.several.names import NAME_BYTES, distinct_names, safe_name


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("host.json", "host.json"),
        ("a/b/host.json", "a/b/host.json"),
        ("/etc/passwd.json", "etc/passwd.json"),
        ("../../x.json", "x.json"),
        ("a/./../b.json", "a/b.json"),
        ("C:\\Windows\\x.json", "C_/Windows/x.json"),
        (".hidden/.analyze/x.json", "hidden/analyze/x.json"),
        ("a\x1b[31m\n.json", "a_[31m_.json"),
        ("\udcff.json", "_.json"),
        ("", "report"),
        ("..", "report"),
    ],
)
def test_safe_name(name, safe):
    assert safe_name(name) == safe


def test_a_long_name_is_cut_and_stays_distinct():
    first, second = safe_name("é" * 200 + "1.json"), safe_name("é" * 200 + "2.json")
    assert first != second
    assert len(first.encode()) <= NAME_BYTES
    assert len(safe_name("d/" * 100 + "x.json").split("/")) == 8


def test_names_that_would_share_a_result_get_a_numbered_folder():
    names = ["h.json", "h.json", "H.JSON", "h", "a/h.json", "set_aside.json", "h.json"]
    assert distinct_names(names) == [
        "h.json", "2/h.json", "3/H.JSON", "4/h", "a/h.json", "2/set_aside.json", "5/h.json",
    ]  # fmt: skip


def test_no_result_is_a_folder_of_another():
    assert distinct_names(["a.json", "a.json/b.json", "c.md/d.json", "c.json"]) == [
        "a.json", "2/a.json/b.json", "c.md/d.json", "2/c.json",
    ]  # fmt: skip


def test_many_equal_names_take_linear_time():
    assert len(set(distinct_names(["x.json"] * 20_000))) == 20_000

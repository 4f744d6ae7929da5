"""Results are complete whenever they exist under their name, and none is done for another content or setting."""

import json
import os
from pathlib import Path

import pytest

from commands.analyze.inputs import Inputs, ReportFile
from commands.analyze.outputs import FileResult, FolderResults, LinesResults, open_results
from datamodules.errors import UserError

NAMES = ("a.json", "rack/b.json", "c.json.gz")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def reports(*names, several=True):
    return Inputs([ReportFile(name, Path("scans", name), 1) for name in names], several, folders=[Path("scans")])


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("output", "inputs", "kind"),
    [
        ("out.json", reports("a.json", several=False), FileResult),
        ("out", reports("a.json", several=False), FileResult),
        ("out.json", reports("a.json"), FileResult),
        ("out/", reports("a.json", several=False), FolderResults),
        ("existing.json", reports("a.json", several=False), FolderResults),
        ("out", reports(*NAMES), FolderResults),
        ("out.jsonl", reports(*NAMES), LinesResults),
        ("new/out.jsonl", reports("a.json", several=False), LinesResults),
    ],
)
def test_the_output_decides_how_results_are_written(output, inputs, kind):
    Path("existing.json").mkdir()
    with open_results(output, inputs, "json") as results:
        assert type(results) is kind


@pytest.mark.parametrize(
    ("output", "format", "problem"),
    [
        ("out.json", "json", "one file can't hold 3 reports. Fix: name a folder (out/) or JSON Lines (out.jsonl)."),
        ("out.jsonl", "html", "JSON Lines can't hold --format html"),
        ("scans", "json", "this is the folder of the reports"),
        ("text/out", "json", "Not a directory"),
        ("text/", "json", "File exists"),
        ("/proc/out", "json", "No such file"),
        ("/proc/out.jsonl", "json", "No such file"),
    ],
)
def test_an_output_that_does_not_fit_is_one_line(output, format, problem):
    Path("scans").mkdir()
    Path("text").write_text("x")
    with pytest.raises(UserError) as error:
        open_results(output, reports(*NAMES), format)
    assert problem in str(error.value)
    assert str(error.value).startswith("--output ")
    assert "Fix: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("output", ["/dev/null", "fifo", "scans/a.json", "link.json"])
def test_a_device_or_the_report_is_not_replaced(output):
    Path("scans").mkdir()
    Path("scans/a.json").write_text("{}")
    os.symlink("scans/a.json", "link.json")  # noqa: PTH211
    os.mkfifo("fifo")
    with pytest.raises(UserError, match=r"not a regular file|the report itself"):
        open_results(output, reports("a.json", several=False), "json")


def test_a_file_is_written_in_one_step_and_its_answers_are_removed():
    with open_results("out/e.json", reports("a.json", several=False), "json") as results:
        results.answers.write_text("x")
        assert not results.is_done("a.json", "k")
        results.write("a.json", "k", "text")
        results.finish([])
    assert tree("out") == ["e.json"]
    assert Path("out/e.json").read_text() == "text"


def folder(names=NAMES, format="json"):
    return open_results("out", reports(*names), format)


def test_results_of_a_folder_mirror_the_reports():
    with folder() as results:
        for name in NAMES:
            results.write(name, "k", name)
        results.finish([])
    assert [name for name in tree("out") if not name.startswith(".analyze")] == [
        "a.json", "c.json.gz.json", "rack/b.json",
    ]  # fmt: skip
    with open_results("html", reports("a.json", "b.json"), "html") as results:
        results.write("a.json", "k", "page")
    assert Path("html/a.html").read_text() == "page"


def test_a_later_run_knows_the_results_that_are_done():
    with folder() as results:
        results.write("a.json", "k", "text")
    with folder() as results:
        assert results.is_done("a.json", "k")
        assert not results.is_done("a.json", "other settings")
        assert not results.is_done("rack/b.json", "k")


@pytest.mark.parametrize("damage", ["cut", "missing", "changed"])
def test_a_result_that_is_not_whole_is_not_done(damage):
    with folder() as results:
        results.write("a.json", "k", "a long text")
    if damage == "missing":
        Path("out/a.json").unlink()
    else:
        Path("out/a.json").write_text("a lo" if damage == "cut" else "a lOng text")
    with folder() as results:
        assert not results.is_done("a.json", "k")


def test_after_a_kill_the_rest_of_a_write_is_removed_and_other_files_are_kept():
    with folder() as results:
        results.write("a.json", "k", "text")
    with Path("out/.analyze/done.jsonl").open("a") as file:
        file.write('\n{"name": "rack/b.json", "key": "k", "sha')  # as after a power failure
    Path("out/rack").mkdir()
    Path("out/rack/b.json.12-0123abcd.tmp").write_text("ha")
    Path("out/rack/mine.json.12-0123abcd.tmp").write_text("of another program")
    with folder() as results:
        assert results.is_done("a.json", "k")
        assert not results.is_done("rack/b.json", "k")
        results.write("rack/b.json", "k", "half")
    with folder() as results:
        assert results.is_done("rack/b.json", "k")
    assert [name for name in tree("out/rack") if name.endswith(".tmp")] == ["mine.json.12-0123abcd.tmp"]


def test_a_file_of_the_user_is_not_replaced():
    Path("out").mkdir()
    Path("out/a.json").write_text("mine")
    with pytest.raises(UserError, match=r"--output out: out/a.json exists and is no result of this command"):
        folder()
    Path("out/a.json").unlink()
    with folder() as results:  # the first attempt has released the folder
        results.write("a.json", "k", "text")


def test_two_commands_do_not_write_to_one_folder():
    with folder(), pytest.raises(UserError, match=r"--output out: another analyze command writes there"):
        folder()
    with folder():
        pass


def test_reports_that_cannot_be_read_are_listed_and_have_no_old_result():
    bad = {"report": "scans/a.json", "name": "a.json", "reason": "No such file"}
    with folder() as results:
        results.write("a.json", "k", "text")
    with folder() as results:
        results.discard("a.json")
        results.discard("rack/b.json")
        results.finish([bad])
    assert json.loads(Path("out/set_aside.json").read_text()) == [bad]
    assert not Path("out/a.json").exists()
    with folder() as results:
        results.finish([])
    assert not Path("out/set_aside.json").exists()


def test_json_lines_appear_when_all_reports_are_done_in_their_order():
    bad = {"report": "scans/c.json.gz", "name": "c.json.gz", "reason": "x"}
    with open_results("out.jsonl", reports(*NAMES), "json") as results:
        results.write("rack/b.json", "k", '{\n "name": "b"\n}')
    assert not Path("out.jsonl").exists()
    with open_results("out.jsonl", reports(*NAMES), "json") as results:
        assert results.is_done("rack/b.json", "k")
        results.write("a.json", "k", '{"name": "ä"}')
        results.finish([bad])
    lines = Path("out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"name": "ä"}, {"name": "b"}]
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl", "out.jsonl.set_aside.json"]


def test_json_lines_do_not_use_a_folder_of_the_user():
    Path("out.jsonl.partial").mkdir()
    with pytest.raises(UserError, match=r"out.jsonl.partial exists and is no part of it"):
        open_results("out.jsonl", reports(*NAMES), "json")


def test_without_a_readable_report_no_empty_file_of_lines_is_written():
    with open_results("out.jsonl", reports("a.json", "b.json"), "json") as results:
        results.finish([{"report": name, "name": name, "reason": "x"} for name in ("a.json", "b.json")])
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl.set_aside.json"]


def test_a_full_disk_is_a_user_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with folder() as results:
        monkeypatch.setattr("commands.analyze.outputs.atomic_write", full)
        with pytest.raises(UserError, match=r"--output out/a.json: No space left on device. Fix: "):
            results.write("a.json", "k", "text")
    monkeypatch.setattr("commands.analyze.outputs.atomic_writer", full)
    with pytest.raises(UserError, match=r"--output new/x.json: No space left on device. Fix: "):
        open_results("new/x.json", reports("a.json", several=False), "json")

"""Reports are found in files, folders, globs and archives; what is no regular file of bounded size is refused."""

import gzip
import hashlib
import io
import json
import os
import socket
import tarfile
from pathlib import Path

import pytest

from commands.analyze import inputs
from commands.analyze.inputs import ReportFile, find_reports, parse_report, read_all_reports, read_file
from datamodules.errors import UserError
from datamodules.sources.field_coercion import InvalidRecord
from tests.helpers.findings_data import finding

REPORT = json.dumps({"results": [{"scanner": "ioc", "findings": [finding(0, "high"), finding(1, "low")]}]}).encode()
OUT = Path("out")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, data=REPORT):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def names(*values, output=OUT):
    return [report.name for report in find_reports(values, output).reports]


def read(*values):
    """Returns the bytes of each report, or the reason that it can't be read, by its name."""
    return {report.name: data for report, data in read_all_reports(find_reports(values, OUT).reports)}


def test_a_single_file_is_one_report_whatever_its_suffix():
    write("scans/host.txt")
    found = find_reports(["scans/host.txt"], OUT)
    assert [(r.name, r.label, r.size) for r in found.reports] == [("host.txt", "scans/host.txt", len(REPORT))]
    assert not found.several
    assert read("scans/host.txt") == {"host.txt": REPORT}


def test_files_of_several_hosts_are_named_by_their_folders():
    write("fleet/a/report.json")
    write("fleet/b/report.json")
    for values in (["fleet/a/report.json", "fleet/b/report.json"], ["fleet/*/report.json"], ["fleet/**/*.json"]):
        assert names(*values) == ["a/report.json", "b/report.json"]
        assert find_reports(values, OUT).several


def test_a_folder_is_read_with_its_subfolders_and_without_the_results():
    for name in ("b.json", "a.json", "sub/c.json.gz", "notes.txt", "sub/._c.json", "out/a.json", "out/.analyze/x.json"):
        write(f"scans/{name}")
    found = find_reports(["scans"], Path("scans/out"))
    assert [r.name for r in found.reports] == ["a.json", "b.json", "sub/c.json.gz"]
    assert found.several
    assert found.ignored == 2
    assert found.folders == [Path("scans")]
    assert names("scans/*.json", output=Path("scans/b.json")) == ["a.json"]
    write("scans/all.jsonl.partial/a.json")
    assert "all.jsonl.partial/a.json" not in names("scans", output=Path("scans/all.jsonl"))


def test_several_folders_keep_their_names():
    write("rack1/host.json")
    write("rack2/host.json")
    assert names("rack1", "rack2") == ["rack1/host.json", "rack2/host.json"]
    assert names("rack*") == ["rack1/host.json", "rack2/host.json"]


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_members_of_an_archive_are_read_without_extraction(suffix, mode):
    members = {"day/b.json": REPORT, "day/a.json": b"{}", "../../../evil.json": b"[1]", "read.me": b"x"}
    write_tar(f"scans.{suffix}", members, mode)
    found = find_reports([f"scans.{suffix}"], OUT)
    assert found.several
    assert found.ignored == 1
    stem = f"scans.{suffix}"
    assert read(stem) == {f"{stem}/day/b.json": REPORT, f"{stem}/day/a.json": b"{}", f"{stem}/evil.json": b"[1]"}
    assert os.listdir(".") == [stem]  # noqa: PTH208


def test_an_archive_in_a_folder_and_compressed_reports():
    write("scans/a.json.gz", gzip.compress(REPORT))
    write_tar("scans/old.tar.gz", {"b.json.gz": gzip.compress(REPORT)})
    assert read("scans") == {"a.json.gz": REPORT, "old.tar.gz/b.json.gz": REPORT}


def test_an_archive_is_read_in_one_pass(monkeypatch):
    write_tar("scans.tar.gz", {f"{n}.json": REPORT for n in range(50)})
    reports, opened, original = find_reports(["scans.tar.gz"], OUT).reports, [], inputs.open_archive
    monkeypatch.setattr(inputs, "open_archive", lambda path: opened.append(path) or original(path))
    assert [data for _, data in read_all_reports(reports)] == [REPORT] * 50
    assert len(opened) == 1


def test_a_damaged_archive_costs_the_damaged_part():
    write_tar("scans.tar.gz", {f"{n}.json": os.urandom(4000) for n in range(4)})
    data = Path("scans.tar.gz").read_bytes()
    write("cut.tar.gz", data[: len(data) // 2])
    write("text.tar.gz", b"no archive at all" * 100)
    result = read("cut.tar.gz", "text.tar.gz", "scans.tar.gz")
    assert isinstance(result["cut.tar.gz/0.json"], bytes)
    assert sum("damaged archive" in str(problem) for problem in result.values()) >= 2
    assert sum(isinstance(data, bytes) for name, data in result.items() if name.startswith("scans")) == 4


def test_a_member_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(inputs, "MAX_REPORT_BYTES", 3000)
    write_tar("scans.tar.gz", {"big.json": os.urandom(3001), "small.json": REPORT[:3000]})
    assert read("scans.tar.gz") == {"scans.tar.gz/big.json": "larger than 64 MiB", "scans.tar.gz/small.json": REPORT}


def test_decompression_bombs_are_refused():
    bomb = b"\0" * (65 << 20)
    write("bomb.json.gz", gzip.compress(bomb, 1))
    write_tar("bomb.tar.gz", {"a.json": REPORT, "b\x1b[2J.json": bomb, "c.json": REPORT})
    result = read("bomb.json.gz", "bomb.tar.gz")
    assert result.pop("bomb.tar.gz/a.json") == REPORT
    assert len(result) == 2
    assert "unpack to more than 200 times" in result["bomb.json.gz"]
    assert "decompression bomb: b\\x1b[2J.json has" in result["bomb.tar.gz"]


def refused(path):
    with pytest.raises(InvalidRecord) as error:
        read_file(Path(path))
    return error.value.detail


def test_devices_fifos_sockets_and_folders_are_refused(tmp_path):
    os.mkfifo("fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    assert refused("/dev/zero") == "a device, not a regular file"
    assert refused("fifo") == "a FIFO, not a regular file"
    assert refused("socket") == "a socket, not a regular file"
    assert refused(tmp_path) == "a folder, not a regular file"
    os.symlink("/dev/zero", "link.json")  # noqa: PTH211
    assert list(read(".").values()) == ["a device, not a regular file"]
    os.mkfifo("fifo.tar.gz")
    assert list(read("fifo.tar.gz").values()) == ["a FIFO, not a regular file"]


def test_a_file_that_is_too_large_or_endless_is_refused(monkeypatch):
    monkeypatch.setattr(inputs, "MAX_REPORT_BYTES", 100)
    write("big.json", b"x" * 101)
    write("fits.json", b"x" * 100)
    assert read("big.json", "fits.json") == {"big.json": "larger than 64 MiB", "fits.json": b"x" * 100}


def test_what_does_not_exist_or_has_no_report_has_a_reason():
    Path("empty").mkdir()
    os.symlink("nowhere", "dangling.json")  # noqa: PTH211
    write_tar("none.tar.gz", {"read.me": b"x"})
    assert list(read("missing.json", "x*.json", "empty", "dangling.json", "none.tar.gz", "").values()) == [
        "No such file or folder", "no file matches", "the folder has no .json file", "No such file or directory",
        "the archive has no .json file", "No such file or folder",
    ]  # fmt: skip


def test_control_characters_of_a_name_are_not_shown():
    write("a\x1b[31m.json")
    (report,) = find_reports(["a\x1b[31m.json"], OUT).reports
    assert report.label == "a\\x1b[31m.json"
    assert report.name == "a_[31m.json"


FILE = ReportFile("h.json", Path("h.json"), label="scans/h.json")


def test_a_report_has_its_reference_and_what_the_limit_skipped():
    report = parse_report(REPORT, FILE, 1)
    assert [f.id for f in report.parsed.document.findings] == ["f0"]
    reference = report.reference
    assert reference.pop("sha256") == hashlib.sha256(REPORT).hexdigest()
    assert reference == {
        "file": "h.json", "host": {}, "findings": 2, "repairs": reference["repairs"], "unusable": [], "limit": 1,
        "skipped": {"findings": 1, "by_severity": {"low": 1}, "worst": reference["skipped"]["worst"]},
    }  # fmt: skip
    assert reference["skipped"]["worst"]["id"] == "f1"
    assert "skipped" not in parse_report(REPORT, FILE, 2).reference


def test_the_raw_scan_is_whole_whatever_the_limit():
    raw = parse_report(REPORT, FILE, 1, with_raw=True).reference["results"]
    assert [f["id"] for f in raw[0]["findings"]] == ["f0", "f1"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not readable as JSON"),
        (b'{"results": [', "not readable as JSON"),
        (b"[" * 100_000, "nested too deep for a parser"),
        (b'{"results":' * 5000, "nested too deep for a parser"),
        (b"[]", "no scanner report"),
        (b'{"results": [{"findings": [7, 8]}]}', "none of its 2 findings is usable; number 1: not_an_object"),
        (b'{"results": [{"finding_count": 3}]}', "none of its 3 findings could be read"),
        (b'{"findings": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", "none of its 1 findings is usable"),
    ],
)
def test_a_report_that_cannot_be_parsed_is_one_line(data, problem):
    with pytest.raises(UserError, match=problem) as error:
        parse_report(data, FILE, None)
    assert str(error.value).startswith("--report scans/h.json: ")
    assert "\n" not in str(error.value)


def test_the_host_and_the_failures_of_scanners_are_in_the_reference():
    report = json.loads(REPORT) | {
        "meta": {"hostname": "web-7"}, "scanner_errors": ["x failed"], "collection_warnings": [{}, {}],
    }  # fmt: skip
    for with_raw in (False, True):
        reference = parse_report(json.dumps(report).encode(), FILE, None, with_raw).reference
        assert reference["host"] == {"host": "web-7"}
        assert len(reference["scanner_errors"]) == 1
        assert reference["collection_warnings"] == 2

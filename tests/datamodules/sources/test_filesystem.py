"""Files of a source: names, folders, globs, remote file systems and their errors."""

import http.server
import json
import os
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest

from datamodules.errors import UserError
from datamodules.sources import open_source
from datamodules.sources.filesystem import File, Location, fingerprint, is_record_file, record_kind
from tests.helpers.findings_data import finding
from tests.helpers.sources_data import (
    COMPRESSIONS,
    FIVE_FINDINGS,
    GENERATION_REPORT,
    gzip_bytes,
    json_lines,
    parquet_table,
    read_source,
    read_spec,
    shard,
    tar,
    write,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", "json"), ("A.JSON", "json"), ("a.json.gz", "json"), ("d/a.jsonl.zst", "lines"),
        ("a.ndjson", "lines"), ("a.parquet", "parquet"), ("a.parquet.gz", "parquet"),
        ("a.tar.gz", ""), ("a.txt", ""), ("json", ""), ("a.json.bz2", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_format_of_records_by_name(name, kind):
    assert record_kind(name) == kind
    assert is_record_file(name) == bool(kind)


@pytest.mark.parametrize("name", ["._a.json", "d/._a.json", "__MACOSX/a.json", "d/__MACOSX/a.json"])
def test_files_of_apple_archives_hold_no_records(name):
    assert not is_record_file(name)


def test_the_fingerprint_depends_on_names_sizes_and_stamps():
    files = [File("/x/a", "a", 3, "1"), File("/x/b", "b", 4, "2")]
    moved = [File("/y/a", "a", 3, "1"), File("/y/b", "b", 4, "2")]
    changed = [
        [File("/x/a", "c", 3, "1"), files[1]], [File("/x/a", "a", 5, "1"), files[1]],
        [File("/x/a", "a", 3, "9"), files[1]], files[::-1], files[:1],
    ]  # fmt: skip
    assert fingerprint(files) == fingerprint(moved)
    assert len({fingerprint(other) for other in [files, *changed]}) == 6
    assert fingerprint([File("/x/\udcff", "\udcff", 1, "")])  # a name that is not UTF-8


def test_folders_and_globs(tmp_path):
    write(tmp_path / "d/a.json", shard(0, 1))
    write(tmp_path / "d/b/c.jsonl.gz", gzip_bytes(json_lines(2, 3)))
    write(tmp_path / "d/b/d.parquet", parquet_table(4))
    write(tmp_path / "d/e.json.zst", COMPRESSIONS[".zst"](shard(5)))
    write(tmp_path / "d/generation_report.json", GENERATION_REPORT)
    write(tmp_path / "d/README.md", b"text")
    write(tmp_path / "d/._a.json", b"\x00\x05\x16\x07")
    source = open_source(str(tmp_path / "d"))
    assert read_source(source) == ([0, 1, 2, 3, 4, 5], [])
    assert source.members() == ["a.json", "b/c.jsonl.gz", "b/d.parquet", "e.json.zst", "generation_report.json"]
    assert not source.sequential
    assert [raw.member for raw in source.read_member(1)] == ["b/c.jsonl.gz"]
    assert read_source(source, (2, 0))[0] == [4, 5]
    glob = open_source(str(tmp_path / "d/**/*.json*"))
    assert sorted(read_source(glob)[0]) == [0, 1, 2, 3, 5]
    assert read_spec(str(tmp_path / "d/b/*.parquet")) == ([4], [])


@pytest.mark.parametrize("form", ["{path}", "{path}/", "file://{path}", "local://{path}"])
def test_forms_of_a_local_path(tmp_path, form):
    write(tmp_path / "d/b/a.json", shard(0))
    location = Location(form.format(path=tmp_path / "d"))
    (file,), is_one_file = location.files()
    assert (file.name, is_one_file) == ("b/a.json", False)
    with location.open(file) as opened:
        assert opened.read() == shard(0)


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path / "d/a.json", shard(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("d", "./d", "~/d", "d/../d"):
        (file,), is_one_file = Location(spec).files()
        assert (file.name, is_one_file) == ("a.json", False)
    assert Location("d/a.json").files()[1]


def test_a_path_with_two_colons_is_not_a_chain_of_urls(tmp_path):
    assert read_spec(write(tmp_path / "a::b.json", shard(0))) == ([0], [])


def test_names_of_a_glob_are_relative_to_the_common_folder(tmp_path):
    for name in ("x/1/a.json", "x/2/3/b.json", "x/c.json"):
        write(tmp_path / name, shard(0))
    files, is_one_file = Location(str(tmp_path / "x/**/*.json")).files()
    assert sorted(file.name for file in files) == ["1/a.json", "2/3/b.json", "c.json"]
    assert not is_one_file
    assert [file.name for file in Location(str(tmp_path / "x/1/*.json")).files()[0]] == ["a.json"]


def test_an_unknown_protocol_is_a_user_error():
    with pytest.raises(UserError, match=r"can't use unknown:// .*Protocol not known.* Fix: check the protocol"):
        Location("unknown://x").files()


def test_a_protocol_without_its_package_is_a_user_error(monkeypatch):
    def url_to_fs(spec, **options):
        raise ImportError("Please install\nnosuchfs")

    monkeypatch.setattr("datamodules.sources.filesystem.url_to_fs", url_to_fs)
    with pytest.raises(UserError, match=r"^data.sources=xyz://y: Please install nosuchfs\. Fix: install that package$"):
        Location("xyz://y").files()


def test_a_storage_error_is_a_user_error(tmp_path, monkeypatch):
    class Storage:
        def exists(self, path):
            raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(Location, "filesystem", lambda self: (Storage(), "x"))
    with pytest.raises(UserError, match=r"can't be read \(no credentials\)\. Fix: check the path"):
        Location("s3://x").files()


def test_errors_of_a_remote_file_become_oserror(monkeypatch):
    class RemoteFile:
        closed = False

        def read(self, size):
            raise RuntimeError("token expired")

        def seek(self, offset, whence):
            raise PermissionError("forbidden")

        def tell(self):
            return 0

        def close(self):
            self.closed = True

    class Storage:
        def open(self, path, mode):
            return remote

    remote = RemoteFile()
    monkeypatch.setattr(Location, "filesystem", lambda self: (Storage(), "x"))
    file = Location("s3://x").open(File("x", "", 1, ""))
    with pytest.raises(OSError, match="RuntimeError: token expired"):
        file.read(1)
    with pytest.raises(PermissionError, match="forbidden"):
        file.seek(3)
    file.close()
    assert remote.closed


def test_remote_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tar.gz", gzip_bytes(tar(FIVE_FINDINGS)))
    memory.pipe("/bucket/d/a.json", shard(0))
    memory.pipe("/bucket/d/b.jsonl", json_lines(1, 2))
    try:
        assert read_spec("memory://bucket/a.tar.gz", cache_dir=tmp_path) == ([0, 1, 2, 3, 4], [])
        assert read_spec("memory://bucket/d") == ([0, 1, 2], [])
        assert read_spec("memory://bucket/d/*.jsonl") == ([1, 2], [])
        with pytest.raises(UserError, match="no such file"):
            open_source("memory://bucket/none")
    finally:
        memory.rm("/bucket", recursive=True)


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files, as remote storage does; the standard library's handler serves whole files only."""

    def do_GET(self):
        first, last = (int(n) for n in self.headers.get("Range", "bytes=0-99999999")[6:].split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path):
    """Serves tmp_path over HTTP on this host; called with a handler, returns the URL."""
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        server.handle_error = lambda *_: None  # a client may close the connection early
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


def test_an_archive_over_http(tmp_path, serve):
    hex_texts = [os.urandom(1 << 19).hex() for _ in range(14)]
    noise = {
        f"d/{n}.json": json.dumps([finding(n, metadata={"n": text[:1000000]})]).encode()
        for n, text in enumerate(hex_texts)
    }
    path = write(tmp_path / "a.tar.gz", gzip_bytes(tar(noise)))
    assert Path(path).stat().st_size > 6 << 20  # more than fsspec's block of 5 MiB
    source = open_source(serve(RangeHandler) + "/a.tar.gz", cache_dir=tmp_path / "cache")
    assert read_source(source) == (list(range(14)), [])
    assert read_source(source, (9, 0)) == (list(range(9, 14)), [])
    without_ranges = type("Whole", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with pytest.raises(UserError, match=r"range requests.*fetch it first"):
        open_source(serve(without_ranges) + "/a.tar.gz")

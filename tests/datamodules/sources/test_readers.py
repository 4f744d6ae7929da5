"""Sources: every kind gives the same records, from any place, whatever is broken in it."""

import gzip
import http.server
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from datamodules.errors import UserError
from datamodules.sources import byte_stream, open_source, parse, readers, seek_index, tar_reader
from datamodules.sources.decompression import DecompressionLimits
from datamodules.sources.seek_index import SeekIndex

packed_gzip = partial(gzip.compress, mtime=0)  # the time would stand in the tests' names, other in each worker

DATA = (Path(__file__).parents[3] / "../shared/data").resolve()
REAL = pytest.mark.skipif(not DATA.is_dir(), reason="the shared real data are absent")


def finding(number, **changes):
    return {
        "id": f"f{number}", "title": "World-writable file", "severity": "medium", "risk_score": 50.0,
        "base_severity_score": 50, "description": f"File {number}", "metadata": {"path": f"/tmp/{number}"},
        "category": "world_writable", "tags": ["filesystem"], "baseline_status": "new", "correlation_refs": [],
    } | changes  # fmt: skip


def document(*numbers):
    records = [finding(number) for number in numbers]
    return {"metadata": {}, "data": {"findings": {"world_writable": {"medium": records}}, "correlations": []}}


def shard(*numbers):
    """An envelope's bytes."""
    packed = packed_gzip(json.dumps(document(*numbers)).encode())
    return json.dumps({"compressed": True, "compression_method": "gzip", "data": packed.hex()}).encode()


def lines(*numbers):
    return b"".join(json.dumps(finding(number)).encode() + b"\n" for number in numbers)


def table(*numbers, as_text=False, rows_per_group=4):
    records = [finding(number) for number in numbers]
    for record in records:
        del record["correlation_refs"]
        if as_text:
            record["metadata"] = json.dumps(record["metadata"])
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records), buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


REPORT = json.dumps({"generation_stats": {}, "batch_results": []}).encode()
THREE = {"d/b0.json": shard(0, 1), "d/generation_report.json": REPORT, "d/b1.json": shard(2), "d/b2.json": shard(3, 4)}


def tar(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def drain(source, start=(0, 0)):
    """Ids of the findings and reasons of the quarantined, in order."""
    ids, reasons = [], []
    for raw in source.raw_documents(start):
        parsed = parse(raw)
        ids += [int(record.id[1:]) for record in parsed.document.findings]
        reasons += [entry.reason for entry in parsed.quarantined]
    return ids, reasons


def read(spec, **options):
    return drain(open_source(spec, **options))


PACK = {"": bytes, ".gz": packed_gzip, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", json.dumps(document(*range(5))).encode()),
        ("a.json", shard(*range(5))),
        ("a.json", json.dumps(document(*range(5)), indent=1).encode()),
        ("a.json", json.dumps([finding(n) for n in range(5)]).encode()),
        ("a.jsonl", lines(*range(5))),
        ("a.json", lines(*range(5))),
        ("a.jsonl", json.dumps(document(*range(5)), indent=1).encode()),
        ("a.jsonl", shard(0, 1) + b"\n" + shard(2, 3) + b"\n\n" + lines(4)),
        ("a.ndjson", lines(*range(5))[:-1]),
        ("a.parquet", table(*range(5))),
        ("a.parquet", table(*range(5), as_text=True)),
        ("a.tar", tar(THREE)),
        ("no_suffix", tar(THREE)),
        ("no_suffix", lines(*range(5))),
        ("no_suffix", table(*range(5))),
    ],
)
def test_every_kind_of_file(tmp_path, name, data, packing):
    spec = write(tmp_path / (name + packing), PACK[packing](data))
    source = open_source(spec)
    assert drain(source) == ([0, 1, 2, 3, 4], [])
    assert drain(pickle.loads(pickle.dumps(source))) == ([0, 1, 2, 3, 4], [])  # worker processes get sources so
    assert read(spec, cache_dir=tmp_path / "cache") == ([0, 1, 2, 3, 4], [])
    assert source.fingerprint() == open_source(spec).fingerprint()
    again = Path(spec)
    os.utime(again, ns=(1, 1))
    assert source.fingerprint() != open_source(spec).fingerprint()


def test_folders_and_globs(tmp_path):
    write(tmp_path / "d/a.json", shard(0, 1))
    write(tmp_path / "d/b/c.jsonl.gz", packed_gzip(lines(2, 3)))
    write(tmp_path / "d/b/d.parquet", table(4))
    write(tmp_path / "d/e.json.zst", PACK[".zst"](shard(5)))
    write(tmp_path / "d/generation_report.json", REPORT)
    write(tmp_path / "d/README.md", b"text")
    write(tmp_path / "d/._a.json", b"\x00\x05\x16\x07")
    source = open_source(str(tmp_path / "d"))
    assert drain(source) == ([0, 1, 2, 3, 4, 5], [])
    assert source.members() == ["a.json", "b/c.jsonl.gz", "b/d.parquet", "e.json.zst", "generation_report.json"]
    assert not source.sequential
    assert [raw.member for raw in source.read_member(1)] == ["b/c.jsonl.gz"]
    assert drain(source, (2, 0))[0] == [4, 5]
    glob = open_source(str(tmp_path / "d/**/*.json*"))
    assert sorted(drain(glob)[0]) == [0, 1, 2, 3, 5]
    assert read(str(tmp_path / "d/b/*.parquet")) == ([4], [])


def test_remote_urls(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/a.tar.gz", packed_gzip(tar(THREE)))
    files.pipe("/bucket/d/a.json", shard(0))
    files.pipe("/bucket/d/b.jsonl", lines(1, 2))
    try:
        assert read("memory://bucket/a.tar.gz", cache_dir=tmp_path) == ([0, 1, 2, 3, 4], [])
        assert read("memory://bucket/d") == ([0, 1, 2], [])
        assert read("memory://bucket/d/*.jsonl") == ([1, 2], [])
        with pytest.raises(UserError, match="no such file"):
            open_source("memory://bucket/none")
    finally:
        files.rm("/bucket", recursive=True)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as the storage behind a URL does; the standard library's serves whole ones."""

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
    """Serves tmp_path over HTTP on this host; called with a handler."""
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        server.handle_error = lambda *_: None  # who asks may hang up
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
    path = write(tmp_path / "a.tar.gz", packed_gzip(tar(noise)))
    assert Path(path).stat().st_size > 6 << 20  # more than fsspec's block of 5 MiB
    source = open_source(serve(Handler) + "/a.tar.gz", cache_dir=tmp_path / "cache")
    assert drain(source) == (list(range(14)), [])
    assert drain(source, (9, 0)) == (list(range(9, 14)), [])
    quiet = type("Whole", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with pytest.raises(UserError, match=r"range requests.*fetch it first"):
        open_source(serve(quiet) + "/a.tar.gz")


def test_a_hugging_face_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.sources.huggingface.CHUNK_RECORDS", 3)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home/datasets")
    write(tmp_path / "set/train-0.parquet", table(*range(5)))
    write(tmp_path / "set/train-1.parquet", table(*range(5, 8)))
    spec = f"hf://datasets/{tmp_path}/set?split=train"
    source = open_source(spec)
    assert drain(source) == (list(range(8)), [])
    assert [raw.position for raw in source.raw_documents()] == [0, 3, 6]
    assert drain(source, (0, 4))[0] == [4, 5, 6, 7]
    assert source.fingerprint() == open_source(spec).fingerprint()
    with pytest.raises(UserError, match="no such data set or split"):
        open_source(f"hf://datasets/{tmp_path}/set?split=nothing")
    with pytest.raises(UserError, match="write hf://datasets/NAME"):
        open_source("hf://datasets/?split=train")


def test_synthetic_findings_are_made_once(tmp_path):
    spec = "synthetic://?findings=60&seed=3"
    source = open_source(spec, cache_dir=tmp_path)
    parsed = [parse(raw) for raw in source.raw_documents()]
    assert sum(len(p.document.findings) for p in parsed) == 60
    assert {p.document.source for p in parsed} == {spec}
    assert not any(p.quarantined for p in parsed)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert made
    again = open_source(spec, cache_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == made
    assert again.fingerprint() == source.fingerprint() != open_source(
        "synthetic://?findings=60&seed=4", cache_dir=tmp_path
    ).fingerprint()  # fmt: skip
    assert not list(tmp_path.rglob(".making-*"))
    for wrong in ("synthetic://?findings=many", "synthetic://?findings=0", "synthetic://?count=3"):
        with pytest.raises(UserError, match="write synthetic"):
            open_source(wrong, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (None, None, "no such file or folder"),
        ("a*.json", None, "no file matches"),
        ("unknown://x", None, "Protocol not known"),
        ("a.json", b"", "is empty"),
        ("a.json.gz", packed_gzip(b""), "is empty"),
        ("a.tar.gz", packed_gzip(tar({})), "holds no findings"),
        ("a.tar.gz", packed_gzip(tar({"readme.txt": b"text"})), "holds no findings"),
        ("a.tar.gz", packed_gzip(tar({"generation_report.json": REPORT})), "holds no findings"),
        ("a.tar.gz", b"\x1f\x8b" + b"\0" * 100, "damaged from its start"),
        ("a.json", b'{"results": [{"scanner": "ioc", "findings": []}]}', "`analyze` reads"),
        ("a.json", b'{"fact_pack_version": "3", "findings": []}', "`analyze` reads"),
        ("a.json", b"[]", "holds no findings"),
        ("a.json", b"not json", "bad_json"),
        ("a.jsonl", b"not json\nat all\n", "bad_json"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "neither JSON nor Parquet"),
        ("a.zip", b"PK\x03\x04" + b"\0" * 600, "neither JSON nor Parquet"),
        ("a.txt", b"hello", "neither JSON nor Parquet"),
        ("a.parquet", b"PAR1garbage", "holds no findings"),
    ],
)
def test_a_wrong_source_is_the_users_to_mend(tmp_path, name, data, message):
    spec = str(tmp_path / (name or "nothing")) if "://" not in (name or "") else name
    if data is not None:
        write(Path(spec), data)
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_findings_is_the_users_to_mend(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text/readme.txt", b"hello")
    write(tmp_path / "reports/a.json", b'{"results": []}')
    write(tmp_path / "archives/a.tar.gz", packed_gzip(tar(THREE)))
    for name, message in [
        ("empty", "no .json"),
        ("text", "no .json"),
        ("reports", "`analyze`"),
        ("archives", "no .json"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))
    with pytest.raises(UserError, match="name each"):
        open_source(str(tmp_path / "archives/*.gz"))


def test_long_files_become_many_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(readers, "CHUNK_RECORDS", 4)
    for name, data in [("a.jsonl", lines(*range(10))), ("a.parquet", table(*range(10), rows_per_group=6))]:
        source = open_source(write(tmp_path / name, data))
        documents = list(source.raw_documents())
        expected = [0, 4, 8] if name == "a.jsonl" else [0, 4, 6]
        assert [raw.position for raw in documents] == expected
        assert [parse(raw).document.position for raw in documents] == expected
        for start in range(11):
            assert drain(source, (0, start))[0] == list(range(start, 10))
    monkeypatch.setattr(tar_reader, "CHUNK_BYTES", 600)
    assert len(list(open_source(str(tmp_path / "a.jsonl")).raw_documents())) > 3


def test_real_limits_of_documents(tmp_path):
    source = open_source(write(tmp_path / "a.jsonl", lines(*range(9000))))
    assert [raw.position for raw in source.raw_documents()] == [0, 4096, 8192]
    source = open_source(write(tmp_path / "a.parquet", table(*range(5000), rows_per_group=5000)))
    assert [raw.position for raw in source.raw_documents()] == [0, 4096]


# ---------------------------------------------------------------- archives: places, index, damage


MIXED = {
    "d/0.json": shard(0, 1), "d/1.jsonl": lines(*range(2, 9)), "notes.txt": b"x" * 3000, "d/2.parquet": table(9, 10),
    "d/3.json.gz": packed_gzip(shard(11)), "d/4.jsonl.zst": PACK[".zst"](lines(12, 13, 14)), "d/5.json": shard(15),
    "d/6.parquet.gz": packed_gzip(table(16)),
}  # fmt: skip


@pytest.fixture
def small_steps(monkeypatch):
    """Chunks, index entries and seek points so close together that a small archive has many."""
    monkeypatch.setattr(tar_reader, "CHUNK_RECORDS", 3)
    monkeypatch.setattr(readers, "SAVE_INTERVAL", 1)
    monkeypatch.setattr(seek_index, "MIN_ENTRY_SPACING", 1)
    monkeypatch.setattr(byte_stream, "SEEK_POINT_SPACING", 1 << 16)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("cached", [False, True])
def test_reading_begins_at_any_place(tmp_path, small_steps, packing, cached):
    spec = write(tmp_path / f"a.tar{packing}", PACK[packing](tar(MIXED)))
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    source = open_source(spec, **options)
    assert source.sequential == bool(packing)
    whole = [(raw.member_index, raw.position, parse(raw)) for raw in source.raw_documents()]
    assert [record.id for *_, parsed in whole for record in parsed.document.findings] == [f"f{n}" for n in range(17)]
    assert source.members() == [name for name in MIXED if name != "notes.txt"]
    for place, (member, position, _) in enumerate(whole):
        rest = [(raw.member_index, raw.position, parse(raw)) for raw in source.raw_documents((member, position))]
        assert rest == whole[place:]
        one = [(raw.member_index, raw.position) for raw in source.read_member(member, position)]
        assert one == [(m, p) for m, p, _ in whole[place:] if m == member]
    assert list(source.raw_documents((99, 0))) == []


@pytest.fixture
def big_archive(tmp_path):
    """A .tar.gz of 40 shards that hardly compress, 1.3 MB uncompressed."""
    members = {}
    for number in range(40):
        noise = os.urandom(16 << 10).hex()
        members[f"d/{number}.json"] = json.dumps([finding(number, metadata={"noise": noise})]).encode()
    return write(tmp_path / "a.tar.gz", packed_gzip(tar(members)))


def test_a_pass_writes_seek_points_and_a_later_start_uses_them(tmp_path, small_steps, big_archive):
    source = open_source(big_archive, cache_dir=tmp_path / "cache")
    assert drain(source)[0] == list(range(40))
    (path,) = (tmp_path / "cache").rglob("*.idx")
    index = SeekIndex.load(path)
    assert index.complete and len(index.names) == 40
    assert len(index.points) > 10 * 32768  # a window of 32 KiB each
    opened = []
    source = open_source(big_archive, cache_dir=tmp_path / "cache")  # another process
    source.location = CountingLocation(source.location.spec, opened)
    documents = source.raw_documents((35, 0))
    assert next(documents).member == "d/35.json"
    documents.close()
    assert sum(file.read_bytes for file in opened) < 0.6 * Path(big_archive).stat().st_size  # not from the start


class Counted(io.FileIO):
    """A file that counts what is read from it."""

    def __init__(self, path, opened):
        super().__init__(path)
        self.read_bytes = 0
        opened.append(self)

    def read(self, size=-1):
        data = super().read(size)
        self.read_bytes += len(data)
        return data


def test_without_a_cache_the_index_is_kept_in_memory(small_steps, big_archive):
    source = open_source(big_archive)
    assert len(source.members()) == 40
    opened = []
    source.location = CountingLocation(source.location.spec, opened)
    assert [raw.member_index for raw in source.read_member(35)] == [35]
    assert sum(file.read_bytes for file in opened) < 0.6 * Path(big_archive).stat().st_size


class CountingLocation:
    """A location that counts what is read from its files."""

    def __init__(self, spec, opened):
        self.spec, self.opened = spec, opened

    def open(self, file):
        return Counted(file.path, self.opened)


def test_an_interrupted_pass_leaves_an_index_that_the_next_one_extends(tmp_path, small_steps, big_archive):
    source = open_source(big_archive, cache_dir=tmp_path / "cache")
    documents = source.raw_documents()
    for _ in range(20):
        next(documents)
    documents.close()
    (path,) = (tmp_path / "cache").rglob("*.idx")
    half = SeekIndex.load(path)
    assert not half.complete and 15 <= len(half.names) <= 20
    assert drain(source, (15, 0))[0] == list(range(15, 40))
    whole = SeekIndex.load(path)
    assert whole.complete and len(whole.names) == 40 and len(whole.points) > len(half.points)
    assert drain(source, (38, 0))[0] == [38, 39]
    half.save(path)  # a slower worker's older index does not replace it
    assert SeekIndex.load(path).complete


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-7], lambda d: d[:20], lambda d: b"", lambda d: d[:60] + b"X" + d[61:]]
)
def test_a_corrupt_index_is_rebuilt(tmp_path, small_steps, big_archive, damage):
    source = open_source(big_archive, cache_dir=tmp_path / "cache")
    drain(source)
    (path,) = (tmp_path / "cache").rglob("*.idx")
    path.write_bytes(damage(path.read_bytes()))
    assert SeekIndex.load(path) is None
    source = open_source(big_archive, cache_dir=tmp_path / "cache")  # another process
    assert drain(source, (30, 0))[0] == list(range(30, 40))
    assert drain(source)[0] == list(range(40))
    assert SeekIndex.load(path).complete


def test_an_unwritable_cache_is_no_error(tmp_path):
    spec = write(tmp_path / "a.tar.gz", packed_gzip(tar(THREE)))
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert read(spec, cache_dir=blocked)[0] == [0, 1, 2, 3, 4]


def test_passing_documents_over_parses_nothing(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "a.tar.gz", packed_gzip(tar(THREE))))
    monkeypatch.setattr("datamodules.sources.decompression.orjson.loads", None)
    assert len(list(source.raw_documents())) == 4
    monkeypatch.undo()
    write(tmp_path / "d/a.json", shard(0))  # a folder's files are not even opened
    source = open_source(str(tmp_path / "d"))
    (tmp_path / "d/a.json").unlink()
    (raw,) = source.raw_documents()
    assert [entry.reason for entry in parse(raw).quarantined] == ["unreadable"]


def test_names_of_members_are_only_names(tmp_path):
    members = {"../../evil.json": shard(0), "/etc/absolute.json": shard(1), "d/\udcff.json": shard(2),
               "n" * 150 + ".json": shard(3)}  # fmt: skip
    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        before = sorted(tmp_path.rglob("*"))
        spec = write(tmp_path / "in/a.tar", tar(members, format=format_, errors="surrogateescape"))
        source = open_source(spec)
        assert drain(source) == ([0, 1, 2, 3], [])
        assert source.members()[:2] == ["../../evil.json", "/etc/absolute.json"]
        assert source.members()[3] == "n" * 150 + ".json"
        assert source.members()[2].isprintable()
        assert [p for p in sorted(tmp_path.rglob("*")) if p.name not in ("in", "a.tar")] == before
        shutil.rmtree(tmp_path / "in")


def test_links_and_folders_are_passed_over(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, kind in [("d", tarfile.DIRTYPE), ("d/l.json", tarfile.SYMTYPE), ("d/h.json", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            file.addfile(info)
        data = shard(0)
        info = tarfile.TarInfo("d/a.json")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    assert read(write(tmp_path / "a.tar", buffer.getvalue())) == ([0], [])


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "empty"),
        (b'{"data": {"findings"', "bad_json"),
        (b'{"compressed": true, "data": "abc"}', "bad_hex"),
        (shard(7)[:-60] + b'"}', "truncated_gzip"),
        (b"[" * 3000, "too_deep"),
        (
            b'{"compressed": true, "data": "' + packed_gzip(b" " * (48 << 20)).hex().encode() + b'"}',
            "decompression_bomb",
        ),
        (b" " * (2 << 20), "too_large"),
    ],
)
def test_a_bad_member_in_the_middle_never_stops_the_rest(tmp_path, bad, reason, packing):
    members = {"0.json": shard(0), "../../1.json": bad, "2.json": shard(2)}
    spec = write(tmp_path / f"a.tar{packing}", PACK[packing](tar(members)))
    limits = DecompressionLimits(member_bytes=1 << 20) if reason == "too_large" else DecompressionLimits()
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        source = open_source(spec, limits=limits, **options)
        assert drain(source) == ([0, 2], [reason])
        (entry,) = [entry for raw in source.raw_documents() for entry in parse(raw).quarantined]
        assert (entry.source, entry.member, entry.position) == (spec, "../../1.json", 0)


def test_a_bad_header_costs_its_member(tmp_path):
    data = bytearray(tar({"0.json": shard(0), "1.json": shard(1), "2.json": shard(2)}))
    data[data.index(b"1.json")] ^= 0xFF
    for packing, pack in PACK.items():
        source = open_source(write(tmp_path / f"a.tar{packing}", pack(bytes(data))), cache_dir=tmp_path / "cache")
        assert drain(source) == ([0, 2], ["bad_header"])
        assert source.members() == ["0.json", "", "2.json"]
        assert drain(source, (2, 0)) == ([2], [])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("packing", PACK)
def test_of_a_truncated_archive_what_came_before_is_read(tmp_path, packing, cached):
    members = {f"{n}.json": shard(n) for n in range(6)}
    whole = tar(members)
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    inside = whole.index(b"3.json") + 512 + 100
    header = whole.index(b"3.json") + 100
    between = whole.index(b"3.json")
    for number, cut in enumerate((inside, header, between)):
        end = -8 if packing == ".gz" else None  # no end of the gzip stream either
        squeezed = PACK[packing](whole[:cut])[:end]
        source = open_source(write(tmp_path / f"{number}.tar{packing}", squeezed), **options)
        assert drain(source) == ([0, 1, 2], ["truncated_archive"])
        assert len(source.members()) == 4


@pytest.mark.parametrize("cut", [0, 300])
def test_several_gzip_members_in_one_file(tmp_path, cut):
    data = b"".join(packed_gzip(lines(n, n + 1)) for n in range(0, 400, 2)) + b"\0" * 100
    ids, reasons = read(write(tmp_path / "a.jsonl.gz", data[: len(data) - cut]), cache_dir=tmp_path / "cache")
    assert ids == list(range(len(ids)))
    assert (len(ids), reasons) == (400, []) if not cut else (len(ids) > 390 and "truncated_archive" in reasons)


def test_of_a_truncated_jsonl_what_came_before_is_read(tmp_path):
    data = lines(*range(50))
    ids, reasons = read(write(tmp_path / "a.jsonl.gz", packed_gzip(data)[:-20]))
    assert ids == list(range(len(ids))) and len(ids) > 10
    assert "truncated_archive" in reasons
    members = {"a.json": shard(100), "b.jsonl": data}
    whole = tar(members)
    ids, reasons = read(write(tmp_path / "a.tar", whole[: whole.index(b"/tmp/30")]))
    assert ids == [100, *range(30)] and reasons == ["truncated_archive"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_gzip_stream_gives_what_came_before(tmp_path, big_archive, cached):
    data = bytearray(Path(big_archive).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff" * 64
    Path(big_archive).write_bytes(bytes(data))
    ids, reasons = read(big_archive, **({"cache_dir": tmp_path / "cache"} if cached else {}))
    assert ids[:17] == list(range(17))
    assert reasons


def test_a_member_that_claims_too_much(tmp_path):
    data = bytearray(tar({"0.json": shard(0), "1.json": shard(1), "2.json": shard(2)}))
    start = data.index(b"1.json")
    info = tarfile.TarInfo("1.json")
    info.size = 1 << 40
    data[start : start + 512] = info.tobuf(format=tarfile.GNU_FORMAT)
    for packing, pack in PACK.items():
        ids, reasons = read(write(tmp_path / f"a.tar{packing}", pack(bytes(data))))
        assert ids == [0]
        assert reasons == ["too_large"]


def test_a_bomb_inside_an_archive_is_passed_over(tmp_path):
    members = {"0.json": shard(0), "bomb.json": b" " * (100 << 20), "2.json": shard(2)}
    spec = write(tmp_path / "a.tar.gz", packed_gzip(tar(members)))
    assert read(spec) == ([0, 2], ["decompression_bomb"])


def test_lines_that_are_bad_or_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "LINE_BYTES", 1 << 20)
    data = lines(0) + b"x" * (2 << 20) + b"\n" + lines(1) + b"\xff\xfe\n{\n" + lines(2)
    source = open_source(write(tmp_path / "a.jsonl", data))
    assert drain(source) == ([0, 1, 2], ["too_large", "bad_json", "bad_json"])
    positions = [entry.position for raw in source.raw_documents() for entry in parse(raw).quarantined]
    assert positions == [1, 3, 4]


def test_documents_on_lines_do_not_mix(tmp_path):
    truth = {"version": "ground_truth_v1", "enriched_findings": [finding(0)], "summaries": {"executive_summary": "one"}}
    data = b"".join(json.dumps(truth).encode() + b"\n" for _ in range(3)) + lines(1, 2)
    documents = [parse(raw).document for raw in open_source(write(tmp_path / "a.jsonl", data)).raw_documents()]
    assert [len(document.findings) for document in documents] == [1, 1, 1, 2]
    assert [document.position for document in documents] == [0, 1, 2, 3]


@REAL
def test_real_batches(tmp_path):
    for spec in (DATA / "batches", DATA / "batches" / "*.json"):
        totals = [0, 0, 0, 0]
        for raw in open_source(str(spec)).raw_documents():
            parsed = parse(raw)
            counts = (parsed.document.findings, parsed.document.correlations, parsed.quarantined, parsed.skipped)
            totals = [total + len(count) for total, count in zip(totals, counts, strict=True)]
        assert totals == [6020, 3432, 0, 1]
    assert len(parse(next(open_source(str(DATA / "plain_batch.json")).raw_documents())).document.findings) == 22
    truth = parse(next(open_source(str(DATA / "ground_truth_example.json")).raw_documents())).document
    assert truth.summaries["executive_summary"] and truth.actions
    with pytest.raises(UserError, match="analyze"):
        open_source(str(DATA / "reports" / "host_scan.json"))


WHOLE = tar({f"{n}.json": shard(n) for n in range(4)})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(PACK)), st.integers(0, 1 << 30), st.binary(min_size=1, max_size=40), st.booleans())
def test_any_damage_ends_in_quarantine_or_an_error(tmp_path, packing, place, junk, cached):
    data = PACK[packing](WHOLE)
    place %= len(data)
    damaged = data[:place] + junk + data[place + len(junk) :]
    spec = write(tmp_path / f"a.tar{packing}", damaged)
    try:
        ids, reasons = read(spec, **({"cache_dir": tmp_path / "cache"} if cached else {}))
    except UserError:
        return
    assert len(ids) == len(set(ids)) and set(ids) <= set(range(4))
    if damaged == data:
        assert (ids, reasons) == ([0, 1, 2, 3], [])
    if not packing and ids != [0, 1, 2, 3]:
        assert reasons or len(ids) >= 2  # a plain tar loses at most what was hit


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.json", "a.jsonl", "a.parquet", "a.tar", "a.gz", "a"]), st.binary(max_size=400))
def test_any_bytes_are_a_users_error_or_quarantined(tmp_path, name, data):
    spec = write(tmp_path / name, data)
    with pytest.raises(UserError):
        read(spec)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["good", "bad", "blank", "document"]), min_size=1, max_size=30), st.integers(0, 40))
def test_lines_from_any_place_lose_and_double_nothing(tmp_path, small_steps, kinds, start):
    data, expected = b"", []
    for number, kind in enumerate(kinds):
        if kind in ("good", "document"):
            expected.append(number)
        line = {"good": json.dumps(finding(number)).encode(), "bad": b"{", "blank": b"", "document": shard(number)}
        data += line[kind] + b"\n"
    if not expected:
        return
    spec = write(tmp_path / "a.jsonl.gz", packed_gzip(data))
    source = open_source(spec)
    ids, reasons = drain(source)
    assert ids == expected and len(reasons) == kinds.count("bad")
    assert drain(source, (0, start))[0] == [number for number in expected if number >= start]

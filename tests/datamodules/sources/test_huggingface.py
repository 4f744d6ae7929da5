"""Hugging Face datasets as sources: rows from any position, fingerprints, errors."""

import pytest

from datamodules.errors import UserError
from datamodules.sources import open_source, parse
from tests.helpers.sources_data import parquet_table, read_source, write


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Spec of a local dataset of 8 findings in 2 files, read in chunks of 3; datasets caches in tmp_path."""
    monkeypatch.setattr("datamodules.sources.huggingface.CHUNK_RECORDS", 3)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home/datasets")
    write(tmp_path / "set/train-0.parquet", parquet_table(*range(5)))
    write(tmp_path / "set/train-1.parquet", parquet_table(*range(5, 8)))
    return f"hf://datasets/{tmp_path}/set"


def test_rows_are_read_from_any_position(dataset):
    source = open_source(f"{dataset}?split=train")
    assert read_source(source) == (list(range(8)), [])
    assert [raw.position for raw in source.raw_documents()] == [0, 3, 6]
    assert source.members() == [""]
    for start in range(9):
        assert read_source(source, (0, start))[0] == list(range(start, 8))
    assert list(source.raw_documents((1, 0))) == []


def test_the_fingerprint_depends_on_files_and_options(dataset, tmp_path):
    spec = f"{dataset}?split=train"
    before = open_source(spec).fingerprint()
    assert open_source(spec).fingerprint() == before
    assert open_source(f"{spec}&config=default").fingerprint() != before
    write(tmp_path / "set/train-1.parquet", parquet_table(*range(5, 9)))
    assert open_source(spec).fingerprint() != before


def test_an_error_while_reading_is_a_quarantined_document(dataset, monkeypatch):
    source = open_source(dataset)

    def rows():
        yield from source_rows[:4]
        raise ConnectionError("the network is down")

    class Rows:
        def skip(self, position):
            assert position == 0
            return rows()

    source_rows = [{"id": f"f{n}", "title": "t", "severity": "low"} for n in range(8)]
    monkeypatch.setattr(source, "_rows", Rows)
    raws = list(source.raw_documents())
    assert read_source(source) == ([0, 1, 2], ["unreadable"])  # the incomplete chunk is lost
    assert raws[-1].position == 3
    assert parse(raws[-1]).quarantined[0].detail == "the network is down"


@pytest.mark.parametrize(
    ("query", "message"),
    [("?split=nothing", "no such data set or split"), ("?splits=train", "write hf://datasets/NAME")],
)
def test_a_wrong_spec_is_a_user_error(dataset, query, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(dataset + query)
    assert "\n" not in str(caught.value)


def test_a_spec_without_a_name_is_a_user_error():
    with pytest.raises(UserError, match="write hf://datasets/NAME"):
        open_source("hf://datasets/?split=train")

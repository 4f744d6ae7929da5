"""``synthesize`` with its options."""

import json

import pytest

from commands.synthesize import main
from datamodules.errors import UserError
from datamodules.synthetic import iter_documents


def run(*options):
    main(["synthesize", *map(str, options)])


def test_writes_a_folder_and_prints_the_command_that_trains_on_it(tmp_path, capsys):
    run("--findings", 250, "--output", tmp_path / "data", "--seed", 3, "--findings_per_shard", 100, "--plain")
    documents = [json.loads(path.read_text()) for path in sorted((tmp_path / "data").glob("batch_*.json"))]
    assert documents == list(iter_documents(250, 3, findings_per_shard=100))
    printed = capsys.readouterr().out
    correlations = sum(len(document["data"]["correlations"]) for document in documents)
    assert f"250 findings, {correlations} correlations, 3 shards" in printed
    assert f"""python main.py fit --data.init_args.sources='["{tmp_path}/data"]'""" in printed


def test_writes_an_archive_of_ground_truth(tmp_path, capsys):
    run("--findings", 30, "--output", tmp_path / "some.tar.gz", "--layout", "ground_truth")
    assert (tmp_path / "some.tar.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert "30 findings" in capsys.readouterr().out


def test_an_existing_output_is_kept_without_overwrite(tmp_path):
    folder, archive = tmp_path / "data", tmp_path / "some.tgz"
    for target in (folder, archive):
        run("--findings", 20, "--output", target, "--findings_per_shard", 5)
        with pytest.raises(UserError, match="--overwrite"):
            run("--findings", 5, "--output", target)
    (folder / "notes.txt").write_text("mine")
    run("--findings", 5, "--output", folder, "--overwrite")
    run("--findings", 5, "--output", archive, "--overwrite=true")
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch_001_20250919_081119.json", "generation_report.json", "notes.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--findings", 0, "--output", "x"), "--findings=0"),
        (("--findings", "many", "--output", "x"), "findings"),
        (("--output", "x"), "findings"),
        (("--findings", 5, "--output", "x", "--layout", "csv"), "--layout=csv"),
        (("--findings", 5, "--output", "x", "--sede", 1), "--sede"),
    ],
)
def test_a_user_error_is_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(*options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_output_of_the_wrong_kind_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.tgz").mkdir()
    for target, message in (("file", "this is a file"), ("folder.tgz", "this is a folder"), ("file/below", "--output")):
        with pytest.raises(UserError, match=message):
            run("--findings", 5, "--output", tmp_path / target)

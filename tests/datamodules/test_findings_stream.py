"""Batches of findings without Lightning: ranks and workers, resume, counters, errors, pairs."""

import gzip
import io
import shutil
import threading
import time

import pytest
import torch

from datamodules.errors import UserError
from datamodules.sources.byte_stream import ByteStream
from datamodules.sources.seek_index import SeekIndex
from datamodules.stream.batching import DataShard
from tests.helpers.findings_data import (
    all_row_ids,
    document,
    finding,
    row_ids,
    write_archive,
    write_folder,
    write_shard,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

# -------------------------------------------------------------------- ranks and workers


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_lose_and_repeat_no_example(make_data, ranks, workers):
    alone = make_data(batch_size=1)
    everything = all_row_ids(alone.train_batches())
    held_out = all_row_ids(alone.eval_batches("val"))
    assert len(set(everything)) == len(everything) == alone.counts["examples.risk"] > 50

    module = make_data(batch_size=2, num_workers=workers)
    trained, validated = [], []
    for rank in range(ranks):
        shard = DataShard(rank, ranks)
        trained.append(list(module.train_batches(shard=shard)))
        assert module.counts["examples.risk"] - module.counts["tail"] == len(everything) // (2 * ranks) * 2 * ranks
        validated.append(list(module.eval_batches("val", shard)))
    assert {len(batches) for batches in trained} == {len(everything) // (2 * ranks)}
    assert len({len(batches) for batches in validated}) == 1
    assert {batch.input_ids_BT.shape for batches in trained + validated for batch in batches} == {(2, 1024)}

    seen = [ids for batches in trained for ids in all_row_ids(batches)]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(everything)
    assert len(everything) - len(seen) == module.counts["tail"] < 2 * ranks
    seen = [ids for batches in validated for ids in all_row_ids(batches)]
    assert sorted(seen) == sorted(held_out)


def test_ranks_divide_one_global_sequence(make_data):
    alone = list(make_data().train_batches())
    ranks = [list(make_data().train_batches(shard=DataShard(rank, 3))) for rank in range(3)]
    merged = [ids for group in zip(*ranks, strict=True) for batch in group for ids in row_ids(batch)]
    # with groups of 3 rows, blocks carry other examples over, so only the first block has the same order
    first = sum(batch.cursor.start.index == 0 for batch in alone)
    assert merged[: first - 3] == all_row_ids(alone)[: first - 3]
    digests = [[batch.cursor.digest for batch in batches] for batches in ranks]
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("change", [{"num_workers": 2}, {"prefetch_batches": 0}, {"cache_dir": "cache"}])
def test_the_sequence_does_not_depend_on_workers_prefetch_and_cache(make_data, tmp_path, change):
    if "cache_dir" in change:
        change = {"cache_dir": str(tmp_path / change["cache_dir"])}
    options = {
        "packing": "shared_prefix",
        "task_weights": {"risk": 1.0, "triage": 1.0},
        "severity_balance": 0.7,
        "sequence_length": 4096,
    }
    expected, module = make_data(**options), make_data(**options, **change)
    for epoch in (0, 1, 1):
        for a, b in zip(expected.train_batches(epoch), module.train_batches(epoch), strict=True):
            assert torch.equal(a.input_ids_BT, b.input_ids_BT)
            assert torch.equal(a.labels_BT, b.labels_BT)
    assert all_row_ids(expected.eval_batches("test")) == all_row_ids(module.eval_batches("test"))


def test_epochs_hold_the_same_examples_in_another_order(make_data, tmp_path):
    archive = str(write_archive(tmp_path / "findings.tar.gz", [30, 20, 1, 40, 9]))
    for module in (make_data(), make_data(sources=[archive])):
        first, second, again = (all_row_ids(module.train_batches(epoch)) for epoch in (0, 1, 0))
        assert sorted(first) == sorted(second)
        assert first != second
        assert first == again
    assert sorted(all_row_ids(make_data().train_batches())) == sorted(first)


def test_the_first_batch_does_not_wait_for_the_end_of_the_archive(make_data, tmp_path, monkeypatch):
    read, plain = [], ByteStream.read
    monkeypatch.setattr(ByteStream, "read", lambda stream, size: read.append(stream.offset) or plain(stream, size))
    archive = write_archive(tmp_path / "findings.tar.gz", [100] * 30)
    module = make_data(sources=[str(archive)], prefetch_batches=0)
    batches = module.train_batches()
    next(batches)
    (source,) = module.document_processor.sources
    assert max(read) < len(gzip.decompress(archive.read_bytes())) / 4
    assert not source.index_path.exists()
    assert len(list(batches)) > 1000
    assert SeekIndex.load(source.index_path).complete  # in the user's cache, because cache_dir is not set


def test_another_seed_gives_another_order_and_split(make_data):
    assert all_row_ids(make_data(seed=1).train_batches()) != all_row_ids(make_data().train_batches())
    assert set(all_row_ids(make_data(seed=1).eval_batches("val"))) != set(all_row_ids(make_data().eval_batches("val")))


def test_the_order_is_that_of_earlier_versions(make_data):
    # fixed values: others mean that resumed runs and comparisons of digests over versions are wrong
    options = {"packing": "shared_prefix", "sequence_length": 4096, "task_weights": {"risk": 1.5, "triage": 0.5}}
    digests = [list(make_data(**options).train_batches(epoch))[-1].cursor.digest for epoch in (0, 1)]
    assert digests == ["cbf46ffd698f7a0881df598526404eee", "ae830bdf873bf92a3eaa5cedc64e3719"]


def test_splits_share_nothing(make_data):
    module = make_data()
    parts = [set(all_row_ids(module.train_batches()))] + [
        set(all_row_ids(module.eval_batches(s))) for s in ("val", "test")
    ]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 100


def test_validation_is_bounded_by_val_rows(make_data):
    module = make_data(val_rows=5, batch_size=2)
    batches = list(module.eval_batches("val"))
    assert [len(row_ids(batch)) for batch in batches] == [2, 2, 1]
    assert [batch.supervised for batch in batches] == [(b.labels_BT != -100).sum().item() for b in batches]
    assert all_row_ids(module.eval_batches("val")) == all_row_ids(batches)  # the second time from memory


# -------------------------------------------------------------------- resume


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("packing", ["none", "shared_prefix"])
@pytest.mark.parametrize("archive", [False, True])
def test_resuming_at_any_batch_is_exact(make_data, tmp_path, packing, archive):
    options = {
        "packing": packing,
        "batch_size": 2,
        "task_weights": {"risk": 1.5, "triage": 0.5},
        "severity_balance": 0.5,
    }
    options |= {"sequence_length": 4096}
    if archive:
        options["sources"] = [str(write_archive(tmp_path / "findings.tar.gz", [30, 20, 1, 40, 9]))]
    module = make_data(**options)
    expected, states = [], [module.state_dict()]
    for _ in range(2):
        for batch in module.train_dataloader():
            module.mark_consumed(batch)
            expected.append(batch)
            states.append(through_a_file(module.state_dict()))
    middle = sum(batch.cursor.start.epoch == 0 for batch in expected)  # of the two epochs
    for consumed in sorted({*range(0, len(expected), 11), 1, middle - 1, middle, middle + 1}):
        state = states[consumed]
        resumed = make_data(**options)
        resumed.load_state_dict(state)
        here = [batch for batch in resumed.train_dataloader() if not resumed.mark_consumed(batch)]
        here += list(resumed.train_dataloader())
        for a, b in zip(expected[consumed:], here, strict=False):
            assert torch.equal(a.input_ids_BT, b.input_ids_BT)
            assert a.cursor.digest == b.cursor.digest
        assert len(here) >= len(expected) - consumed


def test_resuming_on_more_or_fewer_ranks_loses_and_repeats_no_example(make_data):
    everything = all_row_ids(make_data().train_batches())
    for before, after in ((1, 3), (3, 2)):
        modules = [make_data() for _ in range(before)]
        consumed, states = [], []
        for rank, module in enumerate(modules):
            stream = module.train_batches(shard=DataShard(rank, before))
            for _ in range(7):
                batch = next(stream)
                module.mark_consumed(batch)
                consumed += row_ids(batch)
            stream.close()
            states.append(module.state_dict())
        assert len({state["digest"] for state in states}) == 1
        rest = []
        for rank in range(after):
            module = make_data(num_workers=rank)
            module.load_state_dict(states[0])
            rest += all_row_ids(module.train_batches(None, DataShard(rank, after)))
        assert len(set(consumed + rest)) == len(consumed + rest) == len(everything) - module.counts["tail"]
        assert set(consumed + rest) <= set(everything)


def test_a_changed_setting_is_named_when_resuming(make_data):
    state = make_data().state_dict()
    with pytest.warns(UserWarning, match="seed 0 -> 1"):
        make_data(seed=1).load_state_dict(state)


# -------------------------------------------------------------------- counters and errors


def test_duplicates_are_dropped_and_conflicts_follow_the_option(make_data, tmp_path):
    findings = [finding(n) for n in range(20)]
    findings += [finding(n, id=f"copy{n}") for n in range(5)]  # exact duplicates: ids and order aside
    findings += [
        finding(3, "critical", id="other", risk_score=91.0),
        finding(3, "critical", id="third", risk_score=99.0),
    ]
    sources = write_shard(tmp_path / "copies", findings)
    counts, texts = {}, {}
    for conflicts in ("keep", "drop", "merge"):
        module = make_data(sources=sources, conflicts=conflicts, val_fraction=0.0, test_fraction=0.0)
        batches = list(module.train_batches())
        counts[conflicts] = module.counts
        answers = [batch.labels_BT[batch.labels_BT != -100] for batch in batches]
        texts[conflicts] = [module.chat.decode(ids.tolist()[:-1]) for ids in answers]
    assert {name: len(text) for name, text in texts.items()} == {"keep": 22, "drop": 20, "merge": 20}
    assert [counts[name]["duplicates"] for name in texts] == [5, 5, 7]
    assert [counts[name]["conflicts"] for name in texts] == [2, 2, 0]
    assert counts["merge"]["merged"] == 4  # 80, its copy, 91 and 99: none had the median of 85.5
    assert sum('"risk_score":85.5' in text for text in texts["merge"]) == 1


def test_task_weights_select_other_examples_in_each_epoch_and_repeat(make_data):
    module = make_data(task_weights={"risk": 0.5})
    first, second = (set(all_row_ids(module.train_batches(epoch))) for epoch in (0, 1))
    everything = set(all_row_ids(make_data().train_batches()))
    assert 0.3 * len(everything) < len(first) < 0.7 * len(everything)
    assert first != second
    repeated = all_row_ids(make_data(task_weights={"risk": 2.0}).train_batches())
    assert sorted(repeated) == sorted([*everything, *everything])


def test_balance_evens_out_severities_within_a_block(make_data, tmp_path):
    findings = [finding(n, "info" if n % 8 else "critical") for n in range(400)]
    module = make_data(
        sources=write_shard(tmp_path / "skewed", findings),
        val_fraction=0.0,
        test_fraction=0.0,
        severity_balance=1.0,
        block_findings=400,
    )
    critical = sum('"critical"' in module.chat.decode(ids) for ids in all_row_ids(module.train_batches()))
    assert critical == 200
    module = make_data(
        sources=write_shard(tmp_path / "skewed", findings), val_fraction=0.0, test_fraction=0.0, block_findings=400
    )
    assert sum('"critical"' in module.chat.decode(ids) for ids in all_row_ids(module.train_batches())) == 50


def test_quarantine_is_written_as_it_streams_and_not_twice_after_a_resume(make_data, tmp_path):
    folder, path = tmp_path / "bad", tmp_path / "out" / "quarantine.jsonl"
    for part in range(3):
        findings = [finding(part * 40 + n) for n in range(40)]
        folder.mkdir(exist_ok=True)
        (folder / f"{part}.json").write_bytes(document([*findings, "no finding"]))
    module = make_data(sources=[str(folder)], quarantine_path=str(path), max_quarantine=0.05)
    stream, written = module.train_batches(), None
    for number, batch in enumerate(stream):
        module.mark_consumed(batch)
        if number == 30:
            state = module.state_dict()
    written = path.read_text()
    assert written.count("\n") == 3 == module.counts["quarantined"]
    assert '"source"' in written and '"reason"' in written and "no finding" in written
    resumed = make_data(sources=[str(folder)], quarantine_path=str(path), max_quarantine=0.05)
    resumed.load_state_dict(state)
    assert len(list(resumed.train_dataloader()))
    assert path.read_text() == written
    assert resumed.counts == module.counts


def test_too_much_in_quarantine_stops_with_the_reasons(make_data, tmp_path):
    sources = write_shard(tmp_path / "bad", [*(finding(n) for n in range(30)), *["no finding"] * 10])
    with pytest.raises(UserError, match=r"max_quarantine=0\.01: 10 of 40 .* used: \w+ \(10\)\. Fix: set data"):
        list(make_data(sources=sources).train_batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_user_are_on_one_line_with_a_fix(make_data, tmp_path, workers):
    module = make_data()
    prefix = len(module.chat.prefix_ids(module.tasks["risk"]))
    cases = [
        (r"sources=\[\]: no source", {"sources": []}),
        (r"sequence_length=40: not longer than the instruction of task risk \(\d+ tokens\)", {"sequence_length": 40}),
        (
            r"sequence_length=\d+: shorter than each of the first \d+ examples, .* \d+ to \d+ tokens",
            {"sequence_length": prefix + 9},
        ),
        (r"val_fraction=1e-09: leaves no val example", {"val_fraction": 1e-9}),
        (r"batch_size=500: \d+ training examples fill fewer than the 500 rows", {"batch_size": 500}),
        (r"risky", {"task_weights": {"risky": 1.0}}),
        (r"task_weights=.*: the weight of risk is negative", {"task_weights": {"risk": -1}}),
        (r"task_weights=.*: no example is used", {"task_weights": {"risk": 0.0}}),
        (r"severity_balance=2: outside 0\.\.1", {"severity_balance": 2}),
        (
            r"val_fraction=0\.6 and test_fraction=0\.4 leave nothing to train on",
            {"val_fraction": 0.6, "test_fraction": 0.4},
        ),
        (r"no training example of tasks \['correlation'\]", {"task_weights": {"correlation": 1.0}}),
    ]
    for message, change in cases:
        with pytest.raises(UserError, match=message) as caught:
            module = make_data(num_workers=workers, **change)
            list(module.train_batches())
            list(module.eval_batches("val"))
        assert "\n" not in str(caught.value)


def test_pairs_are_distinct_deterministic_and_balanced(make_data, tmp_path):
    findings = [finding(n, "info" if n % 10 else "critical") for n in range(200)] * 2
    module = make_data(sources=write_shard(tmp_path / "skewed", findings), val_fraction=0.4)
    pairs = module.pairs("val", "risk", 20)
    assert len({pair.content for pair in pairs}) == 20
    assert pairs == module.pairs("val", "risk", 20)
    balanced = module.pairs("val", "risk", 10, balanced=True)
    assert len(balanced) == 10
    assert sum(pair.severity == "critical" for pair in balanced) >= 2
    assert len(module.pairs("val", "risk", 1000)) < 200
    with pytest.raises(UserError, match="task 'summary' is missing"):
        module.pairs("val", "summary", 1)


def test_fingerprint_depends_on_data_and_settings(make_data, tmp_path):
    assert make_data().fingerprint() == make_data(num_workers=2, prefetch_batches=1).fingerprint()
    other = write_folder(tmp_path / "other", [3], start=1000)
    prints = {
        make_data(**change).fingerprint()
        for change in ({}, {"seed": 1}, {"packing": "packed"}, {"sources": [str(other)]})
    }
    assert len(prints) == 4


def test_leaving_early_stops_thread_and_processes(make_data):
    before = threading.active_count()
    stream = make_data(num_workers=2).train_batches()
    next(stream)
    assert threading.active_count() > before
    stream.close()
    deadline = time.monotonic() + 60  # on a busy machine a reading process ends late
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_source_that_vanishes_is_reported_by_the_consumer(make_data, tmp_path):
    folder = write_folder(tmp_path / "vanishing", [10, 10])
    module = make_data(sources=[str(folder)])
    shutil.rmtree(folder)
    with pytest.raises(UserError):
        list(module.train_batches())


def test_pairs_are_of_all_kinds_though_documents_are_sorted_by_category(make_data, tmp_path):
    module = make_data(sources=["synthetic://?findings=2000&seed=3"], cache_dir=str(tmp_path / "cache"))
    pairs = module.pairs("val", "risk", 60)
    assert len({pair.category for pair in pairs}) >= 8
    assert len({pair.severity for pair in pairs}) == 5

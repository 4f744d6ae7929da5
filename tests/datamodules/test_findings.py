"""The data module: ranks and workers, exact resume inside Lightning, errors, pairs."""

import gzip
import io
import shutil
import threading
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import FindingsDataModule
from datamodules.errors import UserError
from datamodules.sources.byte_stream import ByteStream
from datamodules.sources.seek_index import SeekIndex
from datamodules.stream.loading import DataShard
from tests.helpers.findings_data import document, finding, row_ids, write_archive, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:Consider setting `persistent")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, mistral_tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    mistral_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer, tmp_path):
    """Data modules of 100 findings in 5 shards of very different sizes."""
    folder = write_folder(tmp_path / "shards", [30, 20, 1, 40, 9])

    def build(**changes):
        options = {
            "sequence_length": 1024,
            "batch_size": 1,
            "packing": "none",
            "val_fraction": 0.2,
            "test_fraction": 0.1,
        }
        options |= {"num_workers": 0, "block_findings": 16, "sources": [str(folder)]} | changes
        module = FindingsDataModule(tokenizer=tokenizer, **options)
        module.setup("fit")
        return module

    return build


def examples(batches):
    return [ids for batch in batches for ids in row_ids(batch)]


# -------------------------------------------------------------------- ranks and workers


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_lose_and_double_nothing(make, ranks, workers):
    alone = make(batch_size=1)
    everything = examples(alone.train_batches())
    held_out = examples(alone.eval_batches("val"))
    assert len(set(everything)) == len(everything) == alone.counts["examples.risk"] > 50

    module = make(batch_size=2, num_workers=workers)
    trained, validated = [], []
    for rank in range(ranks):
        share = DataShard(rank, ranks)
        trained.append(list(module.train_batches(share=share)))
        assert module.counts["examples.risk"] - module.counts["tail"] == len(everything) // (2 * ranks) * 2 * ranks
        validated.append(list(module.eval_batches("val", share)))
    assert {len(batches) for batches in trained} == {len(everything) // (2 * ranks)}
    assert len({len(batches) for batches in validated}) == 1
    assert {batch.input_ids_BT.shape for batches in trained + validated for batch in batches} == {(2, 1024)}

    seen = [ids for batches in trained for ids in examples(batches)]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(everything)
    assert len(everything) - len(seen) == module.counts["tail"] < 2 * ranks
    seen = [ids for batches in validated for ids in examples(batches)]
    assert sorted(seen) == sorted(held_out)


def test_ranks_deal_one_global_sequence(make):
    alone = list(make().train_batches())
    ranks = [list(make().train_batches(share=DataShard(rank, 3))) for rank in range(3)]
    dealt = [ids for group in zip(*ranks, strict=True) for batch in group for ids in row_ids(batch)]
    # blocks pass other leftovers on where a group is of 3 rows, so only the first block's order is the same
    first = sum(batch.cursor.start.index == 0 for batch in alone)
    assert dealt[: first - 3] == examples(alone)[: first - 3]
    digests = [[batch.cursor.digest for batch in batches] for batches in ranks]
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("change", [{"num_workers": 2}, {"prefetch_batches": 0}, {"cache_dir": "cache"}])
def test_the_sequence_is_the_same_however_it_is_read(make, tmp_path, change):
    if "cache_dir" in change:
        change = {"cache_dir": str(tmp_path / change["cache_dir"])}
    options = {
        "packing": "shared_prefix",
        "task_weights": {"risk": 1.0, "triage": 1.0},
        "severity_balance": 0.7,
        "sequence_length": 4096,
    }
    expected, module = make(**options), make(**options, **change)
    for epoch in (0, 1, 1):
        for a, b in zip(expected.train_batches(epoch), module.train_batches(epoch), strict=True):
            assert torch.equal(a.input_ids_BT, b.input_ids_BT)
            assert torch.equal(a.labels_BT, b.labels_BT)
    assert examples(expected.eval_batches("test")) == examples(module.eval_batches("test"))


def test_epochs_hold_the_same_examples_in_another_order(make, tmp_path):
    archive = str(write_archive(tmp_path / "findings.tar.gz", [30, 20, 1, 40, 9]))
    for module in (make(), make(sources=[archive])):
        first, second, again = (examples(module.train_batches(epoch)) for epoch in (0, 1, 0))
        assert sorted(first) == sorted(second)
        assert first != second
        assert first == again
    assert sorted(examples(make().train_batches())) == sorted(first)


def test_the_first_batch_does_not_wait_for_the_archives_end(make, tmp_path, monkeypatch):
    read, plain = [], ByteStream.read
    monkeypatch.setattr(ByteStream, "read", lambda stream, size: read.append(stream.offset) or plain(stream, size))
    archive = write_archive(tmp_path / "findings.tar.gz", [100] * 30)
    module = make(sources=[str(archive)], prefetch_batches=0)
    batches = module.train_batches()
    next(batches)
    (source,) = module.document_processor.sources
    assert max(read) < len(gzip.decompress(archive.read_bytes())) / 4
    assert not source.index_path.exists()
    assert len(list(batches)) > 1000
    assert SeekIndex.load(source.index_path).complete  # in the user's cache, also where no cache_dir is set


def test_another_seed_another_order_and_split(make):
    assert examples(make(seed=1).train_batches()) != examples(make().train_batches())
    assert set(examples(make(seed=1).eval_batches("val"))) != set(examples(make().eval_batches("val")))


def test_splits_share_nothing(make):
    module = make()
    parts = [set(examples(module.train_batches()))] + [set(examples(module.eval_batches(s))) for s in ("val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 100


def test_validation_is_bounded_by_val_rows(make):
    module = make(val_rows=5, batch_size=2)
    batches = list(module.eval_batches("val"))
    assert [len(row_ids(batch)) for batch in batches] == [2, 2, 1]
    assert [batch.supervised for batch in batches] == [(b.labels_BT != -100).sum().item() for b in batches]
    assert examples(module.eval_batches("val")) == examples(batches)  # the second time from memory


# -------------------------------------------------------------------- resume


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("packing", ["none", "shared_prefix"])
@pytest.mark.parametrize("archive", [False, True])
def test_resuming_anywhere_goes_on_exactly(make, tmp_path, packing, archive):
    options = {
        "packing": packing,
        "batch_size": 2,
        "task_weights": {"risk": 1.5, "triage": 0.5},
        "severity_balance": 0.5,
    }
    options |= {"sequence_length": 4096}
    if archive:
        options["sources"] = [str(write_archive(tmp_path / "findings.tar.gz", [30, 20, 1, 40, 9]))]
    module = make(**options)
    expected, states = [], [module.state_dict()]
    for _ in range(2):
        for batch in module.train_dataloader():
            module.consumed(batch)
            expected.append(batch)
            states.append(through_a_file(module.state_dict()))
    middle = sum(batch.cursor.start.epoch == 0 for batch in expected)  # of the two epochs
    for consumed in sorted({*range(0, len(expected), 11), 1, middle - 1, middle, middle + 1}):
        state = states[consumed]
        resumed = make(**options)
        resumed.load_state_dict(state)
        here = [batch for batch in resumed.train_dataloader() if not resumed.consumed(batch)]
        here += list(resumed.train_dataloader())
        for a, b in zip(expected[consumed:], here, strict=False):
            assert torch.equal(a.input_ids_BT, b.input_ids_BT)
            assert a.cursor.digest == b.cursor.digest
        assert len(here) >= len(expected) - consumed


def test_resuming_on_more_or_fewer_ranks_loses_and_doubles_nothing(make):
    everything = examples(make().train_batches())
    for before, after in ((1, 3), (3, 2)):
        modules = [make() for _ in range(before)]
        consumed, states = [], []
        for rank, module in enumerate(modules):
            stream = module.train_batches(share=DataShard(rank, before))
            for _ in range(7):
                batch = next(stream)
                module.consumed(batch)
                consumed += row_ids(batch)
            stream.close()
            states.append(module.state_dict())
        assert len({state["digest"] for state in states}) == 1
        rest = []
        for rank in range(after):
            module = make(num_workers=rank)
            module.load_state_dict(states[0])
            rest += examples(module._epoch(module._cursor, DataShard(rank, after)))
        assert len(set(consumed + rest)) == len(consumed + rest) == len(everything) - module.counts["tail"]
        assert set(consumed + rest) <= set(everything)


class Tiny(LightningModule):
    """A bigram model; keeps the ids it was trained on."""

    def __init__(self, die_at=None, estimated=False):
        super().__init__()
        self.table = torch.nn.Embedding(262, 262)
        torch.nn.init.zeros_(self.table.weight)
        self.die_at, self.estimated, self.trained = die_at, estimated, []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.die_at:
            raise KeyError("killed")
        self.trained.append(row_ids(batch))
        loss = torch.nn.functional.cross_entropy(
            self.table(batch.input_ids_BT).flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
        )
        return loss / batch.supervised

    def validation_step(self, batch, batch_idx):
        self.log("val", float(batch.supervised), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches if self.estimated else 60
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, data, folder, ckpt_path=None, every=3, **options):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    options = {"max_steps": 24, "max_epochs": -1, "limit_val_batches": 0} | options
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


CASES = [
    {},
    {"estimated": True},
    {"accumulate_grad_batches": 3},
    {"limit_val_batches": 2, "val_check_interval": 4, "check_val_every_n_epoch": None},
    {"limit_val_batches": 2, "num_sanity_val_steps": 1},  # at each epoch's end
    {"limit_train_batches": 7},
    {"precision": "bf16-true"},
    {"archive": True},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(map(str, case)) or "plain")
def test_killed_twice_and_resumed_equals_uninterrupted(make, tmp_path, case):
    case = dict(case)
    estimated = case.pop("estimated", False)
    options = {"batch_size": 4}  # 17 steps an epoch
    if case.pop("archive", False):
        options["sources"] = [str(write_archive(tmp_path / "findings.tar.gz", [30, 20, 1, 40, 9]))]
    whole, data = Tiny(estimated=estimated), make(**options)
    fit(whole, data, tmp_path / "whole", **case)
    # the last step of an epoch is of the two batches that are left of 17
    assert len(whole.trained) == (4 * 17 if "accumulate_grad_batches" in case else 24)

    trained, checkpoint, weights = [], None, None
    for attempt, (die_after, workers) in enumerate([(11, 0), (10, 2), (None, 1)]):
        module, resumed = Tiny(die_after, estimated), make(**options, num_workers=workers)
        folder = tmp_path / str(attempt)
        if die_after:
            with pytest.raises(KeyError, match="killed"):
                fit(module, resumed, folder, checkpoint, **case)
            checkpoint = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
            loaded = torch.load(checkpoint, weights_only=True)
            done = loaded["FindingsDataModule"]["batches"]
            assert done == loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
            trained = (trained + module.trained)[:done]
        else:
            fit(module, resumed, folder, checkpoint, **case)
            trained += module.trained
            weights = module.table.weight
    assert trained == whole.trained
    assert torch.equal(weights, whole.table.weight)
    assert resumed.state_dict()["digest"] == data.state_dict()["digest"]
    assert resumed.state_dict()["epoch"] == data.state_dict()["epoch"] == len(whole.trained) // 17


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [16, 17, 18, 34])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_checkpoint_at_the_end_of_an_epoch_resumes_exactly(make, tmp_path, step, accumulate):
    options = {"batch_size": 4}
    case = {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": accumulate, "every": 1}
    whole = Tiny()
    fit(whole, make(**options), tmp_path / "whole", **case)
    assert len(whole.trained) == 3 * 17
    optimizer_step = -(-step // accumulate) if accumulate == 1 else {16: 4, 17: 5, 18: 6, 34: 10}[step]
    checkpoint = tmp_path / "whole" / f"step={optimizer_step}.ckpt"
    module, data = Tiny(), make(**options)
    fit(module, data, tmp_path / "resumed", checkpoint, **case)
    done = torch.load(checkpoint, weights_only=True)["FindingsDataModule"]["batches"]
    assert module.trained == whole.trained[done:]
    assert torch.equal(module.table.weight, whole.table.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_was_interrupted_is_not_consumed(make, tmp_path):
    module, data = Tiny(die_at=5), make(batch_size=4)
    with pytest.raises(KeyError):
        fit(module, data, tmp_path)
    assert data.state_dict()["batches"] == 5


@pytest.mark.filterwarnings("ignore")
def test_a_new_fit_begins_anew(make, tmp_path):
    data, runs = make(batch_size=4), []
    for run in range(2):
        module = Tiny()
        fit(module, data, tmp_path / str(run), max_steps=5)
        runs.append(module.trained)
    assert runs[0] == runs[1]


def test_a_changed_setting_is_named_when_resuming(make):
    state = make().state_dict()
    with pytest.warns(UserWarning, match="seed 0 -> 1"):
        make(seed=1).load_state_dict(state)


# -------------------------------------------------------------------- what is counted, and when it stops


def write(folder, findings):
    folder.mkdir(exist_ok=True)
    (folder / "shard.json").write_bytes(document(findings))
    return [str(folder)]


def test_duplicates_are_dropped_and_conflicts_follow_the_option(make, tmp_path):
    findings = [finding(n) for n in range(20)]
    findings += [finding(n, id=f"copy{n}") for n in range(5)]  # exact duplicates: ids and order aside
    findings += [
        finding(3, "critical", id="other", risk_score=91.0),
        finding(3, "critical", id="third", risk_score=99.0),
    ]
    sources = write(tmp_path / "copies", findings)
    counts, texts = {}, {}
    for conflicts in ("keep", "drop", "merge"):
        module = make(sources=sources, conflicts=conflicts, val_fraction=0.0, test_fraction=0.0)
        batches = list(module.train_batches())
        counts[conflicts] = module.counts
        answers = [batch.labels_BT[batch.labels_BT != -100] for batch in batches]
        texts[conflicts] = [module.chat.decode(ids.tolist()[:-1]) for ids in answers]
    assert {name: len(text) for name, text in texts.items()} == {"keep": 22, "drop": 20, "merge": 20}
    assert [counts[name]["duplicates"] for name in texts] == [5, 5, 7]
    assert [counts[name]["conflicts"] for name in texts] == [2, 2, 0]
    assert counts["merge"]["merged"] == 4  # 80, its copy, 91 and 99: nobody had the median of 85.5
    assert sum('"risk_score":85.5' in text for text in texts["merge"]) == 1


def test_task_shares_draw_other_examples_in_each_epoch_and_repeat(make):
    module = make(task_weights={"risk": 0.5})
    first, second = (set(examples(module.train_batches(epoch))) for epoch in (0, 1))
    everything = set(examples(make().train_batches()))
    assert 0.3 * len(everything) < len(first) < 0.7 * len(everything)
    assert first != second
    repeated = examples(make(task_weights={"risk": 2.0}).train_batches())
    assert sorted(repeated) == sorted([*everything, *everything])


def test_balance_evens_out_severities_within_a_block(make, tmp_path):
    findings = [finding(n, "info" if n % 8 else "critical") for n in range(400)]
    module = make(
        sources=write(tmp_path / "skewed", findings),
        val_fraction=0.0,
        test_fraction=0.0,
        severity_balance=1.0,
        block_findings=400,
    )
    critical = sum('"critical"' in module.chat.decode(ids) for ids in examples(module.train_batches()))
    assert critical == 200
    module = make(sources=write(tmp_path / "skewed", findings), val_fraction=0.0, test_fraction=0.0, block_findings=400)
    assert sum('"critical"' in module.chat.decode(ids) for ids in examples(module.train_batches())) == 50


def test_quarantine_is_written_as_it_streams_and_not_twice_after_a_resume(make, tmp_path):
    folder, path = tmp_path / "bad", tmp_path / "out" / "quarantine.jsonl"
    for part in range(3):
        findings = [finding(part * 40 + n) for n in range(40)]
        folder.mkdir(exist_ok=True)
        (folder / f"{part}.json").write_bytes(document([*findings, "no finding"]))
    module = make(sources=[str(folder)], quarantine_path=str(path), max_quarantine=0.05)
    stream, written = module.train_batches(), None
    for number, batch in enumerate(stream):
        module.consumed(batch)
        if number == 30:
            state = module.state_dict()
    written = path.read_text()
    assert written.count("\n") == 3 == module.counts["quarantined"]
    assert '"source"' in written and '"reason"' in written and "no finding" in written
    resumed = make(sources=[str(folder)], quarantine_path=str(path), max_quarantine=0.05)
    resumed.load_state_dict(state)
    assert len(list(resumed.train_dataloader()))
    assert path.read_text() == written
    assert resumed.counts == module.counts


def test_the_end_of_a_fit_says_what_was_read_and_left_out(make, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("datamodules.findings.rank_zero_info", said.append)
    module = make()
    fit(Tiny(), module, tmp_path, max_steps=3)
    assert len(said) == 1
    assert f"records {module.counts['records']}; " in said[0]
    assert "examples risk" in said[0]


def test_too_much_in_quarantine_stops_with_the_reasons(make, tmp_path):
    sources = write(tmp_path / "bad", [*(finding(n) for n in range(30)), *["no finding"] * 10])
    with pytest.raises(UserError, match=r"max_quarantine: 0\.01: 10 of 40 records can't be used: \w+ \(10\); set data"):
        list(make(sources=sources).train_batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_user_can_mend_is_said_in_one_line(make, tmp_path, workers):
    module = make()
    prefix = len(module.chat.prefix_ids(module.tasks["risk"]))
    cases = [
        (r"sources: none given", {"sources": []}),
        (r"sequence_length: 40 is less than the instruction of task risk alone, \d+ tokens", {"sequence_length": 40}),
        (
            r"sequence_length: \d+ is less than each of the first \d+ examples, .* \d+ to \d+ tokens",
            {"sequence_length": prefix + 9},
        ),
        (r"val_fraction: 1e-09 leaves no val example", {"val_fraction": 1e-9}),
        (r"batch_size: \d+ training examples make less than the 500 rows", {"batch_size": 500}),
        (r"risky", {"task_weights": {"risky": 1.0}}),
        (r"task_weights: the share of risk is -1", {"task_weights": {"risk": -1}}),
        (r"task_weights: .* uses no example", {"task_weights": {"risk": 0.0}}),
        (r"severity_balance: 2 is not in 0..1", {"severity_balance": 2}),
        (r"val_fraction=0.6 and test_fraction=0.4 must be shares", {"val_fraction": 0.6, "test_fraction": 0.4}),
        (r"hold no training example of tasks \['correlation'\]", {"task_weights": {"correlation": 1.0}}),
    ]
    for message, change in cases:
        with pytest.raises(UserError, match=message) as caught:
            module = make(num_workers=workers, **change)
            list(module.train_batches())
            list(module.eval_batches("val"))
        assert "\n" not in str(caught.value)


def test_pairs_are_distinct_deterministic_and_balanced(make, tmp_path):
    findings = [finding(n, "info" if n % 10 else "critical") for n in range(200)] * 2
    module = make(sources=write(tmp_path / "skewed", findings), val_fraction=0.4)
    pairs = module.pairs("val", "risk", 20)
    assert len({pair.content for pair in pairs}) == 20
    assert pairs == module.pairs("val", "risk", 20)
    balanced = module.pairs("val", "risk", 10, balanced=True)
    assert len(balanced) == 10
    assert sum(pair.severity == "critical" for pair in balanced) >= 2
    assert len(module.pairs("val", "risk", 1000)) < 200
    with pytest.raises(UserError, match="'summary' is none of"):
        module.pairs("val", "summary", 1)


def test_fingerprint_follows_data_and_settings(make, tmp_path):
    assert make().fingerprint() == make(num_workers=2, prefetch_batches=1).fingerprint()
    other = write_folder(tmp_path / "other", [3], start=1000)
    prints = {
        make(**change).fingerprint() for change in ({}, {"seed": 1}, {"packing": "packed"}, {"sources": [str(other)]})
    }
    assert len(prints) == 4


def test_construction_reads_nothing(tmp_path):
    module = FindingsDataModule([str(tmp_path / "absent")], str(tmp_path / "no-tokenizer"))
    with pytest.raises(UserError, match="absent"):
        module.setup("fit")


def test_leaving_early_stops_thread_and_processes(make):
    before = threading.active_count()
    stream = make(num_workers=2).train_batches()
    next(stream)
    assert threading.active_count() > before
    stream.close()
    deadline = time.monotonic() + 60  # on a busy machine a reading process takes its time to end
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_source_that_vanishes_is_reported_by_the_consumer(make, tmp_path):
    folder = write_folder(tmp_path / "vanishing", [10, 10])
    module = make(sources=[str(folder)])
    shutil.rmtree(folder)
    with pytest.raises(UserError):
        list(module.train_batches())


def test_pairs_are_of_all_kinds_though_documents_are_sorted_by_category(make, tmp_path):
    module = make(sources=["synthetic://?findings=2000&seed=3"], cache_dir=str(tmp_path / "cache"))
    pairs = module.pairs("val", "risk", 60)
    assert len({pair.category for pair in pairs}) >= 8
    assert len({pair.severity for pair in pairs}) == 5

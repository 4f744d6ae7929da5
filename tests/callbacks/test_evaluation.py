"""Evaluation in a real Trainer with a tiny model: table, file, resuming, validate, and what it must not touch."""

import json
import math
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from callbacks.evaluation import Evaluation
from callbacks.reporting.figures import pictures
from callbacks.reporting.tables import comparison, markdown
from callbacks.task_progress import TaskProgress
from datamodules.errors import UserError
from datamodules.tasks import RiskTask, SummaryTask
from datamodules.tasks.base import Pair, compact_json
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.evaluation.evaluate import PredictionResult, answer_pairs, differences, score, token_limit

BASELINES = ["majority class", "title look-up", "boosted trees"]


@pytest.fixture(autouse=True)
def free_only(monkeypatch):
    """Answers held to a grammar are asked for where they are tested: a tiny model writes long ones."""
    monkeypatch.setattr("callbacks.evaluation.find_spec", lambda name: None)


def short_task():
    """The risk task behind a short instruction: a byte is a token here."""
    task = RiskTask()
    task.system, task.instruction = "", "Rate.\n"
    return task


SEVERITY_ONLY = {
    "type": "object",
    "properties": {"severity": {"type": "string", "enum": ["info", "low", "medium", "high"]}},
    "required": ["severity"],
    "additionalProperties": False,
}


def make_pair(index):
    severity = ("info", "low", "high")[index % 3]
    content = compact_json({"title": "t" + "abc"[index % 3], "category": "network", "n": index})
    answer = compact_json({"severity": severity, "risk_score": 10 * (index % 3)})
    return Pair("risk", content, answer, severity, "network", 1)


PAIRS = {"val": [make_pair(i) for i in range(7)], "test": [make_pair(i) for i in range(50, 54)]}
PAIRS["train"] = [make_pair(i) for i in range(100, 130)]


class Data(LightningDataModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.chat, self.tasks, self.asked = ChatFormat(tokenizer), {"risk": short_task()}, []

    def pairs(self, split, task, limit, *, balanced=False):
        self.asked.append((split, task, limit, balanced))
        return PAIRS[split][:limit]

    def loader(self, split):
        examples = self.chat.encode(self.tasks["risk"], PAIRS[split])
        rows = [torch.tensor([[*e.prompt_ids.tolist(), *e.completion_ids.tolist()]]) for e in examples]
        return torch.utils.data.DataLoader(rows, batch_size=None)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


class Module(LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.model = folder, None

    def configure_model(self):
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_trainer(folder, callback, steps=0, logger=False, ranks=1, **options):
    callback.console = Console(file=StringIO(), width=160)
    return Trainer(
        max_steps=steps, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=logger,
        default_root_dir=folder, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=1, **options,
    )  # fmt: skip


def read(folder, name="evaluation.json"):
    return json.loads((folder / name).read_text())["tasks"]["risk"]


def test_fit_compares_before_and_after_with_baselines(tmp_path, tiny_llama, chatml_tokenizer):
    callback, data, module = Evaluation(num_samples=5, batch_size=2), Data(chatml_tokenizer), Module(tiny_llama)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(tmp_path, callback, 20, logger).fit(module, datamodule=data)
    result = read(tmp_path)
    columns = result["columns"]
    assert list(columns) == ["untuned", "tuned", *BASELINES]
    assert result["n"] == 5
    assert columns["tuned"]["figures"]["loss"] < 0.8 * columns["untuned"]["figures"]["loss"]
    assert columns["untuned"]["figures"]["schema_valid"] == 0
    assert columns["title look-up"]["figures"]["severity_accuracy"] == 1  # the toy severity follows from the title
    assert columns["majority class"]["figures"]["severity_accuracy"] == pytest.approx(2 / 5)
    assert "loss" not in columns["majority class"]["figures"]
    low, high = columns["tuned"]["intervals"]["severity_accuracy"]
    assert 0 <= low <= columns["tuned"]["figures"]["severity_accuracy"] <= high <= 1
    assert [q["content"] for q in result["questions"]] == [pair.content for pair in PAIRS["val"][:5]]
    printed = callback.console.file.getvalue()
    for text in ("5 held-out pairs", "untuned", "title look-up", "severity accuracy", "95 % intervals", "expected"):
        assert text in printed
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Scalars("evaluation_risk/schema_valid")) == 2
    assert events.Tags()["tensors"] == ["evaluation_risk/samples/text_summary"]
    assert "evaluation_risk/confusion" in events.Tags()["images"]
    assert columns["tuned"]["about"] == {"step": 20}
    groups = columns["title look-up"]["groups"]
    assert {name: part["answers"] for name, part in groups["severity"].items()} == {"info": 2, "low": 2, "high": 1}
    assert groups["category"]["network"]["severity_accuracy"] == 1
    assert result["severity_told_in"] == ["network"]
    assert columns["title look-up"]["figures"]["told_severity_accuracy"] == 1


def test_loss_is_that_of_a_plain_forward_pass(tiny_llama, chatml_tokenizer):
    data, module = Data(chatml_tokenizer), Module(tiny_llama)
    module.configure_model()
    task, pairs = data.tasks["risk"], PAIRS["val"]
    outcomes = answer_pairs(module.model, data.chat, task, pairs, max_new_tokens=2, batch_size=3, forced=True)
    total = count = 0
    for example in data.chat.encode(task, pairs):
        ids = torch.tensor([[*example.prompt_ids.tolist(), *example.completion_ids.tolist()]])
        labels = ids.clone()
        labels[:, : len(example.prompt_ids)] = -100
        with torch.no_grad():
            total += module.model(input_ids=ids, labels=labels).loss.item() * len(example.completion_ids)
        count += len(example.completion_ids)
    scores = score(task, pairs, outcomes)
    assert scores.figures["loss"] == pytest.approx(total / count, rel=1e-5)
    low, high = scores.intervals["loss"]
    assert low <= scores.figures["loss"] <= high
    assert all(outcome.forced in ("info", "low", "medium", "high", "critical") for outcome in outcomes)
    assert scores.figures["complete"] == 0


def test_token_limit_has_room_for_the_longest_expected_answer(chatml_tokenizer):
    data = Data(chatml_tokenizer)
    longest = max(len(pair.completion) for pair in PAIRS["val"]) + 1  # bytes, and the end
    assert token_limit(data.chat, data.tasks["risk"], PAIRS["val"]) == longest * 3 // 2 + 16


def test_training_is_what_it_is_without_evaluation(tmp_path, tiny_llama, chatml_tokenizer):
    """Neither weights nor random states notice; a module in evaluation mode stays so."""
    weights = []
    for name, extra in (("with", Evaluation(num_samples=2, every_n_validations=1)), ("without", None)):
        torch.manual_seed(0)
        random.seed(0)
        data, module = Data(chatml_tokenizer), Module(tiny_llama)
        module.configure_model()
        module.model.lm_head.eval()
        modes = [m.training for m in module.modules()]
        trainer = make_trainer(
            tmp_path / name, extra or Evaluation(evaluate_untuned=False, num_samples=1), 3, val_check_interval=2
        )
        if extra is None:
            trainer.callbacks.clear()
        trainer.fit(module, datamodule=data)
        assert extra is None or [m.training for m in module.modules()] == modes
        weights.append((module.state_dict(), torch.rand(1), random.random()))
    assert all(torch.equal(weights[0][0][key], weights[1][0][key]) for key in weights[0][0])
    assert weights[0][1:] == weights[1][1:]
    assert read(tmp_path / "with")["columns"]["tuned"]["seconds"] > 0


def test_resumed_fit_remembers_the_untuned_model(tmp_path, tiny_llama, chatml_tokenizer):
    data, module = Data(chatml_tokenizer), Module(tiny_llama)
    trainer = make_trainer(tmp_path, Evaluation(num_samples=3), 1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = read(tmp_path)["columns"]["untuned"]
    module = Module(tiny_llama)
    make_trainer(tmp_path, Evaluation(num_samples=3), 2).fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert read(tmp_path)["columns"]["untuned"] == before
    make_trainer(tmp_path, Evaluation(num_samples=4), 3).fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert list(read(tmp_path)["columns"]) == ["tuned", *BASELINES]  # other questions


@pytest.mark.parametrize(("command", "split", "n"), [("validate", "val", 7), ("test", "test", 4)])
def test_validate_and_test_measure_the_loaded_model_once(
    tmp_path, tiny_llama, chatml_tokenizer, command, split, n, capsys
):
    data, module, callback = Data(chatml_tokenizer), Module(tiny_llama), Evaluation()
    getattr(make_trainer(tmp_path, callback), command)(module, datamodule=data)
    result = read(tmp_path, f"evaluation_{split}.json")
    assert list(result["columns"]) == ["this model", *BASELINES]
    assert (result["n"], result["split"]) == (n, split)
    assert "this model" in callback.console.file.getvalue()


def test_best_checkpoint_is_measured_and_the_last_weights_stay(tmp_path, tiny_llama, chatml_tokenizer, monkeypatch):
    """Trained with a rate that spoils it after the first validation: the best weights are the first ones."""
    data, module, seen = Data(chatml_tokenizer), Module(tiny_llama), []
    monkeypatch.setattr(module, "validation_step", lambda *arguments: module.log("val/loss", float(module.global_step)))
    callback = Evaluation(num_samples=2, evaluate_untuned=False, max_new_tokens=4)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    trainer = make_trainer(tmp_path, callback, 4, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.callbacks.append(best)
    measure = callback._measure

    def spy(trainer, module, *arguments, **options):
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
        measure(trainer, module, *arguments, **options)

    monkeypatch.setattr(callback, "_measure", spy)
    trainer.fit(module, datamodule=data)
    assert read(tmp_path)["columns"]["tuned"]["about"] == {"step": 2, "checkpoint": "best.ckpt"}
    assert "best step 2" in callback.console.file.getvalue()
    stored = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in seen[0].items())
    assert not all(torch.equal(p, stored[name]) for name, p in module.named_parameters())


def test_forced_choice_is_logged_after_each_validation(tmp_path, tiny_llama, chatml_tokenizer):
    data, module, callback = (
        Data(chatml_tokenizer),
        Module(tiny_llama),
        Evaluation(num_samples=4, evaluate_untuned=False),
    )
    callback.forced_choice, callback.max_new_tokens = True, 2
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(tmp_path, callback, 4, logger, val_check_interval=2, check_val_every_n_epoch=None).fit(
        module, datamodule=data
    )
    logged = EventAccumulator(str(tmp_path)).Reload().Scalars("evaluation_risk/forced_severity_accuracy")
    assert [event.step for event in logged] == [2, 4, 4]  # each validation, and the table's at the end
    assert logged[1].value == pytest.approx(logged[2].value)


def test_constrained_answers_stand_beside_the_free_ones(tmp_path, tiny_llama, chatml_tokenizer):
    pytest.importorskip("llguidance")
    data, module = Data(chatml_tokenizer), Module(tiny_llama)
    data.tasks["risk"].answer_schema = SEVERITY_ONLY
    callback = Evaluation(num_samples=3, constrained=True, max_new_tokens=40, max_preamble_tokens=9)
    make_trainer(tmp_path, callback).validate(module, datamodule=data)
    columns = read(tmp_path, "evaluation_val.json")["columns"]
    assert list(columns) == ["this model", "this model, constrained", *BASELINES]
    free, held = (columns[name] for name in ("this model", "this model, constrained"))
    assert (free["figures"]["schema_valid"], held["figures"]["schema_valid"]) == (0, 1)
    assert held["figures"]["complete"] == 1
    assert "loss" not in held["figures"]
    assert all(len(outcome["text"]) <= 9 for outcome in free["outcomes"])  # given up: no brace in nine bytes
    assert "this model, constrained" in callback.console.file.getvalue()


def test_two_processes_measure_what_one_does(tmp_path, tiny_llama, chatml_tokenizer):
    """Lightning starts two ranks of a script, which talk by gloo; metrics updated on each are those of all answers."""
    script = Path(__file__).parents[1] / "helpers/evaluation_on_ranks.py"
    results = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        command = [sys.executable, str(script), str(folder), str(tiny_llama), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append((read(folder, "evaluation_val.json"), json.loads((folder / "metrics.json").read_text())))
    (alone, one), (together, two) = results
    assert two == pytest.approx(one, nan_ok=True)
    assert [o["text"] for o in together["columns"]["this model"]["outcomes"]] == [
        o["text"] for o in alone["columns"]["this model"]["outcomes"]
    ]
    figures = [
        {name: -1 if value is None else value for name, value in run["columns"]["this model"]["figures"].items()}
        for run in (alone, together)
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_pictures_are_drawn_of_what_there_is():
    pairs = [replace(make_pair(i), category=f"c{i % 2}") for i in range(6)]
    answers = [compact_json(json.loads(p.completion) | {"probability_actionable": 0.3}) for p in pairs]
    pairs = [replace(p, completion=a) for p, a in zip(pairs, answers, strict=True)]
    drawn = pictures(score(RiskTask(), pairs, [PredictionResult(answer) for answer in answers]))
    assert list(drawn) == ["confusion", "calibration", "error_by_category"]
    axes = drawn["confusion"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["2", "2", "2"]
    assert pictures(score(RiskTask(), pairs[:1], [PredictionResult("")])).keys() == {"confusion"}
    assert not pictures(score(SummaryTask(), [], []))


def test_interrupted_fit_is_not_measured(tmp_path, tiny_llama, chatml_tokenizer):
    callback = Evaluation(evaluate_untuned=False, num_samples=2)
    callback._exams = [object()]
    callback.on_train_end(SimpleNamespace(interrupted=True), None)  # would fail on the object
    make_trainer(tmp_path, Evaluation(), 1, fast_dev_run=True).fit(
        Module(tiny_llama), datamodule=Data(chatml_tokenizer)
    )
    assert not (tmp_path / "evaluation.json").exists()


def test_each_rank_answers_its_share_and_sees_all(monkeypatch, tmp_path, tiny_llama, chatml_tokenizer):
    """Three ranks one after the other: the last to come receives what the others have sent."""
    data, module, sent, columns = Data(chatml_tokenizer), Module(tiny_llama), {}, []
    module.configure_model()
    monkeypatch.setattr(Evaluation, "_log", lambda *arguments: None)
    for ranks, rank in ((1, 0), (3, 0), (3, 1), (3, 2)):

        def exchange(everybody, mine, rank=rank, ranks=ranks):
            sent[rank] = mine
            everybody[:] = [
                sent.get(other, [PredictionResult("")] * len(PAIRS["val"][other::ranks])) for other in range(ranks)
            ]

        monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)
        callback = Evaluation(num_samples=7, max_new_tokens=5)
        trainer = SimpleNamespace(
            world_size=ranks, global_rank=rank, is_global_zero=False, datamodule=data,
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )  # fmt: skip
        callback._exams = callback._questions(trainer, "val")
        callback._measure(trainer, module, "tuned", {})
        columns.append(callback._exams[0].columns["tuned"])
    alone, together = columns[0], columns[-1]
    assert [len(sent[rank]) for rank in range(3)] == [3, 2, 2]
    assert [outcome.text for outcome in together.outcomes] == [outcome.text for outcome in alone.outcomes]
    assert together.figures["loss"] == pytest.approx(alone.figures["loss"], rel=1e-5)


def test_unknown_task_and_empty_split_are_the_users_to_mend(tmp_path, tiny_llama, chatml_tokenizer, monkeypatch):
    data, module = Data(chatml_tokenizer), Module(tiny_llama)
    with pytest.raises(UserError, match="'poetry' is none of risk"):
        make_trainer(tmp_path, Evaluation(tasks=["poetry"])).validate(module, datamodule=data)
    monkeypatch.setitem(PAIRS, "val", PAIRS["val"][:0])
    monkeypatch.setattr(data, "val_dataloader", data.train_dataloader)
    with pytest.raises(UserError, match="val split holds no pair of risk"):
        make_trainer(tmp_path, Evaluation()).validate(module, datamodule=data)
    with pytest.raises(UserError, match="data module"):
        make_trainer(tmp_path, Evaluation()).validate(module, dataloaders=data.loader("train"))
    with pytest.raises(ValueError, match="num_samples 0"):
        Evaluation(num_samples=0)


def test_differences_and_escaped_markdown():
    pair = make_pair(1)
    assert differences(pair.completion, '{"risk_score":10,"severity":"high"}') == {"severity": ("low", "high")}
    assert set(differences(pair.completion, "nonsense")) == {"severity", "risk_score"}
    hostile = Pair("risk", '{"title":"<script>|x"}', pair.completion, "low", "network", 1)
    scores = score(RiskTask(), [hostile], [PredictionResult("a|b\n<b>", nll=1.0, tokens=2)])
    table = markdown([hostile], {"tuned": scores})
    assert "<" not in table
    assert all(line.count("|") == 5 for line in table.splitlines())


def test_table_writes_what_could_not_be_measured_as_a_dash():
    pairs = [make_pair(0), make_pair(1)]
    half = score(
        RiskTask(),
        pairs,
        [PredictionResult(pairs[0].completion, nll=2.0, tokens=4), PredictionResult("", nll=6.0, tokens=4)],
    )
    none = score(RiskTask(), pairs, [PredictionResult(""), PredictionResult("")])
    assert half.figures["loss"] == 1.0
    assert math.isnan(none.figures["risk_error"])
    console = Console(file=StringIO(), width=100)
    console.print(comparison("title", {"half": half, "none": none}))
    rows = {line.split("  ")[0].strip("│┃ "): line for line in console.file.getvalue().splitlines()}
    assert "0.0 on 50%" in rows["risk error (points of 100)"]
    assert rows["risk error (points of 100)"].rstrip("│ ").endswith("-")
    assert "50%" in rows["severity accuracy"]
    assert "0.00..0.00" not in console.file.getvalue()  # nothing right is not certainty


def test_gauge_writes_lines_with_time_left_where_there_is_no_terminal():
    console = Console(file=StringIO(), width=80)
    with TaskProgress("work", console, log_interval_seconds=0) as gauge:
        gauge(0.25)
        gauge(1.0)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "work ..."
    assert lines[1].startswith("work 25%")
    assert lines[1].endswith("left")
    assert len(lines) == 4
    with TaskProgress("silent", None) as gauge:
        gauge(0.5)


def test_gauge_is_a_bar_on_a_terminal_even_beside_another():
    console = Console(file=StringIO(), width=80, force_terminal=True)
    with TaskProgress("outer", console) as outer, TaskProgress("inner", console) as inner:
        inner(0.5)
        outer(0.5)
    assert "inner" in console.file.getvalue()

"""Tests of Evaluation in a Trainer with a tiny model: table, file, resume, validate, and side effects."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import Evaluation
from datamodules.errors import UserError
from tests.helpers.tiny_evaluation import (
    PAIRS,
    EvaluationData,
    EvaluationModule,
    make_evaluation_trainer,
    read_risk_record,
)

BASELINES = ["majority class", "title look-up", "boosted trees"]
SEVERITY_SCHEMA = {
    "type": "object",
    "properties": {"severity": {"type": "string", "enum": ["info", "low", "medium", "high"]}},
    "required": ["severity"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def unconstrained_only(monkeypatch):
    """Hides llguidance: constrained answers of a tiny model are long, so only the tests of them generate any."""
    monkeypatch.setattr("callbacks.task_evaluator.find_spec", lambda name: None)


def test_fit_compares_untuned_and_tuned_model_with_baselines(tmp_path, tiny_llama, chatml_tokenizer):
    callback = Evaluation(num_samples=5, batch_size=2)
    data, module = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_evaluation_trainer(tmp_path, callback, 20, logger).fit(module, datamodule=data)
    result = read_risk_record(tmp_path)
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
    assert result["input_determined_categories"] == ["network"]
    assert columns["title look-up"]["figures"]["input_determined_severity_accuracy"] == 1


def test_training_is_the_same_without_evaluation(tmp_path, tiny_llama, chatml_tokenizer):
    """Evaluation changes neither weights nor random states, and a submodule in evaluation mode stays in it."""
    weights = []
    for name, extra in (("with", Evaluation(num_samples=2, every_n_validations=1)), ("without", None)):
        torch.manual_seed(0)
        random.seed(0)
        data, module = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama)
        module.configure_model()
        module.model.lm_head.eval()
        modes = [m.training for m in module.modules()]
        callback = extra or Evaluation(evaluate_untuned=False, num_samples=1)
        trainer = make_evaluation_trainer(tmp_path / name, callback, 3, val_check_interval=2)
        if extra is None:
            trainer.callbacks.clear()
        trainer.fit(module, datamodule=data)
        assert extra is None or [m.training for m in module.modules()] == modes
        weights.append((module.state_dict(), torch.rand(1), random.random()))
    assert all(torch.equal(weights[0][0][key], weights[1][0][key]) for key in weights[0][0])
    assert weights[0][1:] == weights[1][1:]
    assert read_risk_record(tmp_path / "with")["columns"]["tuned"]["seconds"] > 0


def test_resumed_fit_restores_the_column_of_the_untuned_model(tmp_path, tiny_llama, chatml_tokenizer):
    data, last = EvaluationData(chatml_tokenizer), tmp_path / "last.ckpt"
    trainer = make_evaluation_trainer(tmp_path, Evaluation(num_samples=3), 1)
    trainer.fit(EvaluationModule(tiny_llama), datamodule=data)
    trainer.save_checkpoint(last)
    before = read_risk_record(tmp_path)["columns"]["untuned"]
    module = EvaluationModule(tiny_llama)
    make_evaluation_trainer(tmp_path, Evaluation(num_samples=3), 2).fit(module, datamodule=data, ckpt_path=last)
    assert read_risk_record(tmp_path)["columns"]["untuned"] == before
    make_evaluation_trainer(tmp_path, Evaluation(num_samples=4), 3).fit(module, datamodule=data, ckpt_path=last)
    assert list(read_risk_record(tmp_path)["columns"]) == ["tuned", *BASELINES]  # the questions are others


@pytest.mark.parametrize(("command", "split", "n"), [("validate", "val", 7), ("test", "test", 4)])
def test_validate_and_test_measure_the_loaded_model_once(tmp_path, tiny_llama, chatml_tokenizer, command, split, n):
    data, module, callback = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama), Evaluation()
    getattr(make_evaluation_trainer(tmp_path, callback), command)(module, datamodule=data)
    result = read_risk_record(tmp_path, f"evaluation_{split}.json")
    assert list(result["columns"]) == ["this model", *BASELINES]
    assert (result["n"], result["split"]) == (n, split)
    assert "this model" in callback.console.file.getvalue()


def test_questions_are_requested_with_the_callbacks_arguments(tmp_path, tiny_llama, chatml_tokenizer):
    data = EvaluationData(chatml_tokenizer)
    callback = Evaluation(num_samples=2, baseline_train_size=9, balanced=True, max_new_tokens=2)
    make_evaluation_trainer(tmp_path, callback).validate(EvaluationModule(tiny_llama), datamodule=data)
    assert data.requests == [("val", "risk", 2, True), ("train", "risk", 9, False)]
    assert "balanced over severity" in callback.console.file.getvalue()


def test_best_checkpoint_is_measured_and_the_last_weights_are_kept(tmp_path, tiny_llama, chatml_tokenizer, monkeypatch):
    """The logged loss increases with each validation, so the weights of the first validation are the best."""
    data, module, seen = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama), []
    monkeypatch.setattr(module, "validation_step", lambda *arguments: module.log("val/loss", float(module.global_step)))
    callback = Evaluation(num_samples=2, evaluate_untuned=False, max_new_tokens=4)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    trainer = make_evaluation_trainer(tmp_path, callback, 4, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.callbacks.append(best)
    measure = callback._measure

    def spy(trainer, module, *arguments, **options):
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
        measure(trainer, module, *arguments, **options)

    monkeypatch.setattr(callback, "_measure", spy)
    trainer.fit(module, datamodule=data)
    assert read_risk_record(tmp_path)["columns"]["tuned"]["about"] == {"step": 2, "checkpoint": "best.ckpt"}
    assert "best step 2" in callback.console.file.getvalue()
    stored = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in seen[0].items())
    assert not all(torch.equal(p, stored[name]) for name, p in module.named_parameters())


def test_forced_choice_is_logged_after_each_validation(tmp_path, tiny_llama, chatml_tokenizer):
    data, module = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama)
    callback = Evaluation(num_samples=4, evaluate_untuned=False, forced_choice=True, max_new_tokens=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    make_evaluation_trainer(tmp_path, callback, 4, logger, **options).fit(module, datamodule=data)
    logged = EventAccumulator(str(tmp_path)).Reload().Scalars("evaluation_risk/forced_severity_accuracy")
    assert [event.step for event in logged] == [2, 4, 4]  # each validation, and the final table
    assert logged[1].value == pytest.approx(logged[2].value)


def test_constrained_answers_have_their_own_column(tmp_path, tiny_llama, chatml_tokenizer):
    pytest.importorskip("llguidance")
    data, module = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama)
    data.tasks["risk"].answer_schema = SEVERITY_SCHEMA
    callback = Evaluation(num_samples=3, constrained=True, max_new_tokens=40, max_preamble_tokens=9)
    make_evaluation_trainer(tmp_path, callback).validate(module, datamodule=data)
    columns = read_risk_record(tmp_path, "evaluation_val.json")["columns"]
    assert list(columns) == ["this model", "this model, constrained", *BASELINES]
    free, constrained = (columns[name] for name in ("this model", "this model, constrained"))
    assert (free["figures"]["schema_valid"], constrained["figures"]["schema_valid"]) == (0, 1)
    assert constrained["figures"]["complete"] == 1
    assert "loss" not in constrained["figures"]
    assert all(len(outcome["text"]) <= 9 for outcome in free["outcomes"])  # ended: no brace in the first nine bytes
    assert "this model, constrained" in callback.console.file.getvalue()


def test_two_processes_measure_the_same_as_one(tmp_path, tiny_llama):
    """Lightning starts two ranks of a script, connected by gloo. Metrics updated on each rank are those of all."""
    script = Path(__file__).parents[1] / "helpers/evaluation_on_ranks.py"
    results = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        command = [sys.executable, str(script), str(folder), str(tiny_llama), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        record = read_risk_record(folder, "evaluation_val.json")
        results.append((record["columns"]["this model"], json.loads((folder / "metrics.json").read_text())))
    (one_process, metrics_of_one), (two_processes, metrics_of_two) = results
    assert metrics_of_two == pytest.approx(metrics_of_one, nan_ok=True)
    texts = [[outcome["text"] for outcome in column["outcomes"]] for column in (one_process, two_processes)]
    assert texts[1] == texts[0]
    figures = [
        {name: -1 if value is None else value for name, value in column["figures"].items()}
        for column in (one_process, two_processes)
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_interrupted_and_trial_fits_are_not_measured(tmp_path, tiny_llama, chatml_tokenizer):
    callback = Evaluation(evaluate_untuned=False, num_samples=2)
    callback._results = [object()]
    callback.on_train_end(SimpleNamespace(interrupted=True), None)  # a measurement would fail on the object
    make_evaluation_trainer(tmp_path, Evaluation(), 1, fast_dev_run=True).fit(
        EvaluationModule(tiny_llama), datamodule=EvaluationData(chatml_tokenizer)
    )
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "baseline_train_size", "max_new_tokens"])
def test_an_argument_below_one_is_an_error(name):
    with pytest.raises(ValueError, match=f"callbacks.Evaluation: {name}=0: must be at least 1"):
        Evaluation(**{name: 0})


def test_validate_without_the_data_module_is_a_user_error(tmp_path, tiny_llama, chatml_tokenizer):
    data, module = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama)
    with pytest.raises(UserError, match="data module has no pairs"):
        make_evaluation_trainer(tmp_path, Evaluation()).validate(module, dataloaders=data.loader("train"))


def test_validate_prints_the_step_of_the_checkpoint(tmp_path, tiny_llama, chatml_tokenizer):
    data, module = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama)
    trainer = make_evaluation_trainer(tmp_path, Evaluation(num_samples=2), 3)
    trainer.fit(module, datamodule=data)
    for name in ("best.ckpt", "last.ckpt"):
        trainer.save_checkpoint(tmp_path / name)
        callback, logger = Evaluation(num_samples=2), TensorBoardLogger(tmp_path / name[:4], name="", version="")
        evaluating = make_evaluation_trainer(tmp_path, callback, logger=logger)
        evaluating.validate(module, datamodule=data, ckpt_path=tmp_path / name, weights_only=True)
        assert f"{name[:4]} step 3" in callback.console.file.getvalue()
        events = EventAccumulator(str(tmp_path / name[:4])).Reload()
        assert [event.step for event in events.Scalars("evaluation_risk/schema_valid")] == [3]
    assert json.loads((tmp_path / "last" / "evaluation_val.json").read_text())["step"] == 3
    assert read_risk_record(tmp_path / "last", "evaluation_val.json")["columns"]["this model"]["about"]["step"] == 3


def test_validate_of_the_untuned_model_prints_no_step(tmp_path, tiny_llama, chatml_tokenizer):
    data, module, callback = EvaluationData(chatml_tokenizer), EvaluationModule(tiny_llama), Evaluation(num_samples=2)
    make_evaluation_trainer(tmp_path, callback).validate(module, datamodule=data)
    printed = callback.console.file.getvalue()
    assert "untuned" in printed and "step 0" not in printed

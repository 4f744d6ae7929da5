"""Tests of the measurement of a model on tasks: questions, loss, shares of the ranks, forced choice."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from callbacks.task_evaluator import TaskEvaluator, gather_predictions, load_questions
from datamodules.errors import UserError
from datamodules.tasks import SummaryTask
from lightning_modules.evaluation.evaluate import PredictionResult, answer_pairs, score_predictions
from lightning_modules.generation.encoded_pairs import EncodedPairs
from tests.helpers.tiny_evaluation import PAIRS, EvaluationData, EvaluationModule

SAMPLING = {"tasks": None, "num_samples": 7, "balanced": False, "baseline_train_size": 30}
EVALUATOR = TaskEvaluator(
    max_new_tokens=5, batch_size=3, forced_choice=False, constrained=False, max_preamble_tokens=None
)


def fake_trainer(data, rank=0, ranks=1):
    precision = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(
        world_size=ranks, global_rank=rank, is_global_zero=False, datamodule=data, precision_plugin=precision
    )


@pytest.fixture
def data(chatml_tokenizer):
    return EvaluationData(chatml_tokenizer)


@pytest.fixture
def module(tiny_llama):
    module = EvaluationModule(tiny_llama)
    module.configure_model()
    return module


def exchange(sent, rank, ranks):
    """Returns an ``all_gather_object`` that receives the messages of the ranks that were simulated before."""

    def all_gather_object(of_ranks, own):
        sent[rank] = own
        missing = [[PredictionResult("")] * len(PAIRS["val"][other::ranks]) for other in range(ranks)]
        of_ranks[:] = [sent.get(other, missing[other]) for other in range(ranks)]

    return all_gather_object


def test_loss_is_that_of_a_plain_forward_pass(data, module):
    task, pairs = data.tasks["risk"], PAIRS["val"]
    encoded = EncodedPairs.encode(data.chat, task, pairs)
    outcomes = answer_pairs(module.model, encoded, max_new_tokens=2, batch_size=3, forced=True)
    total = count = 0
    for example in data.chat.encode(task, pairs):
        ids = torch.tensor([[*example.prompt_ids.tolist(), *example.completion_ids.tolist()]])
        labels = ids.clone()
        labels[:, : len(example.prompt_ids)] = -100
        with torch.no_grad():
            total += module.model(input_ids=ids, labels=labels).loss.item() * len(example.completion_ids)
        count += len(example.completion_ids)
    scores = score_predictions(task, pairs, outcomes)
    assert scores.figures["loss"] == pytest.approx(total / count, rel=1e-5)
    low, high = scores.intervals["loss"]
    assert low <= scores.figures["loss"] <= high
    assert all(outcome.forced in ("info", "low", "medium", "high", "critical") for outcome in outcomes)
    assert scores.figures["complete"] == 0


def test_each_rank_answers_its_share_and_receives_all(monkeypatch, data, module):
    """Three ranks are simulated one after the other; the last one receives the predictions of all."""
    sent, columns = {}, []
    for ranks, rank in ((1, 0), (3, 0), (3, 1), (3, 2)):
        monkeypatch.setattr(torch.distributed, "all_gather_object", exchange(sent, rank, ranks))
        questions = load_questions(data, "val", **SAMPLING)
        (results,) = EVALUATOR.evaluate(fake_trainer(data, rank, ranks), module, questions, "tuned", {"step": 3})
        columns.append(results.columns["tuned"])
        assert results.about["tuned"] == {"step": 3}
        assert results.seconds["tuned"] >= 0
    one_rank, three_ranks = columns[0], columns[-1]
    assert [len(sent[rank]) for rank in range(3)] == [3, 2, 2]
    assert [outcome.text for outcome in three_ranks.outcomes] == [outcome.text for outcome in one_rank.outcomes]
    assert three_ranks.figures["loss"] == pytest.approx(one_rank.figures["loss"], rel=1e-5)


def test_forced_choice_accuracy_is_that_of_all_ranks(monkeypatch, data, module):
    sent, accuracies = {}, []
    for ranks, rank in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setattr(torch.distributed, "all_gather_object", exchange(sent, rank, ranks))
        (results,) = load_questions(data, "val", **SAMPLING)
        accuracies.append(EVALUATOR.forced_choice_accuracy(fake_trainer(data, rank, ranks), module, results))
    encoded = EncodedPairs.encode(data.chat, data.tasks["risk"], PAIRS["val"])
    outcomes = answer_pairs(module.model, encoded, max_new_tokens=2, batch_size=3, forced=True)
    expected = score_predictions(data.tasks["risk"], PAIRS["val"], outcomes).figures["forced_severity_accuracy"]
    assert accuracies[0] == pytest.approx(expected)
    assert accuracies[2] == pytest.approx(expected)


def test_results_are_yielded_before_the_next_task_starts(data, module):
    first, second = (load_questions(data, "val", **SAMPLING | {"num_samples": n})[0] for n in (1, 2))
    evaluation = EVALUATOR.evaluate(fake_trainer(data), module, [first, second], "tuned", {})
    assert next(evaluation) is first
    assert "tuned" in first.columns
    assert "tuned" not in second.columns
    assert next(evaluation) is second


def test_gathered_predictions_are_in_the_order_of_the_questions(monkeypatch):
    def all_gather_object(of_ranks, own):
        of_ranks[:] = [[PredictionResult(text) for text in texts] for texts in ("ad", "be", "c")]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert [item.text for item in gather_predictions([], 2, 3)] == list("abcde")


def test_a_missing_task_or_pair_is_a_user_error(data, monkeypatch):
    with pytest.raises(UserError, match=r"tasks='poetry': must be one of risk\. Fix: "):
        load_questions(data, "val", **SAMPLING | {"tasks": ["poetry"]})
    monkeypatch.setitem(PAIRS, "val", [])
    with pytest.raises(UserError, match=r"val split has no pair of risk\. Fix: raise data\.val_fraction"):
        load_questions(data, "val", **SAMPLING)
    with pytest.raises(UserError, match="data module has no pairs"):
        load_questions(None, "val", **SAMPLING)


def test_a_later_task_without_pairs_is_skipped_unless_it_was_requested(data, monkeypatch):
    data.tasks["summary"] = SummaryTask()
    pairs = data.pairs
    monkeypatch.setattr(
        data, "pairs", lambda split, task, *a, **k: pairs(split, task, *a, **k) if task == "risk" else []
    )
    with pytest.warns(UserWarning, match="skipping task summary"):
        assert [results.task.name for results in load_questions(data, "val", **SAMPLING)] == ["risk"]
    with pytest.raises(UserError, match="no pair of summary"):
        load_questions(data, "val", **SAMPLING | {"tasks": ["risk", "summary"]})


def test_a_baseline_without_its_package_is_skipped(data, monkeypatch):
    def unavailable(pairs):
        raise UserError("scikit-learn is not installed")

    unavailable.name = "boosted trees"
    monkeypatch.setattr("callbacks.task_evaluator.BASELINES", (unavailable,))
    with pytest.warns(UserWarning, match="skipping a baseline: scikit-learn is not installed"):
        (results,) = load_questions(data, "val", **SAMPLING)
    assert results.baselines == []

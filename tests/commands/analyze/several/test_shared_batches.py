"""Analyses share batches: same answers, the batches in the order of the reports, no thread left after an error."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from commands.analyze.several.shared_batches import run_together

RISK, SUMMARY = SimpleNamespace(name="risk"), SimpleNamespace(name="summary")


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Model:
    """Answers with its input, and records batches; ``fail`` maps the number of a batch to an error."""

    def __init__(self, **fail):
        self.batches, self.fail, self.threads = [], fail, set()

    def __call__(self, questions, progress):
        self.threads.add(threading.current_thread())
        self.batches.append([text for _, text in questions])
        if error := self.fail.get(f"batch{len(self.batches)}"):
            raise error
        progress(1.0)
        return [f"{task.name}({text})" for task, text in questions]


@contextmanager
def silent(names, count):
    yield lambda share: None


def analysis(name, *counts):
    """Returns an analysis that asks ``counts`` questions, one batch after the other."""

    def run(ask):
        answers = []
        for stage, count in enumerate(counts):
            task = SUMMARY if stage else RISK
            answers.append(ask([(task, f"{name}{stage}{n}") for n in range(count)], lambda share: None))
        return name, answers

    return run


def test_each_analysis_gets_its_own_answers_in_shared_batches():
    model = Model()
    results = run_together([analysis("a", 2, 1), analysis("b", 1), analysis("c", 1, 0, 2)], model, silent)
    assert results == [
        ("a", [["risk(a00)", "risk(a01)"], ["summary(a10)"]]),
        ("b", [["risk(b00)"]]),
        ("c", [["risk(c00)"], [], ["summary(c20)", "summary(c21)"]]),
    ]
    assert model.batches == [["a00", "a01", "b00", "c00"], ["a10"], ["c20", "c21"]]
    assert model.threads == {threading.current_thread()}


def test_analyses_without_questions_and_no_analyses():
    model = Model()
    assert run_together([analysis("a")], model, silent) == [("a", [])]
    assert run_together([], model, silent) == []
    assert model.batches == []


def test_the_display_is_opened_for_each_shared_batch():
    opened = []

    @contextmanager
    def show(names, count):
        opened.append((names, count))
        yield opened.append

    run_together([analysis("a", 1, 1), analysis("b", 2)], Model(), show)
    assert opened == [("risk", 3), 1.0, ("summary", 1), 1.0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("out of memory")])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_error_of_the_model_ends_all_threads(error, batch):
    model = Model(**{f"batch{batch}": error})
    with pytest.raises(type(error)):
        run_together([analysis("a", 1, 1), analysis("b", 1, 1), analysis("c", 1)], model, silent)
    assert len(model.batches) == batch


def test_an_error_of_one_analysis_is_raised():
    def broken(ask):
        ask([(RISK, "x")], lambda share: None)
        raise ZeroDivisionError

    model = Model()
    with pytest.raises(ZeroDivisionError):
        run_together([analysis("a", 1, 1), broken], model, silent)
    assert model.batches == [["a00", "x"]]

"""Reference questions come from the run's evaluation if it has enough, else from the held-out data."""

import json

import pytest
import yaml

from commands.export.reference_pairs import reference_pairs
from commands.model_source import open_trained_model
from datamodules.errors import UserError
from tests.helpers.trained_run import make_run, write_evaluation


@pytest.fixture
def run(tmp_path, tiny_llama, chatml_tokenizer):
    return make_run(tmp_path / "version_0", tiny_llama, chatml_tokenizer, tasks=("risk",))


def pairs_of(run, count, task="risk"):
    return reference_pairs(open_trained_model(str(run), "--run"), task, count)


def change_data(run, **arguments):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"] |= arguments
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_questions_of_the_evaluation_are_used_in_their_order(run):
    write_evaluation(run)
    questions = json.loads((run / "evaluation.json").read_text())["tasks"]["risk"]["questions"]
    pairs, origin = pairs_of(run, 3)
    assert origin == "evaluation.json (val)"
    assert [pair.content for pair in pairs] == [question["content"] for question in questions[:3]]
    assert [pair.severity for pair in pairs] == ["low", "high", "info"]


def test_with_too_few_evaluated_questions_the_data_are_read(run):
    write_evaluation(run)
    pairs, origin = pairs_of(run, 5)
    assert (len(pairs), origin) == (5, "data (val)")


def test_the_test_split_is_used_if_nothing_is_held_out_for_validation(run):
    change_data(run, val_fraction=0.0)
    assert pairs_of(run, 3)[1] == "data (test)"


def test_no_questions_are_needed_for_no_measurement(run):
    assert pairs_of(run, 0) == ([], "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": ["gone.tar.gz"]}, "can't be read .*Fix: give --num_reference 0"),
        ({"val_fraction": 0.0, "test_fraction": 0.0}, "split test of the run's data has no pair of task risk"),
        ({"no_such_argument": 1}, "can't be read"),
    ],
)
def test_data_without_a_question_are_an_error(run, arguments, message):
    change_data(run, **arguments)
    with pytest.raises(UserError, match=message):
        pairs_of(run, 3)


def test_the_fix_is_the_number_of_evaluated_questions(run):
    write_evaluation(run)
    change_data(run, sources=["gone.tar.gz"])
    with pytest.raises(UserError, match="Fix: give --num_reference 4"):
        pairs_of(run, 5)

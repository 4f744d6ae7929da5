"""Merging of config files and of the command line, and the errors of jsonargparse that it avoids."""

import json

import pytest
import yaml

from commands.config_merge import compose, merge
from datamodules.errors import UserError

LION = {"optimizer": {"class_path": "optimizers.Lion", "init_args": {"lr": 1e-4, "betas": [0.9, 0.99]}}}
ADAMW = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.999]}}}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content))
    return str(path)


def merged(args):
    assert args[0] == "--config"
    return yaml.safe_load(args[1])


def test_a_later_class_gets_no_argument_of_the_earlier_one():
    bare = {"optimizer": {"class_path": "optimizers.Lion", "init_args": {"lr": 1e-4}}}
    assert merge(ADAMW, bare) == bare


def test_arguments_of_one_class_are_merged():
    update = {"optimizer": {"class_path": "optimizers.Lion", "init_args": {"lr": 3e-5}}}
    assert merge(LION, update)["optimizer"]["init_args"] == {"lr": 3e-5, "betas": [0.9, 0.99]}
    assert merge(LION, {"optimizer": {"init_args": {"lr": 2e-5}}})["optimizer"]["init_args"]["betas"] == [0.9, 0.99]


def test_plus_appends_to_a_list():
    assert merge({"callbacks": [1]}, {"callbacks+": [2]}) == {"callbacks": [1, 2]}


FORMS = [
    ["--model.optimizer=torch.optim.AdamW"],
    ["--model.optimizer", "AdamW"],
    ["--model.optimizer.class_path", "torch.optim.AdamW"],
]


@pytest.mark.parametrize("form", FORMS)
def test_another_class_on_the_command_line_removes_the_arguments_of_the_file(tmp_path, form):
    args = compose(["--config", write(tmp_path, "a.yaml", {"model": LION}), *form])
    assert "init_args" not in merged(args)["model"]["optimizer"]
    assert args[2:] == form


def test_the_word_init_args_may_be_left_out(tmp_path):
    model = {"class_path": "Module", "init_args": LION}
    args = compose(["--config", write(tmp_path, "a.yaml", {"model": model}), "--model.optimizer=torch.optim.AdamW"])
    assert merged(args)["model"]["init_args"] == {"optimizer": {"class_path": "torch.optim.AdamW"}}


@pytest.mark.parametrize("form", [["--{}=null"], ["--{}", "null"], ["--{}=~"]])
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.init_args.lora.num_top_layers", {"lora": {"rank": 4, "num_top_layers": None}, **LION}),
        ("model.lora.num_top_layers", {"lora": {"rank": 4, "num_top_layers": None}, **LION}),
        ("model.init_args.lora", {"lora": None, **LION}),
        ("model.init_args.optimizer", {"lora": {"rank": 4, "num_top_layers": 3}, "optimizer": None}),
        ("model.init_args.adapter.name", {"lora": {"rank": 4, "num_top_layers": 3}, **LION, "adapter": {"name": None}}),
    ],
)
def test_null_on_the_command_line_is_null(tmp_path, form, key, expected):
    content = {"model": {"class_path": "Module", "init_args": {"lora": {"rank": 4, "num_top_layers": 3}, **LION}}}
    words = [word.format(key) for word in form]
    args = compose(["--config", write(tmp_path, "a.yaml", content), "--print_config", *words, "--seed", "1"])
    assert merged(args)["model"]["init_args"] == expected
    assert args[2:] == ["--print_config", "--seed", "1"]


def test_null_for_an_argument_of_a_plain_value_is_an_error(tmp_path):
    content = {"trainer": {"logger": False}}
    with pytest.raises(UserError, match=r"trainer\.logger is False, which has no save_dir"):
        compose(["--config", write(tmp_path, "a.yaml", content), "--trainer.logger.save_dir=null"])


def test_a_strategy_may_be_given_by_its_class_path(tmp_path):
    file = write(tmp_path, "a.yaml", {"trainer": {"strategy": "ddp"}})
    args = compose(["--config", file, "--trainer.strategy=lightning_modules.strategies.FSDP2Strategy"])
    assert args[2:] == ["--trainer.strategy.class_path=lightning_modules.strategies.FSDP2Strategy"]
    assert compose(["--config", file, "--trainer.strategy=ddp_spawn"])[2:] == ["--trainer.strategy=ddp_spawn"]


def test_the_same_class_on_the_command_line_keeps_the_arguments_of_the_file(tmp_path):
    args = compose(["--config", write(tmp_path, "a.yaml", LION), "--optimizer=optimizers.Lion"])
    assert merged(args)["optimizer"]["init_args"]["betas"] == [0.9, 0.99]


def test_the_default_is_used_only_without_a_config(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("a: 1\nb: 2\n")
    assert merged(compose([], default)) == {"a": 1, "b": 2}
    assert merged(compose(["-c", write(tmp_path, "mine.yaml", {"a": 3})], default)) == {"a": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("- 1\n", "expected a mapping"), ("a: [1\n", "not valid YAML")],
)
def test_an_invalid_file_is_a_user_error_on_one_line(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        compose(["--config", str(path)])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="needs a file"):
        compose(["--config"])


CSV, BOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
LOGGER = {"trainer": {"logger": {"class_path": CSV, "init_args": {"save_dir": "runs", "name": "x"}}}}


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (json.dumps({"class_path": BOARD, "init_args": {"name": "y"}}), {"logger": {"class_path": BOARD}}),
        (f"{{class_path: {CSV}, init_args: {{name: y}}}}", LOGGER["trainer"]),
        ("{name: y}", LOGGER["trainer"]),
        (f"[{{class_path: {CSV}}}, {{class_path: {BOARD}}}]", {}),
        (BOARD, {"logger": {"class_path": BOARD}}),
        ("false", {}),
        ("no_class", {}),
    ],
)
def test_each_form_of_a_class_is_accepted(tmp_path, value, left):
    args = compose(["--config", write(tmp_path, "a.yaml", LOGGER), f"--trainer.logger={value}"])
    assert merged(args)["trainer"] == left
    assert args[2:] == [f"--trainer.logger={value}"]


def test_a_yaml_file_is_not_a_class_path(tmp_path):
    file = write(tmp_path, "logger.yaml", {"class_path": BOARD})
    args = compose(["--config", write(tmp_path, "a.yaml", LOGGER), f"--trainer.logger={file}"])
    assert merged(args)["trainer"] == {}


def test_one_task_weight_is_added_to_those_of_the_file(tmp_path, capsys):
    content = {"data": {"class_path": "Data", "init_args": {"task_weights": {"risk": 1.0}, "seed": 0}}}
    file = write(tmp_path, "a.yaml", content)
    for key in ("data.init_args.task_weights.triage", "data.task_weights.triage"):
        args = compose(["--config", file, f"--{key}=2", "--data.init_args.seed=1"])
        assert merged(args)["data"]["init_args"]["task_weights"] == {"risk": 1.0, "triage": 2}
        assert args[2:] == ["--data.init_args.seed=1"]
        assert capsys.readouterr().err == f"--{key}=2: task_weights is now {{'risk': 1.0, 'triage': 2}}\n"
    args = compose(["--config", file, "--data.init_args.task_weights={triage: 2}"])  # the whole mapping
    assert args[2:] == ["--data.init_args.task_weights={triage: 2}"]


def test_one_task_weight_is_added_to_the_default_of_the_class(tmp_path):
    file = write(tmp_path, "a.yaml", {"data": {"class_path": "Data", "init_args": {"seed": 0}}})
    args = compose(["--config", file, "--data.init_args.task_weights.triage=2"])
    assert merged(args)["data"]["init_args"] == {"seed": 0, "task_weights": {"risk": 1.0, "triage": 2}}
    args = compose(["--config", write(tmp_path, "b.yaml", {"seed": 0}), "--task_weights.triage=2"])  # not the data's
    assert args[2:] == ["--task_weights.triage=2"]

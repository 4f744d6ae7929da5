"""A config or a run of somebody else runs no code and writes to no place that the user did not choose."""

import shlex
import shutil
import sys

import pytest
import yaml

from commands.config_merge import DEFAULT_CONFIG, compose
from commands.config_safety import fill_secrets, secret_variable, split_allowed_classes, without_init_args
from datamodules.errors import UserError
from main import main
from tests.helpers.findings_data import finding, write_shard

MODULE = "planted_code"
CLASS = f"{MODULE}.Planted"
SOURCE = """
from pathlib import Path
Path({proof!r}).write_text("imported")
import torch
from lightning.pytorch.callbacks import Callback
class Planted(Callback):
    pass
class Optimizer(torch.optim.SGD):
    pass
def function(*args):
    Path({proof!r}).write_text("called")
"""


@pytest.fixture
def proof(tmp_path):
    return tmp_path / "proof"


@pytest.fixture(params=["working directory", "run folder"])
def foreign_run(request, tmp_path, proof, monkeypatch, tiny_llama):
    """A run of somebody else, with a module in its folder or in the working directory, both on Python's path."""
    run = tmp_path / "unpacked" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    work = tmp_path / "work"
    work.mkdir()
    (run / "run.json").write_text("{}")
    folder = work if request.param == "working directory" else run
    (folder / f"{MODULE}.py").write_text(SOURCE.format(proof=str(proof)))
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    sources = write_shard(tmp_path / "data", [finding(number) for number in range(60)])
    content = yaml.safe_load(DEFAULT_CONFIG.read_text())
    content["model"]["init_args"]["backbone"]["model_name_or_path"] = str(tiny_llama)
    content["data"]["init_args"] |= {"sources": sources, "val_fraction": 0.2, "sequence_length": 2048}
    content["trainer"]["callbacks"] = []
    return run, content


def write(run, content):
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    return str(run / "config.yaml")


def lambda_callback(path):
    return {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": path}}


def set_callbacks(*callbacks):
    return lambda content: content["trainer"].update(callbacks=list(callbacks))


def set_optimizer(value):
    return lambda content: content["model"]["init_args"].update(optimizer=value)


OPTIMIZER = f"{MODULE}.Optimizer"
CHANGES = {
    "callback": set_callbacks({"class_path": CLASS}),
    "callback by name": set_callbacks(CLASS),
    "callable": set_callbacks(lambda_callback(f"{MODULE}.function")),
    "callable of an allowed module": set_callbacks(lambda_callback("callbacks.run_record.os.abort")),
    "function of torch": set_callbacks(lambda_callback("torch.hub.load")),
    "optimizer": set_optimizer({"class_path": OPTIMIZER, "init_args": {"lr": 0.1}}),
    "optimizer as text": set_optimizer(OPTIMIZER),
    "optimizer as YAML": set_optimizer(f"{{class_path: {OPTIMIZER}, init_args: {{lr: 0.1}}}}"),
    "escaped YAML": set_optimizer('{"class_p\\x61th": "pl\\x61nted_code.Optimizer", "init_args": {"lr": 0.1}}'),
    "model": lambda content: content.update(model={"class_path": CLASS}),
    "data": lambda content: content.update(data={"class_path": CLASS}),
    "logger": lambda content: content["trainer"].update(logger={"class_path": CLASS}),
    "strategy": lambda content: content["trainer"].update(strategy=CLASS),
    "any": lambda content: content["data"]["init_args"].update(storage_options={"a": {"class_path": CLASS}}),
}
COMMANDS = {
    "fit": ["fit"], "print_config": ["fit", "--print_config"], "validate": ["validate"], "test": ["test"],
    "inspect": ["inspect", "--near_duplicates=0"], "cache-teacher": ["cache-teacher"],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_code_that_a_run_names_does_not_run(foreign_run, proof, change, capfd):
    run, content = foreign_run
    change(content)
    config = write(run, content)
    for command, *options in COMMANDS.values():
        assert main([command, "--config", config, *options]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert "Fix: if you trust it, add --allow_class" in error
        assert not proof.exists()
    assert MODULE not in sys.modules


@pytest.mark.parametrize("name", ["optimizer.yaml", "data.txt"])
def test_a_further_file_that_a_config_names_is_checked_too(foreign_run, proof, name, capfd, tmp_path):
    run, content = foreign_run
    (tmp_path / "work" / name).write_text(yaml.safe_dump({"class_path": OPTIMIZER, "init_args": {"lr": 0.1}}))
    set_optimizer(name)(content)
    assert main(["fit", "--config", write(run, content)]) == 2
    assert f"--config {name}: class_path={OPTIMIZER}" in capfd.readouterr().err
    assert not proof.exists()


@pytest.mark.parametrize("option", ["-c{}", "-c={}", "--config={}"])
def test_every_form_of_the_option_is_checked(foreign_run, proof, option, capfd):
    run, content = foreign_run
    CHANGES["callback"](content)
    assert main(["fit", option.format(write(run, content))]) == 2
    assert f"--allow_class {CLASS}" in capfd.readouterr().err
    assert not proof.exists()


def test_a_file_for_a_part_of_the_config_is_checked(foreign_run, proof, capfd, tmp_path):
    file = tmp_path / "optimizer.yaml"
    file.write_text(yaml.safe_dump({"class_path": OPTIMIZER, "init_args": {"lr": 0.1}}))
    assert main(["fit", f"--model.init_args.optimizer={file}"]) == 2
    assert f"class_path={OPTIMIZER}: this class or function is not on the list" in capfd.readouterr().err
    assert not proof.exists()


def test_analyze_and_export_import_nothing_of_a_run(foreign_run, proof, capfd, tmp_path):
    run, content = foreign_run
    for change in CHANGES.values():
        copy = yaml.safe_load(yaml.safe_dump(content))
        change(copy)
        write(run, copy)
        report = tmp_path / "report.json"
        report.write_text('{"results": []}')
        assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 2
        assert main(["analyze", "--model", str(run), "--report", str(report), "--output", str(tmp_path / "o")]) == 2
        assert not proof.exists()
    assert MODULE not in sys.modules


def test_a_class_is_used_if_the_user_allows_it_or_names_it(foreign_run, proof):
    run, content = foreign_run
    CHANGES["callback"](content)
    config = write(run, content)
    for options in (["--allow_class", CLASS], [f"--allow_class={MODULE}"]):
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--config", config, *options, "--print_config"])
        assert not caught.value.code
        assert proof.exists()
    content["trainer"]["callbacks"] = []
    proof.unlink()
    sys.modules.pop(MODULE)
    with pytest.raises(SystemExit):
        main(["fit", "--config", write(run, content), f"--model.init_args.optimizer={OPTIMIZER}", "--print_config"])
    assert proof.exists()


PATHS = {
    "save_dir": lambda content, path: content["trainer"]["logger"]["init_args"].update(save_dir=path),
    "cache_dir": lambda content, path: content["data"]["init_args"].update(cache_dir=path),
    "quarantine_path": lambda content, path: content["data"]["init_args"].update(quarantine_path=path),
    "default_root_dir": lambda content, path: content["trainer"].update(default_root_dir=path),
}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["{}/elsewhere", "../elsewhere", "elsewhere"])
def test_a_run_does_not_choose_a_path_to_write_to(foreign_run, tmp_path, key, path, capfd):
    run, content = foreign_run
    value = path.format(tmp_path)
    PATHS[key](content, value)
    config = write(run, content)
    assert main(["validate", "--config", config]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    option = error[error.index("confirm it by ") :].split()[3]
    assert option.endswith(f"{key}={value}")
    assert not list(tmp_path.rglob("elsewhere"))
    assert compose(["--config", config, option])[-1] == option
    own = shutil.copy(config, tmp_path / "own.yaml")  # a config that is not the one of a run
    assert compose(["--config", str(own)])[0] == "--config"


def test_paths_of_callbacks_and_parts_of_paths(foreign_run):
    run, content = foreign_run
    content["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "/elsewhere"}}
    ]
    with pytest.raises(UserError, match=r"callbacks\.0\.init_args\.dirpath=/elsewhere.*copy the file out of the run"):
        compose(["--config", write(run, content)])
    content["trainer"]["callbacks"] = []
    content["trainer"]["logger"]["init_args"]["name"] = "../../elsewhere"
    with pytest.raises(UserError, match=r"logger\.init_args\.name=\.\./\.\./elsewhere"):
        compose(["--config", write(run, content)])


def test_a_run_may_write_to_its_own_folder(foreign_run):
    run, content = foreign_run
    logger = content["trainer"]["logger"]["init_args"]
    logger |= {"save_dir": str(run.parent.parent), "name": run.parent.name}
    content["data"]["init_args"]["cache_dir"] = str(run / "cache")
    assert compose(["--config", write(run, content)])[0] == "--config"
    logger["save_dir"] = "runs"  # as in the configs of this program
    assert compose(["--config", write(run, content)])[0] == "--config"


def test_the_commands_that_a_fit_prints_run(foreign_run, tmp_path, capfd, monkeypatch):
    _run, content = foreign_run
    content["trainer"] |= {"max_steps": 1, "callbacks": [{"class_path": "callbacks.RunRecord"}, {"class_path": CLASS}]}
    content["trainer"]["logger"]["init_args"] |= {"save_dir": str(tmp_path / "my runs"), "name": "a b"}
    content["data"]["init_args"] |= {"cache_dir": str(tmp_path / "my cache")}
    content["model"]["init_args"]["backbone"]["lora"]["num_top_layers"] = 1
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(content))
    args = ["fit", "--config", str(own), "--allow_class", CLASS]
    monkeypatch.setattr(sys, "argv", ["main.py", *args])
    assert main(args) == 0
    printed = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("  validate"))
    words = shlex.split(printed)
    assert words[:3] == ["validate", "python", "main.py"]
    assert words[-3:] == [f"--data.init_args.cache_dir={tmp_path / 'my cache'}", "--allow_class", CLASS]
    without_checkpoint = [word for word in words[3:] if not word.startswith("--ckpt_path")]
    without_checkpoint.remove(str(tmp_path / "my runs" / "a b" / "version_0"))
    assert main(without_checkpoint) == 0
    assert main([*without_checkpoint[:-3], "--allow_class", CLASS]) == 2  # the path is not confirmed


def test_allow_class_needs_an_import_path():
    assert split_allowed_classes(["--allow_class", "a.B", "--x", "--allow_class=c"]) == (["a.B", "c"], ["--x"])
    for args in (["--allow_class"], ["--allow_class", "a b"], ["--allow_class="]):
        with pytest.raises(UserError, match=r"--allow_class .*no import path"):
            split_allowed_classes(args)


def test_secrets_are_filled_in_at_their_place(monkeypatch):
    place = "data.init_args.storage_options.a.b.secret"
    config = {"data": {"init_args": {"storage_options": {"a.b": {"secret": "***"}, "c": 1}, "sources": ["x"]}}}
    with pytest.raises(UserError, match="SYS_SCAN_DATA_STORAGE_OPTIONS_A_B_SECRET"):
        fill_secrets(config, ())
    assert fill_secrets(config, {without_init_args(place)}) == config
    monkeypatch.setenv(secret_variable(place), "value")
    filled = fill_secrets(config, ())
    assert filled["data"]["init_args"]["storage_options"] == {"a.b": {"secret": "value"}, "c": 1}
    assert config["data"]["init_args"]["storage_options"]["a.b"] == {"secret": "***"}

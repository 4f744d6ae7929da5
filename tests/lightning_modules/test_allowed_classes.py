"""The list of classes that a config or a checkpoint may name."""

import sys

import pytest

from datamodules.errors import UserError
from lightning_modules.allowed_classes import check_class_paths, file_content, import_paths, is_allowed

PLANTED = "planted_module.Optimizer"


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """A module on the path that records its import in a file, and that file."""
    proof = tmp_path / "imported"
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "planted_module.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Optimizer: pass\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
    return proof


@pytest.mark.parametrize(
    "path",
    ["optimizers.Lion", "lightning_modules.CausalLMModule", "datamodules.FindingsDataModule", "callbacks.RunRecord",
     "lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.strategies.ModelParallelStrategy",
     "lightning.pytorch.loggers.TensorBoardLogger", "torch.optim.AdamW", "torch.optim.lr_scheduler.CosineAnnealingLR",
     "torch.bfloat16", "bitsandbytes.optim.AdamW8bit", "AdamW", "optimizers.Lyon"],
)  # fmt: skip
def test_allowed(path):
    assert is_allowed(path)


@pytest.mark.parametrize(
    "path",
    ["subprocess.Popen", "os.system", "torch.hub.load", "torch.load", "torch.utils.cpp_extension.load", "builtins.exec",
     "lightning.pytorch.cli.LightningCLI", "optimizers_evil.Lion", "torch.optimizer.X", "transformers.Trainer",
     # defined elsewhere than in the allowed module that imports it
     "callbacks.run_record.os.system", "callbacks.run_record.subprocess", "callbacks.run_record.subprocess.Popen",
     "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree", "datamodules.files.contextmanager",
     "lightning.pytorch.loggers.tensorboard.os.remove"],
)  # fmt: skip
def test_not_allowed(path):
    assert not is_allowed(path)


def test_more_classes_are_allowed_by_name_or_package(proof):
    assert not is_allowed(PLANTED)
    assert not is_allowed(PLANTED, ["planted"])
    assert not proof.exists()
    assert is_allowed(PLANTED, [PLANTED])
    assert is_allowed(PLANTED, ["planted_module"])


HIDDEN = {
    "class_path": {"class_path": PLANTED},
    "text": PLANTED,
    "in a list": [[{"a": {"class_path": PLANTED}}]],
    "yaml": f"{{class_path: {PLANTED}}}",
    "escaped yaml": '{"cl\\x61ss_path": "pl\\x61nted_module.Optimizer"}',
    "quoted": f"'{PLANTED}'",
    "escaped and quoted": '"pl\\x61nted_module.Optimizer"',
    "yaml in yaml": '{"a": "{class_path: planted_module.Optimizer}"}',
    "list in a text": f"[{PLANTED}]",
    "init_args of a plain key": {"name": {"class_path": PLANTED}},
}


@pytest.mark.parametrize("value", HIDDEN.values(), ids=HIDDEN)
def test_import_paths_are_found_without_an_import(value, proof):
    assert PLANTED in {path for _, path in import_paths({"slot": value})}
    with pytest.raises(UserError, match=r"checkpoint argument slot=.*planted_module"):
        check_class_paths({"slot": value})
    assert not proof.exists()
    assert "planted_module" not in sys.modules


def test_plain_texts_name_no_class(proof, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted_module.json").write_text("{}")
    init_args = {
        "sources": ["planted_module.json", "test.jsonl", "code.tar.gz"], "model_name_or_path": "planted_module.x",
        "save_dir": "planted_module.runs", "name": "planted_module.a",
    }  # fmt: skip
    trainer = {"precision": "32-true", "gradient_clip_val": 1.0, "note": "see https://planted_module.org"}
    config = {"data": {"class_path": "datamodules.FindingsDataModule", "init_args": init_args}, "trainer": trainer}
    assert [path for _, path in import_paths(config)] == ["datamodules.FindingsDataModule"]


def test_a_place_is_named():
    config = {"trainer": {"callbacks": [{"class_path": "a.B"}, {"class_path": "c.D"}]}}
    expected = [("trainer.callbacks.0.class_path", "a.B"), ("trainer.callbacks.1.class_path", "c.D")]
    assert list(import_paths(config)) == expected


def test_file_content(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("class_path: a.B")
    assert file_content(str(file)) == {"class_path": "a.B"}
    assert file_content("a.B") is None
    file.write_text("[unclosed")
    assert file_content(str(file)) is None
    file.write_bytes(b"x" * (1 << 21))
    with pytest.raises(UserError, match="no config"):
        file_content(str(file))

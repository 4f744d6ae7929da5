"""Folders that --model and --run accept: run folders, exports, adapters and models."""

import json
import shutil

import pytest
import yaml

from commands.model_source import base_settings, lora_settings, open_trained_model
from datamodules.errors import UserError
from tests.helpers.trained_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, chatml_tokenizer):
    return make_run(tmp_path_factory.mktemp("runs") / "version_0", tiny_llama, chatml_tokenizer, tasks=("risk",))


def open_folder(folder):
    return open_trained_model(str(folder), "--model")


def test_a_run_folder_is_its_best_adapter_on_the_configured_base(run, tiny_llama):
    trained = open_folder(run)
    assert (trained.folder, trained.run, trained.tasks) == (run / "adapter" / "best", run, ("risk",))
    backbone = trained.backbone
    assert (backbone.model_name_or_path, backbone.adapter) == (str(tiny_llama), str(run / "adapter" / "best"))
    assert (backbone.lora, backbone.activation_checkpointing) == (None, "none")
    assert trained.tokenizer == str(run / "adapter" / "best")
    assert trained.name == f"{tiny_llama.name} with an adapter"
    assert lora_settings(trained)["rank"] == 4
    assert base_settings(backbone) == {
        "model_name_or_path": str(tiny_llama), "revision": None, "quantization": "none", "dtype": "float32"
    }  # fmt: skip


def test_without_a_best_adapter_the_last_one_is_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "version_0")
    (copy / "adapter" / "best").rename(copy / "adapter" / "last")
    assert open_folder(copy).folder == copy / "adapter" / "last"
    shutil.rmtree(copy / "adapter")
    with pytest.raises(UserError, match=r"no adapter/best or adapter/last\. Fix: wait"):
        open_folder(copy)


def test_a_run_that_trained_every_weight_is_a_whole_model(run, tmp_path, tiny_llama):
    copy = shutil.copytree(run, tmp_path / "version_0")
    shutil.rmtree(copy / "adapter" / "best")
    shutil.copytree(tiny_llama, copy / "adapter" / "best")
    trained = open_folder(copy)
    assert (trained.backbone.model_name_or_path, trained.backbone.adapter) == (str(copy / "adapter" / "best"), None)


def test_a_plain_adapter_gets_its_base_from_peft_and_an_exported_one_from_its_certificate(run, tmp_path, tiny_llama):
    adapter = shutil.copytree(run / "adapter" / "best", tmp_path / "adapter")
    trained = open_folder(adapter)
    assert (trained.backbone.model_name_or_path, trained.tasks, trained.run) == (str(tiny_llama), None, None)
    certificate = {"base": {"model_name_or_path": "other", "quantization": "nf4", "new_key": 1}, "tasks": ["risk"]}
    (adapter / "certificate.json").write_text(json.dumps(certificate))
    trained = open_folder(adapter)
    assert (trained.backbone.model_name_or_path, trained.backbone.quantization) == ("other", "nf4")
    assert trained.tasks == ("risk",)
    assert lora_settings(trained) == {}


def test_whether_risk_answers_have_a_rationale_is_in_the_config_and_in_the_certificate(run, tmp_path):
    assert open_folder(run).rationale is False
    copy = shutil.copytree(run, tmp_path / "version_0")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["init_args"]["risk_rationale"] = True
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert open_folder(copy).rationale is True
    adapter = shutil.copytree(copy / "adapter" / "best", tmp_path / "adapter")
    base = base_settings(open_folder(run).backbone)
    (adapter / "certificate.json").write_text(json.dumps({"base": base, "tasks": ["risk"], "config": config}))
    assert open_folder(adapter).rationale is True
    (adapter / "certificate.json").write_text(json.dumps({"base": base, "tasks": ["risk"], "config": None}))
    assert open_folder(adapter).rationale is False


def test_a_model_folder_is_its_own_base(tiny_llama):
    trained = open_folder(tiny_llama)
    assert (trained.folder, trained.backbone.adapter, trained.name) == (tiny_llama, None, tiny_llama.name)


def test_the_digest_follows_the_weights_and_the_base(run, tmp_path, tiny_llama, chatml_tokenizer):
    digest = open_folder(run).digest()
    copy = shutil.copytree(run, tmp_path / "copy")
    assert open_folder(copy).digest() == digest  # the content counts, not the folder or the time
    other = make_run(tmp_path / "other", tiny_llama, chatml_tokenizer, seed=2)
    assert open_folder(other).digest() != digest
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["init_args"]["backbone"]["quantization"] = "nf4"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert open_folder(copy).digest() != digest


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "neither a run folder"),
        ({"model.gguf": ""}, "a GGUF export is for llama.cpp and Ollama"),
        ({"adapter_config.json": "{}"}, "has no base model"),
        ({"config.yaml": "model: {}", "adapter/best/config.json": "{}"}, "no valid model.init_args.backbone"),
        (
            {"config.yaml": "model: {init_args: {backbone: {model_name_or_path: x, no_such: 1}}}"},
            "no valid model.init_args.backbone .*no_such",
        ),
    ],
)
def test_a_folder_without_a_model_is_an_error(tmp_path, files, message):
    folder = tmp_path / "folder"
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    if files == {}:
        folder.mkdir()
    with pytest.raises(UserError, match=f"--model {folder}: .*{message}") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)
    assert "Fix: " in str(caught.value)

"""``export`` with a tiny model: plain PEFT, transformers and GGUF readers load its output."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from main import main
from tests.helpers.trained_run import REPORT, analyze, export, make_run, short, write_evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, chatml_tokenizer):
    folder = make_run(tmp_path_factory.mktemp("runs") / "version_0", tiny_llama, chatml_tokenizer)
    return write_evaluation(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def trained_model(run, tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "adapter" / "best")


def test_an_adapter_loads_with_plain_peft(run, tiny_llama, chatml_tokenizer, tmp_path):
    status, certificate = export(run, tmp_path / "out", "--format", "adapter", "--num_reference", "4")
    assert (status, certificate["state"]) == (0, "passed")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trained_model(run, tiny_llama)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turn = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(turn) == chatml_tokenizer.apply_chat_template(turn)
    assert certificate["reference"]["kl_mean"] < 1e-9
    assert certificate["reference"]["same_answers"] == 1
    assert certificate["reference"]["origin"] == "evaluation.json (val)"
    assert certificate["reference"]["trained"] == certificate["reference"]["exported"]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_merged_model_is_base_and_adapter_in_16_bits(run, tiny_llama, tmp_path, dtype):
    options = ("--format", "merged", "--num_reference", "4", "--dtype", dtype)
    status, certificate = export(run, tmp_path / "out", *options)
    assert (status, certificate["state"]) == (0, "passed")
    assert 0 < certificate["reference"]["kl_mean"] < 1e-3
    stored = torch.float16 if dtype == "float16" else torch.bfloat16
    base, adapter = (
        load_file(tiny_llama / "model.safetensors"),
        load_file(run / "adapter/best/adapter_model.safetensors"),
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == base.keys()
    assert {tensor.dtype for tensor in merged.values()} == {stored}
    for name, weight in base.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in adapter:
            update = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            weight = weight + 2.0 * update  # alpha 8 over rank 4
        assert torch.equal(merged[name], weight.to(stored)), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(trained_model(run, tiny_llama)), atol=0.05, rtol=0.05)
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_an_nf4_base_is_dequantised_for_the_merge(tmp_path, tiny_llama, chatml_tokenizer):
    functional = pytest.importorskip("bitsandbytes").functional
    run = make_run(tmp_path / "version_0", tiny_llama, chatml_tokenizer, quantization="nf4", dtype="float32")
    write_evaluation(run)
    status, certificate = export(run, tmp_path / "out", "--format", "merged", "--num_reference", "4", "--device", "cpu")
    assert (status, certificate["state"]) == (0, "passed")
    name = "model.layers.0.mlp.gate_proj.weight"  # without an adapter: the dequantised base itself
    weight = load_file(tiny_llama / "model.safetensors")[name]
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = functional.dequantize_4bit(packed, state).to(torch.bfloat16)
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(merged, expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    other = export(run, tmp_path / "other", "--format", "merged", "--merge_base", "16bit", "--num_reference", "4")[1]
    assert other["reference"]["kl_mean"] > 10 * certificate["reference"]["kl_mean"]
    assert torch.equal(load_file(tmp_path / "other" / "model.safetensors")[name], weight.to(torch.bfloat16))


def test_a_gguf_file_has_the_weights_of_the_merged_model(tmp_path, tiny_mistral, mistral_tokenizer, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_mistral, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"sliding_window": None}))  # as Mistral v0.3
    run = write_evaluation(make_run(tmp_path / "version_0", base, mistral_tokenizer))
    status, certificate = export(run, tmp_path / "out", "--format", "gguf", "--num_reference", "4")
    assert (status, certificate["state"]) == (0, "passed")
    assert certificate["reference"]["kl_mean"] < 1e-4
    assert {"model.gguf", "Modelfile", "README.md"} <= certificate["files"].keys()
    assert "ollama create" in capsys.readouterr().out
    few = export(
        run, tmp_path / "few", "--format", "gguf", "--gguf-type", "q4_1", "--num_reference", "4", "--max_kl", "0.5"
    )
    assert (few[0], few[1]["gguf_type"]) == (0, "q4_1")
    assert few[1]["reference"]["kl_mean"] > 10 * certificate["reference"]["kl_mean"]
    # only the base is in 4 bits; the adapter is the trained one, with its rows in llama.cpp's order
    base = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    reader = GGUFReader(tmp_path / "few" / "model.gguf")
    stored = next(dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    assert np.abs(stored - base.numpy()).max() <= 0.5 * (base.max() - base.min()) / 15 + 1e-4
    adapter = GGUFReader(tmp_path / "few" / "adapter.gguf")
    assert adapter.fields["adapter.lora.alpha"].contents() == 8
    assert adapter.fields["general.type"].contents() == "adapter"
    tensors = {t.name: t.data for t in adapter.tensors}
    trained = load_file(run / "adapter" / "best" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1"
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], trained[f"{stem}.mlp.down_proj.lora_B.weight"])
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_a"], trained[f"{stem}.self_attn.q_proj.lora_A.weight"])
    queries = trained[f"{stem}.self_attn.q_proj.lora_B.weight"].view(4, 2, 8, 4)  # 4 heads of 16, rank 4
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], queries.transpose(1, 2).reshape(64, 4))
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "few" / "Modelfile").read_text()
    assert few[1]["files"]["model.gguf"]["bytes"] < 0.6 * certificate["files"]["model.gguf"]["bytes"]
    assert main(["analyze", "--model", str(tmp_path / "out"), "--report", str(run / "run.json"),
                 "--output", str(tmp_path / "e.json")]) == 2  # fmt: skip


def test_the_certificate_describes_the_files_the_run_and_the_packages(run, tmp_path):
    _, certificate = export(run, tmp_path / "out", "--num_reference", "2")
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"certificate.json"}
    assert certificate["files"].keys() == files
    for name, entry in certificate["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    config = (run / "config.yaml").read_bytes()
    assert certificate["config_sha256"] == hashlib.sha256(config).hexdigest()
    assert certificate["packages"]["torch"]
    assert certificate["run"]["step"] == 3
    backbone = certificate["config"]["model"]["init_args"]["backbone"]
    assert (backbone["lora"]["rank"], backbone["model_name_or_path"]) == (
        4,
        Path(backbone["model_name_or_path"]).name,
    )  # without the folders of this machine
    assert certificate["reference"]["n"] == 2


def test_an_export_beyond_its_bounds_fails_and_prints_the_numbers(run, tmp_path, capsys):
    status, certificate = export(
        run, tmp_path / "out", "--format", "merged", "--num_reference", "4", "--max_kl", "1e-12"
    )
    assert (status, certificate["state"]) == (1, "failed")
    assert certificate["reference"]["max_kl"] == 1e-12
    assert (tmp_path / "out" / "model.safetensors").exists()
    printed, kl = capsys.readouterr().out, certificate["reference"]["kl_mean"]
    assert f"FAILED: divergence {kl:.2g} nats" in printed
    assert f"{kl:.3g} nats per token is {kl - 1e-12:.3g} above --max_kl 1e-12" in printed
    assert "certificate: failed" in (tmp_path / "out" / "README.md").read_text()


def test_a_damaged_adapter_is_detected(run, tmp_path, monkeypatch):
    from commands.export import command

    copy = command.copy_adapter

    def damaged(source, target):
        copy(source, target)
        tensors = load_file(target / "adapter_model.safetensors")
        negated = {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
        save_file(negated, target / "adapter_model.safetensors")

    assert export(run, tmp_path / "good", "--num_reference", "4", "--max_kl", "1e-6")[0] == 0
    monkeypatch.setattr(command, "copy_adapter", damaged)
    status, certificate = export(run, tmp_path / "bad", "--num_reference", "4", "--max_kl", "1e-6")
    assert (status, certificate["state"]) == (1, "failed")


def test_without_reference_findings_nothing_is_measured(run, tmp_path, capsys):
    status, certificate = export(run, tmp_path / "out", "--num_reference", "0")
    assert (status, certificate["state"]) == (0, "not measured")
    assert "not measured" in capsys.readouterr().out
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_analyze_reads_an_export_without_the_run(run, tmp_path, kind):
    assert export(run, tmp_path / "out", "--format", kind, "--num_reference", "2")[0] == 0
    status, document = analyze(tmp_path / "out", REPORT, tmp_path / "e.json", *short())
    assert status == 0
    assert document["enrichment_results"]["model_report"]["tasks"] == [
        "risk", "correlation", "summary", "triage", "remediation"
    ]  # fmt: skip


def test_overwrite_removes_only_the_files_of_an_export(run, tmp_path, capsys):
    output = tmp_path / "out"
    assert export(run, output, "--num_reference", "0", "--format", "merged")[0] == 0
    (output / "notes.txt").write_text("mine")
    assert export(run, output, "--num_reference", "0")[0] == 2
    assert "not empty. Fix: add --overwrite" in capsys.readouterr().err
    assert export(run, output, "--num_reference", "0", "--overwrite")[0] == 0
    names = {path.name for path in output.iterdir()}
    assert {"notes.txt", "adapter_config.json"} <= names
    assert not {"config.json", "model.safetensors"} & names


MISTAKES = {
    "no run": ({"--run": "nowhere"}, "--run nowhere: no such folder"),
    "an export as run": ({"--run": "adapter"}, "--run adapter: this is an export or a model"),
    "no such format": ({"--format": "onnx"}, "format"),
    "an agent that loads a merged model": ({"--format": "merged", "--load_as": "agent"}, "the agent loads adapters"),
    "a negative number of reference findings": ({"--num_reference": "-1"}, "--num_reference -1: too small"),
    "a folder of something else": ({"--output": "full", "--overwrite": "true"}, "no earlier export"),
    "a file": ({"--output": "file"}, "--output file: this is a file"),
    "more reference findings than there are data": (
        {"--run": "dataless", "--num_reference": "3"},
        "give --num_reference 0",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_user_error_is_one_line_and_exit_status_2(
    run, tiny_llama, chatml_tokenizer, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    (tmp_path / "adapter").symlink_to(run / "adapter" / "best")
    make_run(tmp_path / "dataless", tiny_llama, chatml_tokenizer, sources=("gone.tar.gz",))
    given = {"--run": str(run), "--output": "out", "--num_reference": "0"} | options
    assert main(["export", *(part for pair in given.items() for part in pair)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "config.json").exists()

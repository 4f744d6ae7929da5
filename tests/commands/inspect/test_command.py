"""The inspect command, through the door."""

import io
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from commands.inspect.device import find_device, product_rate
from commands.inspect.plan import _count, kernels_of
from commands.inspect.progress import Meter
from commands.inspect.report import Sample
from datamodules.findings import FindingsDataModule
from datamodules.statistics.scan import scan_dataset
from datamodules.stream.epoch_order import epoch_order
from datamodules.synthetic import synthesize
from datamodules.tokenization.chat_format import Example
from lightning_modules.models.backbone import Backbone, LoRA
from lightning_modules.models.fused_decoder import build_decoder
from main import main

SEVEN_B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 32, "vocab_size": 32768, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "shards"
    synthesize(path, findings=120, seed=2, findings_per_shard=60)
    return path


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory, tiny_mistral):
    """A tokenizer, and the config of a large model whose weights are nowhere."""
    folder = tmp_path_factory.mktemp("seven-b")
    for file in tiny_mistral.glob("*token*"):
        shutil.copy(file, folder)
    for file in tiny_mistral.glob("*.jinja"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(SEVEN_B))
    return folder


@pytest.fixture
def inspect(capsys, tiny_mistral, shards):
    def run(*options, config="default", sources=None, model=tiny_mistral, status=0, command="inspect"):
        arguments = [
            command, "--config", f"configs/{config}.yaml", f"--model.init_args.backbone.model_name_or_path={model}",
            f"--data.init_args.sources={json.dumps(sources or [str(shards)])}", "--data.init_args.sequence_length=4096",
        ]  # fmt: skip
        assert main([*arguments, *options]) == status
        return capsys.readouterr()

    return run


def as_json(printed):
    return json.loads(printed.out)


def test_json_is_one_object_with_the_promised_keys(inspect):
    report = as_json(inspect("--format", "json", "--device", "cpu"))
    assert report["records"]["findings"] == 120
    assert report["records"]["correlations"] > 0
    assert (report["quarantined"], report["repaired"], report["unsupervised_examples"]) == (0, 0, 0)
    assert report["duplicates"] >= 0
    assert 0 < report["examples"]["risk"] <= 120
    assert sum(split["findings"] for split in report["splits"].values()) == 120
    assert report["tokens"]["total"] > report["tokens"]["supervised"] > 0
    assert report["tokens"]["prefix_saved"] > 0
    assert 0 < report["packing"]["efficiency"] <= 1
    assert report["near_duplicates"]["looked_at"] > 0
    assert report["epoch"]["rows"] == report["epoch"]["batches"] == report["epoch"]["steps"] > 0
    assert report["memory"]["peak_gib"] > 0
    assert report["device"]["hours_epoch"] > 0


def test_text_says_the_same_and_shows_an_example(inspect):
    printed = inspect("--data.init_args.task_weights={risk: 1.0, triage: 1.0}", "--device=h100")
    for words in ("findings", "120", "triage", "shared_prefix *", "mask: prefix", "1 '<s>'", "3 '[INST]'", "2 '</s>'"):
        assert words in printed.out
    assert "risk_score" in printed.out
    assert "time on h100" in printed.out


def test_overrides_of_the_config_count(inspect):
    report = as_json(
        inspect("--format=json", "--trainer.devices=2", "--trainer.accumulate_grad_batches=3", "--limit=1")
    )
    assert report["epoch"]["devices"] == 2
    assert report["epoch"]["steps"] == -(-report["epoch"]["batches"] // 3)
    assert report["records"]["findings"] == 60
    assert not report["records"]["complete"]
    assert report["device"] is None


def test_a_gpu_config_is_inspected_on_any_machine(inspect, seven_b):
    options = ("--format=json", "--data.init_args.task_weights={risk: 1.0}", "--device=t4")
    report = as_json(inspect(*options, "--data.init_args.batch_size=8", config="gpu", model=seven_b))
    assert report["memory"]["trained_parameters"] == 167_772_160
    assert report["memory"]["kernels"] == "fused"
    assert report["memory"]["parts_gib"]["base"] == pytest.approx(4.26, abs=0.01)
    assert report["memory"]["parts_gib"]["optimizer"] == pytest.approx(0.625)  # Lion: one state in float32
    assert not report["device"]["fits"]
    assert any("exceeds t4's" in warning for warning in report["warnings"])


def test_a_lion_rate_that_looks_like_adamws_is_warned_of(inspect):
    lion = "--model.init_args.optimizer=optimizers.Lion"
    rate = "--model.init_args.optimizer.init_args.lr="
    high = as_json(inspect("--format=json", lion, rate + "1e-3"))
    assert [warning for warning in high["warnings"] if "Lion" in warning and "0.001" in warning]
    assert not as_json(inspect("--format=json", lion, rate + "1e-4"))["warnings"]


def test_a_task_that_loses_every_example_is_warned_of(inspect):
    tasks = "--data.init_args.task_weights={risk: 1.0, summary: 1.0}"
    whole = ("--data.init_args.val_fraction=0", "--data.init_args.test_fraction=0")
    report = as_json(inspect("--format=json", tasks, *whole, "--data.init_args.sequence_length=1600"))
    assert report["examples"]["summary"] == 0 < report["overflow"]["summary"]
    assert any("task summary" in warning and "sequence_length" in warning for warning in report["warnings"])


def test_without_a_model_config_there_is_a_report_without_estimate(inspect, tmp_path, tiny_mistral):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_mistral, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    report = as_json(inspect("--format=json", "--device=h100", model=folder))
    assert report["memory"] is None
    assert "no config.json" in report["no_estimate"]
    assert "no estimate" in inspect(model=folder).out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device=abacus"], "--device abacus: unknown; there are h100"),
        (["--device=measured"], "--device measured: torch sees no GPU"),
        (["--format=xml"], "--format"),
        (["--limit=0"], "--limit 0 is too small"),
        (["--limit=many"], "--limit"),
        (["--near_duplicates=-1"], "--near_duplicates -1"),
        (["--data.init_args.row_tokenz=3"], "row_tokenz"),
        (["--data.init_args.sources=[nowhere.json]"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line(inspect, options, told):
    printed = inspect(*options, status=2)
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert not printed.out


@pytest.mark.parametrize("name", ["folder", "some.tar.gz"])
def test_progress_ends_at_the_sources_size_and_never_goes_back(tmp_path, tiny_mistral, name):
    synthesize(tmp_path / name, findings=60, seed=2, findings_per_shard=20)
    data = FindingsDataModule([str(tmp_path / name)], str(tiny_mistral), sequence_length=4096)
    data.setup()
    sources = data.document_processor.sources
    meter, seen = Meter(sources, epoch_order(sources, epoch=0, seed=0)), []
    scan_dataset(data, progress=lambda _, place: seen.append(meter.done(place)))
    assert seen == sorted(seen)
    assert seen[-1] == meter.total > 0
    assert len(seen) >= 3


KERNELS = [
    {}, {"kernels": "eager"}, {"lora": None}, {"lora": LoRA(rank=2, use_dora=True)}, {"lora": LoRA(rank=2,
    dropout=0.1)},
    {"activation_checkpointing": "selective"}, {"kernels": "eager", "activation_checkpointing": "full"},
]  # fmt: skip


@pytest.mark.parametrize("changes", KERNELS, ids=str)
def test_the_kernels_are_foreseen_as_the_module_chooses_them(tiny_mistral, changes):
    backbone = replace(Backbone(str(tiny_mistral), lora=LoRA(rank=2)), **changes)
    model = backbone.build()
    _, why = build_decoder(model, backbone.kernels, backbone.activation_checkpointing, torch.device("cpu"))
    foreseen = kernels_of(backbone, model.config, "cpu", 4)
    assert why.startswith(f"{foreseen} kernels")
    assert kernels_of(backbone, model.config, "gpu", 4) == "eager"  # flash kernels take 16 bits
    assert kernels_of(backbone, model.config, "tpu", 2) == "eager"
    assert kernels_of(backbone, model.config, "gpu", 2, divided=True) == "eager"


def test_a_rate_is_the_products_arithmetic_over_its_time(monkeypatch):
    clock = itertools.count()  # every look at it is a second later
    monkeypatch.setattr("commands.inspect.device.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("commands.inspect.device.SECONDS", 4)
    rate = product_rate(torch.device("cpu"), torch.float32, (30, 40, 50))
    assert rate == pytest.approx(3 * 2 * 30 * 40 * 50 / 5 / 1e12)


def test_this_machines_gpu_is_a_device(monkeypatch):
    facts = SimpleNamespace(total_memory=80 * 2**30, name="NVIDIA Test")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: facts)
    monkeypatch.setattr("commands.inspect.device.product_rate", lambda *_: 367.0)
    find_device.cache_clear()
    device = find_device("measured")
    find_device.cache_clear()
    assert (device.memory, device.tflops) == (80, 989 / 2)
    assert device.source == "367 TFLOP/s of matrix products measured on NVIDIA Test"


def test_devices_are_counted_as_lightning_counts_them():
    assert [_count(devices, "cpu") for devices in (2, "3", "0,1", "auto", -1, [0, 4, 5], None)] == [2, 3, 2, 1, 1, 3, 1]


def test_an_example_is_shown_with_its_mask_and_no_control_character(mistral_tokenizer):
    ids = {part: mistral_tokenizer.encode(part, add_special_tokens=False) for part in ("abc\x1b[31m", "do ", "yes")}
    prompt = [1, 3, *ids["do "], *ids["abc\x1b[31m"], 4]
    sample = Sample.of(
        Example("t", 2 + len(ids["do "]), np.array(prompt), np.array([*ids["yes"], 2]), 1, 1, "low", "", 1),
        mistral_tokenizer,
    )
    assert sum(sample.lengths.values()) == len(prompt) + len(ids["yes"]) + 1
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(sample.render())
    printed = console.file.getvalue()
    assert "abc\\x1b[31m" in printed
    assert "\x1b[1;32m" in printed  # labels are bold green
    assert sample.joins["end"][-1] == (2, "</s>")
    assert [token for _, token in sample.joins["start"][:2]] == ["<s>", "[INST]"]
    assert (4, "[/INST]") in sample.joins["prompt | completion"]


def test_the_real_shards(inspect, shared_data):
    options = (
        "--format=json",
        "--data.init_args.task_weights={risk: 1.0, correlation: 1.0}",
        "--data.init_args.sequence_length=8192",
        "--data.init_args.severity_balance=0",
    )
    report = as_json(inspect(*options, sources=[str(shared_data / "batches")], model=shared_data / "tokenizer"))
    assert (report["records"]["documents"], report["records"]["findings"]) == (2, 6020)
    assert report["records"]["correlations"] == 3432
    assert (report["quarantined"], report["unsupervised_examples"]) == (0, 0)
    assert report["packing"]["efficiency"] >= 0.98


@pytest.mark.parametrize("name", ["plain_batch.json", "ground_truth_example.json"])
def test_the_other_real_documents(inspect, shared_data, name):
    report = as_json(inspect("--format=json", sources=[str(shared_data / name)], model=shared_data / "tokenizer"))
    assert report["records"]["findings"] > 0
    assert (report["quarantined"], report["unsupervised_examples"]) == (0, 0)


def test_bytes_of_a_cached_teacher(inspect, tmp_path):
    """Held against a cache that was written."""
    options = [
        f"--model.init_args.objective.init_args.cache={{dir: {tmp_path / 'cache'}, top_k: 8}}",
        "--model.init_args.backbone.quantization=none", "--model.init_args.backbone.dtype=float32",
        "--data.init_args.task_weights={risk: 1.0}", "--data.init_args.severity_balance=0",
        "--data.init_args.val_fraction=0",
        "--data.init_args.test_fraction=0", "--data.init_args.num_workers=0",
    ]  # fmt: skip
    few = {"config": "distill", "sources": ["synthetic://?findings=40&seed=1"]}
    report = json.loads(inspect(*options, "--format=json", **few).out)["teacher_cache"]
    text = inspect(*options, **few).out
    assert f"{report['bytes_finding']:,.0f} bytes a finding (top_k 8, {8 * 4 + 2} a supervised token)" in text
    inspect(*options, **few, command="cache-teacher")
    written = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert report["epoch_gib"] * 2**30 == pytest.approx(written, rel=0.01)
    assert json.loads(inspect("--format=json", **few | {"config": "default"}).out)["teacher_cache"] is None

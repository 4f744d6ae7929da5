"""``inspect`` with its options: the report as JSON and as text, warnings, and user errors."""

import json
import shutil

import pytest

from datamodules.synthetic import synthesize
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
    """A tokenizer, and the config of a large model without weights."""
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


def test_json_is_one_object_with_the_documented_keys(inspect):
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


def test_text_has_the_numbers_and_an_example(inspect):
    printed = inspect("--data.init_args.task_weights={risk: 1.0, triage: 1.0}", "--device=h100")
    for words in ("findings", "120", "triage", "shared_prefix *", "mask: prefix", "1 '<s>'", "3 '[INST]'", "2 '</s>'"):
        assert words in printed.out
    assert "risk_score" in printed.out
    assert "time on h100" in printed.out


def test_options_override_the_config(inspect):
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


def test_a_high_learning_rate_for_lion_gives_a_warning(inspect):
    lion = "--model.init_args.optimizer=optimizers.Lion"
    rate = "--model.init_args.optimizer.init_args.lr="
    high = as_json(inspect("--format=json", lion, rate + "1e-3"))
    assert [warning for warning in high["warnings"] if "Lion" in warning and "0.001" in warning]
    assert not as_json(inspect("--format=json", lion, rate + "1e-4"))["warnings"]


def test_a_task_whose_examples_are_all_too_long_gives_a_warning(inspect):
    tasks = "--data.init_args.task_weights={risk: 1.0, summary: 1.0}"
    whole = ("--data.init_args.val_fraction=0", "--data.init_args.test_fraction=0")
    report = as_json(inspect("--format=json", tasks, *whole, "--data.init_args.sequence_length=1600"))
    assert report["examples"]["summary"] == 0 < report["overflow"]["summary"]
    assert any("task summary" in warning and "sequence_length" in warning for warning in report["warnings"])


def test_without_a_model_config_the_report_has_no_estimate(inspect, tmp_path, tiny_mistral):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_mistral, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    report = as_json(inspect("--format=json", "--device=h100", model=folder))
    assert report["memory"] is None
    assert "no config.json" in report["no_estimate"]
    assert "no estimate" in inspect(model=folder).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=abacus"], "--device abacus: unknown; there are h100"),
        (["--device=measured"], "--device measured: torch finds no GPU"),
        (["--format=xml"], "--format"),
        (["--limit=0"], "--limit 0: too small. Fix: give at least 1."),
        (["--limit=many"], "--limit"),
        (["--near_duplicates=-1"], "--near_duplicates -1: too small"),
        (["--data.init_args.row_tokenz=3"], "row_tokenz"),
        (["--data.init_args.sources=[nowhere.json]"], "nowhere.json"),
    ],
)
def test_a_user_error_is_one_line(inspect, options, message):
    printed = inspect(*options, status=2)
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not printed.out


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
def test_other_real_documents(inspect, shared_data, name):
    report = as_json(inspect("--format=json", sources=[str(shared_data / name)], model=shared_data / "tokenizer"))
    assert report["records"]["findings"] > 0
    assert (report["quarantined"], report["unsupervised_examples"]) == (0, 0)


def test_the_estimated_size_of_a_teacher_cache_is_the_written_size(inspect, tmp_path):
    options = [
        f"--model.init_args.objective.init_args.cache={{dir: {tmp_path / 'cache'}, top_k: 8}}",
        "--model.init_args.backbone.quantization=none", "--model.init_args.backbone.dtype=float32",
        "--data.init_args.task_weights={risk: 1.0}", "--data.init_args.severity_balance=0",
        "--data.init_args.val_fraction=0",
        "--data.init_args.test_fraction=0", "--data.init_args.num_workers=0",
    ]  # fmt: skip
    few = {"config": "distill", "sources": ["synthetic://?findings=40&seed=1"]}
    report = json.loads(inspect(*options, "--format=json", **few).out)["teacher_cache"]
    text = " ".join(inspect(*options, **few).out.split())
    assert f"{report['bytes_finding']:,.0f} bytes per finding (top_k 8, {8 * 4 + 2} per supervised token)" in text
    inspect(*options, **few, command="cache-teacher")
    written = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert report["epoch_gib"] * 2**30 == pytest.approx(written, rel=0.01)
    assert json.loads(inspect("--format=json", **few | {"config": "default"}).out)["teacher_cache"] is None

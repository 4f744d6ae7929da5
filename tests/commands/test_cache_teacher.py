"""cache-teacher through the door, killed and resumed, and the fits that use what it wrote."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import commands.cache_teacher as command
from commands.cli import FinetuneCLI
from lightning_modules.losses.teacher_shards import Shard
from main import main

SHARDS = 4  #: of training


def arguments(folder, model, *more):
    """distill.yaml on a CPU, with a tiny model; without a folder the teacher is online."""
    cache = "--model.init_args.objective.init_args.cache."
    return [
        "--config", "configs/distill.yaml", f"--model.init_args.backbone.model_name_or_path={model}",
        "--model.init_args.backbone.quantization=none", "--model.init_args.backbone.dtype=float32",
        "--model.init_args.backbone.lora.rank=4", "--data.init_args.task_weights={risk: 1.0}",
        *([f"{cache}dir={folder}", f"{cache}top_k=8"] if folder else []),
        "--data.init_args.sources=['synthetic://?findings=150&seed=1']", "--data.init_args.val_fraction=0.1",
        "--data.init_args.test_fraction=0", "--data.init_args.num_workers=0", "--data.init_args.sequence_length=4096",
        "--data.init_args.val_rows=4", "--trainer.max_steps=3", *more,
    ]  # fmt: skip


def cache(folder, model, *more):
    return main(["cache-teacher", *arguments(folder, model), "--shard_examples=40", *more])


def cli_of(folder, model, tmp_path, *more):
    """A trainer, a module and data, built as fit builds them."""
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.callbacks=[]"]
    still = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    still += ["--trainer.val_check_interval=3", "--trainer.enable_checkpointing=false"]
    return FinetuneCLI([*arguments(folder, model), *cpu, *still, *more], run=False)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    assert cache(folder, tiny_llama) == 0
    return folder


def test_every_example_is_there_once(cached):
    done, key = (json.loads((cached / name).read_text()) for name in ("done.json", "key.json"))
    assert len(done["shards"]) == SHARDS + 1
    assert (cached / done["shards"][0]).stat().st_mode & 0o077 == (cached / "key.json").stat().st_mode & 0o077
    assert set(contents(cached)) == {*done["shards"], "done.json", "key.json"}
    shards = [Shard(cached / name, command.digest(key)) for name in done["shards"]]
    keys = np.concatenate([shard.keys for shard in shards])
    assert len(keys) == len(set(keys.tolist())) == done["examples"] == 150
    assert sum(int(shard.ends[-1]) for shard in shards) == done["tokens"]
    assert (done["rows"], key["top_k"], key["temperatures"], key["vocabulary"]) == (3, 8, [2.0], 259)


def test_killed_half_way_and_resumed_it_leaves_the_same_bytes(cached, tmp_path, tiny_llama):
    folder = tmp_path / "cache"
    child = os.fork()
    if child == 0:  # dies in the middle of its third shard, as a machine does
        written = []

        def save(path, *rest):
            if len(written) == 2:
                path.with_suffix(".0.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
            command_save(path, *rest)

        command_save, command.save_shard = command.save_shard, save
        cache(folder, tiny_llama)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert not (folder / "done.json").exists()
    assert cache(folder, tiny_llama) == 0
    assert contents(folder) == contents(cached)


def test_two_processes_leave_the_same_bytes_as_one(cached, tmp_path, tiny_llama, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(command.RANKS, "2")
    for rank, there in ((1, 2), (0, SHARDS + 1)):
        monkeypatch.setenv(command.RANK, str(rank))
        assert cache(folder, tiny_llama) == 0
        assert len(list(folder.glob("*.safetensors"))) == there
    assert contents(folder) == contents(cached)


@pytest.mark.slow
def test_devices_start_a_process_each(cached, tmp_path, tiny_llama):
    folder = tmp_path / "cache"
    assert cache(folder, tiny_llama, "--devices=2") == 0
    assert contents(folder) == contents(cached)


def test_a_truncated_shard_is_noticed_and_made_again(cached, tmp_path, tiny_llama, capsys):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, content in contents(cached).items():
        (folder / name).write_bytes(content)
    first, second = folder / "train-00001.safetensors", folder / "val-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    assert cache(folder, tiny_llama) == 0
    said = capsys.readouterr().err
    assert "train-00001.safetensors can't be read" in said
    assert "val-00000.safetensors was changed" in said
    assert "2 shards written" in said
    assert contents(folder) == contents(cached)


def test_a_longer_run_goes_on_in_the_same_cache(tmp_path, tiny_llama):
    found = []
    sources = [f"synthetic://?findings=20&seed={seed}" for seed in range(6)]
    for steps in (1, 12):
        options = "--data.init_args.block_findings=8", f"--trainer.max_steps={steps}", "--data.init_args.val_fraction=0"
        options += (f"--data.init_args.sources={sources}",)
        assert cache(tmp_path / "cache", tiny_llama, *options) == 0
        found.append(json.loads((tmp_path / "cache" / "done.json").read_text()))
    assert [done["rows"] for done in found] == [1, 12]
    assert 8 <= found[0]["examples"] < found[1]["examples"] <= 120


def test_fit_reads_it_without_a_teacher_and_sees_what_a_teacher_would_say(tiny_llama, tmp_path):
    """With all but one token kept the buckets are the vocabulary: online and cached agree to float16's rounding."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(other)
    options = f"{{model_name_or_path: {other}, quantization: none, dtype: float32}}"
    teacher = f"--model.init_args.objective.init_args.teacher={options}"
    every = "--model.init_args.objective.init_args.cache.top_k=258"
    assert cache(tmp_path / "cache", tiny_llama, teacher, every) == 0
    results, weights = [], []
    for folder in (tmp_path / "cache", None):
        cli = cli_of(folder, tiny_llama, tmp_path, teacher, *([every] if folder else []))
        cli.trainer.fit(cli.model, cli.datamodule)
        results.append({name: float(value) for name, value in cli.trainer.callback_metrics.items()})
        weights.append({n: p.detach() for n, p in cli.model.named_parameters() if p.requires_grad})
        assert (cli.model.teacher_source.teacher is None) == (folder is not None)
    cached, online = results
    assert cached.keys() == online.keys()
    assert online["val/kl"] > 1e-3
    for name, value in online.items():
        assert cached[name] == pytest.approx(value, rel=2e-2, abs=1e-5), name
    for name, value in weights[1].items():
        assert torch.nn.functional.cosine_similarity(weights[0][name].flatten(), value.flatten(), 0) > 0.999, name


REFUSALS = {
    "data.seed was 0, is 3": "--data.init_args.seed=3",
    "data.sources": "--data.init_args.sources=['synthetic://?findings=151&seed=1']",
    "data.sequence_length was 4096, is 5000": "--data.init_args.sequence_length=5000",
    "teacher.dtype was float32, is bfloat16": "--model.init_args.backbone.dtype=bfloat16",
    "top_k was 8, is 9": "--model.init_args.objective.init_args.cache.top_k=9",
    "temperature 4: the cache": "--model.init_args.objective.init_args.temperature=4",
    "covers 3 rows of training and the run takes 4": "--trainer.max_steps=4",
    "no teacher's cache there": "--model.init_args.objective.init_args.cache.dir=nowhere",
}


@pytest.mark.parametrize(("message", "option"), REFUSALS.items(), ids=REFUSALS)
def test_fit_refuses_a_cache_of_something_else(cached, tiny_llama, tmp_path, message, option):
    cli = cli_of(cached, tiny_llama, tmp_path, option)
    with pytest.raises(command.UserError, match=message):
        cli.trainer.fit(cli.model, cli.datamodule)


def test_another_tokenizer_template_and_teacher_are_named(cached, tiny_llama, tiny_mistral, tmp_path):
    cli = cli_of(cached, tiny_mistral, tmp_path)
    with pytest.raises(command.UserError, match=r"tokenizer was .*; template was .*; data\.instructions"):
        cli.trainer.fit(cli.model, cli.datamodule)
    other = f"--model.init_args.objective.init_args.teacher={{model_name_or_path: {tiny_mistral}, quantization: none}}"
    cli = cli_of(cached, tiny_llama, tmp_path, other)
    with pytest.raises(command.UserError, match=r"teacher\.weights was .*; teacher\.dtype was float32, is auto"):
        cli.trainer.fit(cli.model, cli.datamodule)


MISTAKES = {
    "has no teacher to cache": ["--model.init_args.objective.init_args.alpha=0"],
    "the vocabulary has 259 tokens": ["--model.init_args.objective.init_args.cache.top_k=259"],
    "--devices 0 is too small": ["--devices=0"],
    "was made for something else: top_k was 8": ["--model.init_args.objective.init_args.cache.top_k=9"],
    "how much to cache is not known": ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(cached, tiny_llama, capsys, message, options):
    assert cache(cached, tiny_llama, *options) == 2
    assert message in next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))

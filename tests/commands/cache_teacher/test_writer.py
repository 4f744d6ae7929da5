"""The cache that ``cache-teacher`` writes: complete, reproducible after interruptions, and readable by ``fit``."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from commands.cache_teacher import command, writer
from datamodules.errors import UserError
from lightning_modules.losses.teacher_cache import digest
from lightning_modules.losses.teacher_shards import Shard
from tests.helpers.teacher_cache_run import TRAINING_SHARDS, build_cli, contents, write_cache


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    assert write_cache(folder, tiny_llama) == 0
    return folder


def test_every_example_is_stored_once(cached):
    done, key = (json.loads((cached / name).read_text()) for name in ("done.json", "key.json"))
    assert len(done["shards"]) == TRAINING_SHARDS + 1
    assert (cached / done["shards"][0]).stat().st_mode & 0o077 == (cached / "key.json").stat().st_mode & 0o077
    assert set(contents(cached)) == {*done["shards"], "done.json", "key.json"}
    shards = [Shard(cached / name, digest(key)) for name in done["shards"]]
    keys = np.concatenate([shard.keys for shard in shards])
    assert len(keys) == len(set(keys.tolist())) == done["examples"] == 150
    assert sum(int(shard.ends[-1]) for shard in shards) == done["tokens"]
    assert (done["rows"], key["top_k"], key["temperatures"], key["vocabulary"]) == (3, 8, [2.0], 259)


def test_a_killed_command_that_is_run_again_writes_the_same_bytes(cached, tmp_path, tiny_llama):
    folder = tmp_path / "cache"
    child = os.fork()
    if child == 0:  # is killed while it writes its third shard
        written = []

        def save(path, *rest):
            if len(written) == 2:
                path.with_name(f"{path.name}.0.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
            save_shard(path, *rest)

        save_shard, writer.save_shard = writer.save_shard, save
        write_cache(folder, tiny_llama)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert not (folder / "done.json").exists()
    assert write_cache(folder, tiny_llama) == 0
    assert contents(folder) == contents(cached)


def test_two_processes_write_the_same_bytes_as_one(cached, tmp_path, tiny_llama, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(command.RANKS, "2")
    for rank, shards in ((1, 2), (0, TRAINING_SHARDS + 1)):
        monkeypatch.setenv(command.RANK, str(rank))
        assert write_cache(folder, tiny_llama) == 0
        assert len(list(folder.glob("*.safetensors"))) == shards
    assert contents(folder) == contents(cached)


def test_damaged_shards_are_detected_and_written_again(cached, tmp_path, tiny_llama, capsys):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, content in contents(cached).items():
        (folder / name).write_bytes(content)
    first, second = folder / "train-00001.safetensors", folder / "val-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    assert write_cache(folder, tiny_llama) == 0
    printed = capsys.readouterr().err
    assert "train-00001.safetensors can't be read" in printed
    assert "val-00000.safetensors was changed" in printed
    assert "2 shards written" in printed
    assert contents(folder) == contents(cached)


def test_a_longer_run_adds_to_the_same_cache(tmp_path, tiny_llama):
    records = []
    sources = [f"synthetic://?findings=20&seed={seed}" for seed in range(6)]
    for steps in (1, 12):
        options = "--data.init_args.block_findings=8", f"--trainer.max_steps={steps}", "--data.init_args.val_fraction=0"
        options += (f"--data.init_args.sources={sources}",)
        assert write_cache(tmp_path / "cache", tiny_llama, *options) == 0
        records.append(json.loads((tmp_path / "cache" / "done.json").read_text()))
    assert [done["rows"] for done in records] == [1, 12]
    assert 8 <= records[0]["examples"] < records[1]["examples"] <= 120


def test_fit_with_a_cache_equals_fit_with_an_online_teacher(tiny_llama, tmp_path):
    """With all but one token kept the buckets are the vocabulary: both fits agree to the rounding of float16."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(other)
    options = f"{{model_name_or_path: {other}, quantization: none, dtype: float32}}"
    teacher = f"--model.init_args.objective.init_args.teacher={options}"
    every_token = "--model.init_args.objective.init_args.cache.top_k=258"
    assert write_cache(tmp_path / "cache", tiny_llama, teacher, every_token) == 0
    results, weights = [], []
    for folder in (tmp_path / "cache", None):
        cli = build_cli(folder, tiny_llama, tmp_path, teacher, *([every_token] if folder else []))
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


OTHER_RUNS = {
    "data.seed was 0, is 3": "--data.init_args.seed=3",
    "data.sources": "--data.init_args.sources=['synthetic://?findings=151&seed=1']",
    "data.sequence_length was 4096, is 5000": "--data.init_args.sequence_length=5000",
    "teacher.dtype was float32, is bfloat16": "--model.init_args.backbone.dtype=bfloat16",
    "top_k was 8, is 9": "--model.init_args.objective.init_args.cache.top_k=9",
    "temperature 4: the cache": "--model.init_args.objective.init_args.temperature=4",
    "covers 3 rows of training and the run takes 4": "--trainer.max_steps=4",
    "no teacher's cache there": "--model.init_args.objective.init_args.cache.dir=nowhere",
}


@pytest.mark.parametrize(("message", "option"), OTHER_RUNS.items(), ids=OTHER_RUNS)
def test_fit_rejects_the_cache_of_another_run(cached, tiny_llama, tmp_path, message, option):
    cli = build_cli(cached, tiny_llama, tmp_path, option)
    with pytest.raises(UserError, match=message):
        cli.trainer.fit(cli.model, cli.datamodule)


def test_the_error_lists_a_different_tokenizer_template_and_teacher(cached, tiny_llama, tiny_mistral, tmp_path):
    cli = build_cli(cached, tiny_mistral, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer was .*; template was .*; data\.instructions"):
        cli.trainer.fit(cli.model, cli.datamodule)
    other = f"--model.init_args.objective.init_args.teacher={{model_name_or_path: {tiny_mistral}, quantization: none}}"
    cli = build_cli(cached, tiny_llama, tmp_path, other)
    with pytest.raises(UserError, match=r"teacher\.weights was .*; teacher\.dtype was float32, is auto"):
        cli.trainer.fit(cli.model, cli.datamodule)


def test_shards_without_a_key_are_not_overwritten(tmp_path, tiny_llama, capsys):
    (tmp_path / "train-00000.safetensors").write_bytes(b"of another program")
    assert write_cache(tmp_path, tiny_llama) == 2
    assert "it has shards but no key.json" in capsys.readouterr().err
    assert contents(tmp_path) == {"train-00000.safetensors": b"of another program"}

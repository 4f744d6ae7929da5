"""Constructor arguments in checkpoints: from Python and from the CLI, public class paths, trusted packages."""

import io
import sys
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

from datamodules.errors import UserError
from lightning_modules import (
    Backbone,
    CausalLMModule,
    CompletionCrossEntropy,
    Distillation,
    HiddenMatch,
    LoRA,
    TeacherCache,
)  # fmt: skip
from lightning_modules.allowed_classes import check_class_paths
from lightning_modules.hyperparameters import public_path, to_plain
from optimizers import Lion, WarmupCosine
from tests.helpers.lm_training import assert_same, checkpointed, module_for, trained


def cli(tmp_path, folder, args=(), **init_args):
    arguments = {
        "backbone": {
            "model_name_or_path": str(folder),
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        },
        "objective": {"class_path": "lightning_modules.CompletionCrossEntropy"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "lr_scheduler": {
            "class_path": "optimizers.WarmupCosine",
            "init_args": {"warmup_steps": 1, "min_lr_ratio": 0.1},
        },
    } | init_args
    config = {"model": {"class_path": "lightning_modules.CausalLMModule", "init_args": arguments}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return LightningCLI(
        LightningModule,
        subclass_mode_model=True,
        run=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=None,
        args=["--config", str(path), "--trainer.logger", "false", *args],
    )


def test_a_module_built_in_python_loads_from_its_checkpoint_alone(tiny_llama, tmp_path):
    schedule = partial(WarmupCosine, warmup_steps=1, min_lr_ratio=0.2)
    objective = Distillation(teacher=Backbone(str(tiny_llama), adapter="some/adapter"), alpha=0.0, chunk_size=9)
    module = module_for(
        tiny_llama, objective, partial(torch.optim.AdamW, lr=3e-3), schedule, target_modules=("q_proj",)
    )
    _, path = checkpointed(module, tmp_path)
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert_same(trained(loaded), trained(module), atol=0)
    assert loaded.backbone == module.backbone
    assert loaded.objective == objective
    optimizer = loaded.optimizer([torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 3e-3
    assert isinstance(loaded.lr_scheduler(optimizer, 10), WarmupCosine)
    _, path = checkpointed(loaded, tmp_path)  # continues training, and its own checkpoint is complete too
    assert CausalLMModule.load_from_checkpoint(path).hparams == module.hparams


@pytest.mark.parametrize("built_by", ["python", "cli"])
def test_arguments_replace_those_of_the_checkpoint(tiny_llama, tmp_path, built_by):
    module = module_for(tiny_llama) if built_by == "python" else cli(tmp_path, tiny_llama).model
    _, path = checkpointed(module, tmp_path)
    backbone = Backbone(str(tiny_llama), lora=module.backbone.lora, activation_checkpointing="full")
    optimizer = partial(torch.optim.SGD, lr=0.7)
    loaded = CausalLMModule.load_from_checkpoint(
        path, backbone=backbone, objective=Distillation(alpha=0.2), optimizer=optimizer, lr_scheduler=None
    )
    assert loaded.backbone == backbone
    assert loaded.objective == Distillation(alpha=0.2)
    assert loaded.optimizer([torch.nn.Parameter(torch.ones(2))]).defaults["lr"] == 0.7
    assert loaded.lr_scheduler is None


def test_an_argument_that_can_not_be_stored_is_passed_again(tiny_llama, tmp_path):
    def local_optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    module = module_for(tiny_llama, optimizer=local_optimizer)
    with pytest.warns(UserWarning, match="the checkpoint does not hold optimizer: pass it to load_from_checkpoint"):
        _, path = checkpointed(module, tmp_path)
    assert CausalLMModule.load_from_checkpoint(path, optimizer=local_optimizer).optimizer is local_optimizer


class Weighted(CausalLMModule):
    """The module of another experiment, with one more argument."""

    def __init__(self, backbone: Backbone, objective: CompletionCrossEntropy, optimizer: type, weight: float = 1.0):
        super().__init__(backbone, objective, optimizer)
        self.weight = weight


def test_a_subclass_keeps_its_own_arguments(tiny_llama, tmp_path):
    module = Weighted(
        Backbone(str(tiny_llama), lora=LoRA(rank=2)), CompletionCrossEntropy(), torch.optim.SGD, weight=2.5
    )
    assert module.hparams["weight"] == 2.5
    assert module.hparams["optimizer"] == {"class_path": "torch.optim.SGD"}


def test_the_cli_builds_a_light_module(tmp_path, tiny_llama):
    module = cli(tmp_path, "a/model/that/is/nowhere").model
    assert isinstance(module, CausalLMModule)
    assert module.model is None
    lora = LoRA(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))
    assert module.backbone == Backbone("a/model/that/is/nowhere", lora=lora)


def test_a_module_built_by_the_cli_loads_from_its_checkpoint_alone(tmp_path, tiny_llama):
    module = cli(tmp_path, tiny_llama, objective={
        "class_path": "lightning_modules.Distillation",
        "init_args": {"teacher": {"model_name_or_path": str(tiny_llama), "quantization": "none"}, "alpha": 0.25},
    }).model  # fmt: skip
    assert module.objective == Distillation(teacher=Backbone(str(tiny_llama)), alpha=0.25)
    _, path = checkpointed(module, tmp_path)
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert_same(trained(loaded), trained(module), atol=0)
    assert (loaded.backbone, loaded.objective) == (module.backbone, module.objective)


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [
        ("torch.optim.AdamW", {"lr": 1e-3, "weight_decay": 0.1}),
        ("optimizers.Lion", {"lr": 1e-4, "betas": [0.9, 0.99]}),
        ("bitsandbytes.optim.Lion8bit", {"lr": 1e-4, "min_8bit_size": 16}),
        ("bitsandbytes.optim.PagedAdamW8bit", {"lr": 1e-4, "min_8bit_size": 16}),
    ],
)
def test_optimizers_by_class_path(tmp_path, tiny_llama, class_path, init_args):
    if class_path.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    module = cli(tmp_path, tiny_llama, optimizer={"class_path": class_path, "init_args": init_args}).model
    trainer, _ = checkpointed(module, tmp_path)
    optimizer = trainer.optimizers[0]
    assert type(optimizer).__name__ == class_path.rpartition(".")[2]
    assert optimizer.defaults["lr"] == init_args["lr"]
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, WarmupCosine)


# ---------------------------------------------------------------------- class paths


@pytest.mark.parametrize(
    ("cls", "path"),
    [
        (CompletionCrossEntropy, "lightning_modules.CompletionCrossEntropy"),
        (Distillation, "lightning_modules.Distillation"),
        (LoRA, "lightning_modules.LoRA"),
        (TeacherCache, "lightning_modules.TeacherCache"),
        (Lion, "optimizers.Lion"),
        (WarmupCosine, "optimizers.WarmupCosine"),
        (torch.optim.AdamW, "torch.optim.AdamW"),
        (torch.optim.lr_scheduler.LambdaLR, "torch.optim.lr_scheduler.LambdaLR"),
        (Weighted, f"{__name__}.Weighted"),  # no package exports it
    ],
)
def test_the_public_path_of_a_class(cls, path):
    assert public_path(cls) == path


def test_classes_without_a_path_are_refused():
    class Local(torch.optim.SGD):
        pass

    with pytest.raises(TypeError, match="Local has no import path"):
        to_plain(Local)
    with pytest.raises(TypeError, match="can't be stored in a checkpoint"):
        to_plain(lambda parameters: None)


def class_paths(value):
    """Yields every stored class path."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"]
        for item in value.values():
            yield from class_paths(item)


@pytest.mark.parametrize("built_by", ["python", "cli"])
def test_checkpoints_store_public_class_paths(tiny_llama, tmp_path, built_by):
    objective = Distillation(hidden=HiddenMatch({"layers.0": "layers.0"}), alpha=0.5)
    if built_by == "python":
        module = module_for(tiny_llama, objective, partial(Lion, lr=1e-4), partial(WarmupCosine, warmup_steps=1))
    else:
        module = cli(tmp_path, tiny_llama, objective={"class_path": "lightning_modules.Distillation"},
                     optimizer={"class_path": "optimizers.Lion", "init_args": {"lr": 1e-4}}).model  # fmt: skip
    _, path = checkpointed(module, tmp_path)
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert set(class_paths(stored)) == {"lightning_modules.Distillation", "optimizers.Lion", "optimizers.WarmupCosine"}
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert loaded.objective == module.objective
    assert_same(trained(loaded), trained(module), atol=0)


# ---------------------------------------------------------------------- checkpoints that name code


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A package on the path that records its import in a file, and that file."""
    folder, proof = tmp_path / "path", tmp_path / "imported"
    folder.mkdir()
    (folder / "planted.py").write_text(
        f"import torch\nopen({str(proof)!r}, 'w').close()\nclass Optimizer(torch.optim.SGD):\n    pass\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return proof


def tampered(path, change):
    """Applies a change to the stored arguments of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["hyper_parameters"])
    torch.save(checkpoint, path)


CLASS = {"class_path": "planted.Optimizer", "init_args": {"lr": 0.1}}
CHANGES = {
    "class_path": lambda stored: stored.update(optimizer=CLASS),
    "string": lambda stored: stored.update(optimizer="planted.Optimizer"),
    "quoted": lambda stored: stored.update(optimizer="'planted.Optimizer'"),
    "yaml": lambda stored: stored.update(optimizer="{class_path: planted.Optimizer, init_args: {lr: 0.1}}"),
    "schedule": lambda stored: stored.update(lr_scheduler={"class_path": "planted.Optimizer"}),
    "nested": lambda stored: stored["objective"]["init_args"].update(cache=CLASS),
    "callable": lambda stored: stored.update(
        lr_scheduler={"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "planted.f"}}
    ),
    "_class_path": lambda stored: stored.update(_class_path="planted.Optimizer"),
    "_instantiator": lambda stored: stored.update(_instantiator="planted.Optimizer"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_code_that_a_checkpoint_names_does_not_run(tiny_llama, tmp_path, planted, change):
    _, path = checkpointed(module_for(tiny_llama), tmp_path)
    tampered(path, change)
    with pytest.raises(
        UserError, match=r"checkpoint argument .*planted.*Fix: if you trust the class, .*pass"
    ) as caught:
        CausalLMModule.load_from_checkpoint(path)
    assert "\n" not in str(caught.value)
    with path.open("rb") as file, pytest.raises(UserError, match="planted"):
        CausalLMModule.load_from_checkpoint(io.BytesIO(file.read()))
    assert not planted.exists()
    assert "planted" not in sys.modules


def test_a_file_with_a_class_path_is_refused(tiny_llama, tmp_path, planted):
    _, path = checkpointed(module_for(tiny_llama), tmp_path)
    config = tmp_path / "optimizer.yaml"
    config.write_text(yaml.safe_dump(CLASS))
    tampered(path, lambda stored: stored.update(optimizer=str(config)))
    with pytest.raises(UserError, match=r"checkpoint argument optimizer="):
        CausalLMModule.load_from_checkpoint(path)
    assert not planted.exists()


def test_a_class_that_the_caller_passes_is_used(tiny_llama, tmp_path, planted):
    _, path = checkpointed(module_for(tiny_llama), tmp_path)
    tampered(path, CHANGES["class_path"])
    loaded = CausalLMModule.load_from_checkpoint(path, optimizer=partial(torch.optim.SGD, lr=0.3))
    assert loaded.optimizer([torch.nn.Parameter(torch.ones(2))]).defaults["lr"] == 0.3
    import planted as module

    loaded = CausalLMModule.load_from_checkpoint(path, optimizer=partial(module.Optimizer, lr=0.2))
    assert type(loaded.optimizer([torch.nn.Parameter(torch.ones(2))])).__name__ == "Optimizer"
    assert planted.exists()


def test_ordinary_strings_are_no_class_paths(tmp_path):
    arguments = {
        "backbone": {"model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.3", "revision": "v1.0",
                     "adapter": str(tmp_path / "runs.old" / "adapter.best"), "dtype": "bfloat16"},
        "objective": {"class_path": "lightning_modules.Distillation",
                      "init_args": {"teacher": "base", "hidden": {"layers": {"layers.0": "layers.1"}}}},
        "weight": 1.5,
    }  # fmt: skip
    check_class_paths(arguments)
    with pytest.raises(UserError, match=r"checkpoint argument weight=subprocess\.Popen"):
        check_class_paths({"weight": "subprocess.Popen"})

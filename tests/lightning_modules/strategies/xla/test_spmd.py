"""Commands on 4 virtual XLA devices against the same commands on the CPU. Needs a process of its own."""

import os

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("torch_xla")
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}

from datamodules.batch import Batch
from lightning_modules.strategies.xla.layer_scan import LayerScan
from main import main
from tests.helpers.strategy_probe import Probe

pytestmark = [pytest.mark.tpu, pytest.mark.timeout(900)]

SMOKE = "configs/tpu_smoke.yaml"
ON_CPU = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.plugins=null"]
PLAIN = ["--model.init_args.backbone.kernels=eager", "--model.init_args.backbone.activation_checkpointing=none"]
FP32 = ["--model.init_args.backbone.dtype=float32"]
CALLBACKS = [
    "callbacks.XLAMonitor", "tests.helpers.strategy_probe.Probe", "callbacks.Throughput", "callbacks.RunRecord",
    "callbacks.Preemption", "callbacks.AdapterCheckpoint",
]  # fmt: skip


@pytest.fixture(scope="module")
def command(tiny_mistral, tmp_path_factory):
    """Returns a function from a name to the arguments of a run: a tiny model, every callback, frequent checkpoints."""
    folder = tmp_path_factory.mktemp("xla")
    checkpoint = {"every_n_train_steps": 15, "save_top_k": -1, "save_last": True, "filename": "{step}"}
    callbacks = [{"class_path": name} for name in CALLBACKS] + [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {
            "class_path": "callbacks.ConsoleProgress",
            "init_args": {"log_interval_seconds": 1e6},
        },  # it reads the loss when it prints a line
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
    ]
    trainer = {"max_steps": 30, "log_every_n_steps": 10, "val_check_interval": 60, "callbacks": callbacks}
    (folder / "overlay.yaml").write_text(yaml.safe_dump({"trainer": trainer}))

    def arguments(name, *more, subcommand="fit"):
        return [
            subcommand, "--config", SMOKE, "--config", str(folder / "overlay.yaml"),
            "--allow_class=tests.helpers.strategy_probe.Probe",
            f"--model.init_args.backbone.model_name_or_path={tiny_mistral}", "--model.init_args.backbone.lora.rank=8",
            f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.logger.init_args.name={name}", *more,
        ]  # fmt: skip

    arguments.folder = folder
    return arguments


@pytest.fixture(scope="module")
def sharded(command):
    """Runs 30 steps in float32 on 4 devices: (the probe, the run's folder)."""
    assert main(command("sharded", *FP32)) == 0
    return Probe.last, command.folder / "sharded" / "version_0"


@pytest.fixture(scope="module")
def on_cpu(command, sharded):
    """Runs the same on the CPU, afterwards: a backward pass on the CPU before XLA's first one would break XLA's."""
    assert main(command("on_cpu", *FP32, *ON_CPU, *PLAIN)) == 0
    return Probe.last


def test_losses_in_float32_are_those_of_the_cpu(sharded, on_cpu):
    assert len(on_cpu.losses) == 30
    assert sharded[0].losses[:10] == pytest.approx(on_cpu.losses[:10], abs=1e-5)
    assert on_cpu.losses[9] < on_cpu.losses[0]


def test_groups_of_devices_with_full_copies_of_the_weights_have_the_same_losses(command, on_cpu):
    few = [
        "--trainer.max_steps=3",
        "--trainer.limit_val_batches=0",
        "--trainer.strategy.init_args.data_parallel_size=2",
    ]
    assert main(command("groups", *FP32, *few)) == 0
    assert Probe.last.losses == pytest.approx(on_cpu.losses[:3], abs=1e-5)


def test_losses_in_bfloat16_are_near(command, sharded):
    few = ["--trainer.max_steps=10", "--trainer.limit_val_batches=0"]
    assert main(command("sharded_bf16", *few)) == 0
    losses = Probe.last.losses
    assert next(p for n, p in Probe.last.module.named_parameters() if "embed" in n).dtype == torch.bfloat16
    assert main(command("on_cpu_bf16", *few, *ON_CPU, *PLAIN)) == 0
    assert losses == pytest.approx(Probe.last.losses, abs=1e-2)


def test_nothing_is_compiled_or_read_after_the_warm_up(sharded):
    probe, _ = sharded
    warm = next(counts for step, counts in probe.counts if step == 3)
    before_checkpoint = [counts for step, counts in probe.counts if step <= 14][-1]
    assert before_checkpoint.compilations == warm.compilations
    after_checkpoint = next(counts for step, counts in probe.counts if step == 16)
    assert probe.counts[-1][1].compilations == after_checkpoint.compilations
    steps = {step: counts.transfers for step, counts in probe.counts}
    reads = {step: steps[step] - steps[step - 1] for step in range(4, 31)}
    # the values logged at a step are read after it: loss, accuracy and norm, three scalars; step 15 saves a checkpoint
    assert {step: n for step, n in reads.items() if n and step != 15} == {10: 3, 20: 3}


def test_checkpoints_are_compiled_once(sharded):
    probe, _ = sharded
    last = {step: counts.compilations for step, counts in probe.counts}
    assert last[16] - last[14] <= 4  # gathering adapters and optimizer states


def test_a_loop_over_layers_has_the_gradients_of_the_layers(sharded, monkeypatch):
    module = sharded[0].module.train()
    rows = torch.randint(5, 200, (4, 128))
    segments, positions = torch.arange(128).div(50, rounding_mode="floor"), torch.arange(128) % 50
    batch = Batch(rows, positions.expand(4, -1).contiguous(), rows, segments.expand(4, -1).contiguous())

    def gradients():
        strategy = module.trainer.strategy
        module.decoder.hidden_states(strategy.batch_to_device(batch)).square().mean().backward()
        gathered = strategy.backend.collect({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
        module.zero_grad()
        return gathered

    layers = module.decoder.model.model.layers
    assert isinstance(layers, LayerScan) and len(layers[:]) == 1
    looped = gradients()
    monkeypatch.setattr("lightning_modules.strategies.xla.layer_scan._can_loop", lambda layers: False)
    assert len(layers[:]) == 2
    torch.testing.assert_close(looped, gradients(), rtol=1e-5, atol=1e-7)


HIDDEN = "--model.init_args.objective.init_args.hidden={layers: {layers.0: layers.0}}"  # a hook splits the loop


@pytest.mark.parametrize(("name", "more"), [("logits", []), ("states", [HIDDEN])])
def test_distillation_from_the_base_and_evaluation_on_the_host(command, sharded, name, more):
    arguments = [
        *FP32, "--trainer.max_steps=3", "--trainer.limit_val_batches=0",
        "--model.init_args.objective=lightning_modules.Distillation", "--data.init_args.packing=packed", *more,
    ]  # fmt: skip
    options = "{tasks: [risk], num_samples: 2, max_new_tokens: 3, evaluate_untuned: false}"
    evaluation = f"{{class_path: callbacks.Evaluation, init_args: {options}}}"
    assert main(command(name, *arguments, f"--trainer.callbacks+={evaluation}")) == 0
    losses = Probe.last.losses
    assert (command.folder / name / "version_0" / "evaluation.json").is_file()
    assert main(command(f"{name}_on_cpu", *arguments, *ON_CPU, *PLAIN)) == 0
    assert losses == pytest.approx(Probe.last.losses, abs=1e-5)


def test_a_user_error_is_one_line(command, sharded, capsys):
    for argument, word in {
        "--model.init_args.backbone.quantization=nf4": "bitsandbytes does not run on a TPU",
        "--data.init_args.batch_size=6": "6 rows can't be divided over the 4 devices",
        "--trainer.plugins=null": "plugins: [lightning_modules.strategies.TruePrecision]",
        "--trainer.devices=4": "one process drives all XLA devices",
        "--model.init_args.backbone.attn_implementation=pallas": "does not support a shared prefix",
    }.items():
        assert main(command("refused", *FP32, argument)) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and word in errors[0]
    flash = ["--model.init_args.backbone.attn_implementation=pallas", "--data.init_args.packing=packed"]
    assert main(command("refused", *FP32, *flash)) == 2
    assert "pallas: its kernel needs a TPU" in capsys.readouterr().err


def test_resumed_equals_uninterrupted(command, sharded):
    _, run = sharded
    checkpoint = run / "checkpoints" / "step=15.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert all("lora" in name and not tensor.is_xla for name, tensor in saved["state_dict"].items())
    expected = torch.load(run / "checkpoints" / "step=30.ckpt", weights_only=True)["state_dict"]
    assert main(command("resumed", *FP32, f"--ckpt_path={checkpoint}")) == 0
    again = command.folder / "resumed" / "version_0" / "checkpoints" / "step=30.ckpt"
    resumed = torch.load(again, weights_only=True)["state_dict"]
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_validate_finds_the_run(command, sharded, capsys):
    assert main(command("sharded", *FP32, subcommand="validate")) == 0
    assert "the newest run's checkpoint" in capsys.readouterr().out


def test_adapter_loads_in_plain_peft_with_the_same_logits(sharded, on_cpu, tiny_mistral):
    probe, run = sharded
    ids = torch.randint(5, 200, (4, 32))
    positions, segments = torch.arange(32).expand(4, 32).contiguous(), torch.ones_like(ids)
    batch = Batch(ids, positions, torch.full_like(ids, -100), segments)
    with torch.no_grad():
        module = probe.module.eval()
        hidden_BTC = module.decoder.hidden_states(batch.to("xla"))
        logits = module.decoder.head(hidden_BTC.flatten(0, 1)).cpu().unflatten(0, (4, 32))
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_mistral), run / "adapter" / "last")
        torch.testing.assert_close(logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    assert any(tensor.abs().max() > 0 for name, tensor in plain.state_dict().items() if "lora_B" in name)

"""Command lines of ``cache-teacher``, and of the fits that read its cache, for a tiny model on a CPU."""

from commands.cli import FinetuneCLI
from main import main

TRAINING_SHARDS = 4  #: number of training shards of the default arguments; validation has one more


def arguments(folder, model, *more):
    """Returns options of configs/distill.yaml for a tiny model; without a folder the teacher is online."""
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


def write_cache(folder, model, *more):
    """Runs ``cache-teacher`` and returns its exit status."""
    return main(["cache-teacher", *arguments(folder, model), "--shard_examples=40", *more])


def build_cli(folder, model, tmp_path, *more):
    """Builds trainer, module and data as ``fit`` does."""
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.callbacks=[]"]
    quiet = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.val_check_interval=3", "--trainer.enable_checkpointing=false"]
    return FinetuneCLI([*arguments(folder, model), *cpu, *quiet, *more], run=False)


def contents(folder):
    """Returns the bytes of every file of a folder by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}

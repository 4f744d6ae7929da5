"""Command lines that fit a tiny model on a few generated findings, in seconds."""

CHECKPOINT = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}"
RECORD = "{class_path: callbacks.RunRecord}"


def tiny_fit(model, folder, *options, callbacks=(RECORD, CHECKPOINT), steps=2):
    """Returns the arguments of ``fit`` with runs below ``<folder>/default``."""
    return [
        "fit", f"--model.init_args.backbone.model_name_or_path={model}",
        "--model.init_args.backbone.lora.num_top_layers=1", "--model.init_args.backbone.lora.rank=4",
        f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.max_steps={steps}",
        f"--trainer.callbacks=[{', '.join(callbacks)}]", "--trainer.enable_progress_bar=false",
        "--data.init_args.sources=['synthetic://?findings=300&seed=1']",
        "--data.init_args.val_fraction=0", "--data.init_args.test_fraction=0",
        *options,
    ]  # fmt: skip


def error_line(capsys):
    """Returns the only line on stderr that begins with ``error: ``."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line

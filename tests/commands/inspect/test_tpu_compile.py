"""``inspect --compile``: the settings that are traced, the compiler's process, and the report; without a TPU."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jsonargparse import Namespace

from commands.config_only_cli import ConfigOnlyCLI
from commands.inspect import tpu_compile
from datamodules.errors import UserError

GIB = 2**30
COST = {"argument": 3 * GIB, "output": GIB, "temporary": 6 * GIB, "peak": 8 * GIB, "code": 0, "seconds": 1.25}


@pytest.fixture
def cli(tmp_path, tiny_llama):
    return ConfigOnlyCLI(
        [
            "--config", "configs/tpu.yaml", f"--model.init_args.backbone.model_name_or_path={tiny_llama}",
            "--data.init_args.batch_size=16", "--data.init_args.sequence_length=512",
        ],
        run=False,
    )  # fmt: skip


@pytest.fixture
def compiler(monkeypatch):
    """Replaces tracing and the compiler; returns the arguments that they were called with."""
    calls = []
    monkeypatch.setattr(tpu_compile, "_trace", lambda *args: calls.append(args) or "graph")
    monkeypatch.setattr(tpu_compile, "_compile", lambda *args: calls.append(args) or dict(COST))
    return calls


def test_the_config_has_no_trainer_and_keeps_the_trainers_settings(cli):
    assert cli.trainer is None
    assert cli.trainer_config.strategy.class_path.startswith("lightning_modules.strategies")


def test_the_report_has_gib_per_core(cli, compiler):
    report = tpu_compile.compile_run(cli, "v3-8")
    assert (report["tpu"], report["cores"], report["tokens_a_core"]) == ("v3-8", 8, 16 * 512 // 8)
    # the compiler's own peak, 8 GiB, is below the sum of arguments and temporaries
    assert report["gib_a_core"] == {"argument": 3, "output": 1, "temporary": 6, "peak": 9, "code": 0}
    assert report["fits"]
    assert compiler[1] == ("graph", "v3-8")


def test_a_step_that_does_not_fit_is_an_error(cli, compiler):
    report = tpu_compile.compile_run(cli, "v2-8")
    assert not report["fits"]
    with pytest.raises(UserError, match=r"--compile v2-8: a step needs 9\.0 GiB of the 8 GiB of a core\. Fix: lower"):
        tpu_compile.check_fits(report)
    tpu_compile.check_fits(report | {"fits": True})


def test_the_report_is_printed_as_a_table(cli, compiler, capsys):
    tpu_compile.print_compiled(tpu_compile.compile_run(cli, "v3-8"))
    printed = capsys.readouterr().out
    for text in ("v3-8: 16 rows of 512 tokens, per core", "9.00", "16.00", "compiled in 1 s"):
        assert text in printed


def test_a_batch_that_the_cores_can_not_share_is_an_error(cli, compiler):
    cli.datamodule.batch_size = 12
    with pytest.raises(UserError, match=r"batch_size 12: no multiple of the 8 cores of a v3-8"):
        tpu_compile.compile_run(cli, "v3-8")
    with pytest.raises(UserError, match="unknown classes"):
        tpu_compile.compile_run(SimpleNamespace(datamodule=None, model=None), "v3-8")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"accumulate_grad_batches": 1}),
        ({"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 2}),
        ({"accumulate_grad_batches": 8}, {"accumulate_grad_batches": 2}),
        ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 1, "gradient_clip_val": 1.0}),
    ],
)
def test_only_settings_that_change_the_graph_are_traced(settings, expected):
    assert tpu_compile._trainer_options(Namespace(**settings)) == expected


def test_the_size_of_the_data_dimension_is_the_strategys():
    strategy = Namespace(init_args=Namespace(data_parallel_size=2))
    assert tpu_compile._data_parallel_size(Namespace(strategy=strategy)) == 2
    assert tpu_compile._data_parallel_size(Namespace(strategy="auto")) == 1


def test_the_compilers_process_imports_this_project(monkeypatch):
    """A relative import path is wrong as soon as this module is moved: the real process is started, up to its usage."""
    run = subprocess.run
    finished = []

    def started(command, **options):
        assert (command[0], command[1], command[-1]) == (sys.executable, "-m", "v3-8")
        check = "import lightning_modules.strategies.xla.aot_compile"
        finished.append(run([sys.executable, "-c", check], cwd=options["cwd"], capture_output=True, check=False))
        return SimpleNamespace(returncode=0, stdout="a note\n" + json.dumps(COST), stderr="")

    monkeypatch.setattr(subprocess, "run", started)
    assert tpu_compile._compile("graph", "v3-8") == COST
    assert finished[0].returncode == 0
    assert (tpu_compile.REPOSITORY / "lightning_modules" / "strategies" / "xla" / "aot_compile.py").is_file()


@pytest.mark.parametrize(
    ("status", "stderr", "message"),
    [
        (-9, "", "ran out of host memory"),
        (1, "first\nRESOURCE_EXHAUSTED: 20G\nlast", r"the compiler failed \(RESOURCE_EXHAUSTED: 20G\)"),
        (1, "first\nlast\n\n", r"the compiler failed \(last\)"),
        (1, "", r"the compiler failed \(\)"),
    ],
)
def test_a_failure_of_the_compiler_is_a_user_error(monkeypatch, status, stderr, message):
    failed = SimpleNamespace(returncode=status, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match=f"inspect: --compile v3-8: {message}.*Fix: "):
        tpu_compile._compile("graph", "v3-8")


def test_an_unknown_tpu_and_missing_packages_are_errors(monkeypatch):
    with pytest.raises(UserError, match=r"--compile v9-1: no such TPU\. Fix: give one of v2-8"):
        tpu_compile.check_compile("v9-1")
    monkeypatch.setattr(tpu_compile, "check_torch_xla", lambda: None)
    monkeypatch.setattr(tpu_compile, "find_spec", lambda name: None if name == "libtpu" else name)
    with pytest.raises(UserError, match=r"libtpu not installed\. Fix: `pip install"):
        tpu_compile.check_compile("v3-8")

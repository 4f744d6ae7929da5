"""Option parsing that the commands share."""

import argparse

import pytest

from commands.options import check_minimum, parse_function_options, parse_own_options, with_underscores
from datamodules.errors import UserError


def example(run: str, batch_size: int = 4, overwrite: bool = False) -> None:
    """Does nothing.

    Args:
        run: run folder.
        batch_size: answers at the same time.
        overwrite: replace files.
    """


def parse(*args):
    return parse_function_options(["export", *args], example, {"overwrite": "replace files"})


def test_the_options_are_the_arguments_of_the_function():
    assert parse("--run", "a") == {"run": "a", "batch_size": 4, "overwrite": False}
    assert parse("--run=a-b", "--batch-size", "2", "--overwrite") == {"run": "a-b", "batch_size": 2, "overwrite": True}
    assert parse("--run=a", "--overwrite=false")["overwrite"] is False


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--run=a", "--batch_size=many"], "batch_size"), ([], "run"), (["--run=a", "--batch_sise=3"], "--batch_sise")],
)
def test_an_invalid_option_is_one_line_with_the_help_as_fix(args, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(*args)
    assert str(caught.value).startswith("export: ")
    assert str(caught.value).endswith("Fix: see the options in `python main.py export --help`.")
    assert "\n" not in str(caught.value)


def test_the_help_has_the_summary_and_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("usage: python main.py export", "with a certificate", "--batch_size", "answers at the same time"):
        assert text in printed


def test_options_of_the_config_are_passed_on_in_their_order():
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--limit", type=int)
    options, rest = parse_own_options(parser, ["inspect", "--config", "a.yaml", "--limit=3", "--data.x=1"])
    assert (options.limit, rest) == (3, ["--config", "a.yaml", "--data.x=1"])
    with pytest.raises(UserError, match=r"inspect: argument --limit: .*Fix: see the options"):
        parse_own_options(parser, ["inspect", "--limit=many"])


def test_values_below_their_minimum_are_errors():
    check_minimum({"limit": 1, "seed": -5, "rows": None}, {"limit": 1, "rows": 3})
    with pytest.raises(UserError, match=r"^--limit 0: too small\. Fix: give at least 1\.$"):
        check_minimum({"limit": 0}, {"limit": 1})


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("--batch-size=a-b", "--batch_size=a-b"), ("--run", "--run"), ("a-b", "a-b"), ("-h", "-h")],
)
def test_only_the_name_of_an_option_gets_underscores(argument, expected):
    assert with_underscores(argument) == expected

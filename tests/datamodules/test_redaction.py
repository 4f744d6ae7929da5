"""Secrets are found by the name of their key, by their place in a text, by their form, and by their value."""

import json
import shlex

import pytest
import yaml

from commands.config_merge import CONFIGS
from datamodules import redaction
from datamodules.redaction import MASK, is_secret_name, masked_places, redact, redact_command, redact_text

SECRET = "Tr0ub4dor-3xyz"


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())


@pytest.mark.parametrize(
    "name",
    ["secret", "key", "access_key", "aws_secret_access_key", "accountKey", "sas_token", "token", "hf_token", "password",
     "db.password", "Authorization", "X-Api-Key", "client_secret", "auth", "passphrase", "AWS_SESSION_TOKEN", "cookie",
     "credentials", "X-Amz-Signature", "--hub_token", "APIKey"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "max_new_tokens", "token_cache", "keyword", "exact_keys", "monitor", "max_preamble_tokens", "author",
     "endpoint_url", "username", "region_name", "train/token_accuracy", ""],
)  # fmt: skip
def test_names_of_other_values(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_nothing_of_the_shipped_configs_is_masked(config):
    content = yaml.safe_load(config.read_text())
    assert redact(content) == content
    assert list(masked_places(content)) == []
    assert redact_text(config.read_text()) == config.read_text()


def test_data_is_masked_by_the_names_of_its_keys():
    options = {
        "key": SECRET, "anon": False, "token": "anon",
        "client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}},
        "auth": ["user", SECRET], "password": 12345678, "endpoint_url": f"https://user:{SECRET}@minio.local",
        "secret": None, "region_name": "eu-central-1", "max_retries": 3,
    }  # fmt: skip
    clean = redact({"storage_options": options})["storage_options"]
    assert SECRET not in json.dumps(clean)
    assert "12345678" not in json.dumps(clean)
    unchanged = {"anon": False, "token": "anon", "secret": None, "region_name": "eu-central-1", "max_retries": 3}
    assert {name: clean[name] for name in unchanged} == unchanged
    assert clean["endpoint_url"] == f"https://{MASK}@minio.local"
    assert options["key"] == SECRET  # the argument is not changed


TEXTS = {
    "url": f"could not read https://alice:{SECRET}@host/x.json: 403",
    "url with a token as user": f"git remote https://{SECRET}@github.com/a/b.git",
    "chained url": f"simplecache::ftp://alice:{SECRET}@host/x",
    "at sign in the password": f"https://alice:a@{SECRET}@host/x",
    "signed url": f"https://host/x?X-Amz-Signature={SECRET}&part=1",
    "sas": f"https://host/x?sv=1&sig={SECRET}",
    "bearer": f"Authorization: Bearer {SECRET}",
    "basic": "curl -H 'authorization: Basic dXNlcjpwYXNzd29yZA=='",
    "header in JSON": f'{{"X-Api-Key": "{SECRET}"}}',
    "cookie": f"Cookie: session={SECRET}",
    "assignment": f"AWS_SECRET_ACCESS_KEY={SECRET} python main.py",
    "connection string": f"AccountName=a;AccountKey={SECRET};EndpointSuffix=x",
    "option": f"--hub_token {SECRET} --verbose",
    "option with equals": f"--data.init_args.storage_options.secret={SECRET}",
    "yaml": f"  secret: {SECRET}\n  other: 1",
    "python": f"S3FileSystem(key='AK', secret='{SECRET}')",
    "Hugging Face": "token hf_abcdefghijklmnopqrstuvwxyz",
    "AWS": "the id AKIAIOSFODNN7EXAMPLE is unknown",
    "GitHub": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_ghi",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----",
}
PIECES = (SECRET, "dXNlcjpwYXNzd29yZA", "abcdefghijklmnop", "AKIAIOSFODNN7", "eyJzdWIi", "MIIEow")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_masked(text):
    clean = redact_text(text)
    assert MASK in clean
    assert not any(piece in clean for piece in PIECES)
    assert redact_text(clean) == clean


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/findings.json", "hf://datasets/org/name@main/x.parquet", "synthetic://?findings=300&seed=1",
     "trainer.max_stepz: no such key. Fix: see --help", "KeyError: 'category'", "unknown key: foo", "the token: 5",
     "basic understanding of the data", "https://host/path@2x.png", "user@host", "--max_new_tokens=64 --batch_size 4",
     "data/***/x.json", "--trainer.logger.init_args.save_dir runs"],
)  # fmt: skip
def test_other_text_is_kept(text):
    assert redact_text(text) == text


def test_a_command_line_is_masked_and_can_be_read_by_a_shell():
    options = {"secret": SECRET, "anon": False}
    words = ["python", "main.py", "fit", f"--data.init_args.storage_options={json.dumps(options)}",
             "--data.init_args.storage_options.key", SECRET, "--password", "a b c", "--trainer.max_steps=3",
             "--data.init_args.sources", f"['https://a:{SECRET}@h/x y.json']"]  # fmt: skip
    line = redact_command(words)
    assert SECRET not in line
    assert "a b c" not in line
    shown = shlex.split(line)
    assert len(shown) == len(words)
    assert json.loads(shown[3].partition("=")[2]) == {"secret": MASK, "anon": False}
    assert "--trainer.max_steps=3" in shown


def test_values_of_secrets_are_masked_wherever_they_appear(monkeypatch):
    assert redact_text(f"InvalidKey {SECRET}") == f"InvalidKey {SECRET}"
    redaction.remember_secrets({"data": {"storage_options": {"key": SECRET}, "sources": ["http://u:other-pw@h/x"]}})
    assert redact_text(f"InvalidKey {SECRET}, other-pw") == f"InvalidKey {MASK}, {MASK}"
    assert redact_text("environment-secret") == "environment-secret"
    monkeypatch.setenv("MY_SERVICE_TOKEN", "environment-secret")
    assert redact_text("x environment-secret x") == f"x {MASK} x"


def test_masked_places():
    config = {"data": {"storage_options": {"secret": SECRET, "anon": True}, "sources": ["a", f"http://u:{SECRET}@h/x"]}}
    assert list(masked_places(config)) == []
    places = dict(masked_places(redact(config)))
    assert places == {"data.storage_options.secret": MASK, "data.sources.1": f"http://{MASK}@h/x"}

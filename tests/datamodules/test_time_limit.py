"""A computation that does not end is stopped, in the main thread and in another one."""

import signal
import threading
import time

import pytest

from datamodules.errors import UserError
from datamodules.time_limit import TimeLimitReached, time_limit
from datamodules.tokenization import chat_template
from datamodules.tokenization.chat_format import ChatFormat
from tests.helpers.toy_tokenizers import build_chatml_tokenizer


def endless():
    while True:
        try:
            while True:
                time.sleep(0.001)
        except Exception:
            pass


def assert_stopped(results):
    began = time.monotonic()
    try:
        with time_limit(0.2):
            endless()
    except TimeLimitReached:
        results.append(time.monotonic() - began)


def test_an_endless_loop_of_the_main_thread_is_stopped():
    results, handler, timer = [], signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    assert_stopped(results)
    assert len(results) == 1
    assert 0.2 <= results[0] < 10
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(timer, abs=10)  # of pytest-timeout


def test_an_endless_loop_of_another_thread_is_stopped():
    results = []
    thread = threading.Thread(target=assert_stopped, args=(results,), daemon=True)
    thread.start()
    thread.join(20)
    assert len(results) == 1


def test_a_block_that_ends_in_time_is_not_disturbed():
    with time_limit(0.3):
        value = sum(range(1000))
    time.sleep(0.6)
    assert value == 499500


TEMPLATES = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "power": "{% set a = messages | length + 8 %}{{ a ** (a ** (a - 2)) }}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_endless_chat_template_is_a_user_error(template, monkeypatch):
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS", 0.5)
    tokenizer = build_chatml_tokenizer()
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(UserError, match=r"its chat template did not end within 0\.5 s"):
        ChatFormat(tokenizer)
    assert time.monotonic() - began < 30

"""Conversations: the cache is reused and changes nothing; Ctrl-C stops an answer only."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.models import cache as caches

from mlxfuse.generate.chat import Chat
from mlxfuse.generate.run import Settings, new_cache
from mlxfuse.loader import load
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.kv.options import KVOptions

from ..cli.test_cli import REPOSITORY, TEMPLATE, invoke, start
from ..models import tiny

LINES = ("Hello", "and now?", "a longer message than the ones before", "bye")


def write(folder, name):
    made = tiny.build(name, 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return str(tiny.write(folder / f"{name}.gguf", made))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder, name) for name in ("llama", "gemma3")}


@pytest.fixture
def chat(paths):
    model, tokenizer = load(paths["llama"])
    return Chat(model, tokenizer, Settings(max_tokens=6, system_prompt="be brief"))


def afresh(model, tokenizer, messages, count):
    """The answer without any cache."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    answers = stream_generate(model, tokenizer, ids, max_tokens=count)
    return [int(r.token) for r in answers if r.finish_reason != "stop"], len(ids)


# Gemma 3's window is shorter than the conversation: its caches take nothing back then.
@pytest.mark.parametrize(("name", "size"), [("llama", None), ("gemma3", None), ("llama", 24)])
def test_answers_are_those_without_a_cache(paths, name, size):
    model, tokenizer = load(paths[name])
    chat = Chat(model, tokenizer, Settings(max_tokens=6, max_kv_size=size))
    read = []
    for line in LINES:
        result = chat.say(line)
        want, total = afresh(model, tokenizer, chat.messages[:-1], 6)
        if size is None:  # a bounded cache forgets
            assert result.tokens == want, line
        read.append((result.prompt_tokens, total))
    assert read[0][0] == read[0][1]
    if (name, size) == ("llama", None):
        assert all(few < total for few, total in read[1:]), read


def test_a_cache_that_is_not_trimmed_would_change_the_answer(chat, monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(Chat, "_reuse", lambda self, ids: ids[self.cached_tokens :] or ids[-1:])
    chat.say(LINES[0])
    got = chat.say(LINES[1]).tokens
    assert got != afresh(chat._model, chat._tokenizer, chat.messages[:-1], 6)[0]


def test_reset_forgets_all_but_the_system_prompt(chat):
    first = chat.say("Hello").tokens
    chat.say("more")
    assert " ".join(m["role"] for m in chat.messages) == "system user assistant user assistant"
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert chat.cached_tokens == 0
    assert chat.say("Hello").tokens == first


def test_stopped_answers_leave_a_conversation_that_goes_on(chat):
    pieces = []
    result = chat.say("Hello", write=pieces.append, stop=lambda: bool(pieces))
    assert result.finish_reason == "interrupted"
    assert pieces == [result.text]
    assert 1 <= len(result.tokens) < 6
    assert chat.messages[-1] == {"role": "assistant", "content": result.text}
    second = chat.say("more")
    assert second.finish_reason == "length"
    assert second.tokens == afresh(chat._model, chat._tokenizer, chat.messages[:-1], 6)[0]


def test_stopped_while_the_prompt_is_read(paths):
    model, tokenizer = load(paths["llama"])
    chat = Chat(model, tokenizer, Settings(max_tokens=6, prefill_step_size=4))
    before = list(chat.messages)
    seen = []

    def on_prompt(done, total):
        seen.append(done)

    assert chat.say("a message of some length", on_prompt=on_prompt, stop=lambda: True) is None
    assert len(seen) == 1
    assert chat.messages == before
    got = chat.say("a message")
    assert got.tokens == afresh(model, tokenizer, chat.messages[:-1], 6)[0]


def test_a_cache_that_tells_no_offset_is_begun_anew(chat, monkeypatch):
    monkeypatch.setattr(caches.KVCache, "is_trimmable", lambda self: False)
    chat.say("Hello")
    result = chat.say("more")
    tokens, total = afresh(chat._model, chat._tokenizer, chat.messages[:-1], 6)
    assert (result.tokens, result.prompt_tokens) == (tokens, total)


def test_a_prompt_that_was_read_whole_still_gives_an_answer(chat):
    """Stopped when all of it was in the cache, and said again."""
    at_end = []
    stopped = chat.say(
        "Hello",
        on_prompt=lambda done, total: at_end.append(done == total),
        stop=lambda: at_end[-1],
    )
    assert stopped is None
    ids = chat._encode([*chat.messages, {"role": "user", "content": "Hello"}])
    assert chat._ids[: chat.cached_tokens] == ids
    got = chat.say("Hello")
    assert got.tokens == afresh(chat._model, chat._tokenizer, chat.messages[:-1], 6)[0]
    assert got.prompt_tokens == 1


def test_the_end_of_an_answer_is_not_read_again(tmp_path):
    made = tiny.build("llama", 0)
    made.metadata["tokenizer.chat_template"] = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}[assistant]"
    )
    model, tokenizer = load(tiny.write(tmp_path / "m.gguf", made))
    ends = {tokenizer.eos_token_id: 1e4}
    chat = Chat(model, tokenizer, Settings(max_tokens=6, logit_bias=ends))
    first = chat.say("Hello")
    assert (first.tokens, first.end_token) == ([], tokenizer.eos_token_id)
    assert first.prompt_tokens == len("[user]Hello[assistant]")
    assert chat.say("more").prompt_tokens == len("[user]more[assistant]")


# --- the command --------------------------------------------------------------------------


def test_lines_of_a_pipe_are_messages(paths):
    text = 'Hello\n\n"""\ntwo\nlines\n"""\nends \\\nhere\n/stats\n/nope\n/reset\nHello\n/exit\nno\n'
    result = invoke("chat", paths["llama"], "-m", "4", "--json", text=text)
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    # The template writes [role]content and a newline; nothing of it is a merge.
    assert answers[0]["prompt_tokens"] == len("[user]Hello\n")
    assert len(answers) == 4
    assert answers[3]["tokens"] == answers[0]["tokens"]
    assert "no command /nope" in result.stderr
    assert "tokens in the cache" in result.stderr
    assert "Generation: 4 tokens" in result.stderr


def test_a_bad_reference_is_one_message(tmp_path):
    result = invoke("chat", tmp_path / "no.gguf", text="Hello\n")
    assert (result.exit_code, result.stdout) == (1, "")


def read_until(terminal, text, seconds=60, again=lambda: None):
    """What is shown until ``text`` is; ``again`` is called when nothing comes for a while."""
    found, end = b"", time.monotonic() + seconds
    while text not in found:
        assert time.monotonic() < end, found
        if select.select([terminal], [], [], 3)[0]:
            found += os.read(terminal, 1024)
        else:
            again()
    return found


def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_chat(paths):
    terminal, theirs = pty.openpty()
    process = start("chat", paths["llama"], "-m", "-1", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(terminal, b">>>")
    os.write(terminal, b"go on\n")  # its answer has 742 tokens
    read_until(terminal, b"\xbd")  # of U+FFFD: it has begun
    process.send_signal(signal.SIGINT)
    read_until(terminal, b">>>")
    os.write(terminal, b"/stats\n")
    read_until(terminal, b"tokens in the cache")
    read_until(terminal, b">>>")
    process.send_signal(signal.SIGINT)
    # A signal that comes while the prompt is being put up is seen with the next one only.
    read_until(terminal, b"again", again=lambda: process.send_signal(signal.SIGINT))
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
            break
    assert process.returncode == 130


def test_a_closed_pipe_is_no_traceback(paths):
    process = start("chat", paths["llama"], "-m", "4", stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"Hello\n" * 3)
    process.stdin.close()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in process.stderr.read()


def test_without_a_terminal_the_answers_alone_are_on_stdout(paths):
    code = [sys.executable, "-m", "mlxfuse", "chat", paths["llama"], "-m", "3"]
    done = subprocess.run(
        code, input=b"Hello\n", capture_output=True, cwd=REPOSITORY, check=True, timeout=120
    )
    model, tokenizer = load(paths["llama"])
    text = Chat(model, tokenizer, Settings(max_tokens=3)).say("Hello").text
    assert done.stdout.decode(errors="replace") == text + "\n"


def test_the_cache_begins_plain_and_is_compressed_and_bounded(paths):
    model, tokenizer = load(paths["llama"])
    settings = Settings(max_tokens=30, kv=KVOptions(4, 4), quantized_kv_start=100)
    chat = Chat(model, tokenizer, settings)
    kinds = []
    for text in ("one", "a message of some length " * 5):
        chat.say(text)
        kinds.append({isinstance(c, CompressedKVCache) for c in chat._cache})
    assert kinds == [{False}, {True}]
    bounded = new_cache(model, replace(settings, max_kv_size=50, quantized_kv_start=0))
    assert {(c.keep, c.window) for c in bounded} == {(4, 46)}

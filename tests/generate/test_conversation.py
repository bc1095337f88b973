"""The context of a conversation: what is forgotten, refused and cut; and conversations in files."""

import math

import pytest

from mlxfuse.errors import MLXFuseError, UnsupportedError
from mlxfuse.generate import conversation
from mlxfuse.generate.chat import Chat
from mlxfuse.generate.run import Settings
from mlxfuse.loader import load

from ..models import tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
CONTEXT = 256  # tokens that the tiny model was made for; of its vocabulary one is a byte


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = tiny.build("llama", 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return load(tiny.write(tmp_path_factory.mktemp("talk") / "m.gguf", made))


def test_the_oldest_messages_are_forgotten_and_the_system_prompt_is_not(pair):
    chat = Chat(*pair, Settings(max_tokens=3, system_prompt="be brief"))
    told = []
    for letter in "abcd":
        assert chat.say(letter * 50, note=told.append) is not None
    assert told == ["the context of 256 tokens is full: the 2 oldest messages are forgotten"]
    users = [m["content"][0] for m in chat.messages if m["role"] == "user"]
    assert users == ["b", "c", "d"]
    assert chat.messages[0] == {"role": "system", "content": "be brief"}
    # What it said last is what it says to the messages that are left.
    fresh = Chat(*pair, Settings(max_tokens=3, system_prompt="be brief"))
    fresh.resume(chat.messages[:-2])
    assert fresh.say("d" * 50).text == chat.messages[-1]["content"]


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(pair):
    chat = Chat(*pair, Settings(max_tokens=3))
    chat.say("Hello")
    before = list(chat.messages)
    with pytest.raises(MLXFuseError, match=r"the message has 3\d\d tokens .* read 256"):
        chat.say("x" * 300)
    assert chat.messages == before
    assert chat.say("and now?") is not None


@pytest.mark.parametrize("same", [True, False])
def test_a_draft_changes_no_answer(pair, tmp_path, same):
    """Of the model itself, whose drafts are all taken, and of another, whose are hardly."""
    other = load(tiny.write(tmp_path / "d.gguf", tiny.build("llama", 1)))[0]
    settings = Settings(max_tokens=9, system_prompt="be brief")
    plain = Chat(*pair, settings)
    drafted = Chat(*pair, settings, draft_model=pair[0] if same else other)
    accepted = 0
    for text in ("Hello", "and now?", "x" * 40):
        want, got = plain.say(text), drafted.say(text)
        assert got.tokens == want.tokens
        assert got.prompt_tokens <= want.prompt_tokens + 2
        accepted += got.accepted
        stops = iter([False, False, True])
        assert len(drafted.say("more", stop=lambda s=stops: next(s)).tokens) == 3
        # What it had read of the answer that was stopped is taken back.
        drafted.messages = list(plain.messages)
    assert (accepted > 12) == same


def test_a_draft_needs_caches_that_can_be_cut(pair, tmp_path):
    hybrid = load(tiny.write(tmp_path / "h.gguf", tiny.build("qwen35", 0)))[0]
    with pytest.raises(UnsupportedError, match="--draft-model: its cache"):
        Chat(*pair, Settings(), draft_model=hybrid)


def test_an_answer_ends_with_the_context(pair):
    endless = dict.fromkeys(pair[1].eos_token_ids, -math.inf)
    chat = Chat(*pair, Settings(max_tokens=-1, logit_bias=endless))
    result = chat.say("y" * 100)
    assert result.finish_reason == "length"
    assert result.prompt_tokens + result.generation_tokens == CONTEXT
    assert chat.fill == 1
    # A bounded cache forgets by itself: then there is no end.
    bounded = Chat(*pair, Settings(max_tokens=3, max_kv_size=64))
    assert (bounded.context, bounded.fill) == (None, None)
    assert bounded.say("z" * 300) is not None


def test_another_system_prompt(pair):
    chat = Chat(*pair, Settings(max_tokens=3, system_prompt="be brief"))
    chat.say("Hello")
    chat.system_prompt = "be long"
    assert [m["content"] for m in chat.messages[:2]] == ["be long", "Hello"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be long"}]
    chat.system_prompt = None
    assert chat.messages == []


def test_a_conversation_in_a_file_goes_on(pair, tmp_path):
    path = tmp_path / "talk.json"
    chat = Chat(*pair, Settings(max_tokens=4, system_prompt="be brief"))
    chat.say("Hello")
    conversation.save(path, chat.messages)
    other = Chat(*pair, Settings(max_tokens=4))
    other.resume(conversation.load(path))
    assert other.system_prompt == "be brief"
    assert other.say("and now?").tokens == chat.say("and now?").tokens
    conversation.save(path, chat.messages)  # an earlier conversation is replaced
    assert conversation.load(path) == chat.messages
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"messages": 1}', '{"messages": [{"role": "user"}]}',
     '{"messages": [{"role": "root", "content": "x"}]}',
     '{"messages": [{"role": "user", "content": 1}]}'],
)  # fmt: skip
def test_a_file_that_is_no_conversation_is_neither_read_nor_replaced(text, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(MLXFuseError, match="expected a conversation"):
        conversation.load(path)
    with pytest.raises(MLXFuseError, match="is there and is no conversation"):
        conversation.save(path, [])
    assert path.read_text() == text

"""OpenAI's protocol, as its own client speaks it."""

import json

import openai
import pytest

from .conftest import openai_client, serving
from .speaker import CHATML, HERMES, Speaker, tokenizer

CALL = '{"name": "f", "arguments": {"x": 1}}'
HI = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"enum": [1, 2]}},
                "required": ["x"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def plain():
    """Says ``xabcdyz``, of which ab and cd are one token each."""
    tok = tokenizer("ab", "cd")
    with serving(Speaker(tok, ["x", "ab", "cd", "y", "z"]), tok) as server:
        yield server


@pytest.fixture
def client(plain):
    return openai_client(plain)


def ask(client, **more):
    return client.chat.completions.create(model="any", messages=HI, **more)


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


# --- stop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("bc", "xa", "stop"),
        ("b", "xa", "stop"),
        (["abc"], "x", "stop"),
        (["d", "zz"], "xabc", "stop"),
        ("xab", "", "stop"),
        ("zq", "xabcdyz", "stop"),  # held back, and never lost
        (["bq", "", "dyz!"], "xabcdyz", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_text_before_the_string(client, stop, text, reason, stream):
    got = ask(client, stop=stop, stream=stream)
    if stream:
        chunks = list(got)
        assert text_of(chunks) == text
        assert chunks[-1].choices[0].finish_reason == reason
    else:
        assert got.choices[0].message.content == text
        assert got.choices[0].finish_reason == reason


def test_what_is_held_back_comes_at_the_length_too(client):
    got = ask(client, stop="bcq", max_tokens=2)
    assert got.choices[0].message.content == "xab"
    assert got.choices[0].finish_reason == "length"


# --- lengths ---------------------------------------------------------------------------------


def test_without_max_tokens_the_context_that_is_left_is_used():
    tok = tokenizer()
    dot = {str(ord(".")): 100}
    with serving(Speaker(tok, ["x"], context=40), tok) as server:
        for most in ({}, {"max_tokens": 99}, {"max_tokens": None}):
            got = openai_client(server).completions.create(
                model="", prompt="12345", logit_bias=dot, **most
            )
            assert got.choices[0].text == "." * 35
            assert got.choices[0].finish_reason == "length"
            assert got.usage.total_tokens == 40


def test_a_prompt_that_fills_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="256") as error:
        ask(client, extra_body={"messages": [{"role": "user", "content": "x" * 300}]})
    assert error.value.code == "context_length_exceeded"


def test_usage_tells_what_the_cache_held(client):
    first = client.completions.create(model="", prompt="a long enough prompt")
    again = client.completions.create(model="", prompt="a long enough prompt")
    assert first.usage.prompt_tokens == again.usage.prompt_tokens == 20
    assert again.usage.prompt_tokens_details.cached_tokens >= 18
    assert again.usage.completion_tokens == 6  # and the token that ends it
    assert first.choices[0].text == again.choices[0].text == "xabcdyz"


# --- choices, probabilities, prompts ---------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices(client, stream):
    got = ask(client, n=3, stream=stream)
    if not stream:
        assert [c.message.content for c in got.choices] == ["xabcdyz"] * 3
        assert got.usage.completion_tokens == 18
        return
    texts, ends = {}, []
    for chunk in got:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert texts == dict.fromkeys(range(3), "xabcdyz")
    assert ends == ["stop"] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, stream):
    got = ask(client, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        found = [t for c in got if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    else:
        found = got.choices[0].logprobs.content
    assert [t.token for t in found] == ["x", "ab", "cd", "y", "z"]
    assert bytes(found[1].bytes) == b"ab"
    # One logit of 10 among zeros.
    assert all(-0.02 < t.logprob < -0.01 for t in found)
    assert found[0].top_logprobs[0].token == "x"
    assert found[0].top_logprobs[1].logprob == pytest.approx(found[0].logprob - 10, abs=1e-4)


def test_logprobs_of_a_text_that_a_stop_string_cuts(client):
    found = ask(client, logprobs=True, stop="c").choices[0]
    assert [t.token for t in found.logprobs.content] == ["x", "ab"]
    assert found.message.content == "xab"


@pytest.mark.parametrize("stream", [False, True])
def test_the_older_form_of_logprobs(client, stream):
    """With those of the prompt, whose first token follows nothing."""
    got = client.completions.create(
        model="", prompt="abd", logprobs=1, echo=True, max_tokens=3, stream=stream
    )
    parts = [choice for each in (got if stream else [got]) for choice in each.choices]
    assert "".join(part.text for part in parts) == "abdxabcd"

    def all_of(name):
        return [x for p in parts if p.logprobs for x in getattr(p.logprobs, name)]

    assert all_of("tokens") == ["ab", "d", "x", "ab", "cd"]
    assert all_of("text_offset") == [0, 2, 3, 4, 6]
    first, unlikely, *likely = all_of("token_logprobs")
    # One logit of 10 among zeros: "cd" follows "ab".
    assert first is None
    assert unlikely == pytest.approx(likely[0] - 10, abs=1e-4)
    assert all(-0.02 < each < -0.01 for each in likely)
    assert [sorted(t or ()) for t in all_of("top_logprobs")] == [
        [], ["cd", "d"], ["x"], ["ab"], ["cd"]
    ]  # fmt: skip


def test_a_prompt_is_scored_and_nothing_generated(client):
    """As lm-eval asks: lists of token ids, each as long as the context."""
    prompts = [[72, 105] * 128, [65]]
    got = client.completions.create(model="", prompt=prompts, echo=True, max_tokens=0, logprobs=0)
    long, short = got.choices
    assert len(long.logprobs.token_logprobs) == 256
    assert all(each < -10 for each in long.logprobs.token_logprobs[1:])
    assert short.logprobs.token_logprobs == [None]
    assert (short.text, short.finish_reason) == ("A", "length")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (257, 0)
    silent = client.completions.create(model="", prompt="Hi", max_tokens=0).choices[0]
    assert (silent.text, silent.finish_reason) == ("", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_lists_of_prompts_and_of_token_ids(client, stream):
    got = client.completions.create(
        model="", prompt=[[72, 105], [65]], echo=True, n=2, stream=stream
    )
    texts = {}
    for each in got if stream else [got]:
        for choice in each.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "Hixabcdyz", 1: "Hixabcdyz", 2: "Axabcdyz", 3: "Axabcdyz"}


def test_logit_bias(client):
    dot = ord(".")
    assert ask(client, logit_bias={str(dot): 100}, max_tokens=3).choices[0].message.content == "..."
    assert ask(client, logit_bias={str(dot): 5}).choices[0].message.content == "xabcdyz"


def test_penalties_are_for_what_was_generated(client):
    """Of a prompt of dots none is penalised; of dots that were generated each is."""
    dot = str(ord("."))
    biased = {"logit_bias": {dot: 15}, "prompt": "....", "max_tokens": 4, "model": ""}
    free = client.completions.create(**biased)
    assert free.choices[0].text == "...."
    once = client.completions.create(**biased, presence_penalty=10)
    assert once.choices[0].text == ".xabcd"
    more = client.completions.create(**biased, frequency_penalty=3)
    assert more.choices[0].text == "..xab"


# --- streams ---------------------------------------------------------------------------------


def test_a_stream_ends_with_usage_where_it_is_asked_for(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.usage is None for c in chunks[:-1])


# --- tools and reasoning ---------------------------------------------------------------------


def caller(*steps, words=(), controls=("<think>", "</think>"), template=HERMES, **more):
    tok = tokenizer(*words, controls=controls, template=template)
    return serving(Speaker(tok, steps, **more), tok)


MARKS = ("<tool_call>", "</tool_call>", CALL, " \n")


def calls_of(chunks):
    """As clients put deltas together: (id, name, arguments) of each call."""
    made = {}
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or ():
            call = made.setdefault(delta.index, ["", "", ""])
            for i, part in enumerate((delta.id, delta.function.name, delta.function.arguments)):
                call[i] += part or ""
    return list(made.values())


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_behind_a_reasoning(stream):
    steps = ["<think>", "q", "</think>", "a", "<tool_call>", CALL, "</tool_call>"]
    with caller(*steps, words=MARKS) as server:
        got = ask(openai_client(server), tools=TOOLS, stream=stream)
        if stream:
            chunks = list(got)
            assert text_of(chunks) == "a"
            thought = [c.choices[0].delta.to_dict().get("reasoning_content") for c in chunks]
            assert "".join(filter(None, thought)) == "q"
            ((identity, *call),) = calls_of(chunks)
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        else:
            (choice,) = got.choices
            message = choice.message.to_dict()
            assert (message["content"], message["reasoning"]) == ("a", "q")
            (made,) = choice.message.tool_calls
            identity, call = made.id, [made.function.name, made.function.arguments]
            assert choice.finish_reason == "tool_calls"
    assert len(identity) == 9
    assert call == ["f", '{"x": 1}']


def test_reasoning_between_marks_that_mlx_lm_has_no_table_for():
    marks = ("[THINK]", "[/THINK]")
    with caller("[THINK]", "q", "[/THINK]", "a", controls=marks) as server:
        message = ask(openai_client(server)).choices[0].message.to_dict()
    assert (message["content"], message["reasoning_content"]) == ("a", "q")


@pytest.mark.parametrize(
    ("more", "count"), [({}, 2), ({"parallel_tool_calls": False}, 1)], ids=["both", "one"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_two_calls(more, count, stream):
    second = CALL.replace("1", "2")
    # Distinct tokens: the second call is marked by the letters.
    words = ("<tool_call>", f"{CALL}</tool_call> \n<tool_call>{second}", "</tool_call>")
    with caller(*words, words=words) as server:
        got = ask(openai_client(server), tools=TOOLS, stream=stream, **more)
        if stream:
            arguments = [call[2] for call in calls_of(got)]
        else:
            arguments = [c.function.arguments for c in got.choices[0].message.tool_calls]
            assert got.choices[0].message.content is None
    assert arguments == ['{"x": 1}', '{"x": 2}'][:count]


@pytest.mark.parametrize("bad", ["{not json", "[1]", '{"arguments": {}}', '"text"', "[" * 9000])
def test_what_is_no_call_is_text(bad):
    with caller(
        "<tool_call>", bad, "</tool_call>", words=("<tool_call>", "</tool_call>", bad)
    ) as s:
        (choice,) = ask(openai_client(s), tools=TOOLS).choices
    assert choice.message.content == f"<tool_call>{bad}</tool_call>"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def test_without_tools_the_marks_are_text():
    with caller("<tool_call>", CALL, "</tool_call>", words=MARKS) as server:
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            (choice,) = ask(openai_client(server), **more).choices
            assert choice.message.content == f"<tool_call>{CALL}</tool_call>"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "f"}}], ids=["any", "named"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required(choice, stream):
    """The model would say something else, behind its reasoning."""
    with caller("<think>", "q", "</think>", "no", words=("no",)) as server:
        got = ask(openai_client(server), tools=TOOLS, tool_choice=choice, stream=stream)
        if stream:
            ((_, name, arguments),) = calls_of(got)
        else:
            assert got.choices[0].finish_reason == "tool_calls"
            assert got.choices[0].message.to_dict()["reasoning_content"] == "q"
            (call,) = got.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
    assert name == "f"
    assert json.loads(arguments)["x"] in (1, 2)


def test_the_template_is_told_of_tools_and_calls():
    """The prompt is echoed by a template that refuses it."""
    template = CHATML + "{{ raise_exception(tools | tojson ~ messages | tojson) }}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append(
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "7"}]}
    )
    tok = tokenizer(template=template)
    with (
        serving(Speaker(tok, ["x"]), tok) as server,
        pytest.raises(openai.BadRequestError) as error,
    ):
        openai_client(server).chat.completions.create(model="", messages=messages, tools=TOOLS)
    assert '"arguments": {"x": 1}' in str(error.value)
    assert '"content": "7"' in str(error.value)
    assert '"enum": [1, 2]' in str(error.value)


HARMONY = CHATML + "{# <|channel|> <|message|> #}"
CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>")


@pytest.mark.parametrize("stream", [False, True])
def test_channels_of_gpt_oss(stream):
    words = ("analysis", "why", "assistant", "final<|message|>", "because")
    steps = ["<|channel|>", "analysis", "<|message|>", "why", "<|end|>", "<|start|>", "assistant"]
    first = "<|channel|>final<|message|>"
    steps += [first, "because"]
    tok = tokenizer(*words, first, controls=CHANNELS, template=HARMONY)
    with serving(Speaker(tok, steps), tok) as server:
        got = ask(openai_client(server), stream=stream)
        if stream:
            chunks = list(got)
            assert text_of(chunks) == "because"
        else:
            message = got.choices[0].message.to_dict()
            assert (message["reasoning_content"], message["content"]) == ("why", "because")


def test_a_call_of_gpt_oss():
    call = 'to=functions.f <|constrain|>json<|message|>{"x": 1}'
    tok = tokenizer("commentary ", call, controls=CHANNELS, template=HARMONY)
    with serving(Speaker(tok, ["<|channel|>", "commentary ", call]), tok) as server:
        (choice,) = ask(openai_client(server), tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.arguments == '{"x": 1}'


# --- refusals --------------------------------------------------------------------------------


def test_a_refusing_template_and_an_image_are_bad_requests():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    tok = tokenizer(template=template + CHATML)
    with serving(Speaker(tok, ["x"]), tok) as server:
        client = openai_client(server)
        with pytest.raises(openai.BadRequestError, match="no system role"):
            client.chat.completions.create(model="", messages=[{"role": "system", "content": "x"}])
        image = {"type": "image_url", "image_url": {"url": f"{server.address}/health"}}
        with pytest.raises(openai.BadRequestError, match="reads text only"):
            client.chat.completions.create(
                model="", messages=[{"role": "user", "content": [image]}]
            )


def test_a_model_without_a_template_says_so():
    tok = tokenizer(template=None)
    with serving(Speaker(tok, ["x"]), tok) as server:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            ask(openai_client(server))
        got = openai_client(server).completions.create(model="", prompt="Hi")
        assert got.choices[0].text == "x"


def test_what_is_not_there_tells_what_is(client):
    with pytest.raises(openai.NotFoundError, match="there are POST /v1/chat/completions"):
        client.embeddings.create(model="", input="Hi")


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.to_dict()["context_length"]) == ("tiny", 256)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")

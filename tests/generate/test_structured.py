"""Answers of a given form: what each token may be, with reasoning, drafts and tools beside."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from jsonschema import validate
from typer.testing import CliRunner

from mlxfuse.cli import app
from mlxfuse.errors import GrammarError
from mlxfuse.generate.run import Settings, generate
from mlxfuse.generate.structured import Grammars
from mlxfuse.loader import load

from ..models import tiny
from ..server.speaker import HERMES, tokenizer

ANSWER = {"type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


def follow(constraint, tok, likes, length=60, prompt=(1, 2, 3)):
    """The text of what the model likes best among what is allowed.

    Args:
        likes: token -> what is added to its logit.
    """
    tokens = list(prompt)
    for _ in range(length):
        logits = mx.zeros((1, len(tok) + 5))  # a model's output may be padded
        for token, value in likes(tokens[len(prompt) :]).items():
            logits[:, token] += value
        masked = np.array(constraint(mx.array(tokens), logits))[0]
        assert np.isfinite(masked).any()
        tokens.append(int(masked.argmax()))
        if tokens[-1] in tok.eos_token_ids:
            return tok.decode(tokens[len(prompt) : -1])
    return tok.decode(tokens[len(prompt) :])


def nothing(_):
    return {}


def test_only_json_of_the_schema_is_left():
    tok = tokenizer("yes")
    made = Grammars(tok).json_schema(ANSWER)
    text = follow(made, tok, nothing)
    validate(json.loads(text), ANSWER)
    # However much the model would say something else, and end.
    ends = dict.fromkeys(tok.eos_token_ids, 50.0) | {tok.convert_tokens_to_ids("yes"): 40.0}
    validate(json.loads(follow(made.copy(), tok, lambda _: ends)), ANSWER)


def test_a_copy_begins_anew():
    tok = tokenizer()
    made = Grammars(tok).grammar('root ::= "ab"')
    assert [follow(made.copy(), tok, nothing) for _ in range(2)] == ["ab", "ab"]


@pytest.mark.parametrize("text", ['root ::= "no" | "on"', 'start: "no" | "on"'])
def test_grammars_of_llama_cpp_and_of_lark(text):
    tok = tokenizer()
    n, o = (tok.convert_tokens_to_ids(c) for c in "no")
    for first, said in ((n, "no"), (o, "on")):
        assert follow(Grammars(tok).grammar(text), tok, lambda _, t=first: {t: 5.0}) == said


@pytest.mark.parametrize(
    "schema",
    [{"enum": []}, False, {"type": "integer", "minimum": 3, "maximum": 2}, {"type": "foo"}, 5,
     {"type": "object", "required": ["x"], "additionalProperties": False}, {"pattern": "("},
     {"$ref": "http://127.0.0.1:9/x"}, {"not": {}}, {"allOf": [{"type": "null"}, {"const": 1}]}],
    ids=str,
)  # fmt: skip
def test_a_schema_that_nothing_satisfies_is_refused(schema):
    with pytest.raises(GrammarError, match="JSON schema"):
        Grammars(tokenizer()).json_schema(schema)


@pytest.mark.parametrize("text", ["", "x", "root ::= (", "root ::= other", 'start: "a'])
def test_what_is_no_grammar_is_refused(text):
    with pytest.raises(GrammarError, match="grammar"):
        Grammars(tokenizer()).grammar(text)


@pytest.mark.parametrize("reasoning", [False, True])
def test_reasoning_is_free_and_comes_first(reasoning):
    tok = tokenizer(controls=("<think>", "</think>"), template=HERMES)
    think, ends = (tok.convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    q = tok.convert_tokens_to_ids("q")
    thought = [q, q, ends] if reasoning else [think, q, q, ends]

    def likes(said):
        """To think, and then to end; it may not while it thinks."""
        wish = thought[len(said)] if len(said) < len(thought) else q
        return {wish: 9.0, **dict.fromkeys(tok.eos_token_ids, 5.0)}

    made = Grammars(tok).json_schema(ANSWER, reasoning=reasoning)
    said = follow(made, tok, likes).partition("</think>")
    assert said[0] == ("qq" if reasoning else "<think>qq")
    validate(json.loads(said[2]), ANSWER)
    # Where an answer has no reasoning, the mark of one is not allowed.
    plain = Grammars(tok).json_schema(ANSWER, plain=True)
    validate(json.loads(follow(plain, tok, likes)), ANSWER)


def test_a_tool_call_may_take_its_place():
    tok = tokenizer("<tool_call>", template=HERMES)
    call, q = (tok.convert_tokens_to_ids(t) for t in ("<tool_call>", "q"))
    said = [call, q, *tok.eos_token_ids][:3]

    def likes(so_far):
        return {said[min(len(so_far), 2)]: 9.0}

    assert follow(Grammars(tok).json_schema(ANSWER, tools=True), tok, likes) == "<tool_call>q"
    without = follow(Grammars(tok).json_schema(ANSWER), tok, likes)
    validate(json.loads(without), ANSWER)


def test_tokens_that_were_drafted_in_vain_are_forgotten():
    tok = tokenizer()
    a, b, c = (tok.convert_tokens_to_ids(t) for t in "abc")
    made = Grammars(tok).grammar('root ::= "ab" | "ac"')

    def allowed(*tokens):
        masked = np.array(made(mx.array([5, *tokens]), mx.zeros((1, len(tok)))))[0]
        return set(np.flatnonzero(np.isfinite(masked)).tolist())

    assert allowed() == {a}
    assert allowed(a) == {b, c}
    assert allowed(a, b) == {*tok.eos_token_ids}
    assert allowed(a) == {b, c}
    assert allowed(a, c) == {*tok.eos_token_ids}
    assert allowed() == {a}
    assert allowed(a, b, *tok.eos_token_ids, c) == {*tok.eos_token_ids}
    assert allowed(a) == {b, c}


def test_drafts_in_vain_are_taken_back_and_the_answer_is_not_read_again():
    tok = tokenizer(controls=("<think>", "</think>"), template=HERMES)
    ends, one, quote = (tok.convert_tokens_to_ids(t) for t in ("</think>", "1", '"'))
    made = Grammars(tok).json_schema({"type": "array", "items": {"enum": [1]}}, reasoning=True)
    kept, read = made._matcher, []

    class Counting:
        def __getattr__(self, name):
            return getattr(kept, name)

        def consume_token(self, token):
            read.append(token)
            return kept.consume_token(token)

    made._matcher = Counting()
    opening, comma, space = (tok.convert_tokens_to_ids(t) for t in ("[", ",", "Ġ"))

    def allowed(*tokens):
        masked = np.array(made(mx.array([5, *tokens]), mx.zeros((1, len(tok)))))[0]
        return set(np.flatnonzero(np.isfinite(masked)).tolist())

    said = [quote, quote, ends, opening]
    assert opening in allowed()
    for _ in range(50):
        assert allowed(*said, one, comma, space, one) == {comma, tok.convert_tokens_to_ids("]")}
        assert one in allowed(*said)
        said += [one, comma, space]
    assert len(read) == 1 + 49 * 3 + 50 * 4
    # And as far as into its reasoning, which is free.
    assert comma in allowed(quote)
    assert comma not in allowed(*said)


def test_of_a_file_whose_tokens_are_sentencepieces(tmp_path):
    """Its tokenizer has code of ours, which llguidance could not take over."""
    _, tok = load(tiny.write(tmp_path / "m.gguf", tiny.build("gemma3", 0)))
    text = follow(Grammars(tok).json_schema(ANSWER), tok, nothing)
    validate(json.loads(text), ANSWER)


@pytest.mark.parametrize("drafted", [False, True])
def test_generate_follows_a_schema(tmp_path, drafted):
    """On a random model, whose own words are no JSON; also with drafts."""
    made = tiny.build("llama", 0)
    model, tok = load(tiny.write(tmp_path / "m.gguf", made))
    draft = load(tiny.write(tmp_path / "d.gguf", tiny.build("llama", 1)))[0] if drafted else None
    settings = Settings(prompt="Hi", max_tokens=40, json_schema=ANSWER, ignore_chat_template=True)
    got = generate(model, tok, settings, draft_model=draft)
    validate(json.loads(got.text), ANSWER)
    assert got.finish_reason == "stop"
    with pytest.raises(json.JSONDecodeError):
        json.loads(generate(model, tok, replace(settings, json_schema=None)).text)


def test_the_command_follows_a_schema_in_a_file(tmp_path):
    model = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    schema = tmp_path / "schema.json"
    arguments = ["generate", str(model), "-p", "Hi", "--ignore-chat-template", "-m", "40"]
    arguments += ["--json-schema", str(schema)]
    for text, what in (("{", "not JSON"), ("[]", "an object"), ('{"enum": []}', "followed")):
        schema.write_text(text)
        got = CliRunner().invoke(app, arguments)
        assert got.exit_code == 4
        assert what in got.output
    schema.write_text(json.dumps(ANSWER))
    got = CliRunner().invoke(app, arguments)
    assert got.exit_code == 0, got.output
    validate(json.loads(got.stdout.splitlines()[0]), ANSWER)

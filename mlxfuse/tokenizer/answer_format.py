"""How a model marks tool calls and reasoning in its answers, by what its template says.

MLX-LM has a parser for each family and finds it by the template; what it lacks is here: the
channels of gpt-oss ("harmony"), https://cookbook.openai.com/articles/openai-harmony, and marks of
reasoning other than ``<think>``, each a token of the models that write it.
"""

from __future__ import annotations

import importlib
import json
import re
from types import SimpleNamespace
from typing import Any

_MESSAGE = "<|message|>"
_NEXT = [("<|end|>", "header"), ("<|start|>", "header")]
_HARMONY = {
    "initial_state": "header",
    "transitions": {
        "header": [
            ("<|channel|>analysis<|message|>", "reasoning"),
            ("to=functions.", "tool"),
            (_MESSAGE, "normal"),
        ],
        "reasoning": _NEXT,
        "normal": _NEXT,
        "tool": _NEXT,
    },
}

# Of Magistral, Seed-OSS, MiniMax M3, Command A and Apertus.
_REASONING = (
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
# Marks around an answer that are no part of it: Command A's.
_ANSWER = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")


def complete(wrapper: Any) -> Any:
    """MLX-LM's ``TokenizerWrapper``, told in place what its own tables lack.

    These are the marks of reasoning above, where its tables find none, and gpt-oss's channels.
    """
    if not wrapper.response_transitions:
        told = answer_format(wrapper._tokenizer)
        for name, value in told.items() if "response_format" in told else ():
            setattr(wrapper, f"_{name}", value)
    vocab = wrapper.get_vocab()
    known = next((pair for pair in _REASONING if all(mark in vocab for mark in pair)), None)
    if known is not None and not wrapper.has_thinking:
        wrapper._think_start, wrapper._think_end = known
        wrapper._think_start_tokens, wrapper._think_end_tokens = ((vocab[m],) for m in known)
        wrapper._structural_markers += tuple(mark for mark in _ANSWER if mark in vocab)
    return wrapper


def answer_format(tokenizer: Any) -> dict[str, Any]:
    """What MLX-LM's ``TokenizerWrapper`` is to be told of ``tokenizer``'s answers.

    Returns:
        Arguments of its constructor: ``tool_parser``, ``tool_call_start``, ``tool_call_end`` and
        ``response_format``; none where the template knows neither tools nor channels.
    """
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = templates.get("tool_use") or templates.get("default")
    if templates and "<|channel|>" in templates and _MESSAGE in templates:
        return {
            "tool_parser": parse_harmony_call,
            "tool_call_start": "to=functions.",
            "tool_call_end": "<|call|>",
            "response_format": _HARMONY,
        }
    found = _infer_tool_parser(
        SimpleNamespace(chat_template=templates, get_vocab=tokenizer.get_vocab)
    )
    if found is None:
        return {}
    module = importlib.import_module(f"mlx_lm.tool_parsers.{found}")
    return {
        "tool_parser": module.parse_tool_call,
        "tool_call_start": module.tool_call_start,
        "tool_call_end": module.tool_call_end,
    }


def parse_harmony_call(text: str, tools: Any = None) -> dict[str, Any]:
    """The call in ``name<|channel|>commentary json<|message|>{...}``.

    Raises:
        ValueError: there is no name, or the arguments are not JSON.
    """
    header, found, arguments = text.partition(_MESSAGE)
    name = re.match(r"[\w.-]+", header)
    if not found or name is None:
        raise ValueError(f"not a function call: {text[:100]!r}")
    return {"name": name[0], "arguments": json.loads(arguments)}

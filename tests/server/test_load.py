"""Many requests at once: what they are answered, what they leave behind, what they launch."""

import gc
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import mlx.core as mx
import pytest
from jsonschema import validate

from mlxfuse.generate.run import Settings, generate
from mlxfuse.kernels.runtime.backend import Emulated
from mlxfuse.loader import load
from mlxfuse.nn.kv.batch_cache import BatchCompressedKVCache
from mlxfuse.nn.kv.options import KVOptions
from mlxfuse.server.engine import Limits

from ..models import tiny
from .conftest import openai_client, serving
from .schemas import random_schema
from .test_engine import Collected, run

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


def loaded(folder, name, **how):
    made = tiny.build(name, 0)
    made.metadata["tokenizer.chat_template"] = TEMPLATE
    return load(tiny.write(folder / f"{name}.gguf", made, **how))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("load"), "llama")


# --- load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_clients(pair, each):
    """No error, the answers that single requests get, and no bytes but the cache's.

    Measured with 200 each: 63,248 bytes more, of which the cache has 57,600.
    """
    model, tok = pair
    stem = "The quick brown fox jumps over the lazy dog. "
    prompts = [stem[: 5 + 3 * i] + str(i) for i in range(6)]
    plain = Settings(max_tokens=12, ignore_chat_template=True)
    want = {p: generate(model, tok, replace(plain, prompt=p)).text for p in prompts}
    limit = 200_000
    limits = Limits(prompt_caches=1000, prompt_cache_bytes=limit)
    with serving(model, tok, limits=limits) as server:

        def client(number):
            random, wrong = Random(number), []
            api = openai_client(server)
            for _ in range(each):
                prompt = random.choice(prompts)
                how = {"model": "", "prompt": prompt, "max_tokens": 12}
                if (kind := random.randrange(4)) == 0:
                    got = api.completions.create(**how).choices[0].text
                elif kind == 1:  # and hangs up
                    with api.completions.create(**how, stream=True) as chunks:
                        got = next(iter(chunks)).choices[0].text
                    wrong += [(prompt, got)] * (not want[prompt].startswith(got))
                    continue
                else:
                    chunks = api.completions.create(**how, stream=True)
                    got = "".join(chunk.choices[0].text for chunk in chunks)
                wrong += [(prompt, got)] * (got != want[prompt])
            return wrong

        def held():
            while server._engine.running:
                time.sleep(0.01)
            gc.collect()
            mx.clear_cache()
            return mx.get_active_memory()

        before = held()
        with ThreadPoolExecutor(8) as pool:
            assert [wrong for found in pool.map(client, range(8)) for wrong in found] == []
        growth = held() - before
        assert 0 < server._engine._cache.nbytes <= limit
        cached = server._engine._cache.nbytes
        print(f"{8 * each} requests: {growth:,} bytes more, of which the cache {cached:,}")
        assert growth <= limit + 50_000


# --- schemas ---------------------------------------------------------------------------------


def answers_to(server, schemas, most):
    def ask(schema):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        text = "Answer in JSON. Tell me about a town."
        got = openai_client(server, timeout=900).chat.completions.create(
            model="",
            messages=[{"role": "user", "content": text}],
            response_format=form,
            max_tokens=most,
        )
        return got.choices[0]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, schemas))


def check(schemas, choices):
    for schema, choice in zip(schemas, choices, strict=True):
        assert choice.finish_reason == "stop", (schema, choice.message.content)
        validate(json.loads(choice.message.content), schema)


def test_answers_follow_random_schemas(pair):
    """Of a model whose own words are no JSON."""
    schemas = [random_schema(Random(seed), depth=1) for seed in range(5)]
    with serving(*pair) as server:
        check(schemas, answers_to(server, schemas, 220))


@pytest.mark.slow
def test_the_demo_model_follows_fifty_random_schemas(demo):
    schemas = [random_schema(Random(seed)) for seed in range(50)]
    assert len({json.dumps(schema) for schema in schemas}) == 50
    start = time.monotonic()
    with serving(*load(demo)) as server:
        choices = answers_to(server, schemas, 600)
    check(schemas, choices)
    print(f"50 schemas, 50 valid answers, {time.monotonic() - start:.0f} s")


# --- states that cannot be cut ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen35", "falcon-h1"])
def test_a_hybrid_model_reads_on_from_the_messages_it_knows(tmp_path, name):
    """And says what it says to the whole conversation, read at once."""
    model, tok = loaded(tmp_path, name)
    first = [{"role": "system", "content": "s" * 60}, {"role": "user", "content": "u" * 40}]
    # The answer is sent back otherwise than it was generated.
    grown = [*first, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "so?"}]
    other = [first[0], {"role": "user", "content": "v" * 30}]
    with serving(model, tok) as server:
        cached = []
        for messages in (first, grown, other):
            got = openai_client(server).chat.completions.create(
                model="", messages=messages, max_tokens=4
            )
            text = tok.apply_chat_template(messages, tokenize=False)
            alone = Settings(prompt=text, max_tokens=4, ignore_chat_template=True)
            assert got.choices[0].message.content == generate(model, tok, alone).text
            cached.append(got.usage.prompt_tokens_details.cached_tokens)
    system, both = (len(tok.apply_chat_template(first[:n])) for n in (1, 2))
    assert cached[0] == 0
    assert both - 2 <= cached[1] <= both
    assert system - 2 <= cached[2] <= system + len("[user]")


# --- compressed caches -----------------------------------------------------------------------


def test_eight_compressed_chats_take_two_launches_a_layer(tmp_path, monkeypatch):
    """Of a token for all of them, by the engine: attention, and its parts put together.

    They are counted and give zeros; what they compute is proven elsewhere.
    """
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    model, tok = loaded(tmp_path, "qwen3", twin=True)
    steps, now = [], Counter()
    call = type(model).__call__

    def counted(self, arrays, launch):
        now[launch.program.op] += 1
        return launch.blank()

    def step(self, inputs, **how):
        now.clear()
        result = call(self, inputs, **how)
        steps.append((inputs.shape, now.copy()))
        return result

    monkeypatch.setattr(Emulated, "_dispatch", counted)
    monkeypatch.setattr(type(model), "__call__", step)

    def most(server):
        steps.clear()
        prompts = [f"{i} and so on" for i in range(8)]
        run(server._engine, *(Collected(tok.encode(p), 8) for p in prompts))
        full = [launched for shape, launched in steps if shape == (8, 1)]
        assert len(full) >= 4
        return max(launched["compressed_sdpa"] for launched in full)

    with serving(model, tok, Settings(kv=KVOptions(8, 4))) as server:
        assert len(model.layers) <= most(server) <= 2 * len(model.layers)
        monkeypatch.setattr(BatchCompressedKVCache, "_together", lambda *_: False)
        assert most(server) >= 8 * len(model.layers)  # control

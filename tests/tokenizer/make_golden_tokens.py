"""Writes golden_tokens.json: what llama.cpp makes of `vocabularies.texts` with each vocabulary.

    python -m tests.tokenizer.make_golden_tokens            # rewrite the file
    python -m tests.tokenizer.make_golden_tokens --fuzz N   # compare N texts a family

The demo model's own vocabulary is among them: fetch it first, with `mlxfuse inspect`.
Needs the ``xllamacpp`` wheel, whose library exports llama.cpp's C API; the test suite does not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

from mlxfuse.gguf.reader import open_gguf
from mlxfuse.hub.demo import demo_path
from mlxfuse.tokenizer.load import build_tokenizer
from mlxfuse.tokenizer.pretokenizers import PRE

from . import vocabularies

GOLDEN = Path(__file__).with_name("golden_tokens.json")
TEXTS, SEED = 40, 7
DEMO = "demo model"

_PARAMS_SIZE = 80
_VOCAB_ONLY = 72  # byte offset of vocab_only in llama_model_params of llama.cpp in 2026


class _Params(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _PARAMS_SIZE),)


class LlamaVocab:
    """llama.cpp's tokenizer for a file that need have no tensors."""

    def __init__(self, path: Path) -> None:
        self._lib = lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        lib.llama_model_default_params.restype = _Params
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
        for name in ("llama_model_load_from_file", "llama_model_get_vocab"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        lib.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
        lib.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        lib.llama_vocab_is_eog.restype = ctypes.c_bool
        lib.llama_tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32]
        lib.llama_tokenize.argtypes += [ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool]
        lib.llama_tokenize.argtypes += [ctypes.c_bool]
        lib.llama_token_to_piece.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p]
        lib.llama_token_to_piece.argtypes += [ctypes.c_int32, ctypes.c_int32, ctypes.c_bool]
        params = lib.llama_model_default_params()
        params.bytes[_VOCAB_ONLY] = 1
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp did not load {path}: look for vocab_only's offset")
        self._vocab = lib.llama_model_get_vocab(model)
        self.size: int = lib.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, text: str) -> list[int]:
        """With BOS and EOS as the file says, special tokens parsed."""
        data = text.encode()
        out = (ctypes.c_int32 * (2 * len(data) + 16))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), out, len(out), True, True)
        return out[:count]

    def eog(self) -> list[int]:
        return [i for i in range(self.size) if self._lib.llama_vocab_is_eog(self._vocab, i)]

    def pieces(self) -> list[bytes]:
        buffer = ctypes.create_string_buffer(4096)
        sizes = (
            self._lib.llama_token_to_piece(self._vocab, i, buffer, 4096, 0, True)
            for i in range(self.size)
        )
        return [buffer.raw[:size] for size in sizes]


def write_vocab(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file of ``metadata`` and the hyper-parameters that llama.cpp asks for."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, np.ndarray | list):
            writer.add_array(key, list(map(_plain, value)))
        elif key != "general.architecture":
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def compare(name: str, metadata: dict[str, Any], vocab: LlamaVocab, texts: list[str]) -> int:
    """Prints how this package differs from llama.cpp; returns the number of texts that do."""
    tokenizer = build_tokenizer(metadata, name)
    wrong = [text for text in texts if tokenizer.encode(text) != vocab.tokenize(text)]
    for text in wrong[:3]:
        print(f"  {text!r}")
        print(f"   ours      {tokenizer.encode(text)}")
        print(f"   llama.cpp {vocab.tokenize(text)}")
    same = tokenizer.pieces == vocab.pieces(), sorted(tokenizer.eos_token_ids) == vocab.eog()
    print(f"{name}: {len(wrong)} of {len(texts)} differ; pieces equal: {same[0]}, ends: {same[1]}")
    return len(wrong) + (not all(same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    golden: dict[str, Any] = {
        "texts": vocabularies.texts(TEXTS, SEED),
        "tokens": [],
        "families": {},
    }
    fuzzed = vocabularies.texts(args.fuzz, args.seed)
    # Most families agree on most texts: each distinct row is stored once and referred to.
    rows: list[dict[tuple[int, ...], int]] = [{} for _ in golden["texts"]]
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        with open_gguf(demo_path()) as demo:
            families = {**vocabularies.families(PRE), DEMO: dict(demo.metadata)}
        for name, metadata in families.items():
            if name != DEMO:
                write_vocab(path, metadata)
            vocab = LlamaVocab(demo_path() if name == DEMO else path)
            if args.fuzz:
                different += compare(name, metadata, vocab, fuzzed)
                continue
            chosen = [
                row.setdefault(tuple(vocab.tokenize(text)), len(row))
                for row, text in zip(rows, golden["texts"], strict=True)
            ]
            golden["families"][name] = {"eog": vocab.eog(), "rows": chosen}
    if not args.fuzz:
        golden["tokens"] = [list(map(list, row)) for row in rows]
        GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())

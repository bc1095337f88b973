"""Make `golden/*.npz`: llama.cpp's logits for every case of `tiny.py`, and for the demo model.

    pip install xllamacpp==2026.10.11549
    python -m tests.models.make_golden [CASE ...] [--demo smollm2-135m-instruct-q4_1.gguf]

Without CASE, all of them. llama.cpp (its C API, from xllamacpp's shared library) evaluates the
F32 twin of each file: K and V cache in F32, flash attention off, one thread, the whole prompt in
one batch, a context of `CONTEXT`. Each file holds, stacked over `tiny.SEEDS`:
`tokens` int32 [seeds, prompt], `logits` float16 [seeds, prompt, vocabulary] (rounding them adds
an NMSE of 4e-8) and `digest`, the fingerprint of the weights. llama.cpp's GELU is a
float16 table: in gemma that alone is an NMSE of 1e-7 to 1e-5. The demo's file holds 30 `tokens`
and the `logits` of its last `DEMO_POSITIONS` positions.
"""

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize

from tests.models import tiny

GOLDEN = Path(__file__).parent / "golden"
CONTEXT = 256  # llama.cpp rounds a context up to a multiple of 256
DEMO_POSITIONS = 3
# "The capital of France is Paris, a city on the river Seine. Its best known sights are the
# Eiffel Tower, the Louvre and the" by llama.cpp's tokenizer.
DEMO_TOKENS = np.fromstring(
    "504 3575 282 4649 314 7042 28 253 2240 335 260 4626 1268 462 30 4781 1450 1343 24455 359 "
    "260 414 46682 18669 28 260 5991 36462 284 260",
    np.int32,
    sep=" ",
)


class ContextParams(ctypes.Structure):
    """llama_context_params up to the cache types; the rest is kept as the library filled it."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("rope_and_yarn", ctypes.c_uint32 * 8),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 256),
    ]


class ModelParams(ctypes.Structure):
    """llama_model_params, passed back as the library filled it."""

    _fields_ = [("rest", ctypes.c_uint8 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@LOG
def _log(level: int, text: bytes, _: object) -> None:
    if level == 4:  # errors; 5 continues the line before
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class LlamaCpp:
    """One GGUF file in llama.cpp, with a context of CONTEXT tokens."""

    def __init__(self, path: Path) -> None:
        (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
        self.lib = lib = ctypes.CDLL(str(library))
        pointer = ctypes.c_void_p
        for name, result, *arguments in (
            ("llama_log_set", None, LOG, pointer),
            ("llama_model_default_params", ModelParams),
            ("llama_context_default_params", ContextParams),
            ("llama_model_load_from_file", pointer, ctypes.c_char_p, ModelParams),
            ("llama_init_from_model", pointer, pointer, ContextParams),
            ("llama_n_ctx", ctypes.c_uint32, pointer),
            ("llama_model_get_vocab", pointer, pointer),
            ("llama_vocab_n_tokens", ctypes.c_int32, pointer),
            ("llama_decode", ctypes.c_int32, pointer, Batch),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32),
            ("llama_free", None, pointer),
            ("llama_model_free", None, pointer),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.llama_log_set(_log, None)
        lib.llama_backend_init()
        params = lib.llama_context_default_params()
        found = params.n_ctx, params.flash_attn_type, params.type_k, params.type_v
        if found != (512, -1, 1, 1):  # the defaults, when the fields are where we think they are
            raise RuntimeError(f"another llama_context_params layout than expected: {found}")
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_outputs_max = params.n_outputs_max_per_seq = CONTEXT
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = params.type_k = params.type_v = 0  # disabled, F32, F32
        self.model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context or lib.llama_n_ctx(self.context) != CONTEXT:
            raise RuntimeError(f"llama.cpp makes no context of {CONTEXT} tokens for {path}")

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The logits after each of `tokens` (int32 [n]): float32 [n, vocabulary]."""
        count = len(tokens)
        ints, int_pointer = ctypes.c_int32 * count, ctypes.POINTER(ctypes.c_int32)
        sequence = ctypes.cast((ctypes.c_int32 * 1)(0), int_pointer)
        batch = Batch(
            n_tokens=count,
            token=ints(*tokens.tolist()),
            pos=ints(*range(count)),
            n_seq_id=ints(*[1] * count),
            seq_id=(int_pointer * count)(*[sequence] * count),
            logits=(ctypes.c_int8 * count)(*[1] * count),
        )
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        rows = [self.lib.llama_get_logits_ith(self.context, i) for i in range(count)]
        return np.stack([np.ctypeslib.as_array(row, (vocabulary,)).copy() for row in rows])

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def llama_cpp_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    model = LlamaCpp(path)
    try:
        return model.logits(tokens)
    finally:
        model.close()


def make_case(name: str, folder: Path) -> None:
    tokens, logits, digests = [], [], []
    for seed in tiny.SEEDS:
        model = tiny.build(name, seed)
        path = tiny.write(folder / f"{name}-{seed}.gguf", model, twin=True)
        tokens.append(model.prompt)
        logits.append(llama_cpp_logits(path, model.prompt))
        digests.append(model.digest())
        path.unlink()
    deviation = min(float(rows.std()) for rows in logits)
    if deviation < 1:
        raise RuntimeError(f"{name}: logits deviate by only {deviation:.2f}; a test needs 1")
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        tokens=np.stack(tokens),
        logits=np.stack(logits).astype(np.float16),
        digest=np.array(digests),
    )
    print(f"{name}: standard deviation {deviation:.2f}")


def write_twin(source: Path, path: Path) -> None:
    """Copy a GGUF file with every tensor as F32."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, arch)
    for key, entry in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind, *rest = entry.types
            writer.add_key_value(key, entry.contents(), kind, rest[-1] if rest else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_demo(source: Path, folder: Path) -> None:
    twin = folder / "demo.gguf"
    write_twin(source, twin)
    logits = llama_cpp_logits(twin, DEMO_TOKENS)[-DEMO_POSITIONS:]
    np.savez_compressed(GOLDEN / "demo.npz", tokens=DEMO_TOKENS, logits=logits.astype(np.float16))


def main() -> None:
    parser = argparse.ArgumentParser(description="make the golden logits with llama.cpp")
    parser.add_argument("case", nargs="*", default=list(tiny.CASES), help="names in tiny.CASES")
    parser.add_argument("--demo", type=Path, help="the demo model's GGUF file")
    arguments = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.case:
            make_case(name, Path(folder))
        if arguments.demo:
            make_demo(arguments.demo, Path(folder))


if __name__ == "__main__":
    main()

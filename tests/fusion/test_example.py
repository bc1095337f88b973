"""examples/patch_mlx_lm.py, on a small model in mlx-lm's own form."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.fusion.stock import FORMATS, SIZES, make

ROOT = Path(__file__).parents[2]


def test_the_example_runs(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w63").save_pretrained(tmp_path)
    make("llama", "affine4").save_weights(str(tmp_path / "model.safetensors"))
    config = {"model_type": "llama", **SIZES, "quantization": FORMATS["affine4"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "examples/patch_mlx_lm.py", str(tmp_path), "w1", "w2"]
    answers = []
    for disabled in ("", "qkv,gate_up,residual,norm_rope,embedding"):
        # `auto` fuses where kernels run; the emulation of one token is enough.
        environment = {**os.environ, "MLXFUSE_KERNELS": "emulated", "MLXFUSE_DISABLE": disabled}
        done = subprocess.run(
            [*command],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
        fused = "qkv 0/2" if disabled else "qkv 2/2, gate/up 2/2, residual 2/2, norm+rope 2/2"
        assert fused in done.stderr
    assert answers[0] == answers[1]
    assert answers[0].split()[0].startswith("w")

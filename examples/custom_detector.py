"""A fusion of your own, Gemma's 1 + w computed once: python examples/custom_detector.py MODEL"""

import sys
from collections.abc import Iterator

import mlx.core as mx
from mlx_lm import generate
from mlx_lm.models.gemma3_text import RMSNorm

import mlxfuse
from mlxfuse.errors import NotFusible
from mlxfuse.fusion import Candidate, Skip, Tree


class ReadyRMSNorm(RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self._ready, self.eps)


@mlxfuse.register_detector("ready_norm")
def ready_norms(tree: Tree) -> Iterator[Candidate | Skip]:
    for path, norm in tree.modules:
        if type(norm) is not RMSNorm:  # a subclass may compute something else
            continue
        try:
            tree.check_alone(norm)
        except NotFusible as reason:
            yield Skip("ready_norm", path, str(reason))
            continue

        def emit(norm: RMSNorm = norm) -> None:
            norm._ready = 1.0 + norm.weight  # a name with _ is no parameter: saving does not see it
            norm.__class__ = ReadyRMSNorm

        def undo(norm: RMSNorm = norm) -> None:
            norm.__class__ = RMSNorm
            norm.pop("_ready", None)

        yield Candidate("ready_norm", 10, path, frozenset({path}), emit, undo, "1 + w, once")


if len(sys.argv) < 2:
    raise SystemExit(__doc__)
model, tokenizer = mlxfuse.load(sys.argv[1], fuse="off")
print(mlxfuse.patch_model(model, fuse="ready_norm", check=True), file=sys.stderr)
print(generate(model, tokenizer, "The sky is", max_tokens=32))
mlxfuse.unpatch_model(model)

"""How several machines share the model that ``load`` makes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .errors import UnsupportedError
from .fusion import PatchReport
from .fusion.patch import try_every_length
from .hub.folders import is_checkpoint
from .kernels.runtime import self_test
from .models.adapters import check_adapter
from .models.part import Part
from .models.plan import Plan
from .models.shard import shares, stages
from .ranks import expect_same, same_run


@dataclass(frozen=True, slots=True)
class Sharing:
    """The machines, and whether each has a part of each layer or, in a pipeline, some layers."""

    group: mx.distributed.Group
    pipeline: bool

    @classmethod
    def among(cls, group: mx.distributed.Group | None, pipeline: bool) -> Sharing | None:
        """As ``load`` was asked; None for a process that has the model alone.

        Raises:
            ValueError: there is a ``pipeline`` without a ``group``.
        """
        if pipeline and group is None:
            raise ValueError("pipeline: several machines have the layers; give their group as well")
        return cls(group, pipeline) if group is not None and group.size() > 1 else None

    def begin(self, path: Path, arguments: tuple[object, ...], adapter: Path | None) -> None:
        """Compare what the ranks were asked to load, before anything is read.

        Raises:
            CheckpointError: there is no such adapter.
            UnsupportedError: an adapter is for a model that mlx-lm shares by itself.
            RanksError: on all ranks, where versions, arguments or the model's files differ.
        """
        files = {"the model's files": path}
        if adapter is not None:
            check_adapter(adapter)
            if is_checkpoint(path):
                raise UnsupportedError(
                    f"{path}: machines share an MLX-LM checkpoint as mlx-lm does, which cannot "
                    "share an adapter; use a GGUF file or an export of one"
                )
            files["the adapter's files"] = adapter
        expect_same(same_run(files, str((*arguments, self.pipeline))), self.group)

    def part(self, path: Path, weights: Plan) -> Part:
        """This machine's part of a file's model.

        Raises:
            UnsupportedError: it cannot be shared by so many.
        """
        split = stages if self.pipeline else shares
        try:
            return Part(split(weights, self.group.size())[self.group.rank()], self.group)
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from None

    def of_checkpoint(self, path: Path) -> mx.distributed.Group:
        """The group for mlx-lm, which shares an MLX-LM checkpoint by itself.

        Raises:
            UnsupportedError: it is to be a pipeline.
        """
        if self.pipeline:
            raise UnsupportedError(f"{path}: a pipeline is for GGUF files and exports of them")
        return self.group

    def end(self, model: nn.Module, patch: PatchReport) -> None:
        """Use no kernel that another rank cannot use, and compare where rank 0 adds the residual
        before a sum: the others must know of it.

        Raises:
            RanksError: on all ranks, where that differs.
        """
        try_every_length(model, patch)
        disabled = self_test.agree(self.group)
        patch.disabled |= {program.op: why for program, why in disabled.items()}
        if not self.pipeline:
            places = sorted(place.path for place in patch.fused if place.name == "residual")
            digest = zlib.crc32(" ".join(places).encode())
            told = f"{len(places)} places ({digest:08x})"
            expect_same({"the fusion `residual`": told}, self.group)

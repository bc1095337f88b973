"""Three correct kernels in which the self-check plants its bugs, with inputs and exact results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from tests import msl

Array = np.ndarray[Any, Any]

Q4_K_HEADER = """
struct block_q4_K { half d; half dmin; uchar scales[12]; uchar qs[128]; };
static inline uchar2 scale_min(int j, device const uchar* q) {
  if (j < 4) return uchar2(q[j] & 63, q[j + 4] & 63);
  return uchar2((q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4));
}
"""
# y = W x with W in Q4_K: 2 SIMD-groups to a threadgroup, 4 rows each.
Q4_K_GEMV = """
  const int blocks = K / 256;
  const uint lane = thread_index_in_simdgroup;
  const uint row0 = threadgroup_position_in_grid.x * 8 + simdgroup_index_in_threadgroup * 4;
  const uint j = lane / 8;
  const uint l = (lane % 8) * 4;
  float acc[4] = {0, 0, 0, 0};
  for (int b = 0; b < blocks; b++) {
    const device T* xb = x + b * 256 + j * 64 + l;
    const float4 xl = float4(*(const device vec<T, 4>*)xb);
    const float4 xh = float4(*(const device vec<T, 4>*)(xb + 32));
    const float sl = xl.x + xl.y + xl.z + xl.w;
    const float sh = xh.x + xh.y + xh.z + xh.w;
    for (int r = 0; r < 4; r++) {
      const uint row = min(row0 + r, uint(M) - 1);
      const device block_q4_K* block = (const device block_q4_K*)w + row * blocks + b;
      const uchar2 a = scale_min(2 * j, block->scales);
      const uchar2 c = scale_min(2 * j + 1, block->scales);
      const uint q4 = *(const device uint*)(block->qs + j * 32 + l);
      const float4 lo = float4(q4 & 15, (q4 >> 8) & 15, (q4 >> 16) & 15, (q4 >> 24) & 15);
      const float4 hi = float4((q4 >> 4) & 15, (q4 >> 12) & 15, (q4 >> 20) & 15, q4 >> 28);
      acc[r] += float(block->d) * (float(a.x) * dot(lo, xl) + float(c.x) * dot(hi, xh))
              - float(block->dmin) * (float(a.y) * sl + float(c.y) * sh);
    }
  }
  for (int r = 0; r < 4; r++) {
    const float t = simd_sum(acc[r]);
    if (lane == 0 && row0 + r < uint(M)) y[row0 + r] = T(t);
  }
"""

# RMSNorm of each row, quantised to int8 in groups of 32: a threadgroup of 256 threads a row.
RMS_INT8 = """
  threadgroup float partial[32];
  const uint row = threadgroup_position_in_grid.x;
  const uint tid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const device T* xr = x + row * D;
  float acc = 0;
  for (uint i = tid; i < uint(D); i += 256) {
    const float v = float(xr[i]);
    acc += v * v;
  }
  acc = simd_sum(acc);
  if (lane == 0) partial[sg] = acc;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = simd_sum(lane < simdgroups_per_threadgroup ? partial[lane] : 0.0f);
  const float r = metal::precise::rsqrt(total / float(D) + eps[0]);
  for (uint g = sg; g < uint(D) / 32; g += 8) {
    const uint i = g * 32 + lane;
    const float v = float(xr[i]) * r * float(w[i]);
    const float s = simd_max(metal::abs(v)) / 127.0f;
    const float inverse = s > 0.0f ? 1.0f / s : 0.0f;
    q[row * D + i] = int8_t(clamp(metal::rint(v * inverse), -127.0f, 127.0f));
    if (lane == 0) scales[row * (D / 32) + g] = s;
  }
"""

# C = A B: 4 SIMD-groups on a tile of 32 x 32, K in steps of 32, 8 x 8 SIMD-group matrices.
GEMM = """
  threadgroup half As[32 * 40];
  threadgroup half Bs[32 * 40];
  const uint2 tile = threadgroup_position_in_grid.xy;
  const uint tid = thread_index_in_threadgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  simdgroup_matrix<float, 8, 8> acc[2][2];
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  const uint ro = (sg / 2) * 16, co = (sg % 2) * 16;
  for (int k0 = 0; k0 < K; k0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = tid; e < 1024; e += 128) {
      const uint r = e / 32, c = e % 32;
      As[r * 40 + c] = a[(tile.y * 32 + r) * K + k0 + c];
      Bs[r * 40 + c] = b[(k0 + r) * N + tile.x * 32 + c];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int kk = 0; kk < 32; kk += 8) {
      simdgroup_matrix<half, 8, 8> ma[2], mb[2];
      for (int i = 0; i < 2; i++) simdgroup_load(ma[i], As + (ro + i * 8) * 40 + kk, 40);
      for (int j = 0; j < 2; j++) simdgroup_load(mb[j], Bs + kk * 40 + co + j * 8, 40);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
          simdgroup_multiply_accumulate(acc[i][j], ma[i], mb[j], acc[i][j]);
    }
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      simdgroup_store(acc[i][j], c + (tile.y * 32 + ro + i * 8) * N + tile.x * 32 + co + j * 8, N);
"""


@dataclass(frozen=True)
class Subject:
    """A kernel with one call of it.

    Attributes:
        source, header: as given to ``metal_kernel``.
        inputs: by name, in order.
        outputs: shape and dtype by name, in order.
        template, grid, threadgroup: of the call.
        correct: whether the outputs (float32) are right.
    """

    name: str
    source: str
    header: str
    inputs: dict[str, mx.array]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    template: list[tuple[str, Any]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    correct: Callable[..., bool]

    def _kernel(self) -> msl.EmulatedKernel:
        return msl.metal_kernel(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
        )

    def _call(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": [shape for shape, _ in self.outputs.values()],
            "output_dtypes": [dtype for _, dtype in self.outputs.values()],
        }

    def capture(self) -> msl.Capture:
        """The text MLX generates for the call."""
        return msl.capture(self._kernel(), list(self.inputs.values()), **self._call())

    def run(self) -> bool:
        """Run under the current ``msl.options``: are the results right?"""
        outputs = self._kernel()(inputs=list(self.inputs.values()), **self._call())
        return self.correct(*(np.array(y.astype(mx.float32)) for y in outputs))

    def planted(self, edits: Sequence[tuple[str, str]], header: str = "") -> Subject:
        """With each ``(old, new)`` applied where ``old`` first occurs, and ``header`` added."""
        texts = {"header": self.header, "source": self.source}
        for old, new in edits:
            part = next(p for p in texts if old in texts[p])
            texts[part] = texts[part].replace(old, new, 1)
        texts["header"] += header
        return dataclasses.replace(self, header=texts["header"], source=texts["source"])


def _close(got: Array, expected: Array, tolerance: float) -> bool:
    """Largest difference within ``tolerance`` of the largest value; a NaN is never close."""
    return bool(np.abs(got - expected).max() <= tolerance * np.abs(expected).max())


def _q4_k(w: Array) -> Array:
    """float32 values of Q4_K rows: uint8 ``[M, K / 256 * 144]`` to ``[M, K]``."""
    block = w.reshape(w.shape[0], -1, 144)
    d, dmin = block[..., :4].copy().view(np.float16).astype(np.float32).transpose(2, 0, 1)
    low, mid, high = block[..., 4:8], block[..., 8:12], block[..., 12:16]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], -1)
    qs = block[..., 16:].reshape(*block.shape[:2], 4, 32)
    q = np.stack([qs & 15, qs >> 4], 3).reshape(*block.shape[:2], 8, 32)
    values = (d[..., None] * scale)[..., None] * q - (dmin[..., None] * minimum)[..., None]
    flat: Array = values.reshape(w.shape[0], -1)
    return flat


def q4_k_gemv(rows: int = 16, dtype: mx.Dtype = mx.float16) -> Subject:
    columns = 512
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, (rows, columns // 256, 2)).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    w = blocks.reshape(rows, -1)
    x = mx.array(rng.standard_normal(columns).astype(np.float32)).astype(dtype)
    expected = _q4_k(w) @ np.array(x.astype(mx.float32))
    return Subject(
        "q4_k_gemv",
        Q4_K_GEMV,
        Q4_K_HEADER,
        {"w": mx.array(w), "x": x},
        {"y": ((rows,), dtype)},
        [("T", dtype), ("M", rows), ("K", columns)],
        ((rows + 7) // 8 * 64, 1, 1),
        (64, 1, 1),
        lambda y: _close(y, expected, 5e-4 if dtype == mx.float16 else 4e-3),
    )


def rms_int8(dtype: mx.Dtype = mx.float16) -> Subject:
    rows, n, eps = 4, 512, 1e-5
    rng = np.random.default_rng(2)
    x = mx.array(rng.standard_normal((rows, n)).astype(np.float32)).astype(dtype)
    w = mx.array(rng.uniform(0.5, 1.5, n).astype(np.float32)).astype(dtype)
    exact = np.array(x.astype(mx.float32)).astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + eps)
    groups = (exact * np.array(w.astype(mx.float32))).reshape(rows, -1, 32)
    scales = np.abs(groups).max(-1) / 127
    q = np.rint(groups / scales[..., None]).reshape(rows, n)
    return Subject(
        "rms_int8",
        RMS_INT8,
        "",
        {"x": x, "w": w, "eps": mx.array([eps])},
        {"q": ((rows, n), mx.int8), "scales": ((rows, n // 32), mx.float32)},
        [("T", dtype), ("D", n)],
        (rows * 256, 1, 1),
        (256, 1, 1),
        # A tie of the exact value may round either way.
        lambda q_, s_: bool(np.abs(q_ - q).max() <= 1) and _close(s_, scales, 1e-6),
    )


def gemm() -> Subject:
    m = n = k = 64
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, m, k)).astype(np.float16)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    return Subject(
        "gemm",
        GEMM,
        "",
        {"a": mx.array(a), "b": mx.array(b)},
        {"c": ((m, n), mx.float32)},
        [("N", n), ("K", k)],
        (n // 32 * 128, m // 32, 1),
        (128, 1, 1),
        lambda c: _close(c, expected, 1e-6),
    )

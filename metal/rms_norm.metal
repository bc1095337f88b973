// RMSNorm of rows, each in the registers of one threadgroup, so that it is read once.
// Thread t of n holds, for p < pieces, the four values from 4 (p n + t) on. `whole`: K is a
// multiple of 4; else rows are not aligned to four values and are read one by one.

struct Row {
  uint columns;
  uint groups;
  uint group;
  uint lane;
  ulong first;
};

METAL_FUNC uint quad_of(Row row, int p) {
  return 4 * ((p * row.groups + row.group) * 32 + row.lane);
}

template <typename T, bool whole, typename P>
METAL_FUNC vec<T, 4> load_quad(P x, ulong first, uint at, uint columns) {
  vec<T, 4> v = vec<T, 4>(T(0));
  if (whole) {
    if (at < columns) {
      v = *elements<vec<T, 4>>(x + first + at);
    }
  } else {
    UNROLL
    for (int e = 0; e < 4; e++) {
      if (at + e < columns) {
        v[e] = x[first + at + e];
      }
    }
  }
  return v;
}

template <typename T, int pieces, bool whole, typename P>
METAL_FUNC void load_row(P x, Row row, thread vec<T, 4>* v) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    v[p] = load_quad<T, whole>(x, row.first, quad_of(row, p), row.columns);
  }
}

template <typename T, int pieces>
METAL_FUNC float inverse_rms(
    const thread vec<T, 4>* v, Row row, float eps, threadgroup float* partial) {
  float4 squares = float4(0.0f);
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const float4 x = float4(v[p]);
    squares = fma(x, x, squares);
  }
  float sum = simd_sum(squares[0] + squares[1] + (squares[2] + squares[3]));
  if (row.lane == 0) {
    partial[row.group] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(row.lane < row.groups ? partial[row.lane] : 0.0f);
  return metal::precise::rsqrt(sum / float(row.columns) + eps);
}

//@ add:
template <typename T, int pieces, bool whole, typename P>
METAL_FUNC void add_row(P residual, Row row, thread vec<T, 4>* v) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const vec<T, 4> r = load_quad<T, whole>(residual, row.first, quad_of(row, p), row.columns);
    v[p] = vec<T, 4>(float4(v[p]) + float4(r));
  }
}

//@ store:
template <typename T, int pieces, bool whole>
METAL_FUNC void store_row(const thread vec<T, 4>* v, Row row, device T* y) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const uint at = quad_of(row, p);
    if (whole) {
      if (at < row.columns) {
        *(device vec<T, 4>*)(y + row.first + at) = v[p];
      }
    } else {
      UNROLL
      for (int e = 0; e < 4; e++) {
        if (at + e < row.columns) {
          y[row.first + at + e] = v[p][e];
        }
      }
    }
  }
}

//@ plain:
template <typename T, int pieces>
METAL_FUNC void scale_row(float inverse, thread vec<T, 4>* v) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    v[p] = vec<T, 4>(float4(v[p]) * inverse);
  }
}

//@ weighted:
// As mx.fast.rms_norm: the normalised values and the weights are of type T before the product.
template <typename T, int pieces, bool whole, typename P>
METAL_FUNC void weight_row(P w, float offset, Row row, float inverse, thread vec<T, 4>* v) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const vec<T, 4> given = load_quad<T, whole>(w, 0, quad_of(row, p), row.columns);
    const vec<T, 4> weights = vec<T, 4>(offset + float4(given));
    v[p] = vec<T, 4>(float4(vec<T, 4>(float4(v[p]) * inverse)) * float4(weights));
  }
}

//@ other: weighted store
// The row by another weight; v stays as it is.
template <typename T, int pieces, bool whole, typename P>
METAL_FUNC void other_row(
    P w, float offset, Row row, float inverse, const thread vec<T, 4>* v, device T* y) {
  vec<T, 4> other[pieces];
  UNROLL
  for (int p = 0; p < pieces; p++) {
    other[p] = v[p];
  }
  weight_row<T, pieces, whole>(w, offset, row, inverse, other);
  store_row<T, pieces, whole>(other, row, y);
}

//@ codes:
template <typename T, int pieces>
METAL_FUNC void quantize_row(
    const thread vec<T, 4>* v, Row row, device int8_t* codes, device float* scales,
    device float* sums) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const uint at = quad_of(row, p);
    quantize_quad<T>(v[p], row.first + at, at < row.columns, codes, scales, sums);
  }
}

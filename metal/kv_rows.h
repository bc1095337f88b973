// Rows of compressed keys and values; `mlxfuse/kernels/kv/scheme.py` documents them.
//
// A unit is 8 consecutive elements. A side, K or V, is Side<C, K, N, first, scales, group, align>:
// codes C from word `first` of a row on and, if group > 0, numbers N of kind K from word `scales`
// on. Element e of a unit is scale.x * v[e] + scale.y, where `load` gives v and `scale` the pair. A
// row may lie in any address space; its codes lie at a multiple of `align` words.

// The largest power of two that is no more than 32, or enough for n.
constexpr int lanes_of(int n) {
  return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : n <= 8 ? 8 : n <= 16 ? 16 : 32;
}

// How `dim` elements lie in the lanes of a SIMD-group: lane l has the units l % lanes + lanes * j
// of a token, and 32 / lanes tokens lie in a SIMD-group at once.
template <int dim>
struct Spread {
  static constexpr constant int units = dim / 8;
  static constexpr constant int lanes = lanes_of(dim / 8);
  static constexpr constant int each = (dim / 8 + lanes - 1) / lanes;
  static constexpr constant int tokens = 32 / lanes;
  static METAL_FUNC uint unit(uint lane, int j) {
    return lane % lanes + lanes * j;
  }
};

// Words from a multiple of `align` words on, in loads as wide as that allows.
template <int count, int align, typename P>
METAL_FUNC void read_words(P from, thread uint* to) {
  constexpr int wide = count % 4 == 0 && align % 4 == 0 ? 4 : count % 2 == 0 && align % 2 == 0 ? 2 : 1;
  UNROLL
  for (int i = 0; i < count / wide; i++) {
    if constexpr (wide == 1) {
      to[i] = from[i];
    } else {
      const vec<uint, wide> some = elements<vec<uint, wide>>(from)[i];
      UNROLL
      for (int e = 0; e < wide; e++) {
        to[wide * i + e] = some[e];
      }
    }
  }
}

// Numbers<S>: values of type S in words: two, one, and a unit of them. Codes<bits>: a unit of codes.
// A kind gives the scale, and what is added to scale times code, from the numbers of group g.
template <typename S>
struct Numbers;
template <int bits>
struct Codes;

template <typename C, typename K, typename N, int first, int scales, int group, int align>
struct Side {
  static constexpr constant bool scaled = group > 0;
  template <typename P>
  static METAL_FUNC void load(P row, uint unit, thread float* v) {
    C::template load<align>(row + first, unit, v);
  }
  template <typename P>
  static METAL_FUNC float2 scale(P row, uint unit) {
    return K::template scale<N>(row + scales, unit * 8 / group);
  }
};

//@ halves:
METAL_FUNC float2 halves(uint word, half) {
  return float2(as_type<half2>(word));
}
METAL_FUNC float2 halves(uint word, bfloat16_t) {
  return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
}

template <typename S>
struct Numbers {
  template <typename P>
  static METAL_FUNC float2 pair(P words, uint i) {
    return halves(words[i], S(0));
  }
  template <typename P>
  static METAL_FUNC float one(P words, uint i) {
    const float2 two = pair(words, i / 2);
    return i % 2 ? two.y : two.x;
  }
  template <int align, typename P>
  static METAL_FUNC void load(P words, uint unit, thread float* v) {
    uint four[4];
    read_words<4, align>(words + 4 * unit, four);
    UNROLL
    for (int i = 0; i < 4; i++) {
      const float2 two = halves(four[i], S(0));
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    }
  }
};

//@ floats:
template <>
struct Numbers<float> {
  template <typename P>
  static METAL_FUNC float one(P words, uint i) {
    return as_type<float>(words[i]);
  }
  template <typename P>
  static METAL_FUNC float2 pair(P words, uint i) {
    return float2(one(words, 2 * i), one(words, 2 * i + 1));
  }
  template <int align, typename P>
  static METAL_FUNC void load(P words, uint unit, thread float* v) {
    uint eight[8];
    read_words<8, align>(words + 8 * unit, eight);
    UNROLL
    for (int i = 0; i < 8; i++) {
      v[i] = as_type<float>(eight[i]);
    }
  }
};

//@ codes8:
template <>
struct Codes<8> {
  template <int align, typename P>
  static METAL_FUNC void load(P words, uint unit, thread float* v) {
    uint two[2];
    read_words<2, align>(words + 2 * unit, two);
    UNROLL
    for (int i = 0; i < 2; i++) {
      const float4 four = bytes(two[i]);
      UNROLL
      for (int e = 0; e < 4; e++) {
        v[4 * i + e] = four[e];
      }
    }
  }
};

//@ codes4:
template <>
struct Codes<4> {
  template <int align, typename P>
  static METAL_FUNC void load(P words, uint unit, thread float* v) {
    const uint word = words[unit];
    const float4 even = bytes(word & 0x0f0f0f0fu);
    const float4 odd = bytes((word >> 4) & 0x0f0f0f0fu);
    UNROLL
    for (int e = 0; e < 4; e++) {
      v[2 * e] = even[e];
      v[2 * e + 1] = odd[e];
    }
  }
};

//@ codes:
// Codes one behind the other, the first in the lowest bits: a unit begins at a byte, and lies in
// two words at most.
template <int bits>
struct Codes {
  template <int align, typename P>
  static METAL_FUNC void load(P words, uint unit, thread float* v) {
    const uint at = unit * bits;
    const uint shift = at % 4 * 8;
    const uint first = words[at / 4];
    const uint last = words[(at + bits - 1) / 4];
    const uint low = first >> shift | last << 1 << (31 - shift);
    const uint high = last >> shift;
    UNROLL
    for (int e = 0; e < 8; e++) {
      const int bit = e * bits;
      const uint code = bit + bits <= 32 ? low >> bit
                        : bit >= 32      ? high >> (bit - 32)
                                         : low >> bit | high << (32 - bit);
      v[e] = float(code & ((1u << bits) - 1));
    }
  }
};

//@ affine:
struct Affine {
  template <typename N, typename P>
  static METAL_FUNC float2 scale(P words, uint g) {
    return N::pair(words, g);
  }
};

//@ zero_point:
struct ZeroPoint {
  template <typename N, typename P>
  static METAL_FUNC float2 scale(P words, uint g) {
    const float2 found = N::pair(words, g);
    return float2(found.x, -found.x * found.y);
  }
};

//@ symmetric:
template <int zero>
struct Symmetric {
  template <typename N, typename P>
  static METAL_FUNC float2 scale(P words, uint g) {
    const float found = N::one(words, g);
    return float2(found, -float(zero) * found);
  }
};

//@ units:
// Writes a lane's unit j of a token: neighbouring lanes write neighbouring 16 bytes. Of 4 bytes a
// value, two lanes write half of the one's unit each, then of the other's.
template <typename At, typename T>
METAL_FUNC void write_unit(device T* token, const thread float* x, int j, bool here, uint lane) {
  const float4 low = float4(x[0], x[1], x[2], x[3]);
  const float4 high = float4(x[4], x[5], x[6], x[7]);
  const uint unit = At::unit(lane, j);
  if constexpr (sizeof(T) == 2) {
    if (here && unit < uint(At::units)) {
      *(device uint4*)(token + 8 * unit) =
          uint4(as_type<uint2>(vec<T, 4>(low)), as_type<uint2>(vec<T, 4>(high)));
    }
  } else {
    const bool odd = lane & 1;
    const float4 sent = odd ? low : high;
    float4 got;
    UNROLL
    for (int e = 0; e < 4; e++) {
      got[e] = simd_shuffle_xor(sent[e], ushort(1));
    }
    const uint pair = unit & ~1u;
    device float4* to = (device float4*)(token + 8 * pair + (odd ? 4 : 0));
    if (here && pair < uint(At::units)) {
      to[0] = odd ? got : low;
    }
    if (here && pair + 1 < uint(At::units)) {
      to[2] = odd ? high : got;
    }
  }
}

//@ hadamard:
// Of a power of two up to 512.
constexpr float inverse_root(int n) {
  const int root = n >= 256 ? 16 : n >= 64 ? 8 : n >= 16 ? 4 : n >= 4 ? 2 : 1;
  return (n == root * root ? 1.0f : 0.70710678118654752f) / root;
}

// The elements of a token, spread over lanes, times an orthonormal Hadamard matrix in blocks.
template <int dim, int block>
METAL_FUNC void hadamard(thread float* x, uint lane) {
  typedef Spread<dim> At;
  UNROLL
  for (int h = 1; h < block; h *= 2) {
    UNROLL
    for (int i = 0; i < 8 * At::each; i++) {
      if (h >= 8 && h < 8 * At::lanes) {
        const float other = simd_shuffle_xor(x[i], ushort(h / 8));
        x[i] = lane & uint(h / 8) ? other - x[i] : x[i] + other;
      } else {
        const int step = h < 8 ? h : h / At::lanes;
        if (!(i & step)) {
          const float sum = x[i] + x[i + step];
          x[i + step] = x[i] - x[i + step];
          x[i] = sum;
        }
      }
    }
  }
  if (block > 1) {
    UNROLL
    for (int i = 0; i < 8 * At::each; i++) {
      x[i] *= inverse_root(block);
    }
  }
}

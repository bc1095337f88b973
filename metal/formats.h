// One decode trait for each format. `mlxfuse/streams.py` documents the streams they read.
//
// A unit is the run of `width` consecutive weights that one lane decodes: 32, or 16 where the
// codes of 32 would not fit one 16-byte load. Half h of a unit is its weights 16 h to 16 h + 15.
// A trait is a `Unit` of what its codes and its scales are. Both load their share of unit i of
// the row whose first unit is `first` from the streams p.
//
// Codes provide
//
//   width           weights in the unit
//   code(i)         the code of weight i times 2^shift(i): codes need not be shifted into
//                   place one by one where the activations can be scaled once for many rows
//   quad(q)         the codes of weights 4 q to 4 q + 3
//   word(q)         the same as bytes, unsigned where the trait has an offset, else signed
//
// and scales
//
//   halves          true if each half has a scale and bias of its own
//   biased          true if the format has biases
//   scale(h), bias(h)
//   d, times[h]     where there are halves and no biases: scale(h) is d * times[h], an integer
//
// so that weight i is scale(i / 16) * (code(i) / 2^shift(i) - offset) + bias(i / 16).
// All products of a scale and a code are exact in float32.

template <typename C, typename H, typename B, typename S, typename D, typename G>
struct Streams {
  C codes;
  H high;
  B signs;
  S scales;
  D supers;
  G grid;
};
template <typename C, typename H, typename B, typename S, typename D, typename G>
METAL_FUNC Streams<C, H, B, S, D, G> streams(
    C codes, H high, B signs, S scales, D supers, G grid) {
  return Streams<C, H, B, S, D, G>{codes, high, signs, scales, supers, grid};
}

// The float16 that all scales of a block of 256 weights are multiplied by.
template <typename P>
METAL_FUNC float super(P p, uint first, uint i) {
  return float(p.supers[(first + i) >> 3]);
}

template <typename C, typename S, int subtracted = 0>
struct Unit {
  static constexpr constant int width = C::width;
  static constexpr constant bool halves = S::halves;
  static constexpr constant bool biased = S::biased;
  static constexpr constant int offset = subtracted;
  C codes;
  S scales;
  template <typename P>
  METAL_FUNC Unit(P p, uint first, uint i) : codes(p, first, i), scales(p, first, i) {}
  METAL_FUNC static constexpr int shift(int i) {
    return C::shift(i);
  }
  METAL_FUNC float code(int i) const {
    return codes.code(i);
  }
  METAL_FUNC uint word(int q) const {
    return codes.word(q);
  }
  METAL_FUNC float4 quad(int q) const {
    return codes.quad(q);
  }
  METAL_FUNC float scale(int h) const {
    return scales.scale(h);
  }
  METAL_FUNC float bias(int h) const {
    return scales.bias(h);
  }
};

//@ Nibbles:
// Weight 16 h + 4 j + b: word j, byte b, nibble h.
struct Nibbles {
  static constexpr constant int width = 32;
  uint4 w;
  template <typename P>
  METAL_FUNC Nibbles(P p, uint first, uint i) : w(elements<uint4>(p.codes)[first + i]) {}
  METAL_FUNC static constexpr int shift(int i) {
    return 8 * (i & 3) + 4 * (i >> 4);
  }
  METAL_FUNC float code(int i) const {
    return float(w[(i >> 2) & 3] & (15u << shift(i)));
  }
  METAL_FUNC uint word(int q) const {
    return (w[q & 3] >> (q & 4)) & 0x0f0f0f0fu;
  }
  METAL_FUNC float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ Pairs:
// Weight 16 h + 4 j + b: word j % 2, byte b, bits 4 h + 2 (j / 2) and the next; of the codes or,
// if `high`, of the plane above.
template <bool high>
struct Pairs {
  static constexpr constant int width = 32;
  ulong w;  // as one, so that no compiler takes the load apart
  template <typename P>
  METAL_FUNC Pairs(P p, uint first, uint i) {
    if constexpr (high) {
      w = elements<ulong>(p.high)[first + i];
    } else {
      w = elements<ulong>(p.codes)[first + i];
    }
  }
  METAL_FUNC static constexpr int shift(int i) {
    return 8 * (i & 3) + 4 * (i >> 4) + 2 * ((i >> 3) & 1);
  }
  METAL_FUNC float code(int i) const {
    return float(uint(w >> (32 * ((i >> 2) & 1))) & (3u << shift(i)));
  }
  METAL_FUNC uint word(int q) const {
    return (uint(w >> (32 * (q & 1))) >> ((q & 4) + (q & 2))) & 0x03030303u;
  }
  METAL_FUNC float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ HighBits:
// In the plane above, weight 16 h + 4 j + b: byte b, bit 4 h + j; rotated, bit
// 4 (j % 2) + 2 h + j / 2.
template <bool rotated>
struct HighBits {
  uint w;
  template <typename P>
  METAL_FUNC HighBits(P p, uint first, uint i) : w(p.high[first + i]) {}
  METAL_FUNC uint word(int q) const {
    return (w >> (rotated ? 4 * (q & 1) + (q >> 1) : q)) & 0x01010101u;
  }
};

//@ Merged:
// A plane of `Low` codes and a plane above it, put together four weights at a time.
template <typename Low, typename High, int bits>
struct Merged {
  static constexpr constant int width = 32;
  Low low;
  High high;
  template <typename P>
  METAL_FUNC Merged(P p, uint first, uint i) : low(p, first, i), high(p, first, i) {}
  METAL_FUNC static constexpr int shift(int i) {
    return 8 * (i & 3);
  }
  METAL_FUNC uint word(int q) const {
    return low.word(q) | (high.word(q) << bits);
  }
  METAL_FUNC float code(int i) const {
    return float(word(i >> 2) & (255u << shift(i)));
  }
  METAL_FUNC float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ Bytes:
// Signed bytes in the order of the weights.
struct Bytes {
  static constexpr constant int width = 16;
  uint4 w;
  template <typename P>
  METAL_FUNC Bytes(P p, uint first, uint i) : w(elements<uint4>(p.codes)[first + i]) {}
  METAL_FUNC static constexpr int shift(int) {
    return 0;
  }
  METAL_FUNC uint word(int q) const {
    return w[q];
  }
  METAL_FUNC float4 quad(int q) const {
    return float4(as_type<char4>(w[q]));
  }
  METAL_FUNC float code(int i) const {
    return float(as_type<char4>(w[i >> 2])[i & 3]);
  }
};

//@ IQ4: Nibbles
// Nibbles that index 16 values: one load of 4 bytes a weight, of lanes that never meet in a bank
// of threadgroup memory but at the same word.
struct IQ4 {
  static constexpr constant int width = 32;
  Nibbles index;
  const threadgroup uint* values;
  template <typename P>
  METAL_FUNC IQ4(P p, uint first, uint i) : index(p, first, i), values(p.grid) {}
  METAL_FUNC static constexpr int shift(int) {
    return 0;
  }
  METAL_FUNC float code(int i) const {
    return as_type<float>(values[(index.w[(i >> 2) & 3] >> Nibbles::shift(i)) & 15u]);
  }
  METAL_FUNC uint word(int q) const {
    return as_type<uint>(char4(quad(q)));
  }
  METAL_FUNC float4 quad(int q) const {
    return float4(code(4 * q), code(4 * q + 1), code(4 * q + 2), code(4 * q + 3));
  }
};

//@ E2M1:
// Twice the values of floats of 4 bits: 2 of the exponent, 1 of the mantissa. Moved to the places
// that these have in a float16 (the exponent 0 to a subnormal one), they are 2^15 times smaller,
// which `shift` leaves to the activations. Nibbles in the order of `Nibbles`, or of the weights.
template <bool in_order>
struct E2M1 {
  static constexpr constant int width = 32;
  uint4 w;
  template <typename P>
  METAL_FUNC E2M1(P p, uint first, uint i) : w(elements<uint4>(p.codes)[first + i]) {}
  METAL_FUNC static constexpr int shift(int) {
    return -15;
  }
  // The nibbles from bits 0 and 16 on.
  METAL_FUNC static float2 pair(uint x) {
    return float2(as_type<half2>(((x & 0x00070007u) << 9) | ((x & 0x00080008u) << 12)));
  }
  METAL_FUNC float4 small(int q) const {
    if (in_order) {
      const uint x = w[q >> 1];
      const int at = q & 1;
      return float4(pair(x)[at], pair(x >> 4)[at], pair(x >> 8)[at], pair(x >> 12)[at]);
    }
    const uint x = w[q & 3] >> (q & 4);
    const float2 even = pair(x);
    const float2 odd = pair(x >> 8);
    return float4(even.x, odd.x, even.y, odd.y);
  }
  METAL_FUNC float code(int i) const {
    return small(i >> 2)[i & 3];
  }
  METAL_FUNC float4 quad(int q) const {
    return fma(float4(32768.0f), small(q), float4(0.0f));  // adding 0 makes -0 a 0, as it is in ggml
  }
  METAL_FUNC uint word(int q) const {
    return as_type<uint>(char4(quad(q)));
  }
};

//@ Single:
// A float16 scale for each so many units.
template <int units>
struct Single {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  float s;
  template <typename P>
  METAL_FUNC Single(P p, uint first, uint i) : s(float(p.scales[(first + i) / units])) {}
  METAL_FUNC float scale(int) const {
    return s;
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ Biased:
// A float16 scale and a float16 bias for each unit.
struct Biased {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = true;
  float2 s;
  template <typename P>
  METAL_FUNC Biased(P p, uint first, uint i) : s(float2(elements<half2>(p.scales)[first + i])) {}
  METAL_FUNC float scale(int) const {
    return s.x;
  }
  METAL_FUNC float bias(int) const {
    return s.y;
  }
};

//@ SixBits:
// The scale and the minimum of group g of a Q4_K or Q5_K block, from its 16 bytes d, dmin and
// 12 bytes of packed 6-bit numbers.
struct SixBits {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = true;
  float s;
  float b;
  template <typename P>
  METAL_FUNC SixBits(P p, uint first, uint i) {
    const uint4 block = elements<uint4>(p.scales)[(first + i) >> 3];
    const uint g = i & 7;
    // Groups 0 to 3: 6 bits of x and y. 4 to 7: 4 bits of z, 2 high bits of x and y.
    const uint at = 8 * (g & 3);
    const bool late = g > 3;
    const uint low = late ? 15 : 63;
    const uint high = late ? 48 : 0;
    const uint x = block.y >> at;
    const uint y = block.z >> at;
    const uint z = block.w >> at;
    const uint scale = (metal::select(x, z, late) & low) | ((x >> 2) & high);
    const uint minimum = (metal::select(y, z >> 4, late) & low) | ((y >> 2) & high);
    const half2 d = as_type<half2>(block.x);
    s = float(d.x) * float(scale);
    b = -float(d.y) * float(minimum);
  }
  METAL_FUNC float scale(int) const {
    return s;
  }
  METAL_FUNC float bias(int) const {
    return b;
  }
};

//@ Q2KScales:
struct Q2KScales {
  static constexpr constant bool halves = true;
  static constexpr constant bool biased = true;
  float2 s;
  float2 b;
  template <typename P>
  METAL_FUNC Q2KScales(P p, uint first, uint i) {
    const half2 d = elements<half2>(p.supers)[(first + i) >> 3];
    const uchar2 packed = elements<uchar2>(p.scales)[first + i];
    s = float(d.x) * float2(packed & uchar2(15));
    b = -float(d.y) * float2(packed >> uchar2(4));
  }
  METAL_FUNC float scale(int h) const {
    return s[h];
  }
  METAL_FUNC float bias(int h) const {
    return b[h];
  }
};

//@ Halves:
// A scale for each 16 weights: that of the block times an integer; From reads both.
template <typename From>
struct Halves {
  static constexpr constant bool halves = true;
  static constexpr constant bool biased = false;
  float d;
  int2 times;
  template <typename P>
  METAL_FUNC Halves(P p, uint first, uint i)
      : d(From::d(p, first, i)), times(From::times(p, first, i)) {}
  METAL_FUNC float scale(int h) const {
    return d * float(times[h]);
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ Q3KScales:
struct Q3KScales {
  template <typename P>
  METAL_FUNC static float d(P p, uint first, uint i) {
    return super(p, first, i);
  }
  template <typename P>
  METAL_FUNC static int2 times(P p, uint first, uint i) {
    const auto packed = elements<ushort>(p.scales) + 6 * ((first + i) >> 3);
    const uint g = i & 7;
    const uint four = (packed[g & 3] >> (g & 4)) & 0x0f0f;
    const uint two = (packed[4 + (g & 1)] >> (g & 6)) & 0x0303;
    const uint six = four | (two << 4);
    return int2(six & 255, six >> 8) - 32;
  }
};

//@ Q6KScales:
struct Q6KScales {
  template <typename P>
  METAL_FUNC static float d(P p, uint first, uint i) {
    return super(p, first, i);
  }
  template <typename P>
  METAL_FUNC static int2 times(P p, uint first, uint i) {
    return int2(elements<char2>(p.scales)[first + i]);
  }
};

//@ IQ4XSScales:
struct IQ4XSScales {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  float s;
  template <typename P>
  METAL_FUNC IQ4XSScales(P p, uint first, uint i) {
    const uint2 block = elements<uint2>(p.scales)[(first + i) >> 3];
    const uint g = i & 7;
    const uint six = ((block.y >> (4 * g)) & 15) | (((block.x >> (16 + 2 * g)) & 3) << 4);
    s = float(as_type<half2>(block.x).x) * (float(six) - 32.0f);
  }
  METAL_FUNC float scale(int) const {
    return s;
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ E8M0:
// An exponent for each so many units: 2^(e - 128), the scale that goes with twice the value;
// subnormal for e < 2.
template <int units>
struct E8M0 {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  float s;
  template <typename P>
  METAL_FUNC E8M0(P p, uint first, uint i) {
    const uint e = p.scales[(first + i) / units];
    s = as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  }
  METAL_FUNC float scale(int) const {
    return s;
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ Q4_0: Nibbles Single
using Q4_0 = Unit<Nibbles, Single<1>, 8>;

//@ Q4_1: Nibbles Biased
using Q4_1 = Unit<Nibbles, Biased>;

//@ Q5_0: Nibbles HighBits Merged Single
using Q5_0 = Unit<Merged<Nibbles, HighBits<true>, 4>, Single<1>, 16>;

//@ Q5_1: Nibbles HighBits Merged Biased
using Q5_1 = Unit<Merged<Nibbles, HighBits<true>, 4>, Biased>;

//@ Q8_0: Bytes Single
using Q8_0 = Unit<Bytes, Single<2>>;

//@ Q2_K: Pairs Q2KScales
using Q2_K = Unit<Pairs<false>, Q2KScales>;

//@ Q3_K: Pairs HighBits Merged Halves Q3KScales
using Q3_K = Unit<Merged<Pairs<false>, HighBits<false>, 2>, Halves<Q3KScales>, 4>;

//@ Q4_K: Nibbles SixBits
using Q4_K = Unit<Nibbles, SixBits>;

//@ Q5_K: Nibbles HighBits Merged SixBits
using Q5_K = Unit<Merged<Nibbles, HighBits<false>, 4>, SixBits>;

//@ Q6_K: Nibbles Pairs Merged Halves Q6KScales
using Q6_K = Unit<Merged<Nibbles, Pairs<true>, 4>, Halves<Q6KScales>, 32>;

//@ IQ4_NL: IQ4 Single
using IQ4_NL = Unit<IQ4, Single<1>>;

//@ IQ4_XS: IQ4 IQ4XSScales
using IQ4_XS = Unit<IQ4, IQ4XSScales>;

//@ MXFP4: E2M1 E8M0
using MXFP4 = Unit<E2M1<false>, E8M0<1>>;

//@ E4M3:
// For each 16 weights an unsigned float of 8 bits, 4 of the exponent and 3 of the mantissa: half
// of it, which goes with twice the value. 127 is 0, as in ggml.
struct E4M3 {
  static constexpr constant bool halves = true;
  static constexpr constant bool biased = false;
  float2 s;
  template <typename P>
  METAL_FUNC E4M3(P p, uint first, uint i) {
    const ushort2 e = ushort2(elements<uchar2>(p.scales)[first + i]) & ushort2(127);
    const half2 places = half2(as_type<half>(ushort(e.x << 7)), as_type<half>(ushort(e.y << 7)));
    s = float2(e.x == 127 ? 0.0f : float(places.x), e.y == 127 ? 0.0f : float(places.y)) * 128.0f;
  }
  METAL_FUNC float scale(int h) const {
    return s[h];
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ Signs:
// Twice a bit, of a rotated plane as in HighBits: with an offset of 1, plus or minus 1.
struct Signs {
  static constexpr constant int width = 32;
  uint w;
  template <typename P>
  METAL_FUNC Signs(P p, uint first, uint i) : w(p.codes[first + i]) {}
  METAL_FUNC static constexpr int place(int q) {
    return 4 * (q & 1) + (q >> 1);
  }
  METAL_FUNC static constexpr int shift(int i) {
    return 8 * (i & 3) + place(i >> 2) - 1;
  }
  METAL_FUNC float code(int i) const {
    return float(w & (1u << (shift(i) + 1)));
  }
  METAL_FUNC uint word(int q) const {
    return ((w >> place(q)) & 0x01010101u) << 1;
  }
  METAL_FUNC float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ One:
struct One {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  template <typename P>
  METAL_FUNC One(P, uint, uint) {}
  METAL_FUNC float scale(int) const {
    return 1.0f;
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ Dense:
// Ordinary numbers: float32 if `wide`, else the upper half of one if `brain`, else float16.
template <bool wide, bool brain>
struct Dense {
  static constexpr constant int width = wide ? 4 : 8;
  uint4 w;
  template <typename P>
  METAL_FUNC Dense(P p, uint first, uint i) : w(elements<uint4>(p.codes)[first + i]) {}
  METAL_FUNC static constexpr int shift(int) {
    return 0;
  }
  METAL_FUNC float code(int i) const {
    if (wide) {
      return as_type<float>(w[i & 3]);
    }
    const uint two = w[i >> 1];
    if (brain) {
      return as_type<float>(i & 1 ? two & 0xffff0000u : two << 16);
    }
    return float(as_type<half2>(two)[i & 1]);
  }
  METAL_FUNC float4 quad(int q) const {
    return float4(code(4 * q), code(4 * q + 1), code(4 * q + 2), code(4 * q + 3));
  }
};

//@ F32: Dense One
using F32 = Unit<Dense<true, false>, One>;

//@ F16: Dense One
using F16 = Unit<Dense<false, false>, One>;

//@ BF16: Dense One
using BF16 = Unit<Dense<false, true>, One>;

//@ NVFP4: E2M1 E4M3
using NVFP4 = Unit<E2M1<false>, E4M3>;

//@ TQ2_0: Pairs Single
using TQ2_0 = Unit<Pairs<false>, Single<8>, 1>;

//@ Q2_0: Pairs Single
using Q2_0 = Unit<Pairs<false>, Single<2>, 1>;

//@ Q1_0: Signs Single
using Q1_0 = Unit<Signs, Single<4>, 1>;

//@ Words:
// 32 bytes in the order of the weights, which From makes out of entries of a codebook.
template <typename From, bool signs>
struct Words {
  static constexpr constant int width = 32;
  uint w[8];
  template <typename P>
  METAL_FUNC Words(P p, uint first, uint i) {
    uint made[8];
    From::fill(p, first, i, made);
    UNROLL
    for (int q = 0; q < 8; q++) {
      w[q] = made[q];
    }
  }
  METAL_FUNC static constexpr int shift(int i) {
    return signs ? 0 : 8 * (i & 3);
  }
  METAL_FUNC float code(int i) const {
    const uint word = w[i >> 2];
    return signs ? float(as_type<char4>(word)[i & 3]) : float(word & (255u << (8 * (i & 3))));
  }
  METAL_FUNC uint word(int q) const {
    return w[q];
  }
  METAL_FUNC float4 quad(int q) const {
    return signs ? float4(as_type<char4>(w[q])) : bytes(w[q]);
  }
};

// Positive bytes, negative where the byte of `minus` is 1 and not 0.
METAL_FUNC uint negated(uint word, uint minus) {
  return (word ^ ((minus << 8) - minus)) + minus;
}

// A nibble's bits as bytes of 0 or 1.
METAL_FUNC uint spread(uint bits) {
  return ((bits & 15u) * 0x00204081u) & 0x01010101u;
}

// 7 signs and the eighth, with which an even number of them are minus.
METAL_FUNC uint even_signs(uint seven) {
  return (seven & 127u) | ((metal::popcount(seven & 127u) & 1u) << 7);
}

// Bits of weights 4 q to 4 q + 3 of a rotated plane as in HighBits.
METAL_FUNC uint plane_signs(uint plane, int q) {
  return (plane >> (4 * (q & 1) + (q >> 1))) & 0x01010101u;
}

//@ Scaled:
// One scale for 32 weights: that of the block times what From reads.
template <typename From>
struct Scaled {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  float s;
  template <typename P>
  METAL_FUNC Scaled(P p, uint first, uint i) : s(super(p, first, i) * From::times(p, first, i)) {}
  METAL_FUNC float scale(int) const {
    return s;
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ IQ2: Words
// 8 weights from the grid with signs in `minus`, a bit each.
template <typename G>
METAL_FUNC void eight(G grid, uint index, uint minus, thread uint* w) {
  const uint2 entry = elements<uint2>(grid)[index];
  w[0] = negated(entry.x, spread(minus));
  w[1] = negated(entry.y, spread(minus >> 4));
}

//@ IQ2_XXS: IQ2 Scaled
// A word of 4 indices, then one of 4 times 7 signs and the scale.
struct FromIQ2XXS {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint2 v = as_type<uint2>(elements<ulong>(p.codes)[first + i]);
    UNROLL
    for (int k = 0; k < 4; k++) {
      eight(p.grid, (v.x >> (8 * k)) & 255u, even_signs(v.y >> (7 * k)), w + 2 * k);
    }
  }
  template <typename P>
  METAL_FUNC static float times(P p, uint first, uint i) {
    return 0.125f * float(2 * (uint(elements<ulong>(p.codes)[first + i] >> 60)) + 1);
  }
};
using IQ2_XXS = Unit<Words<FromIQ2XXS, true>, Scaled<FromIQ2XXS>>;

//@ IQ2Scales: Halves
struct IQ2Scales {
  template <typename P>
  METAL_FUNC static float d(P p, uint first, uint i) {
    return 0.125f * super(p, first, i);
  }
  template <typename P>
  METAL_FUNC static int2 times(P p, uint first, uint i) {
    const uint both = elements<uchar>(p.scales)[first + i];
    return 2 * int2(both & 15u, both >> 4) + 1;
  }
};

//@ IQ2_XS: IQ2 IQ2Scales
// Four times 9 bits of an index and 7 signs.
struct FromIQ2XS {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint2 v = elements<uint2>(p.codes)[first + i];
    UNROLL
    for (int k = 0; k < 4; k++) {
      const uint both = v[k >> 1] >> (16 * (k & 1));
      eight(p.grid, both & 511u, even_signs(both >> 9), w + 2 * k);
    }
  }
};
using IQ2_XS = Unit<Words<FromIQ2XS, true>, Halves<IQ2Scales>>;

//@ IQ2_S: Words IQ2Scales
// 8 bits of 4 indices, 2 high bits of each, 32 signs.
struct FromIQ2S {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint low = p.codes[first + i];
    const uint high = elements<uchar>(p.high)[first + i];
    const uint minus = p.signs[first + i];
    UNROLL
    for (int k = 0; k < 4; k++) {
      const uint index = ((low >> (8 * k)) & 255u) | (((high >> (2 * k)) & 3u) << 8);
      const uint2 entry = elements<uint2>(p.grid)[index];
      w[2 * k] = negated(entry.x, plane_signs(minus, 2 * k));
      w[2 * k + 1] = negated(entry.y, plane_signs(minus, 2 * k + 1));
    }
  }
};
using IQ2_S = Unit<Words<FromIQ2S, true>, Halves<IQ2Scales>>;

//@ IQ3_XXS: Words Scaled
// 8 indices of 4 weights each, a byte each; 4 times 7 signs and the scale.
struct FromIQ3XXS {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint2 v = elements<uint2>(p.codes)[first + i];
    const uint signs = p.signs[first + i];
    UNROLL
    for (int q = 0; q < 8; q++) {
      const uint minus = even_signs(signs >> (7 * (q >> 1))) >> (4 * (q & 1));
      w[q] = negated(p.grid[(v[q >> 2] >> (8 * (q & 3))) & 255u], spread(minus));
    }
  }
  template <typename P>
  METAL_FUNC static float times(P p, uint first, uint i) {
    return 0.25f * float(2 * (p.signs[first + i] >> 28) + 1);
  }
};
using IQ3_XXS = Unit<Words<FromIQ3XXS, true>, Scaled<FromIQ3XXS>>;

//@ IQ3_S: Words Scaled
// 8 bits of 8 indices, the high bit of each, 32 signs.
struct FromIQ3S {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint2 v = elements<uint2>(p.codes)[first + i];
    const uint high = elements<uchar>(p.high)[first + i];
    const uint minus = p.signs[first + i];
    UNROLL
    for (int q = 0; q < 8; q++) {
      const uint index = ((v[q >> 2] >> (8 * (q & 3))) & 255u) | (((high >> q) & 1u) << 8);
      w[q] = negated(p.grid[index], plane_signs(minus, q));
    }
  }
  template <typename P>
  METAL_FUNC static float times(P p, uint first, uint i) {
    return float(2 * ((p.scales[(first + i) >> 3] >> (4 * (i & 7))) & 15u) + 1);
  }
};
using IQ3_S = Unit<Words<FromIQ3S, true>, Scaled<FromIQ3S>>;

//@ IQ1: Words
// Codes are 8 times a value of the grid plus or minus 1, plus 9. 8 weights of an entry.
METAL_FUNC void ternary(uint entry, bool minus, thread uint* w) {
  const uint added = minus ? 0u : 0x02020202u;
  w[0] = ((entry & 0x03030303u) << 3) | added;
  w[1] = ((entry & 0x30303030u) >> 1) | added;
}

//@ IQ1_S: IQ1 Scaled
// 8 bits of 4 indices; 3 high bits of each, 3 bits of the scale and the sign of what is added.
struct FromIQ1S {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint low = p.codes[first + i];
    const uint high = elements<ushort>(p.high)[first + i];
    UNROLL
    for (int k = 0; k < 4; k++) {
      const uint index = ((low >> (8 * k)) & 255u) | (((high >> (3 * k)) & 7u) << 8);
      ternary(p.grid[index], (high & 0x8000u) != 0, w + 2 * k);
    }
  }
  template <typename P>
  METAL_FUNC static float times(P p, uint first, uint i) {
    const uint high = elements<ushort>(p.high)[first + i];
    return 0.125f * float(2 * ((high >> 12) & 7u) + 1);
  }
};
using IQ1_S = Unit<Words<FromIQ1S, false>, Scaled<FromIQ1S>, 9>;

//@ IQ1_M: IQ1 Halves
// 8 bits of 4 indices; 3 high bits of each and the sign of what is added to its weights. A block
// has a word of scales for each 64 weights, and 4 bits of the float16 above them.
struct FromIQ1M {
  template <typename P>
  METAL_FUNC static void fill(P p, uint first, uint i, thread uint* w) {
    const uint low = p.codes[first + i];
    const uint high = elements<ushort>(p.high)[first + i];
    UNROLL
    for (int k = 0; k < 4; k++) {
      const uint four = high >> (4 * k);
      ternary(
          p.grid[((low >> (8 * k)) & 255u) | ((four & 7u) << 8)], (four & 8u) != 0, w + 2 * k);
    }
  }
  template <typename P>
  METAL_FUNC static float d(P p, uint first, uint i) {
    const uint2 v = elements<uint2>(p.scales)[(first + i) >> 3];
    const uint low = ((v.x >> 12) & 0xfu) | ((v.x >> 24) & 0xf0u);
    const uint bits = low | ((v.y >> 4) & 0xf00u) | ((v.y >> 16) & 0xf000u);
    return 0.125f * float(as_type<half>(ushort(bits)));
  }
  template <typename P>
  METAL_FUNC static int2 times(P p, uint first, uint i) {
    const uint2 v = elements<uint2>(p.scales)[(first + i) >> 3];
    const uint six = ((i & 4) ? v.y : v.x) >> (16 * ((i >> 1) & 1) + 6 * (i & 1));
    return 2 * int2(six & 7u, (six >> 3) & 7u) + 1;
  }
};
using IQ1_M = Unit<Words<FromIQ1M, false>, Halves<FromIQ1M>, 9>;

//@ Run:
// A unit's words, loaded as many at once as they allow.
template <int words, int at_once>
struct Run {
  uint w[words];
  template <typename P>
  METAL_FUNC Run(P p, uint unit) {
    UNROLL
    for (int k = 0; k < words; k++) {
      w[k] = p.codes[unit * words + k];
    }
  }
  METAL_FUNC uint at(int k) const {
    return w[k];
  }
};
template <int words>
struct Run<words, 2> {
  ulong w[words / 2];
  template <typename P>
  METAL_FUNC Run(P p, uint unit) {
    UNROLL
    for (int k = 0; k < words / 2; k++) {
      w[k] = elements<ulong>(p.codes)[unit * (words / 2) + k];
    }
  }
  METAL_FUNC uint at(int k) const {
    return uint(w[k >> 1] >> (32 * (k & 1)));
  }
};
template <>
struct Run<4, 4> {
  uint4 w;
  template <typename P>
  METAL_FUNC Run(P p, uint unit) : w(elements<uint4>(p.codes)[unit]) {}
  METAL_FUNC uint at(int k) const {
    return w[k];
  }
};

//@ Packed: Run
// Codes of so many bits in the order of the weights, as MLX packs its own: that of weight i from
// bit `bits * i` of the unit on.
template <int bits>
struct Packed {
  static constexpr constant int width = bits == 8 ? 16 : 32;
  static constexpr constant int words = bits == 8 ? 4 : bits;
  static constexpr constant uint mask = (1u << bits) - 1;
  Run<words, words == 4 ? 4 : words % 2 == 0 ? 2 : 1> run;
  template <typename P>
  METAL_FUNC Packed(P p, uint first, uint i) : run(p, first + i) {}
  METAL_FUNC static constexpr int place(int i) {
    return (bits * i) & 31;
  }
  METAL_FUNC static constexpr bool parted(int i) {
    return place(i) + bits > 32;
  }
  METAL_FUNC static constexpr int shift(int i) {
    return parted(i) ? 0 : place(i);
  }
  METAL_FUNC uint field(int i) const {
    const int k = bits * i / 32;
    const uint low = run.at(k) >> place(i);
    return (parted(i) ? low | (run.at(k + 1) << (32 - place(i))) : low) & mask;
  }
  METAL_FUNC float code(int i) const {
    return float(parted(i) ? field(i) : run.at(bits * i / 32) & (mask << place(i)));
  }
  METAL_FUNC float4 quad(int q) const {
    return float4(uint4(field(4 * q), field(4 * q + 1), field(4 * q + 2), field(4 * q + 3)));
  }
  METAL_FUNC uint word(int q) const {
    if (bits == 8) {
      return run.at(q);
    }
    if (bits == 4) {
      const uint v = (run.at(q >> 1) >> (16 * (q & 1))) & 0xffffu;
      const uint two = (v | (v << 8)) & 0x00ff00ffu;
      return (two | (two << 4)) & 0x0f0f0f0fu;
    }
    return field(4 * q) | (field(4 * q + 1) << 8) | (field(4 * q + 2) << 16) |
           (field(4 * q + 3) << 24);
  }
};

//@ AffineScales:
// A scale and (as `supers`) a bias of so many units.
template <int units>
struct AffineScales {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = true;
  float s;
  float b;
  template <typename P>
  METAL_FUNC AffineScales(P p, uint first, uint i)
      : s(float(p.scales[(first + i) / units])), b(float(p.supers[(first + i) / units])) {}
  METAL_FUNC float scale(int) const {
    return s;
  }
  METAL_FUNC float bias(int) const {
    return b;
  }
};

//@ Affine: Packed AffineScales
// MLX's own affine weights: codes, scales and biases of each `group` weights.
template <int bits, int group>
using Affine = Unit<Packed<bits>, AffineScales<group / Packed<bits>::width>>;

//@ MLXMXFP4: E2M1 E8M0
// MLX's mxfp4: the values of MXFP4 in the order of the weights.
using MLXMXFP4 = Unit<E2M1<true>, E8M0<1>>;

//@ MLXNVFP4: E2M1 E4M3
// MLX's nvfp4, likewise.
using MLXNVFP4 = Unit<E2M1<true>, E4M3>;

//@ E4M3Bytes:
// Twice the values of floats of 8 bits: 4 of the exponent, 3 of the mantissa. In the places that
// these have in a float16 they are 2^9 times smaller; see E2M1.
struct E4M3Bytes {
  static constexpr constant int width = 16;
  uint4 w;
  template <typename P>
  METAL_FUNC E4M3Bytes(P p, uint first, uint i) : w(elements<uint4>(p.codes)[first + i]) {}
  METAL_FUNC static constexpr int shift(int) {
    return -9;
  }
  // The bytes from bits 0 and 16 on.
  METAL_FUNC static float2 pair(uint x) {
    return float2(as_type<half2>(((x & 0x007f007fu) << 7) | ((x & 0x00800080u) << 8)));
  }
  METAL_FUNC float4 small(int q) const {
    const float2 even = pair(w[q]);
    const float2 odd = pair(w[q] >> 8);
    return float4(even.x, odd.x, even.y, odd.y);
  }
  METAL_FUNC float code(int i) const {
    return small(i >> 2)[i & 3];
  }
  METAL_FUNC float4 quad(int q) const {
    return 512.0f * small(q);
  }
};

//@ MLXMXFP8: E4M3Bytes E8M0
using MLXMXFP8 = Unit<E4M3Bytes, E8M0<2>>;

// One decode trait for each format. `mlxfuse/formats.py` documents the streams they read.
//
// A unit is the run of `width` consecutive weights that one lane decodes: 32, or 16 where the
// codes of 32 would not fit one 16-byte load. Half h of a unit is its weights 16 h to 16 h + 15.
// A trait F(p, first, i) loads unit i of the row whose first unit is `first`, and provides
//
//   width           weights in the unit
//   halves          true if each half has a scale and bias of its own
//   biased          true if the format has biases
//   offset          what is subtracted from every code
//   code(i)         the code of weight i times 2^shift(i): codes need not be shifted into
//                   place one by one where the activations can be scaled once for many rows
//   quad(q)         the codes of weights 4 q to 4 q + 3
//   word(q)         the same, a byte each; not for codes from a table
//   scale(h), bias(h)
//   d, times[h]     where there are halves and no biases: scale(h) is d * times[h], an integer
//
// so that weight i is scale(i / 16) * (code(i) / 2^shift(i) - offset) + bias(i / 16).
// All products of a scale and a code are exact in float32.

template <typename C, typename H, typename S, typename D>
struct Streams {
  C codes;
  H high;
  S scales;
  D supers;
};
template <typename C, typename H, typename S, typename D>
METAL_FUNC Streams<C, H, S, D> streams(C codes, H high, S scales, D supers) {
  return Streams<C, H, S, D>{codes, high, scales, supers};
}

//@ Nibbles:
// Weight 16 h + 4 j + b: word j, byte b, nibble h.
struct Nibbles {
  static constexpr constant int width = 32;
  uint4 w;
  static constexpr int shift(int i) {
    return 8 * (i & 3) + 4 * (i >> 4);
  }
  float code(int i) const {
    return float(w[(i >> 2) & 3] & (15u << shift(i)));
  }
  uint word(int q) const {
    return (w[q & 3] >> (q & 4)) & 0x0f0f0f0fu;
  }
  float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ Pairs:
// Weight 16 h + 4 j + b: word j % 2, byte b, bits 4 h + 2 (j / 2) and the next.
struct Pairs {
  static constexpr constant int width = 32;
  uint2 w;
  static constexpr int shift(int i) {
    return 8 * (i & 3) + 4 * (i >> 4) + 2 * ((i >> 3) & 1);
  }
  float code(int i) const {
    return float(w[(i >> 2) & 1] & (3u << shift(i)));
  }
  uint word(int q) const {
    return (w[q & 1] >> ((q & 4) + (q & 2))) & 0x03030303u;
  }
  float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ Merged:
// A plane of `Low` codes and a plane above it, put together four weights at a time.
template <typename Low, typename High, int bits>
struct Merged {
  static constexpr constant int width = 32;
  Low low;
  High high;
  static constexpr int shift(int i) {
    return 8 * (i & 3);
  }
  uint word(int q) const {
    return low.word(q) | (high.word(q) << bits);
  }
  float code(int i) const {
    return float(word(i >> 2) & (255u << shift(i)));
  }
  float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ Bits:
// Weight 16 h + 4 j + b: byte b, bit 4 h + j; rotated, bit 4 (j % 2) + 2 h + j / 2.
template <bool rotated>
struct Bits {
  uint w;
  uint word(int q) const {
    return (w >> (rotated ? 4 * (q & 1) + (q >> 1) : q)) & 0x01010101u;
  }
};

//@ Table:
// Nibbles that index a table of 16 values.
template <typename Values>
struct Table {
  static constexpr constant int width = 32;
  Nibbles index;
  static constexpr int shift(int) {
    return 0;
  }
  float code(int i) const {
    return Values::at((index.w[(i >> 2) & 3] >> Nibbles::shift(i)) & 15u);
  }
  uint word(int q) const {
    return as_type<uint>(char4(quad(q)));
  }
  float4 quad(int q) const {
    return float4(code(4 * q), code(4 * q + 1), code(4 * q + 2), code(4 * q + 3));
  }
};

//@ IQ4Values:
constant float iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
struct IQ4Values {
  static float at(uint i) {
    return iq4_values[i];
  }
};

//@ E2M1Values:
// Twice the values of a 4-bit float with 2 exponent bits and 1 mantissa bit.
constant float e2m1_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
struct E2M1Values {
  static float at(uint i) {
    return e2m1_values[i];
  }
};

//@ E8M0:
// 2^(e - 128), the scale that goes with twice the value; subnormal for e < 2.
METAL_FUNC float e8m0_half(uint e) {
  return as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}

//@ SixBits:
// The scale and the minimum of group g of a Q4_K or Q5_K block, from its 16 bytes d, dmin and
// 12 bytes of packed 6-bit numbers.
struct SixBits {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = true;
  static constexpr constant int offset = 0;
  float s;
  float b;
  SixBits() = default;
  SixBits(uint4 block, uint g) {
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
  float scale(int) const {
    return s;
  }
  float bias(int) const {
    return b;
  }
};

//@ Single:
// One scale for 32 weights.
template <int subtracted>
struct Single {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  static constexpr constant int offset = subtracted;
  float s;
  float scale(int) const {
    return s;
  }
  float bias(int) const {
    return 0.0f;
  }
};

//@ Biased:
// One scale and one bias for 32 weights.
struct Biased {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = true;
  static constexpr constant int offset = 0;
  float s;
  float b;
  float scale(int) const {
    return s;
  }
  float bias(int) const {
    return b;
  }
};

//@ Halves:
// A scale for each 16 weights.
template <int subtracted>
struct Halves {
  static constexpr constant bool halves = true;
  static constexpr constant bool biased = false;
  static constexpr constant int offset = subtracted;
  float d;
  int2 times;
  float2 s;
  float scale(int h) const {
    return s[h];
  }
  float bias(int) const {
    return 0.0f;
  }
};

//@ Q4_0: Nibbles Single
struct Q4_0 : Nibbles, Single<8> {
  template <typename P>
  Q4_0(P p, uint first, uint i) {
    w = elements<uint4>(p.codes)[first + i];
    s = float(p.scales[first + i]);
  }
};

//@ Q4_1: Nibbles Biased
struct Q4_1 : Nibbles, Biased {
  template <typename P>
  Q4_1(P p, uint first, uint i) {
    w = elements<uint4>(p.codes)[first + i];
    const half2 d = elements<half2>(p.scales)[first + i];
    s = float(d.x);
    b = float(d.y);
  }
};

//@ Q5_0: Nibbles Bits Merged Single
struct Q5_0 : Merged<Nibbles, Bits<true>, 4>, Single<16> {
  template <typename P>
  Q5_0(P p, uint first, uint i) {
    low.w = elements<uint4>(p.codes)[first + i];
    high.w = p.high[first + i];
    s = float(p.scales[first + i]);
  }
};

//@ Q5_1: Nibbles Bits Merged Biased
struct Q5_1 : Merged<Nibbles, Bits<true>, 4>, Biased {
  template <typename P>
  Q5_1(P p, uint first, uint i) {
    low.w = elements<uint4>(p.codes)[first + i];
    high.w = p.high[first + i];
    const half2 d = elements<half2>(p.scales)[first + i];
    s = float(d.x);
    b = float(d.y);
  }
};

//@ Q8_0: Single
struct Q8_0 : Single<0> {
  static constexpr constant int width = 16;
  uint4 w;
  template <typename P>
  Q8_0(P p, uint first, uint i) {
    w = elements<uint4>(p.codes)[first + i];
    s = float(p.scales[(first + i) >> 1]);
  }
  static constexpr int shift(int) {
    return 0;
  }
  uint word(int q) const {
    return w[q];
  }
  float4 quad(int q) const {
    return float4(as_type<char4>(w[q]));
  }
  float code(int i) const {
    return float(as_type<char4>(w[i >> 2])[i & 3]);
  }
};

//@ Q2_K: Pairs
struct Q2_K : Pairs {
  static constexpr constant bool halves = true;
  static constexpr constant bool biased = true;
  static constexpr constant int offset = 0;
  float2 s;
  float2 b;
  template <typename P>
  Q2_K(P p, uint first, uint i) {
    w = elements<uint2>(p.codes)[first + i];
    const half2 d = elements<half2>(p.supers)[(first + i) >> 3];
    const uchar2 packed = elements<uchar2>(p.scales)[first + i];
    s = float(d.x) * float2(packed & uchar2(15));
    b = -float(d.y) * float2(packed >> uchar2(4));
  }
  float scale(int h) const {
    return s[h];
  }
  float bias(int h) const {
    return b[h];
  }
};

//@ Q3_K: Pairs Bits Merged Halves
struct Q3_K : Merged<Pairs, Bits<false>, 2>, Halves<4> {
  template <typename P>
  Q3_K(P p, uint first, uint i) {
    low.w = elements<uint2>(p.codes)[first + i];
    high.w = p.high[first + i];
    const uint block = (first + i) >> 3;
    const uint g = i & 7;
    const auto packed = elements<ushort>(p.scales) + 6 * block;
    const uint four = (packed[g & 3] >> (g & 4)) & 0x0f0f;
    const uint two = (packed[4 + (g & 1)] >> (g & 6)) & 0x0303;
    const uint six = four | (two << 4);
    d = float(p.supers[block]);
    times = int2(six & 255, six >> 8) - 32;
    s = d * float2(times);
  }
};

//@ Q4_K: Nibbles SixBits
struct Q4_K : Nibbles, SixBits {
  template <typename P>
  Q4_K(P p, uint first, uint i)
      : SixBits(elements<uint4>(p.scales)[(first + i) >> 3], i & 7) {
    w = elements<uint4>(p.codes)[first + i];
  }
};

//@ Q5_K: Nibbles Bits Merged SixBits
struct Q5_K : Merged<Nibbles, Bits<false>, 4>, SixBits {
  template <typename P>
  Q5_K(P p, uint first, uint i)
      : SixBits(elements<uint4>(p.scales)[(first + i) >> 3], i & 7) {
    low.w = elements<uint4>(p.codes)[first + i];
    high.w = p.high[first + i];
  }
};

//@ Q6_K: Nibbles Pairs Merged Halves
struct Q6_K : Merged<Nibbles, Pairs, 4>, Halves<32> {
  template <typename P>
  Q6_K(P p, uint first, uint i) {
    low.w = elements<uint4>(p.codes)[first + i];
    high.w = elements<uint2>(p.high)[first + i];
    const char2 packed = elements<char2>(p.scales)[first + i];
    d = float(p.supers[(first + i) >> 3]);
    times = int2(packed);
    s = d * float2(packed);
  }
};

//@ IQ4_NL: Nibbles Table IQ4Values Single
struct IQ4_NL : Table<IQ4Values>, Single<0> {
  template <typename P>
  IQ4_NL(P p, uint first, uint i) {
    index.w = elements<uint4>(p.codes)[first + i];
    s = float(p.scales[first + i]);
  }
};

//@ IQ4_XS: Nibbles Table IQ4Values Single
struct IQ4_XS : Table<IQ4Values>, Single<0> {
  template <typename P>
  IQ4_XS(P p, uint first, uint i) {
    index.w = elements<uint4>(p.codes)[first + i];
    const uint2 block = elements<uint2>(p.scales)[(first + i) >> 3];
    const uint g = i & 7;
    const uint six = ((block.y >> (4 * g)) & 15) | (((block.x >> (16 + 2 * g)) & 3) << 4);
    s = float(as_type<half2>(block.x).x) * (float(six) - 32.0f);
  }
};

//@ MXFP4: Nibbles Table E2M1Values E8M0 Single
struct MXFP4 : Table<E2M1Values>, Single<0> {
  template <typename P>
  MXFP4(P p, uint first, uint i) {
    index.w = elements<uint4>(p.codes)[first + i];
    s = e8m0_half(p.scales[first + i]);
  }
};

//@ Packed:
// Nibbles in the order of the weights, 8 to a word.
struct Packed {
  static constexpr constant int width = 32;
  uint4 w;
  static constexpr int shift(int i) {
    return 4 * (i & 7);
  }
  float code(int i) const {
    return float(w[(i >> 3) & 3] & (15u << shift(i)));
  }
  uint word(int q) const {
    const uint v = (w[(q >> 1) & 3] >> (16 * (q & 1))) & 0xffffu;
    const uint two = (v | (v << 8)) & 0x00ff00ffu;
    return (two | (two << 4)) & 0x0f0f0f0fu;
  }
  float4 quad(int q) const {
    const uint v = w[(q >> 1) & 3] >> (16 * (q & 1));
    return float4(uint4(v, v >> 4, v >> 8, v >> 12) & uint4(15));
  }
};

//@ Affine4: Packed Biased
// MLX's own affine weights: codes, scales and (as `supers`) biases of each `group` weights.
template <int group>
struct Affine4 : Packed, Biased {
  template <typename P>
  Affine4(P p, uint first, uint i) {
    w = elements<uint4>(p.codes)[first + i];
    s = float(p.scales[(first + i) / (group / 32)]);
    b = float(p.supers[(first + i) / (group / 32)]);
  }
};

//@ Affine8: Biased
template <int group>
struct Affine8 : Biased {
  static constexpr constant int width = 16;
  uint4 w;
  template <typename P>
  Affine8(P p, uint first, uint i) {
    w = elements<uint4>(p.codes)[first + i];
    s = float(p.scales[(first + i) / (group / 16)]);
    b = float(p.supers[(first + i) / (group / 16)]);
  }
  static constexpr int shift(int i) {
    return 8 * (i & 3);
  }
  float code(int i) const {
    return float(w[i >> 2] & (255u << shift(i)));
  }
  uint word(int q) const {
    return w[q];
  }
  float4 quad(int q) const {
    return bytes(w[q]);
  }
};

//@ MLXMXFP4: E2M1Values E8M0 Single
// MLX's mxfp4: the values of MXFP4 in the order of the weights.
struct MLXMXFP4 : Single<0> {
  static constexpr constant int width = 32;
  uint4 w;
  template <typename P>
  MLXMXFP4(P p, uint first, uint i) {
    w = elements<uint4>(p.codes)[first + i];
    s = e8m0_half(p.scales[first + i]);
  }
  static constexpr int shift(int) {
    return 0;
  }
  float code(int i) const {
    return E2M1Values::at((w[(i >> 3) & 3] >> (4 * (i & 7))) & 15u);
  }
  float4 quad(int q) const {
    return float4(code(4 * q), code(4 * q + 1), code(4 * q + 2), code(4 * q + 3));
  }
};

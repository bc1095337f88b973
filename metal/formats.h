// One decode trait for each format. `mlxfuse/formats.py` documents the streams they read.
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
// Weight 16 h + 4 j + b: word j % 2, byte b, bits 4 h + 2 (j / 2) and the next.
struct Pairs {
  static constexpr constant int width = 32;
  uint2 w;
  METAL_FUNC explicit Pairs(uint2 words) : w(words) {}
  template <typename P>
  METAL_FUNC Pairs(P p, uint first, uint i) : w(elements<uint2>(p.codes)[first + i]) {}
  METAL_FUNC static constexpr int shift(int i) {
    return 8 * (i & 3) + 4 * (i >> 4) + 2 * ((i >> 3) & 1);
  }
  METAL_FUNC float code(int i) const {
    return float(w[(i >> 2) & 1] & (3u << shift(i)));
  }
  METAL_FUNC uint word(int q) const {
    return (w[q & 1] >> ((q & 4) + (q & 2))) & 0x03030303u;
  }
  METAL_FUNC float4 quad(int q) const {
    return bytes(word(q));
  }
};

//@ HighPairs: Pairs
// Pairs in the plane above.
struct HighPairs {
  Pairs pairs;
  template <typename P>
  METAL_FUNC HighPairs(P p, uint first, uint i) : pairs(elements<uint2>(p.high)[first + i]) {}
  METAL_FUNC uint word(int q) const {
    return pairs.word(q);
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

//@ Table: Nibbles
// Nibbles that index a table of 16 values.
template <typename Values>
struct Table {
  static constexpr constant int width = 32;
  Nibbles index;
  template <typename P>
  METAL_FUNC Table(P p, uint first, uint i) : index(p, first, i) {}
  METAL_FUNC static constexpr int shift(int) {
    return 0;
  }
  METAL_FUNC float code(int i) const {
    return Values::at((index.w[(i >> 2) & 3] >> Nibbles::shift(i)) & 15u);
  }
  METAL_FUNC uint word(int q) const {
    return as_type<uint>(char4(quad(q)));
  }
  METAL_FUNC float4 quad(int q) const {
    return float4(code(4 * q), code(4 * q + 1), code(4 * q + 2), code(4 * q + 3));
  }
};

//@ IQ4Values:
constant float iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
struct IQ4Values {
  METAL_FUNC static float at(uint i) {
    return iq4_values[i];
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
// A scale for each 16 weights: a float16 of the block times an integer, which Times reads.
template <typename Times>
struct Halves {
  static constexpr constant bool halves = true;
  static constexpr constant bool biased = false;
  float d;
  int2 times;
  template <typename P>
  METAL_FUNC Halves(P p, uint first, uint i)
      : d(float(p.supers[(first + i) >> 3])), times(Times::of(p, first, i)) {}
  METAL_FUNC float scale(int h) const {
    return d * float(times[h]);
  }
  METAL_FUNC float bias(int) const {
    return 0.0f;
  }
};

//@ Q3KTimes:
struct Q3KTimes {
  template <typename P>
  METAL_FUNC static int2 of(P p, uint first, uint i) {
    const auto packed = elements<ushort>(p.scales) + 6 * ((first + i) >> 3);
    const uint g = i & 7;
    const uint four = (packed[g & 3] >> (g & 4)) & 0x0f0f;
    const uint two = (packed[4 + (g & 1)] >> (g & 6)) & 0x0303;
    const uint six = four | (two << 4);
    return int2(six & 255, six >> 8) - 32;
  }
};

//@ Q6KTimes:
struct Q6KTimes {
  template <typename P>
  METAL_FUNC static int2 of(P p, uint first, uint i) {
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
// An exponent for each unit: 2^(e - 128), the scale that goes with twice the value; subnormal
// for e < 2.
struct E8M0 {
  static constexpr constant bool halves = false;
  static constexpr constant bool biased = false;
  float s;
  template <typename P>
  METAL_FUNC E8M0(P p, uint first, uint i) {
    const uint e = p.scales[first + i];
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
using Q2_K = Unit<Pairs, Q2KScales>;

//@ Q3_K: Pairs HighBits Merged Halves Q3KTimes
using Q3_K = Unit<Merged<Pairs, HighBits<false>, 2>, Halves<Q3KTimes>, 4>;

//@ Q4_K: Nibbles SixBits
using Q4_K = Unit<Nibbles, SixBits>;

//@ Q5_K: Nibbles HighBits Merged SixBits
using Q5_K = Unit<Merged<Nibbles, HighBits<false>, 4>, SixBits>;

//@ Q6_K: Nibbles HighPairs Merged Halves Q6KTimes
using Q6_K = Unit<Merged<Nibbles, HighPairs, 4>, Halves<Q6KTimes>, 32>;

//@ IQ4_NL: Table IQ4Values Single
using IQ4_NL = Unit<Table<IQ4Values>, Single<1>>;

//@ IQ4_XS: Table IQ4Values IQ4XSScales
using IQ4_XS = Unit<Table<IQ4Values>, IQ4XSScales>;

//@ MXFP4: E2M1 E8M0
using MXFP4 = Unit<E2M1<false>, E8M0>;

//@ Packed:
// Codes of so many bits in the order of the weights, as MLX packs its own: that of weight i from
// bit `bits * i` of the unit on.
template <int bits>
struct Packed {
  static constexpr constant int width = bits == 8 ? 16 : 32;
  static constexpr constant int words = bits == 8 ? 4 : bits;
  static constexpr constant uint mask = (1u << bits) - 1;
  uint w[words];
  template <typename P>
  METAL_FUNC Packed(P p, uint first, uint i) {
    constexpr int many = words == 4 ? 4 : words % 2 == 0 ? 2 : 1;
    UNROLL
    for (int k = 0; k < words; k += many) {
      const uint at = ((first + i) * words + k) / many;
      if constexpr (many == 1) {
        w[k] = p.codes[at];
      } else {
        const vec<uint, many> found = elements<vec<uint, many>>(p.codes)[at];
        UNROLL
        for (int e = 0; e < many; e++) {
          w[k + e] = found[e];
        }
      }
    }
  }
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
    const uint low = w[k] >> place(i);
    return (parted(i) ? low | (w[k + 1] << ((32 - place(i)) & 31)) : low) & mask;
  }
  METAL_FUNC float code(int i) const {
    return float(parted(i) ? field(i) : w[bits * i / 32] & (mask << place(i)));
  }
  METAL_FUNC float4 quad(int q) const {
    return float4(uint4(field(4 * q), field(4 * q + 1), field(4 * q + 2), field(4 * q + 3)));
  }
  METAL_FUNC uint word(int q) const {
    if (bits == 8) {
      return w[q];
    }
    if (bits == 4) {
      const uint v = (w[q >> 1] >> (16 * (q & 1))) & 0xffffu;
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
using MLXMXFP4 = Unit<E2M1<true>, E8M0>;

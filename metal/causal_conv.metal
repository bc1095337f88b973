// A convolution of each channel along its tokens with SiLU behind it: a thread for each channel and
// token. What precedes the tokens is in `state`, and what the next ones need goes to `next`.

// A channel's values: of the state, then of the tokens. Tokens that `mask` leaves out are zeros.
template <int kept, bool masked, typename T, typename X, typename S, typename M>
METAL_FUNC float value_at(
    X x, S state, M mask, uint channels, uint tokens, uint sequence, uint channel, uint at) {
  if (at < uint(kept)) {
    return float(state[(ulong(sequence) * kept + at) * channels + channel]);
  }
  const ulong row = ulong(sequence) * tokens + at - kept;
  if (masked && !mask[row]) {
    return 0.0f;
  }
  return float(x[row * channels + channel]);
}

// `size` holds the channels and the tokens. The state that is kept ends with the last token, or
// with the one of `lengths`.
template <
    int taps, bool biased, bool masked, bool cut, typename T, typename X, typename S, typename W,
    typename B, typename M, typename L, typename Z>
METAL_FUNC void causal_conv(
    X x, S state, W weight, B bias, M mask, L lengths, Z size, uint3 at, device T* y,
    device T* next) {
  constexpr int kept = taps - 1;
  const uint channels = uint(size[0]);
  const uint tokens = uint(size[1]);
  const uint channel = at.x, token = at.y, sequence = at.z;
  if (token < tokens) {
    float w[taps];
    if (taps == 4) {
      const vec<T, 4> row = elements<vec<T, 4>>(weight)[channel];
      UNROLL
      for (int k = 0; k < taps; k++) {
        w[k] = float(row[k % 4]);
      }
    } else {
      UNROLL
      for (int k = 0; k < taps; k++) {
        w[k] = float(weight[channel * taps + k]);
      }
    }
    float sum = biased ? float(bias[channel]) : 0.0f;
    UNROLL
    for (int k = 0; k < taps; k++) {
      const float v = value_at<kept, masked, T>(
          x, state, mask, channels, tokens, sequence, channel, token + k);
      sum = fma(w[k], v, sum);
    }
    const ulong to = (ulong(sequence) * tokens + token) * channels + channel;
    y[to] = static_cast<T>(sum / (1.0f + metal::precise::exp(-sum)));
  }
  if (token < uint(kept)) {
    uint end = tokens;
    if (cut) {
      end = uint(metal::clamp(int(lengths[sequence]), 0, int(tokens)));
    }
    next[(ulong(sequence) * kept + token) * channels + channel] = static_cast<T>(
        value_at<kept, masked, T>(
            x, state, mask, channels, tokens, sequence, channel, end + token));
  }
}

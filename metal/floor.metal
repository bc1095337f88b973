// The bytes of a kernel without its arithmetic, for measuring: 16 bytes at a time, every input is
// read once and an output as large as the kernel's is written once, by as many threads as it takes.
template <typename P>
METAL_FUNC uint4 read_all(P p, uint count, uint me, uint threads) {
  uint4 found = uint4(0);
  for (uint i = me; i < count; i += threads) {
    found ^= elements<uint4>(p)[i];
  }
  return found;
}

METAL_FUNC void write_all(device uint* out, uint4 found, uint count, uint me, uint threads) {
  for (uint i = me; i < count; i += threads) {
    ((device uint4*)out)[i] = found;
  }
}

// SPDX-License-Identifier: BSD-3-Clause
// Which source row a tap reads for each of many destination pixels: a vector of pointers at a time. A text like
// ukernels-inl.h, included after it. One by one they took 10% of SegNet's second layer and take 3% (Zen 3).

// Whole vectors: what lies behind the last pixel is read and written too.
template <class T>
void point_rows(const PointerArgs<T>& args, int64_t off_h, int64_t off_w, const T** out) {
  typedef int64_t Vector __attribute__((vector_size(SEGPOSE_VECTOR_BYTES)));
  constexpr int kLength = SEGPOSE_VECTOR_BYTES / 8;
  static_assert(sizeof(const T*) == sizeof(int64_t));
  const auto size = static_cast<int64_t>(sizeof(T));
  const int64_t first = reinterpret_cast<int64_t>(args.source) + (off_h * args.stride_h + off_w * args.stride_w) * size;
  const Vector zeros = reinterpret_cast<int64_t>(args.zeros) - Vector{};
  // In registers: what is written to `out` might be them.
  const int64_t *const row = args.row, *const col = args.col, *const at = args.at;
  const int64_t count = args.count;
  const Vector high = args.h - Vector{}, wide = args.w - Vector{};
  for (int64_t m = 0; m < count; m += kLength) {
    Vector h, w, pointer;
    __builtin_memcpy(&h, row + m, sizeof(h));
    __builtin_memcpy(&w, col + m, sizeof(w));
    __builtin_memcpy(&pointer, at + m, sizeof(pointer));
    h += off_h;
    w += off_w;
    const Vector inside = (h > -1) & (high > h) & (w > -1) & (wide > w);
    const Vector pointers = inside ? pointer * size + first : zeros;
    __builtin_memcpy(out + m, &pointers, sizeof(pointers));
  }
}

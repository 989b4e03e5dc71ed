// SPDX-License-Identifier: BSD-3-Clause
// AVX-512 and AMX in software: the intrinsics that the kernels use, on vectors of half the width, and tiles in memory.
// A build with SEGPOSE_EMULATE runs every path on a processor with AVX2, for tests: masked accesses touch what their
// mask lets them touch and nothing else, so that the address sanitizer sees it. Sources: the pseudo-code of Intel's
// "Architecture Instruction Set Extensions Programming Reference" (TDPBF16PS, VCVTNE2PS2BF16) and of its software
// developer's manual.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

// Found before the compiler's own, which stand outside of every namespace.
namespace segpose {
inline namespace emulated {

#define SEGPOSE_EMULATED __attribute__((always_inline)) inline

typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t SignedWords __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint64_t Quads __attribute__((vector_size(64)));
typedef uint16_t HalfOfHalves __attribute__((vector_size(32)));

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated instruction: %s\n", what);
  std::abort();
}

SEGPOSE_EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
SEGPOSE_EMULATED __m512 _mm512_set1_ps(float value) { return __m512{} + value; }
SEGPOSE_EMULATED __m512i _mm512_set1_epi32(int value) { return (__m512i)(SignedWords{} + value); }
SEGPOSE_EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
SEGPOSE_EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
SEGPOSE_EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
SEGPOSE_EMULATED __m512i _mm512_and_epi32(__m512i a, __m512i b) { return a & b; }
SEGPOSE_EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
SEGPOSE_EMULATED __m512i _mm512_or_epi32(__m512i a, __m512i b) { return a | b; }
SEGPOSE_EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned bits) { return (__m512i)((Words)a << bits); }
SEGPOSE_EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned bits) { return (__m512i)((Words)a >> bits); }
SEGPOSE_EMULATED __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
SEGPOSE_EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
SEGPOSE_EMULATED float _mm512_cvtss_f32(__m512 a) { return a[0]; }

// Memory.

template <class Vector>
SEGPOSE_EMULATED Vector read(const void* source) {
  Vector value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
template <class Vector>
SEGPOSE_EMULATED void write(void* destination, const Vector& value) {
  std::memcpy(destination, &value, sizeof value);
}
template <class Vector>
SEGPOSE_EMULATED void write_line(void* destination, const Vector& value) {
  if (reinterpret_cast<uintptr_t>(destination) % sizeof value != 0) fail("an aligned store to an unaligned address");
  write(destination, value);
}
// Element by element: what the mask leaves out may lie outside of any memory.
template <class Vector, class T>
SEGPOSE_EMULATED Vector read_masked(unsigned mask, const T* source) {
  Vector value{};
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) value[i] = source[i];
  }
  return value;
}
template <class Vector, class T>
SEGPOSE_EMULATED void write_masked(T* destination, unsigned mask, const Vector& value) {
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) destination[i] = value[i];
  }
}

SEGPOSE_EMULATED __m512 _mm512_loadu_ps(const void* source) { return read<__m512>(source); }
SEGPOSE_EMULATED __m512i _mm512_loadu_si512(const void* source) { return read<__m512i>(source); }
SEGPOSE_EMULATED void _mm512_storeu_ps(void* to, __m512 value) { write(to, value); }
SEGPOSE_EMULATED void _mm512_storeu_si512(void* to, __m512i value) { write(to, value); }
SEGPOSE_EMULATED void _mm512_store_ps(void* to, __m512 value) { write_line(to, value); }
SEGPOSE_EMULATED void _mm512_stream_ps(float* to, __m512 value) { write_line(to, value); }
SEGPOSE_EMULATED void _mm512_stream_si512(__m512i* to, __m512i value) { write_line(to, value); }
SEGPOSE_EMULATED void _mm512_stream_pd(double* to, __m512d value) { write_line(to, value); }
SEGPOSE_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* source) {
  return read_masked<__m512>(mask, source);
}
SEGPOSE_EMULATED __m512d _mm512_maskz_loadu_pd(__mmask8 mask, const double* source) {
  return read_masked<__m512d>(mask, source);
}
SEGPOSE_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* source) {
  return (__m256i)read_masked<HalfOfHalves>(mask, static_cast<const uint16_t*>(source));
}
SEGPOSE_EMULATED void _mm512_mask_storeu_ps(float* to, __mmask16 mask, __m512 value) { write_masked(to, mask, value); }
SEGPOSE_EMULATED void _mm512_mask_storeu_pd(double* to, __mmask8 mask, __m512d value) { write_masked(to, mask, value); }
SEGPOSE_EMULATED void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i value) {
  write_masked(static_cast<uint16_t*>(to), mask, (HalfOfHalves)value);
}

// Masks.

SEGPOSE_EMULATED __mmask16 to_mask(const SignedWords& truth) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (truth[i] & 1u) << i;
  return static_cast<__mmask16>(mask);
}
SEGPOSE_EMULATED SignedWords to_truth(__mmask16 mask) {
  SignedWords truth;
  for (int i = 0; i < 16; ++i) truth[i] = mask >> i & 1 ? -1 : 0;
  return truth;
}
SEGPOSE_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  switch (predicate) {
    case _CMP_LT_OQ:
      return to_mask(a < b);
    case _CMP_GT_OQ:
      return to_mask(a > b);
    case _CMP_NGT_UQ:
      return to_mask(~(a > b));
    case _CMP_UNORD_Q:
      return to_mask((a != a) | (b != b));
    default:
      fail("a comparison that no kernel used");
  }
}
SEGPOSE_EMULATED __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b) { return to_mask((Words)a >= (Words)b); }
SEGPOSE_EMULATED __mmask16 _mm512_fpclass_ps_mask(__m512 a, int classes) {
  const Words bits = (Words)a;
  const Words magnitude = bits & 0x7fffffffu;
  const SignedWords infinite = magnitude == 0x7f800000u;
  const SignedWords nan = magnitude > 0x7f800000u;
  const SignedWords negative = bits != magnitude;
  const SignedWords quiet = (bits & 0x00400000u) != 0;
  SignedWords truth{};
  if (classes & 0x01) truth |= nan & quiet;
  if (classes & 0x08) truth |= infinite & ~negative;
  if (classes & 0x10) truth |= infinite & negative;
  if (classes & 0x80) truth |= nan & ~quiet;
  if (classes & 0x66) fail("a class of values that no kernel asked for");
  return to_mask(truth);
}
SEGPOSE_EMULATED __m512 select(__mmask16 mask, __m512 chosen, __m512 other) { return to_truth(mask) ? chosen : other; }
SEGPOSE_EMULATED __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 mask, __m512 a) { return select(mask, a, other); }
SEGPOSE_EMULATED __m512 _mm512_mask_mul_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) {
  return select(mask, a * b, other);
}
SEGPOSE_EMULATED __m512 _mm512_maskz_sub_ps(__mmask16 mask, __m512 a, __m512 b) {
  return select(mask, a - b, __m512{});
}
SEGPOSE_EMULATED __m512i _mm512_mask_and_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  return (__m512i)select(mask, (__m512)(a & b), (__m512)other);
}

// Lanes that move.

SEGPOSE_EMULATED __m512i _mm512_castsi256_si512(__m256i a) {
  __m512i value{};
  std::memcpy(&value, &a, sizeof a);
  return value;
}
SEGPOSE_EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
  __m256i value;
  std::memcpy(&value, reinterpret_cast<const char*>(&a) + 32 * half, sizeof value);
  return value;
}
SEGPOSE_EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return _mm512_extracti64x4_epi64(a, 0); }
SEGPOSE_EMULATED __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
  std::memcpy(reinterpret_cast<char*>(&a) + 32 * half, &b, sizeof b);
  return a;
}
SEGPOSE_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return (__m512i) __builtin_convertvector((HalfOfHalves)a, Words);
}
SEGPOSE_EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return (__m256i) __builtin_convertvector((Words)a, HalfOfHalves);
}
template <class... Values>
SEGPOSE_EMULATED __m512i _mm512_set_epi16(Values... from_the_last) {
  static_assert(sizeof...(Values) == 32);
  const int values[] = {from_the_last...};
  Halves result;
  for (int i = 0; i < 32; ++i) result[i] = static_cast<uint16_t>(values[31 - i]);
  return (__m512i)result;
}
SEGPOSE_EMULATED __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
  return (__m512i)__builtin_shuffle((Halves)a, (Halves)order);
}
SEGPOSE_EMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  const Words order = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  return (__m512i)__builtin_shuffle((Words)a, (Words)b, order);
}
SEGPOSE_EMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  const Words order = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  return (__m512i)__builtin_shuffle((Words)a, (Words)b, order);
}
SEGPOSE_EMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return (__m512i)__builtin_shuffle((Quads)a, (Quads)b, Quads{0, 8, 2, 10, 4, 12, 6, 14});
}
SEGPOSE_EMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return (__m512i)__builtin_shuffle((Quads)a, (Quads)b, Quads{1, 9, 3, 11, 5, 13, 7, 15});
}
SEGPOSE_EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, unsigned order) {
  Words result;
  for (unsigned i = 0; i < 16; ++i) {
    const unsigned from = (order >> (i / 4 * 2) & 3) * 4 + i % 4;
    result[i] = i < 8 ? ((Words)a)[from] : ((Words)b)[from];
  }
  return (__m512i)result;
}

// Conversions.

SEGPOSE_EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  __m512 value;
  std::memcpy(&value, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&value) + 32, &high, sizeof high);
  return value;
}
SEGPOSE_EMULATED __m256i _mm512_cvtps_ph(__m512 a, int) {
  __m256 low, high;
  std::memcpy(&low, &a, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&a) + 32, sizeof high);
  return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}
// Neither bfloat16 instruction knows denormal numbers.
SEGPOSE_EMULATED Words flush(Words bits) { return (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits; }
SEGPOSE_EMULATED __m256i to_bfloat16(__m512 a) {
  const Words bits = flush((Words)a);
  const Words nan = (bits >> 16) | 0x40u;
  const Words nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return _mm512_cvtepi32_epi16((__m512i)((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest));
}
SEGPOSE_EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) { return (__m256bh)to_bfloat16(a); }
SEGPOSE_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(to_bfloat16(low)), to_bfloat16(high), 1);
}

// Tiles: 8 of 16 rows of 64 bytes, as the kernels configure them.

struct Tiles {
  bool configured = false;
  Words rows[8][16] = {};
};
inline thread_local Tiles tiles;

inline void configure_tiles() {
  tiles = {};
  tiles.configured = true;
}
inline void release_tiles() { tiles.configured = false; }

template <int Tile>
SEGPOSE_EMULATED Words (&tile())[16] {
  static_assert(0 <= Tile && Tile < 8);
  if (!tiles.configured) fail("a tile without ldtilecfg");
  return tiles.rows[Tile];
}
template <int Tile>
void zero_tile() {
  for (Words& row : tile<Tile>()) row = Words{};
}
template <int Tile>
void load_tile(const void* rows, int64_t pitch) {
  for (int i = 0; i < 16; ++i) tile<Tile>()[i] = read<Words>(static_cast<const char*>(rows) + i * pitch);
}
template <int Tile>
void store_tile(void* rows) {
  for (int i = 0; i < 16; ++i) write(static_cast<char*>(rows) + i * 64, tile<Tile>()[i]);
}
// Products of even and odd depths are added up apart and join at the end.
template <int Sum, int A, int B>
void multiply_tiles() {
  static_assert(Sum != A && Sum != B && A != B, "the same tile twice is an invalid instruction");
  const Words(&a)[16] = tile<A>();
  const Words(&b)[16] = tile<B>();
  for (int m = 0; m < 16; ++m) {
    __m512 even{}, odd{};
    for (int k = 0; k < 16; ++k) {
      const Words pair = Words{} + a[m][k];
      even += (__m512)flush(pair << 16) * (__m512)flush(b[k] << 16);
      odd += (__m512)flush(pair & 0xffff0000u) * (__m512)flush(b[k] & 0xffff0000u);
    }
    const __m512 before = (__m512)flush(tile<Sum>()[m]);
    tile<Sum>()[m] = flush((Words)(before + (even + odd)));
  }
}

#undef SEGPOSE_EMULATED

}  // namespace emulated
}  // namespace segpose
#pragma GCC pop_options

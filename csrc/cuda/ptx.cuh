// SPDX-License-Identifier: BSD-3-Clause
// The instructions of sm_80 that C++ has no words for. PTX ISA 8.x: "cp.async", "ldmatrix", "mma", "cvt".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace segpose::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// Calls fn(0), fn(1), ... with constants, so that what they index stays in registers and offsets become immediates.
template <int kCount, class Fn>
__device__ __forceinline__ void unroll(const Fn& fn) {
  if constexpr (kCount > 0) {
    unroll<kCount - 1>(fn);
    fn(Constant<kCount - 1>{});
  }
}

// 16 bytes from global to shared memory, kTarget and kSource bytes behind the addresses. `bytes` is 16, or 0 to write
// zeros without touching the source.
template <int kTarget, int kSource = 0>
__device__ __forceinline__ void copy_async_16(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;\n" ::"r"(target), "l"(source), "r"(bytes),
               "n"(kTarget), "n"(kSource));
}

// One element of 4 or 8 bytes, zero where it is not valid.
template <int kBytes>
__device__ __forceinline__ void copy_async_element(uint32_t target, const void* source, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async.ca copies 4, 8 or 16 bytes");
  const int bytes = valid ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(target), "l"(source), "n"(kBytes), "r"(bytes));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kNewest groups of this thread's copies are in flight.
template <int kNewest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kNewest) : "memory");
}

// Four 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones: lane 4 * g + t receives row g, column t.
template <int kOffset>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&values)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address), "n"(kOffset));
}

// The same with every matrix transposed; 16-bit elements only.
template <int kOffset>
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&values)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address), "n"(kOffset));
}

// Two neighbouring results in one store; C++ stores of pairs are taken apart by the compiler.
__device__ __forceinline__ void store_pair(float* target, float v0, float v1) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};\n" ::"l"(target), "f"(v0), "f"(v1) : "memory");
}

__device__ __forceinline__ void store_quad(float* target, float v0, float v1, float v2, float v3) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(target), "f"(v0), "f"(v1), "f"(v2), "f"(v3)
               : "memory");
}

// A 16-byte chunk of registers into shared memory.
template <int kOffset>
__device__ __forceinline__ void store_chunk(uint32_t target, const uint32_t (&chunk)[4]) {
  asm volatile("st.shared.v4.b32 [%0 + %5], {%1, %2, %3, %4};\n" ::"r"(target), "r"(chunk[0]), "r"(chunk[1]),
               "r"(chunk[2]), "r"(chunk[3]), "n"(kOffset)
               : "memory");
}

template <int kOffset>
__device__ __forceinline__ void load_chunk(uint32_t (&chunk)[4], uint32_t source) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(chunk[0]), "=r"(chunk[1]), "=r"(chunk[2]), "=r"(chunk[3])
               : "r"(source), "n"(kOffset));
}

// Keeps a value in its register: the compiler would rather compute it again, or take it apart.
template <class T>
__device__ __forceinline__ void keep(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    static_assert(sizeof(T) == 4, "a register has 32 or 64 bits");
    asm volatile("" : "+r"(value));
  }
}

// c += a * b for a 16 x k, b k x 8: k = 16 for two-byte elements, 8 for tf32. float means tf32 here.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Nearest tf32, ties away from zero. The tensor cores drop the low 13 bits, which alone would bias every product.
__device__ __forceinline__ uint32_t round_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "r"(bits));
  return rounded;
}

}  // namespace segpose::cuda

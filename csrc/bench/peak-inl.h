// SPDX-License-Identifier: BSD-3-Clause
// One register-only loop of fused multiply-adds, compiled once for each vector length: SEGPOSE_PEAK_BYTES, and
// SEGPOSE_PEAK_CHAINS independent sums, enough to hide the latency of an addition and few enough to stay in registers.

typedef float Vector __attribute__((vector_size(SEGPOSE_PEAK_BYTES)));

constexpr int kLanes = SEGPOSE_PEAK_BYTES / sizeof(float);

double fma_flops(int64_t steps, float one, float* sink) {
  Vector sums[SEGPOSE_PEAK_CHAINS];
  const Vector factor = Vector{} + one;
  const Vector term = Vector{} + (1.0F - one);
#pragma GCC unroll 32
  for (auto& sum : sums) sum = factor;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 32
    for (auto& sum : sums) {
      sum = sum * factor + term;
      // A value the compiler cannot see through: no step may be merged with the next.
      asm volatile("" : "+" SEGPOSE_PEAK_REGISTER(sum));
    }
  }
  Vector total = sums[0];
#pragma GCC unroll 32
  for (const auto& sum : sums) total += sum;
  for (int lane = 0; lane < kLanes; ++lane) *sink += total[lane];
  return 2.0 * kLanes * SEGPOSE_PEAK_CHAINS * static_cast<double>(steps);
}

// SPDX-License-Identifier: BSD-3-Clause
// The pybind11 module `_limits`: operations a second that one core reaches in registers, where no operand is ever
// loaded. Matrix products of libraries stay below it, in bfloat16 by half, so they cannot serve as the limit.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace py = pybind11;

namespace {

namespace base {
#define SEGPOSE_PEAK_BYTES 16
#define SEGPOSE_PEAK_CHAINS 12
#if defined(__x86_64__)
#define SEGPOSE_PEAK_REGISTER "x"
#else
#define SEGPOSE_PEAK_REGISTER "w"
#endif
#include "peak-inl.h"
#undef SEGPOSE_PEAK_BYTES
#undef SEGPOSE_PEAK_CHAINS
#undef SEGPOSE_PEAK_REGISTER
}  // namespace base

#if defined(__x86_64__)
#define SEGPOSE_PEAK_REGISTER "v"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SEGPOSE_PEAK_BYTES 32
#define SEGPOSE_PEAK_CHAINS 12
#include "peak-inl.h"
#undef SEGPOSE_PEAK_BYTES
#undef SEGPOSE_PEAK_CHAINS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bf16")
namespace avx512 {
#define SEGPOSE_PEAK_BYTES 64
#define SEGPOSE_PEAK_CHAINS 24
#include "peak-inl.h"
#undef SEGPOSE_PEAK_BYTES
#undef SEGPOSE_PEAK_CHAINS

double bf16_flops(int64_t steps, float one, float* sink) {
  constexpr int kChains = 24;
  __m512 sums[kChains];
  const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_ps(one));
#pragma GCC unroll 32
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 32
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, pairs, pairs);
      asm volatile("" : "+v"(sum));
    }
  }
  Vector total = sums[0];
#pragma GCC unroll 32
  for (const auto& sum : sums) total += sum;
  for (int lane = 0; lane < kLanes; ++lane) *sink += total[lane];
  return 2.0 * 32 * kChains * static_cast<double>(steps);
}
}  // namespace avx512
#pragma GCC pop_options

namespace amx {

// Asks the kernel for the tile state, once a process; false where there is none to be had.
bool permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four independent sums over two tiles of each operand, as the inner loop of a product has them.
double bf16_flops(int64_t steps, float, float*) {
  const TileConfig config;
  // In assembly throughout: compilers do not know that the configuration is read, nor that tiles are written.
  asm volatile("ldtilecfg %0" ::"m"(config));
  asm volatile(
      "tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3\n\t"
      "tilezero %tmm4\n\ttilezero %tmm5\n\ttilezero %tmm6\n\ttilezero %tmm7");
  for (int64_t i = 0; i < steps; ++i) {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
  return 4 * 2.0 * 16 * 16 * 32 * static_cast<double>(steps);
}
}  // namespace amx
#endif

struct Unit {
  const char* name;
  const char* dtype;
  double (*flops)(int64_t steps, float one, float* sink);
};

// Units of this machine, the slowest of each dtype first.
std::vector<Unit> units() {
  std::vector<Unit> found{{"vector", "float32", base::fma_flops}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx2", "float32", avx2::fma_flops});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", "float32", avx512::fma_flops});
    if (__builtin_cpu_supports("avx512bf16")) found.push_back({"avx512-bf16", "bfloat16", avx512::bf16_flops});
  }
  if (__builtin_cpu_supports("amx-bf16") && amx::permitted()) {
    found.push_back({"amx-bf16", "bfloat16", amx::bf16_flops});
  }
#endif
  return found;
}

std::vector<std::pair<std::string, std::string>> unit_names() {
  std::vector<std::pair<std::string, std::string>> names;
  for (const Unit& unit : units()) names.emplace_back(unit.name, unit.dtype);
  return names;
}

// Operations a second of the calling thread: the best of bursts of about 5 ms, for `seconds`.
double flops_per_second(const std::string& name, double seconds) {
  using Clock = std::chrono::steady_clock;
  for (const Unit& unit : units()) {
    if (name != unit.name) continue;
    volatile float one = 1.0F;
    float sink = 0.0F;
    int64_t steps = 1000;
    double best = 0.0;
    const auto begin = Clock::now();
    while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds) {
      const auto start = Clock::now();
      const double flops = unit.flops(steps, one, &sink);
      const double took = std::chrono::duration<double>(Clock::now() - start).count();
      if (took < 5e-3) {
        steps *= 2;
      } else if (flops / took > best) {
        best = flops / took;
      }
    }
    return best;
  }
  throw std::invalid_argument("no unit called '" + name + "' on this machine");
}

}  // namespace

PYBIND11_MODULE(_limits, module) {
  module.doc() = "What a core computes at most, measured in registers.";
  module.def("units", unit_names, "(name, dtype) of each arithmetic unit, the slowest of a dtype first.");
  module.def("flops_per_second", flops_per_second, py::arg("unit"), py::arg("seconds") = 0.2,
             py::call_guard<py::gil_scoped_release>(),
             "Operations a second of the calling thread; ValueError for a unit this machine has not.");
}

// SPDX-License-Identifier: BSD-3-Clause
// What a plan has to know of a GPU. Throughputs are per multiprocessor and clock, from the vendor's data sheets and the
// CUDA C++ Programming Guide ("Compute capabilities"): ratios to choose by, no measurements.
#pragma once

#include <vector>

namespace segpose::cuda {

struct Gpu {
  int capability;        // 80 for 8.0
  int multiprocessors;   // of a typical card; the device's own at run time
  int shared_per_sm;     // KiB
  int shared_per_block;  // KiB, opted in
  int threads_per_sm;
  int fma32, fma64;        // multiply-adds outside the tensor cores
  int mma16, mma32;        // multiply-adds by mma.sync in float16/bfloat16 and in tf32, float32 sums
  double bytes_per_clock;  // of device memory
};

// Known architectures, ascending.
inline const std::vector<Gpu>& known_gpus() {
  static const std::vector<Gpu> gpus{
      {80, 108, 164, 163, 2048, 64, 32, 1024, 512, 13.4},   {86, 82, 100, 99, 1536, 128, 2, 256, 128, 6.7},
      {89, 128, 100, 99, 1536, 128, 2, 256, 128, 3.2},      {90, 132, 228, 227, 2048, 128, 64, 1280, 640, 14.5},
      {100, 148, 228, 227, 2048, 128, 64, 1280, 640, 29.0}, {120, 170, 100, 99, 1536, 128, 2, 256, 128, 4.4},
  };
  return gpus;
}

// The architecture itself or the closest one before it, which has its binary; null for one older than 8.0.
inline const Gpu* find_gpu(int capability) {
  const Gpu* found = nullptr;
  for (const Gpu& gpu : known_gpus()) {
    if (gpu.capability <= capability) found = &gpu;
  }
  return found;
}

}  // namespace segpose::cuda

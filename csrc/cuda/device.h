// SPDX-License-Identifier: BSD-3-Clause
// The device of a call: guard, stream and facts. Tests build the library with SEGPOSE_SIMULATED, where device memory is
// the CPU's and every launch is executed by a simulator that has to be told which memory it may touch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "gpu.h"

#ifdef SEGPOSE_SIMULATED
extern "C" void ptxsim_note_memory(const void* data, int64_t bytes, int kind);
extern "C" void ptxsim_note_call(int begins);
#endif

namespace segpose::cuda {

// What a launch may do with memory, for the simulator: see tools/ptxsim/ptxsim/cudart.py.
enum class Memory : int { input, output, scratch, filled };

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "segpose: ", what, ": ", cudaGetErrorString(error));
}

// Facts of a device; read once, then without a lock.
inline Gpu gpu_of_device(int device) {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int64_t>, kMaxDevices> known{};
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "segpose: device index must be below ", kMaxDevices, ", got ",
                  device);
  int64_t packed = known[static_cast<size_t>(device)].load(std::memory_order_relaxed);
#ifdef SEGPOSE_SIMULATED
  packed = 0;
#endif
  if (packed == 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    packed = int64_t{major * 10 + minor} << 32 | multiprocessors;
    known[static_cast<size_t>(device)].store(packed, std::memory_order_relaxed);
  }
  const int capability = static_cast<int>(packed >> 32);
  const Gpu* found = find_gpu(capability);
  STD_TORCH_CHECK(found != nullptr, "segpose: the cuda backend needs compute capability 8.0 or newer, got ",
                  capability / 10, ".", capability % 10);
  Gpu gpu = *found;
  gpu.capability = capability;
  gpu.multiprocessors = static_cast<int>(packed & 0xffffffff);
  return gpu;
}

#ifdef SEGPOSE_SIMULATED

struct DeviceScope {
  cudaStream_t stream = nullptr;
  Gpu gpu = gpu_of_device(0);

  explicit DeviceScope(const torch::stable::Tensor&) { ptxsim_note_call(1); }
  ~DeviceScope() { ptxsim_note_call(0); }
};

inline void note_memory(const void* data, int64_t bytes, Memory kind) {
  ptxsim_note_memory(data, bytes, static_cast<int>(kind));
}

#else

// Makes the tensor's device current while it lives; the stream is torch's current one.
class DeviceScope {
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  cudaStream_t stream;
  Gpu gpu;

  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream(static_cast<cudaStream_t>(
            torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle())),
        gpu(gpu_of_device(tensor.get_device_index())) {
    // This library has a runtime of its own, linked statically, that keeps its own current device.
    check_cuda(cudaSetDevice(tensor.get_device_index()), "cudaSetDevice");
  }
};

inline void note_memory(const void*, int64_t, Memory) {}

#endif

}  // namespace segpose::cuda

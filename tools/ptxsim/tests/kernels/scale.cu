// SPDX-License-Identifier: BSD-3-Clause
// Two kernels and launchers without a memory of their own: what they may touch is noted by the host code.
#include <cuda_runtime_api.h>

__global__ void scale(const float* x, float* y, int n, float factor) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] * factor;
}

// Reads shared memory behind an index that is negative until a constant is added.
__global__ void reversed(const float* x, float* y, int n) {
  extern __shared__ float shared[];
  const int i = threadIdx.x;
  shared[i] = x[i];
  __syncthreads();
  y[i] = shared[n - 1 - i];
}

extern "C" int launch_scale(const float* x, float* y, int n, float factor, cudaStream_t stream) {
  scale<<<(n + 63) / 64, 64, 0, stream>>>(x, y, n, factor);
  return cudaGetLastError();
}

extern "C" int launch_reversed(const float* x, float* y, int n, cudaStream_t stream) {
  reversed<<<1, n, n * sizeof(float), stream>>>(x, y, n);
  return cudaGetLastError();
}

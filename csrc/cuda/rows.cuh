// SPDX-License-Identifier: BSD-3-Clause
// The prologue of a pass: an operand is loaded once, masked by the sign of the saved output, summed over pixels for the
// bias gradient, and laid out as aligned rows of channels. The order of every sum is fixed.
#pragma once

#include "numeric.cuh"

namespace segpose::cuda {

constexpr int kRowsThreads = 256;

// Gradient through the activation by the sign of its output; NaN passes a ReLU.
template <class Acc>
__device__ __forceinline__ Acc mask(Acc gradient, Acc output, Act act, Acc negative_slope) {
  if (act == Act::relu) return output <= Acc(0) ? Acc(0) : gradient;
  return output > Acc(0) ? gradient : gradient * negative_slope;
}

__device__ __forceinline__ int64_t pixel_offset(const RowsParams& p, const View& view, int64_t pixel) {
  auto col = static_cast<uint32_t>(pixel);
  const uint32_t n = p.image.split(col);
  const uint32_t row = p.row.split(col);
  return n * view.stride_n + row * view.stride_h + col * view.stride_w;
}

// Any strides: tiles of pixels and channels through shared memory, each operand read along its contiguous axis.
template <class T>
struct RowsAny {
  using Acc = Accumulator<T>;
  static constexpr int kPixels = 64, kChannels = 32;
  static constexpr int kLines = kRowsThreads / kChannels;  // threads that share a channel
  static constexpr int kSteps = kPixels * kChannels / kRowsThreads;

  T tile[kChannels][kPixels + 2];
  Acc sums[kLines][kChannels];

  // A column of the padded row: its channel, -1 for padding.
  __device__ __forceinline__ static int channel_of(const RowsParams& p, uint32_t column) {
    if (column >= static_cast<uint32_t>(p.padded)) return -1;
    const uint32_t group = p.depth.split(column);
    return static_cast<int>(column) < p.group_channels
               ? static_cast<int>(group) * p.group_channels + static_cast<int>(column)
               : -1;
  }

  // Calls fn(column, pixel, value) for the elements of a view's tile.
  template <class Fn>
  __device__ __forceinline__ static void visit(const RowsParams& p, const View& view, int64_t first, int64_t end,
                                               const Fn& fn) {
    const bool along_channels = view.stride_c == 1;
    const T* const data = static_cast<const T*>(view.data);
    T values[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int index = threadIdx.x + i * kRowsThreads;
      const int c = along_channels ? index % kChannels : index / kPixels;
      const int m = along_channels ? index / kChannels : index % kPixels;
      const int channel = channel_of(p, blockIdx.y * kChannels + c);
      values[i] = narrow<T>(Acc(0));
      if (channel >= 0 && first + m < end) {
        values[i] = data[pixel_offset(p, view, first + m) + channel * view.stride_c];
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int index = threadIdx.x + i * kRowsThreads;
      fn(along_channels ? index % kChannels : index / kPixels, along_channels ? index / kChannels : index % kPixels,
         values[i]);
    }
  }

  __device__ __forceinline__ void run(const RowsParams& p) {
    const int64_t begin = blockIdx.x * p.pixels_per_block;
    const int64_t end = min(p.pixels, begin + p.pixels_per_block);
    const auto slope = static_cast<Acc>(p.negative_slope);
    const bool masked = p.output.data != nullptr;
    const int c = threadIdx.x % kChannels;
    const int column = blockIdx.y * kChannels + c;
    Acc sum = Acc(0);
    for (int64_t first = begin; first < end; first += kPixels) {
      if (masked) {
        visit(p, p.output, first, end, [&](int at_c, int at_m, T value) { tile[at_c][at_m] = value; });
        __syncthreads();
      }
      visit(p, p.source, first, end, [&](int at_c, int at_m, T value) {
        if (masked) value = narrow<T>(mask(widen(value), widen(tile[at_c][at_m]), p.act, slope));
        tile[at_c][at_m] = value;
      });
      __syncthreads();
#pragma unroll
      for (int m = threadIdx.x / kChannels; m < kPixels; m += kLines) {
        const T value = tile[c][m];
        sum += widen(value);
        if (p.rows != nullptr && column < p.padded && first + m < end) {
          static_cast<T*>(p.rows)[(first + m) * p.padded + column] = value;
        }
      }
      __syncthreads();
    }
    if (p.partial == nullptr) return;
    sums[threadIdx.x / kChannels][c] = sum;
    __syncthreads();
    const int channel = channel_of(p, column);
    if (threadIdx.x < kChannels && channel >= 0) {
      Acc total = Acc(0);
#pragma unroll
      for (int line = 0; line < kLines; ++line) total += sums[line][c];
      static_cast<Acc*>(p.partial)[int64_t{blockIdx.x} * p.channels + channel] = total;
    }
  }
};

// Aligned rows of channels on both sides: 16 bytes a thread.
template <class T>
struct RowsVector {
  using Acc = Accumulator<T>;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kChunks = 8;  // of a block: 128 bytes of a row
  static constexpr int kLines = kRowsThreads / kChunks;
  static constexpr int kUnroll = 2;

  Acc sums[kLines][kChunks * kVector];

  union Chunk {
    uint4 bits;
    T value[kVector];
    __device__ __forceinline__ Chunk() : bits{0, 0, 0, 0} {}
  };

  __device__ __forceinline__ static Chunk load(const View& view, int64_t offset) {
    Chunk chunk;
    chunk.bits = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(view.data) + offset));
    return chunk;
  }

  __device__ __forceinline__ void run(const RowsParams& p) {
    const int64_t begin = blockIdx.x * p.pixels_per_block;
    const int64_t end = min(p.pixels, begin + p.pixels_per_block);
    const auto slope = static_cast<Acc>(p.negative_slope);
    const int line = threadIdx.x / kChunks;
    const int channel = (blockIdx.y * kChunks + threadIdx.x % kChunks) * kVector;
    const bool exists = channel < p.channels;
    Acc sum[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] = Acc(0);
    for (int64_t first = begin + line; first < end; first += kLines * kUnroll) {
      Chunk gradient[kUnroll], output[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t pixel = first + u * kLines;
        if (!exists || pixel >= end) continue;
        gradient[u] = load(p.source, pixel_offset(p, p.source, pixel) + channel);
        if (p.output.data != nullptr) output[u] = load(p.output, pixel_offset(p, p.output, pixel) + channel);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          T& value = gradient[u].value[e];
          if (p.output.data != nullptr) value = narrow<T>(mask(widen(value), widen(output[u].value[e]), p.act, slope));
          sum[e] += widen(value);
        }
        const int64_t pixel = first + u * kLines;
        if (p.rows != nullptr && exists && pixel < end) {
          *reinterpret_cast<uint4*>(static_cast<T*>(p.rows) + pixel * p.padded + channel) = gradient[u].bits;
        }
      }
    }
    if (p.partial == nullptr) return;
#pragma unroll
    for (int e = 0; e < kVector; ++e) sums[line][threadIdx.x % kChunks * kVector + e] = sum[e];
    __syncthreads();
    const int c = threadIdx.x;
    const int at = blockIdx.y * kChunks * kVector + c;
    if (c < kChunks * kVector && at < p.channels) {
      Acc total = Acc(0);
#pragma unroll 4
      for (int i = 0; i < kLines; ++i) total += sums[i][c];
      static_cast<Acc*>(p.partial)[int64_t{blockIdx.x} * p.channels + at] = total;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kRowsThreads) rows_any(const __grid_constant__ RowsParams p) {
  __shared__ RowsAny<T> shared;
  shared.run(p);
}

template <class T>
__global__ void __launch_bounds__(kRowsThreads) rows_vector(const __grid_constant__ RowsParams p) {
  __shared__ RowsVector<T> shared;
  shared.run(p);
}

}  // namespace segpose::cuda

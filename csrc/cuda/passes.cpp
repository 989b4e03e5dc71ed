// SPDX-License-Identifier: BSD-3-Clause
#include "passes.h"

#include <algorithm>
#include <limits>

#include "tiles.h"

namespace segpose::cuda {
namespace {

constexpr int64_t kAlignment = 256;  // of the pieces of a workspace, as torch's allocator gives

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int to_int(int64_t value) { return static_cast<int>(value); }

const Launchers& launchers(DType dtype) {
  switch (dtype) {
    case DType::float16:
      return kLaunchersF16;
    case DType::bfloat16:
      return kLaunchersBF16;
    case DType::float32:
      return kLaunchersF32;
    case DType::float64:
      break;
  }
  return kLaunchersF64;
}

// The pieces of a plan's workspace.
struct Pieces {
  char* filter;
  char* rows;
  char* activation;
  char* partial;
  int64_t bytes;

  Pieces(const Plan& plan, void* workspace) {
    char* const base = static_cast<char*>(workspace);
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      char* const piece = base + used;
      used += round_up(size, kAlignment);
      return piece;
    };
    filter = take(plan.filter_bytes);
    rows = take(plan.rows_bytes);
    activation = take(plan.activation_bytes);
    partial = take(plan.partial_bytes);
    bytes = used;
  }
};

int64_t padded_channels(const Plan& plan, int64_t channels) {
  return plan.algorithm == Algorithm::mma ? round_up(channels, kChunkBytes / plan.element()) : channels;
}

// Copies an operand to aligned rows; returns the view of the copy.
cudaError_t copy_rows(const Plan& plan, View& view, int64_t group_channels, void* rows, cudaStream_t stream) {
  const ConvProblem& problem = plan.request.problem;
  const int64_t depth = padded_channels(plan, group_channels);
  RowsParams params{};
  params.source = view;
  params.rows = rows;
  params.pixels = problem.n * view.h * view.w;
  params.pixels_per_block = 64;
  params.image = make_fast_div(int64_t{view.h} * view.w);
  params.row = make_fast_div(view.w);
  params.channels = to_int(group_channels * problem.groups);
  params.group_channels = to_int(group_channels);
  params.depth = make_fast_div(depth);
  params.padded = to_int(depth * problem.groups);
  params.grid = {ceil_div(params.pixels, params.pixels_per_block), to_int(ceil_div(params.padded, 32))};
  view = rows_view(rows, params.padded, view.h, view.w);
  return launchers(plan.request.dtype).rows(params, false, stream);
}

// Offsets between neighbouring taps of a phase, along one axis, and between the filter positions they stand for.
struct TapSteps {
  int offset_h = 0, offset_w = 0, r = 0, s = 0;
  int taps_h = 0, taps_w = 0;

  // Taps are listed row by row and form a grid.
  explicit TapSteps(const Phase& phase) {
    if (phase.taps.empty()) return;
    const Tap& first = phase.taps.front();
    while (taps_w < to_int(static_cast<int64_t>(phase.taps.size())) && phase.taps[taps_w].r == first.r) ++taps_w;
    taps_h = to_int(static_cast<int64_t>(phase.taps.size())) / taps_w;
    if (taps_w > 1) {
      offset_w = to_int(phase.taps[1].off_w - first.off_w);
      s = to_int(phase.taps[1].s - first.s);
    }
    if (taps_h > 1) {
      offset_h = to_int(phase.taps[taps_w].off_h - first.off_h);
      r = to_int(phase.taps[taps_w].r - first.r);
    }
  }
};

// The steps are those of whichever phase has two taps along an axis; they are the same for all.
TapSteps common_steps(const std::vector<Phase>& phases) {
  TapSteps steps(Phase{});
  for (const Phase& phase : phases) {
    const TapSteps own(phase);
    if (own.taps_h > 1) steps.offset_h = own.offset_h, steps.r = own.r;
    if (own.taps_w > 1) steps.offset_w = own.offset_w, steps.s = own.s;
  }
  return steps;
}

GatherParams gather_params(const GatherPass& pass, const View& source) {
  const Plan& plan = pass.plan;
  const ConvProblem& problem = plan.request.problem;
  const TapSteps steps = common_steps(plan.phases);
  int64_t rows = 1, cols = 1;
  for (const Phase& phase : plan.phases) {
    rows = std::max(rows, phase.rows);
    cols = std::max(cols, phase.cols);
  }
  GatherParams params{};
  params.grid.splits = plan.splits;
  params.source = source;
  params.destination = pass.destination;
  params.epilogue = {pass.bias, pass.bias_stride, pass.negative_slope, pass.act};
  params.m_total = plan.gemm_m;
  params.depth = to_int(plan.depth);
  params.columns = to_int(plan.columns);
  params.istep_h = to_int(plan.phases.front().istep_h);
  params.istep_w = to_int(plan.phases.front().istep_w);
  params.ostep_h = to_int(plan.phases.front().ostep_h);
  params.ostep_w = to_int(plan.phases.front().ostep_w);
  params.tap_step_h = steps.offset_h;
  params.tap_step_w = steps.offset_w;
  params.depth_div = make_fast_div(plan.depth);
  params.image = make_fast_div(rows * cols);
  params.row = make_fast_div(cols);
  params.n_tiles = make_fast_div(plan.n_tiles);
  params.groups = make_fast_div(plan.algorithm == Algorithm::depthwise ? plan.n_tiles : problem.groups);
  params.m_tiles = make_fast_div(plan.m_tiles);
  params.k_blocks_per_split = to_int(std::min<int64_t>(plan.k_per_split, std::numeric_limits<int>::max()));
  const int64_t store_channels = plan.shuffle ? problem.c_per_group() : plan.columns;
  params.vector_store =
      in_aligned_rows(pass.destination, plan.request.dtype) && store_channels % (kChunkBytes / plan.element()) == 0;
  params.shuffle_channels = plan.shuffle ? to_int(problem.c_per_group()) : 0;
  params.shuffle_channel = make_fast_div(problem.c_per_group());
  params.shuffle_tap_w = make_fast_div(problem.s);
  return params;
}

FilterParams filter_params(const GatherPass& pass) {
  const Plan& plan = pass.plan;
  const ConvProblem& problem = plan.request.problem;
  const TapSteps steps = common_steps(plan.phases);
  const bool fprop = plan.request.pass == Pass::fprop;
  FilterParams params{};
  params.data = pass.filter.data;
  params.stride_k = pass.filter.stride_k;
  params.stride_c = pass.filter.stride_c;
  params.stride_r = pass.filter.stride_r;
  params.stride_s = pass.filter.stride_s;
  params.channels = to_int(fprop ? problem.c_per_group() : problem.k_per_group());
  params.by_output = fprop;
  params.r_step = plan.shuffle ? 1 : steps.r;
  params.s_step = plan.shuffle ? 1 : steps.s;
  return params;
}

PackParams pack_params(const GatherPass& pass, void* packed) {
  const Plan& plan = pass.plan;
  const ConvProblem& problem = plan.request.problem;
  PackParams params{};
  params.filter = filter_params(pass);
  params.packed = packed;
  params.k_stride = 1;
  if (plan.algorithm == Algorithm::depthwise) {
    params.row_stride = 1;
    params.k_stride = problem.groups;
  }
  params.columns = make_fast_div(plan.columns);
  params.depth_div = make_fast_div(plan.depth);
  params.shuffle_channels = plan.shuffle ? to_int(problem.c_per_group()) : 0;
  params.shuffle_channel = make_fast_div(problem.c_per_group());
  params.shuffle_tap_w = make_fast_div(problem.s);
  return params;
}

// gemm_k of a packed filter row of a phase, at least one K block so that a pitch can be divided by.
int64_t filter_pitch(const Plan& plan, const Phase& phase) {
  return round_up(static_cast<int64_t>(phase.taps.size()) * plan.depth, plan.block_k);
}

cudaError_t launch_gather(const Plan& plan, const GatherParams& params, cudaStream_t stream) {
  const Launchers& table = launchers(plan.request.dtype);
  switch (plan.algorithm) {
    case Algorithm::depthwise:
      return table.depthwise(params, !plan.narrow, stream);
    case Algorithm::direct:
      return table.direct(params, plan.block_n, !plan.narrow, stream);
    case Algorithm::mma:
      return table.gather_mma(params, plan.tile, plan.narrow, stream);
    case Algorithm::fma:
      return table.gather_fma(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

View rows_view(void* data, int64_t channels, int h, int w) {
  return {data, int64_t{h} * w * channels, w * channels, channels, 1, h, w};
}

bool in_aligned_rows(const View& view, DType dtype) {
  const int64_t chunk = kChunkBytes / dtype_size(dtype);
  const auto whole = [&](int64_t stride) { return stride % chunk == 0; };
  return view.stride_c == 1 && whole(view.stride_n) && whole(view.stride_h) && whole(view.stride_w) &&
         reinterpret_cast<uintptr_t>(view.data) % kChunkBytes == 0;
}

int64_t workspace_bytes(const Plan& plan) { return Pieces(plan, nullptr).bytes; }

Status run(const GatherPass& pass, void* workspace, cudaStream_t stream) {
  const Plan& plan = pass.plan;
  const ConvProblem& problem = plan.request.problem;
  const Pieces pieces(plan, workspace);
  View source = pass.source;
  if (plan.copy_source) {
    const int64_t channels = plan.request.pass == Pass::fprop ? problem.c_per_group() : problem.k_per_group();
    const cudaError_t error = copy_rows(plan, source, channels, pieces.rows, stream);
    if (error != cudaSuccess) return {error, "rows"};
  }
  GatherParams params = gather_params(pass, source);
  PackParams pack = pack_params(pass, pieces.filter);
  params.filter = plan.pack_filter ? pieces.filter : pass.filter.data;
  params.unpacked = pack.filter;
  if (plan.splits > 1) params.partial = pieces.partial;

  // One launch of each kernel, more only beyond kMaxPhases phases.
  int64_t filter_start = 0;
  for (size_t first = 0; first < plan.phases.size(); first += kMaxPhases) {
    const size_t count = std::min<size_t>(kMaxPhases, plan.phases.size() - first);
    int64_t longest = 0;
    for (size_t i = 0; i < count; ++i) {
      const Phase& phase = plan.phases[first + i];
      const TapSteps own(phase);
      const int64_t pitch = filter_pitch(plan, phase);
      const int64_t packed = pitch * plan.columns * problem.groups;
      const Tap origin = phase.taps.empty() ? Tap{} : phase.taps.front();
      params.phases[i] = {to_int(phase.oh),
                          to_int(phase.ow),
                          to_int(origin.off_h),
                          to_int(origin.off_w),
                          own.taps_h,
                          own.taps_w,
                          to_int(pitch / plan.block_k),
                          to_int(pitch),
                          filter_start,
                          to_int(origin.r),
                          to_int(origin.s)};
      pack.phases[i] = {to_int(origin.r),
                        to_int(origin.s),
                        make_fast_div(std::max(own.taps_w, 1)),
                        own.taps_h * own.taps_w,
                        make_fast_div(std::max<int64_t>(pitch, 1)),
                        filter_start,
                        packed};
      filter_start += packed;
      longest = std::max(longest, packed);
    }
    if (plan.pack_filter && longest > 0) {
      pack.grid = {ceil_div(longest, 256), to_int(static_cast<int64_t>(count))};
      const cudaError_t error = launchers(plan.request.dtype).pack_filter(pack, plan.tf32(), stream);
      if (error != cudaSuccess) return {error, "pack_filter"};
    }
    if (plan.algorithm == Algorithm::depthwise) {
      params.grid = {ceil_div(plan.m_tiles * plan.n_tiles, plan.threads), to_int(static_cast<int64_t>(count))};
      params.columns = to_int(problem.groups);
    } else {
      params.grid.blocks = plan.m_tiles * plan.n_tiles * problem.groups * static_cast<int64_t>(count);
    }
    cudaError_t error = launch_gather(plan, params, stream);
    if (error != cudaSuccess) return {error, "gather"};
    if (plan.splits > 1) {
      error = launchers(plan.request.dtype).finish_gather(params, plan.block_m, plan.block_n, stream);
      if (error != cudaSuccess) return {error, "finish_gather"};
    }
  }
  return {};
}

Status run(const WgradPass& pass, void* workspace, cudaStream_t stream) {
  const Plan& plan = pass.plan;
  const ConvProblem& problem = plan.request.problem;
  const Launchers& table = launchers(plan.request.dtype);
  const Pieces pieces(plan, workspace);
  WgradParams params{};
  params.output = pass.output;
  params.activation = pass.activation;
  if (plan.copy_source) {
    const cudaError_t error = copy_rows(plan, params.output, problem.k_per_group(), pieces.rows, stream);
    if (error != cudaSuccess) return {error, "rows"};
  }
  if (plan.copy_activation) {
    const cudaError_t error = copy_rows(plan, params.activation, problem.c_per_group(), pieces.activation, stream);
    if (error != cudaSuccess) return {error, "rows"};
  }
  params.grid = {plan.blocks, plan.splits};
  params.partial = pieces.partial;
  params.pixels = problem.n * problem.p * problem.q;
  params.pixels_per_split = plan.k_per_split;
  params.groups = to_int(problem.groups);
  params.filters = to_int(problem.k_per_group());
  const int64_t stored = plan.request.source.depth != 0 ? plan.request.source.depth : problem.k_per_group();
  params.output_depth = to_int(plan.copy_source ? padded_channels(plan, problem.k_per_group()) : stored);
  params.depth = to_int(plan.depth);
  params.columns = to_int(plan.columns);
  params.stride_h = to_int(problem.stride_h);
  params.stride_w = to_int(problem.stride_w);
  params.pad_h = to_int(problem.pad_h);
  params.pad_w = to_int(problem.pad_w);
  params.dilation_h = to_int(problem.dilation_h);
  params.dilation_w = to_int(problem.dilation_w);
  params.image = make_fast_div(problem.p * problem.q);
  params.row = make_fast_div(problem.q);
  params.depth_div = make_fast_div(plan.depth);
  params.tap_w = make_fast_div(problem.s);
  params.n_tiles = make_fast_div(plan.n_tiles);
  params.m_tiles = make_fast_div(plan.m_tiles);
  cudaError_t error = plan.algorithm == Algorithm::depthwise ? table.depthwise_wgrad(params, stream)
                      : plan.algorithm == Algorithm::mma     ? table.wgrad_mma(params, plan.tile, plan.narrow, stream)
                                                             : table.wgrad_fma(params, stream);
  if (error != cudaSuccess) return {error, "wgrad"};

  FinishParams finish{};
  finish.partial = pieces.partial;
  finish.pieces = plan.splits;
  finish.block_m = plan.block_m;
  finish.block_n = plan.block_n;
  finish.m_tile = make_fast_div(plan.block_m);
  finish.n_tile = make_fast_div(plan.block_n);
  finish.m_tiles = to_int(plan.m_tiles);
  finish.n_tiles = to_int(plan.n_tiles);
  finish.piece = problem.groups * plan.m_tiles * plan.n_tiles * plan.block_m * plan.block_n;
  finish.count = problem.k * plan.columns;
  finish.columns = make_fast_div(plan.columns);
  finish.filters = make_fast_div(problem.k_per_group());
  finish.depth_div = make_fast_div(plan.depth);
  finish.tap_w = make_fast_div(problem.s);
  finish.channels = to_int(problem.c_per_group());
  finish.gradient = pass.gradient.data;
  finish.stride_k = pass.gradient.stride_k;
  finish.stride_c = pass.gradient.stride_c;
  finish.stride_r = pass.gradient.stride_r;
  finish.stride_s = pass.gradient.stride_s;
  finish.grid = {ceil_div(finish.count, 256), 1};
  error = table.finish_wgrad(finish, stream);
  if (error != cudaSuccess) return {error, "finish_wgrad"};
  return {};
}

// The gradient pass is cut into pieces of pixels: enough blocks to fill the device, few enough to add up quickly.
static int64_t gradient_pixels_per_block(const GradientPass& pass) {
  const int64_t pixels = pass.n * pass.h * pass.w;
  return std::max<int64_t>(round_up(ceil_div(pixels, int64_t{4} * pass.gpu.multiprocessors), 64), 64);
}

int64_t workspace_bytes(const GradientPass& pass) {
  if (pass.bias == nullptr) return 0;
  const int64_t pieces = ceil_div(pass.n * pass.h * pass.w, gradient_pixels_per_block(pass));
  return pieces * pass.channels * (pass.dtype == DType::float64 ? 8 : 4);
}

int64_t row_bytes(const GradientPass& pass) {
  return pass.n * pass.h * pass.w * pass.groups * pass.depth * dtype_size(pass.dtype);
}

Status run(const GradientPass& pass, void* workspace, cudaStream_t stream) {
  const Launchers& table = launchers(pass.dtype);
  const int64_t chunk = kChunkBytes / dtype_size(pass.dtype);
  const bool vector = pass.depth * pass.groups == pass.channels && pass.channels % chunk == 0 &&
                      in_aligned_rows(pass.gradient, pass.dtype) &&
                      (pass.output.data == nullptr || in_aligned_rows(pass.output, pass.dtype));
  RowsParams params{};
  params.source = pass.gradient;
  params.output = pass.output;
  params.act = pass.act;
  params.negative_slope = pass.negative_slope;
  params.rows = pass.rows;
  params.partial = pass.bias == nullptr ? nullptr : workspace;
  params.pixels = pass.n * pass.h * pass.w;
  params.pixels_per_block = gradient_pixels_per_block(pass);
  params.image = make_fast_div(pass.h * pass.w);
  params.row = make_fast_div(pass.w);
  params.channels = to_int(pass.channels);
  params.group_channels = to_int(pass.channels / pass.groups);
  params.depth = make_fast_div(pass.depth);
  params.padded = to_int(pass.depth * pass.groups);
  const int64_t pieces = ceil_div(params.pixels, params.pixels_per_block);
  params.grid = {pieces, to_int(vector ? ceil_div(pass.channels / chunk, 8) : ceil_div(params.padded, 32))};
  cudaError_t error = table.rows(params, vector, stream);
  if (error != cudaSuccess) return {error, "rows"};
  if (pass.bias == nullptr) return {};
  FinishBiasParams finish{};
  finish.partial = workspace;
  finish.pieces = to_int(pieces);
  finish.channels = to_int(pass.channels);
  finish.gradient = pass.bias;
  finish.grid = {ceil_div(pass.channels, 256), 1};
  error = table.finish_bias(finish, stream);
  if (error != cudaSuccess) return {error, "finish_bias"};
  return {};
}

}  // namespace segpose::cuda

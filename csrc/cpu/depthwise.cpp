// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "../common/integers.h"
#include "row_table.h"
#include "staging.h"
#include "streaming.h"

namespace segpose {
namespace {

// Results of a task, about as many as L2 takes with what they read.
constexpr int64_t kTaskValues = 64 << 10;
// Sources that do not stay in L2 are asked for ahead: pixels as far apart as their channels take are no pattern that
// the hardware follows. 64 channels of 256 x 256 took 2.9 ms instead of 4.0, 128 channels of 128 x 256 2.4 instead
// of 2.6 (Zen 3, 2 threads); what lies in L2 would take 5% longer.
constexpr int64_t kPrefetchedBytes = 256 << 10;
// Pixels on their way to another layout or dtype.
constexpr int64_t kRun = 64;

template <class T>
struct Scratch {
  DepthwiseTap<T>* taps;
  T* tile;
  int64_t* offsets;

  Scratch(const Plan& plan, Arena& arena) {
    taps = arena.take<DepthwiseTap<T>>(plan.most_taps());
    tile = arena.take<T>(kRun * plan.columns());
    offsets = arena.take<int64_t>(kRun);
  }
};

// Channels that fill no vectors: a vector length of neighbouring pixels without gaps has `length` times as many, whose
// weights repeat.
template <class T>
class Repeated {
 public:
  Repeated(const GatherLaunch<T>& launch, int64_t length) : length_(length), channels_(launch.plan->columns()) {
    if (channels_ % length == 0 || channels_ > 2 * length) return;
    for (size_t p = 0; p < launch.plan->phases.size(); ++p) {
      starts_.push_back(static_cast<int64_t>(weights_.size()));
      const T* w = launch.packed + launch.layout->phase_offset(static_cast<int64_t>(p));
      for (size_t t = 0; t < launch.plan->phases[p].taps.size(); ++t, w += channels_) repeat(w, weights_);
    }
    if (launch.bias != nullptr) repeat(launch.bias, bias_);
  }

  bool applies(int64_t pixels, int64_t a_step, int64_t out_step) const {
    return !starts_.empty() && pixels >= length_ && a_step == channels_ && out_step == channels_;
  }
  int64_t length() const { return length_; }
  int64_t channels() const { return length_ * channels_; }
  const T* weights(int64_t phase, int64_t tap) const {
    return weights_.data() + starts_[static_cast<size_t>(phase)] + tap * channels();
  }
  const T* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

 private:
  void repeat(const T* values, std::vector<T>& out) const {
    for (int64_t i = 0; i < length_; ++i) out.insert(out.end(), values, values + channels_);
  }

  int64_t length_, channels_;
  std::vector<int64_t> starts_;
  std::vector<T> weights_, bias_;
};

// One row of destination pixels of a phase.
template <class T>
class Row {
 public:
  Row(const GatherLaunch<T>& launch, const Repeated<T>& repeated, const Scratch<T>& scratch, int64_t phase, int64_t n,
      int64_t row)
      : launch_(launch),
        repeated_(repeated),
        scratch_(scratch),
        index_(phase),
        phase_(launch.plan->phases[static_cast<size_t>(phase)]),
        n_(n),
        row_(row),
        prefetches_(launch.source.n * launch.source.h * launch.source.w * launch.source.c *
                        static_cast<int64_t>(sizeof(T)) >
                    kPrefetchedBytes),
        streams_(launch.destination.has_channel_rows(compute_dtype<T>()) &&
                 overflows_caches(launch.destination, sizeof(T))) {}

  // Pixels that see the padding on their left or right one by one, what lies between in one run.
  void run() {
    int64_t begin = 0;
    int64_t end = phase_.cols;
    for (const Tap& tap : phase_.taps) {
      if (!inside_h(tap)) continue;
      begin = std::max(begin, first_inside(tap.off_w, phase_.istep_w, 0, phase_.cols));
      end = std::min(end, first_inside(tap.off_w, phase_.istep_w, launch_.source.w, phase_.cols));
    }
    if (begin > end) begin = end = phase_.cols;
    for (int64_t col = 0; col < begin; ++col) emit(col, 1);
    if (begin < end) emit(begin, end - begin);
    for (int64_t col = end; col < phase_.cols; ++col) emit(col, 1);
  }

 private:
  int64_t source_h(const Tap& tap) const { return row_ * phase_.istep_h + tap.off_h; }
  bool inside_h(const Tap& tap) const { return source_h(tap) >= 0 && source_h(tap) < launch_.source.h; }

  // Whether it is the last tap of its row, which reads the furthest.
  bool ends_row(size_t tap) const {
    return tap + 1 == phase_.taps.size() || phase_.taps[tap + 1].off_h != phase_.taps[tap].off_h;
  }

  void emit(int64_t col, int64_t count) {
    const TensorView& out = launch_.destination;
    const int64_t start = out.offset(n_, phase_.oh + row_ * phase_.ostep_h, phase_.ow + col * phase_.ostep_w);
    const int64_t step = phase_.ostep_w * out.stride_w;
    if (out.has_channel_rows(compute_dtype<T>())) return compute(col, count, out.as<T>() + start, step);
    const int64_t channels = launch_.plan->columns();
    for (int64_t i = 0; i < count; i += kRun) {
      const int64_t run = std::min(kRun, count - i);
      compute(col + i, run, scratch_.tile, channels);
      for (int64_t j = 0; j < run; ++j) scratch_.offsets[j] = start + (i + j) * step;
      unstage_block(ukernels<T>(launch_.plan->isa), scratch_.tile, channels, run, channels, out, scratch_.offsets, 0);
    }
  }

  void compute(int64_t col, int64_t count, T* out, int64_t out_step) {
    const TensorView& source = launch_.source;
    const int64_t channels = launch_.plan->columns();
    DepthwiseArgs<T> args{};
    args.taps = scratch_.taps;
    args.a_step = phase_.istep_w * source.stride_w;
    args.out_step = out_step;
    args.activation = launch_.epilogue.activation;
    args.negative_slope = static_cast<T>(launch_.epilogue.negative_slope);
    const bool repeats = repeated_.applies(count, args.a_step, out_step);
    const T* weights = launch_.packed + launch_.layout->phase_offset(index_);
    for (size_t t = 0; t < phase_.taps.size(); ++t) {
      const Tap& tap = phase_.taps[t];
      const int64_t w = col * phase_.istep_w + tap.off_w;
      if (!inside_h(tap) || w < 0 || w >= source.w) continue;
      const auto i = static_cast<int64_t>(t);
      scratch_.taps[args.count++] = {source.as<const T>() + source.offset(n_, source_h(tap), w),
                                     repeats ? repeated_.weights(index_, i) : weights + i * channels,
                                     prefetches_ && ends_row(t)};
    }
    if (!repeats) {
      args.bias = launch_.bias;
      args.channels = channels;
      call(args, count, out);
      return;
    }
    args.bias = repeated_.bias();
    args.a_step = args.out_step = args.channels = repeated_.channels();
    const int64_t whole = count / repeated_.length();
    call(args, whole, out);
    const int64_t back = (whole + 1) * repeated_.length() - count;
    if (back == repeated_.length()) return;
    // The last group of pixels ends with the run, and computes some of the one before again.
    const int64_t shift = whole * args.a_step - back * channels;
    for (int64_t t = 0; t < args.count; ++t) scratch_.taps[t].a += shift;
    call(args, 1, out + shift);
  }

  void call(DepthwiseArgs<T>& args, int64_t pixels, T* out) const {
    args.pixels = pixels;
    args.out = out;
    args.streams = streams_ && is_at_line(out) && are_lines<T>(args.channels) && are_lines<T>(args.out_step);
    ukernels<T>(launch_.plan->isa).depthwise(args);
  }

  const GatherLaunch<T>& launch_;
  const Repeated<T>& repeated_;
  const Scratch<T>& scratch_;
  int64_t index_;
  const Phase& phase_;
  int64_t n_, row_;
  bool prefetches_, streams_;
};

}  // namespace

template <class T>
int64_t depthwise_scratch(const Plan& plan) {
  Arena arena(nullptr);
  const Scratch<T> scratch(plan, arena);
  return arena.used();
}

template <class T>
void launch_depthwise(const GatherLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const Repeated<T> repeated(launch, ukernels<T>(plan.isa).vector_length);
  const int64_t scratch_bytes = depthwise_scratch<T>(plan);
  int64_t rows = 0;
  int64_t cols = 1;
  for (const Phase& phase : plan.phases) {
    rows = std::max(rows, phase.rows);
    cols = std::max(cols, phase.cols);
  }
  const int64_t band = std::clamp<int64_t>(kTaskValues / (cols * plan.columns()), 1, std::max<int64_t>(rows, 1));
  const int64_t bands = ceil_div(rows, band);
  for_each_task(executor, plan.problem.n * bands, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(plan, arena);
    const int64_t n = task / bands;
    const int64_t first = task % bands * band;
    // All phases of a band: they read the same source rows.
    for (size_t p = 0; p < plan.phases.size(); ++p) {
      const int64_t end = std::min(first + band, plan.phases[p].rows);
      for (int64_t row = first; row < end; ++row) {
        Row<T>(launch, repeated, scratch, static_cast<int64_t>(p), n, row).run();
      }
    }
    finish_streaming();
  });
}

template int64_t depthwise_scratch<float>(const Plan&);
template int64_t depthwise_scratch<double>(const Plan&);
template void launch_depthwise<float>(const GatherLaunch<float>&, const Executor&);
template void launch_depthwise<double>(const GatherLaunch<double>&, const Executor&);

}  // namespace segpose

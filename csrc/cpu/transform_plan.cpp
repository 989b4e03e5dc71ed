// SPDX-License-Identifier: BSD-3-Clause
#include "transform_plan.h"

#include <algorithm>

#include "../common/integers.h"
#include "split_ukernels.h"

namespace segpose {
namespace {

// F(4 x 4, r x r); a wgrad uses F(r x r, 4 x 4).
constexpr int64_t kWinogradOutputs = 4;
// Fewer channels leave the GEMMs too small.
constexpr int64_t kLeastChannels = 16;
// A block's transformed inputs and products, V and P, with float operands: 24 tiles of 64 channels run 1.8 times as
// fast as 144, whose V and P fall out of L2.
constexpr int64_t kBlockBytes = 1024 << 10;
constexpr int64_t kLeastTiles = 24;
constexpr int64_t kMostTiles = 144;
// Full blocks are rows of the tallest tiles alone, 12 with AVX-512 and 6 with AVX2: there 24 tiles instead of 28 gained
// 4 to 9% (Zen 3).
constexpr int64_t kTallRows = 12;
// With tiles of bfloat16, 32 to 128 tiles of 128 channels run equally fast (within 4%, two threads): what a larger
// block loses because V and P leave L2, it gains by reading the filter less often. A filter that fits leaves the rest
// of L2 to V and P.
constexpr int64_t kFilterInL2 = 1024 << 10;
constexpr int64_t kSplitBlockBytes = 768 << 10;
constexpr int64_t kMostSplitTiles = 64;
constexpr int64_t kMostBytes = 16 << 20;
// wgrad: sums of a block of channels and filters, and its transformed tiles, which stay in L2 together.
constexpr int64_t kSumsBytes = 1200 << 10;
constexpr int64_t kTransformedBytes = 640 << 10;
// Tasks that tiles are split for; fixed, so that a sum does not depend on the threads.
constexpr int64_t kWgradTasks = 8;
// Cycles: of a multiply-add vector and of a tile product at the rate the GEMMs reach, of a byte from beyond L2, of a
// transformed vector with its share of the transform, and of a block whatever its size.
constexpr double kVectorCycles = 0.6;
constexpr double kTileCycles = 22;
constexpr double kByteCycles = 0.12;
constexpr double kTransformCycles = 4;
constexpr double kSplitTransformCycles = 9;
constexpr double kFourierCycles = 15;
constexpr double kFilterCycles = 14;
constexpr double kBlockCycles = 8e3;
constexpr double kSplitFilterCycles = 18;

// Edge of the phase's taps when they are a dense square at unit stride, else 0.
int64_t dense_edge(const Phase& phase) {
  if (phase.istep_h != 1 || phase.istep_w != 1) return 0;
  int64_t edge = 1;
  while (edge * edge < static_cast<int64_t>(phase.taps.size())) ++edge;
  if (edge * edge != static_cast<int64_t>(phase.taps.size())) return 0;
  for (int64_t i = 0; i < edge * edge; ++i) {
    const Tap& tap = phase.taps[static_cast<size_t>(i)];
    if (tap.off_h != phase.taps.front().off_h + i / edge || tap.off_w != phase.taps.front().off_w + i % edge) return 0;
  }
  return edge;
}

int64_t common_edge(const std::vector<Phase>& phases) {
  const int64_t edge = dense_edge(phases.front());
  for (const Phase& phase : phases) {
    if (dense_edge(phase) != edge) return 0;
  }
  return edge;
}

// A plan with what its codelet decides for taps of r x r.
TransformPlan plan_of(const TransformUkernels& kernels, int64_t codelet, int64_t r) {
  const TransformCodelets& transform = kernels.codelets[codelet];
  TransformPlan plan{};
  plan.n = transform.n;
  plan.r = r;
  plan.m = transform.n - r + 1;
  plan.frequencies = transform.frequencies;
  plan.parts = transform.parts;
  plan.codelet = codelet;
  return plan;
}

TransformCandidate plan_codelet(const TransformQuery& query, int64_t codelet, int64_t r, int64_t terms) {
  const TransformUkernels& kernels = transform_ukernels(query.isa);
  TransformCandidate candidate;
  TransformPlan& plan = candidate.plan;
  plan = plan_of(kernels, codelet, r);
  plan.terms = terms;
  const int64_t vector = kernels.vector_length;
  plan.panel_columns = terms > 0 ? 2 * kTileColumns : (plan.parts == 2 ? 1 : kernels.vectors) * vector;
  plan.panels = ceil_div(query.columns, plan.panel_columns);
  int64_t most_tiles = 1;
  int64_t all_tiles = 0;
  for (const Phase& phase : *query.phases) {
    const int64_t tiles = query.images * ceil_div(phase.rows, plan.m) * ceil_div(phase.cols, plan.m);
    most_tiles = std::max(most_tiles, tiles);
    all_tiles += tiles;
  }
  const int64_t row_multiple = terms > 0 ? kTileRows : kTransformRows;
  const int64_t value = terms > 0 ? 2 * terms : 4;
  const int64_t elements = plan.frequencies * plan.parts;
  const int64_t padded_depth = round_up(query.depth, terms > 0 ? kTileDepth : vector);
  const int64_t tile_bytes = elements * padded_depth * value;
  const int64_t filter_bytes = elements * padded_depth * plan.panels * plan.panel_columns * value;
  const int64_t product_bytes = elements * plan.panels * plan.panel_columns * 4;
  const auto most_in = [&](int64_t bytes) { return bytes / (tile_bytes + product_bytes); };
  int64_t most = 0;
  if (terms > 0 && filter_bytes > kFilterInL2) {
    most = std::min(kMostSplitTiles, most_in(kMostBytes));
  } else if (terms > 0) {
    most = std::min(kMostSplitTiles, most_in(kSplitBlockBytes));
  } else {
    most = std::clamp(most_in(kBlockBytes) / kTallRows * kTallRows, kLeastTiles, kMostTiles);
  }
  most = std::max(most / row_multiple * row_multiple, row_multiple);
  // Blocks of the same size, and no fewer than there are threads to take them; where the tiles do not suffice, the
  // columns are split as well.
  const int64_t tasks = query.threads > 1 ? 2 * query.threads : 1;
  // A large filter is better read once, by all threads in parts, than by each of them.
  const int64_t least = (terms > 0 && filter_bytes <= kMostBytes ? 2 : 4) * row_multiple;
  const int64_t pieces = std::max(ceil_div(most_tiles, most), std::min(tasks, ceil_div(most_tiles, least)));
  plan.tiles = std::min(round_up(ceil_div(most_tiles, pieces), row_multiple), most);
  int64_t blocks = 0;
  for (const Phase& phase : *query.phases) {
    blocks += ceil_div(query.images * ceil_div(phase.rows, plan.m) * ceil_div(phase.cols, plan.m), plan.tiles);
  }
  blocks = std::max<int64_t>(blocks, 1);
  plan.column_splits = std::clamp(ceil_div(tasks, blocks * query.groups), int64_t{1}, plan.panels);
  if (blocks * query.groups >= query.threads) plan.column_splits = 1;
  plan.group_panels = std::clamp(kMostBytes / std::max<int64_t>(elements * plan.tiles * plan.panel_columns * 4, 1),
                                 int64_t{1}, ceil_div(plan.panels, plan.column_splits));

  const double tiles = static_cast<double>(all_tiles);
  const double columns = static_cast<double>(plan.panels * plan.panel_columns);
  const double products = static_cast<double>(elements * plan.parts) * static_cast<double>(padded_depth) * columns;
  const double padded_tiles =
      static_cast<double>(blocks) * static_cast<double>(std::min(plan.tiles, round_up(most_tiles, row_multiple)));
  double cycles = 0;
  if (terms > 0) {
    cycles += padded_tiles * products / (kTileRows * kTileColumns * kTileDepth) *
              static_cast<double>(split_products(terms)) * kTileCycles;
  } else {
    cycles += padded_tiles * products / static_cast<double>(vector) * kVectorCycles;
  }
  cycles += static_cast<double>(blocks) * kBlockCycles;
  cycles += static_cast<double>(blocks * filter_bytes) * (filter_bytes > kFilterInL2 ? kByteCycles : kByteCycles / 4);
  const double in = terms > 0 ? kSplitTransformCycles : plan.parts == 2 ? kFourierCycles : kTransformCycles;
  const double out = plan.parts == 2 ? kFourierCycles : kTransformCycles;
  cycles += tiles * static_cast<double>(elements) *
            (in * static_cast<double>(ceil_div(query.depth, vector)) +
             out * static_cast<double>(ceil_div(query.columns, vector)));
  if (!query.prepared) {
    const double each = terms > 0 ? kSplitFilterCycles : kFilterCycles;
    cycles += static_cast<double>(elements * query.depth) * columns / static_cast<double>(vector) * each;
  }
  candidate.cycles = cycles * static_cast<double>(query.groups);
  return candidate;
}

bool too_small(const TransformQuery& query) { return query.columns < kLeastChannels || query.depth < kLeastChannels; }

}  // namespace

TransformCandidate plan_winograd(const TransformQuery& query) {
  const int64_t edge = common_edge(*query.phases);
  if (too_small(query) || (edge != 2 && edge != 3)) return {};
  const TransformUkernels& kernels = transform_ukernels(query.isa);
  TransformCandidate best;
  for (int64_t i = 0; i < kernels.count; ++i) {
    const TransformCodelets& codelet = kernels.codelets[i];
    if (codelet.taps != edge || codelet.n != kWinogradOutputs + edge - 1) continue;
    for (const int64_t terms : {int64_t{0}, query.terms}) {
      if (terms > 0 && split_transform(query.isa, static_cast<int>(edge)) == nullptr) continue;
      const TransformCandidate candidate = plan_codelet(query, i, edge, terms);
      if (best.plan.n == 0 || candidate.cycles < best.cycles) best = candidate;
    }
  }
  return best;
}

TransformPlan cut_for_threads(const TransformPlan& plan, TransformQuery query, int64_t threads) {
  query.threads = threads;
  return plan_codelet(query, plan.codelet, plan.r, plan.terms).plan;
}

TransformCandidate plan_fourier(const TransformQuery& query) {
  const int64_t edge = common_edge(*query.phases);
  if (too_small(query) || edge < 4) return {};
  const TransformUkernels& kernels = transform_ukernels(query.isa);
  TransformCandidate best;
  for (int64_t i = 0; i < kernels.count; ++i) {
    const TransformCodelets& codelet = kernels.codelets[i];
    if (codelet.taps != 0 || 2 * (edge - 1) > codelet.n) continue;
    const TransformCandidate candidate = plan_codelet(query, i, edge, 0);
    if (best.plan.n == 0 || candidate.cycles < best.cycles) best = candidate;
  }
  return best;
}

namespace {

TransformCandidate plan_wgrad_codelet(const TransformWgradQuery& query, int64_t codelet, int64_t adjoint, int64_t r) {
  const TransformUkernels& kernels = transform_ukernels(query.isa);
  TransformCandidate candidate;
  TransformPlan& plan = candidate.plan;
  plan = plan_of(kernels, codelet, r);
  plan.adjoint = adjoint;
  const int64_t vector = kernels.vector_length;
  const int64_t panel = (plan.parts == 2 ? kernels.reduce_complex : kernels.reduce_real).vectors * vector;
  const int64_t channels = round_up(query.channels, vector);
  const int64_t filters = round_up(query.filters, panel);
  const int64_t elements = plan.frequencies * plan.parts;
  const int64_t tiles = query.images * ceil_div(query.phase->rows, plan.m) * ceil_div(query.phase->cols, plan.m);
  const int64_t area = kSumsBytes / (4 * elements);
  plan.channel_block = std::min(channels, plan.parts == 2 ? 2 * vector : round_up(64, vector));
  plan.filter_block = std::clamp(area / plan.channel_block / panel * panel, panel, filters);
  // Blocks of the same size.
  const int64_t filter_blocks = ceil_div(filters, plan.filter_block);
  plan.filter_block = round_up(ceil_div(filters, filter_blocks), panel);
  const int64_t channel_blocks = ceil_div(channels, plan.channel_block);
  plan.tiles = kTransformedBytes / (elements * (plan.channel_block + plan.filter_block) * 4);
  plan.tiles = std::clamp<int64_t>(plan.tiles, 4, std::max<int64_t>(tiles, 4));
  const int64_t blocks = channel_blocks * filter_blocks * query.groups;
  plan.tile_splits = std::clamp<int64_t>(kWgradTasks / blocks, 1, ceil_div(tiles, plan.tiles));
  const double products = static_cast<double>(tiles * elements * plan.parts) * static_cast<double>(channels * filters);
  const double cycles = plan.parts == 2 ? kFourierCycles : kTransformCycles;
  const double transforms =
      static_cast<double>(tiles * elements) * static_cast<double>(channels * filter_blocks + filters * channel_blocks);
  const double sums = static_cast<double>(plan.tile_splits * elements * channels * filters);
  candidate.cycles = (products * kVectorCycles + (transforms + 2 * sums) * cycles) / static_cast<double>(vector);
  candidate.cycles *= static_cast<double>(query.groups);
  return candidate;
}

bool too_small(const TransformWgradQuery& query) {
  return query.channels < kLeastChannels || query.filters < kLeastChannels;
}

}  // namespace

TransformCandidate plan_winograd_wgrad(const TransformWgradQuery& query) {
  const int64_t edge = dense_edge(*query.phase);
  if (too_small(query) || (edge != 2 && edge != 3)) return {};
  const TransformUkernels& kernels = transform_ukernels(query.isa);
  const int64_t n = kWinogradOutputs + edge - 1;
  const auto find = [&](int64_t taps) {
    int64_t i = 0;
    while (kernels.codelets[i].n != n || kernels.codelets[i].taps != taps) ++i;
    return i;
  };
  return plan_wgrad_codelet(query, find(edge), find(kWinogradOutputs), edge);
}

TransformCandidate plan_fourier_wgrad(const TransformWgradQuery& query) {
  const int64_t edge = dense_edge(*query.phase);
  if (too_small(query) || edge < 4) return {};
  const TransformUkernels& kernels = transform_ukernels(query.isa);
  TransformCandidate best;
  for (int64_t i = 0; i < kernels.count; ++i) {
    if (kernels.codelets[i].taps != 0 || 2 * (edge - 1) > kernels.codelets[i].n) continue;
    const TransformCandidate candidate = plan_wgrad_codelet(query, i, i, edge);
    if (best.plan.n == 0 || candidate.cycles < best.cycles) best = candidate;
  }
  return best;
}

}  // namespace segpose

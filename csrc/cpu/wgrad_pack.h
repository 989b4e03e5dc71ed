// SPDX-License-Identifier: BSD-3-Clause
// Copies of a block's pixels that lie as the tiles of a wgrad read them. With 256 channels a pixel is 1 KB from the
// next: the pixels of a block share a few sets of L1, and every load misses it. With copies, wgrad alone, 256 filters
// and more, in turns with the same tiles without them (Zen 3, two threads): U-Net's bottom 16.2 -> 11.9 ms, DCGAN 2
// 13.4 -> 8.6, Mask R-CNN's head 13.0 -> 10.2, CPM2DPose's conv4_3 27.7 -> 22.7.
#pragma once

#include <algorithm>

#include "plan.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

// Tiles for so many filters, as tall as they can be.
template <class T, class Fn>
void for_each_tile(const Ukernels<T>& kernels, int64_t nr, int64_t filters, const Fn& fn) {
  int64_t filter = 0;
  for (int i = 0; i < kernels.wgrad_tiles; ++i) {
    const WgradTile<T>& tile = kernels.wgrad[i];
    if (tile.nr != nr) continue;
    for (; filter + tile.mr <= filters; filter += tile.mr) fn(tile, filter);
  }
}

template <class T>
class PackedPixels {
 public:
  PackedPixels(const Plan& plan, Arena& arena) {
    if (!plan.packs_pixels) return;
    panel_step_ = plan.block_m * plan.panels.front().nr + kLine;
    filters_ = arena.take<T>(plan.block_m * plan.k_block);
    columns_ = arena.take<T>(plan.panels_per_task * panel_step_);
    pieces_ = arena.take<Piece>(std::max(plan.k_block, plan.panels_per_task));
  }

  // Panels [first, end) of the activation, which lie `x_base` behind the pointers of the segments.
  void load_columns(const Plan& plan, const WgradArgs<T>& block, int64_t x_base, int64_t first, int64_t end) {
    for (int64_t p = first; p < end; ++p) {
      const Panel& panel = plan.panels[static_cast<size_t>(p)];
      pieces_[p - first] = {panel.column, panel.nr, columns_ + (p - first) * panel_step_};
    }
    pixels_ = 0;
    for (int64_t i = 0; i < block.count; ++i) {
      const Segment<T>& segment = block.segments[i];
      load(segment.x + x_base, block.x_step, segment.length, end - first);
      pixels_ += segment.length;
    }
  }

  // All filters of the gradient, after load_columns, for tiles that are `nr` columns wide.
  void load_filters(const Ukernels<T>& kernels, int64_t nr, const WgradArgs<T>& block, int64_t g_base,
                    int64_t filters) {
    int64_t tiles = 0;
    for_each_tile(kernels, nr, filters, [&](const WgradTile<T>& tile, int64_t filter) {
      pieces_[tiles++] = {filter, tile.mr, filters_ + filter * pixels_};
    });
    for (int64_t i = 0; i < block.count; ++i) {
      const Segment<T>& segment = block.segments[i];
      load(segment.g + g_base, block.g_step, segment.length, tiles);
    }
  }

  // One tile of what is loaded, added to `out`.
  void run(const WgradTile<T>& tile, int64_t panel, int64_t filter, T* out, int64_t out_step) const {
    const Segment<T> all{filters_ + filter * pixels_, columns_ + panel * panel_step_, pixels_};
    tile.run({&all, 1, 0, 0, tile.mr, tile.nr, out, out_step});
  }

 private:
  // Columns of a pixel, and where those of the next pixel go.
  struct Piece {
    int64_t column, width;
    T* to;
  };

  // A pixel is read from end to end.
  void load(const T* from, int64_t step, int64_t pixels, int64_t pieces) {
    constexpr int64_t kTogether = 4;
    for (int64_t pixel = 0; pixel < pixels; ++pixel, from += step) {
      for (int64_t i = 0; i < pieces; ++i) {
        Piece& piece = pieces_[i];
        const T* const values = from + piece.column;
        int64_t value = 0;
        for (; value + kTogether <= piece.width; value += kTogether) {
          std::copy_n(values + value, kTogether, piece.to + value);
        }
        for (; value < piece.width; ++value) piece.to[value] = values[value];
        piece.to += piece.width;
      }
    }
  }

  // Between panels, so that the lines of a pixel fall into different sets.
  static constexpr int64_t kLine = 64 / sizeof(T);

  T* filters_ = nullptr;  // [tile][pixel][its filters]
  T* columns_ = nullptr;  // [panel][pixel][its columns]
  Piece* pieces_ = nullptr;
  int64_t panel_step_ = 0;
  int64_t pixels_ = 0;
};

}  // namespace segpose

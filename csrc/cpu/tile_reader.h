// SPDX-License-Identifier: BSD-3-Clause
// Square tiles of a tensor as rows of float channels, zeros outside the image: read where they lie, copied at the
// edges, or, from tensors of another layout or dtype, through a staged band of rows.
#pragma once

#include "plan.h"
#include "staging.h"
#include "tensor_view.h"

namespace segpose {

struct TileRows {
  const float* rows[kMaxTransformN];
  int64_t pixel_step;
};

class TileReader {
 public:
  // Tiles of edge x edge pixels and so many channels at most. The arena provides the reader's own memory; with a null
  // base it is only measured.
  TileReader(Isa isa, const MaskedSource& source, int64_t edge, int64_t most_channels, Arena& arena);

  // Before the first tile.
  void clear() const;
  // The tile whose first pixel is (h, w), which may lie outside, from a channel on. Valid until the next call.
  TileRows read(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t channels);
  TileRows zeros() const;
  // Asks for the last `columns` of a tile that is read soon: its pixels lie apart, where the hardware sees no stream.
  void prefetch(int64_t image, int64_t h, int64_t w, int64_t columns, int64_t channel, int64_t channels) const;

 private:
  TileRows staged(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t channels);
  TileRows in_place(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t channels) const;

  Isa isa_;
  MaskedSource source_;
  int64_t edge_;
  int64_t zeros_size_;
  float* zeros_;
  float* tile_ = nullptr;  // one tile at an edge
  float* band_ = nullptr;  // `edge` rows of some channels with `edge` pixels of zeros on either side
  float* row_ = nullptr;   // one source row on its way
  int64_t band_image_ = -1, band_h_ = 0, band_channel_ = 0, band_channels_ = 0;
};

}  // namespace segpose

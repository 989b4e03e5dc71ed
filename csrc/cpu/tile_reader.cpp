// SPDX-License-Identifier: BSD-3-Clause
#include "tile_reader.h"

#include <algorithm>

namespace segpose {
namespace {

// Pixels further apart than this would need a wide row of zeros for those outside the image.
constexpr int64_t kMostSpread = 4;

}  // namespace

TileReader::TileReader(Isa isa, const MaskedSource& source, int64_t edge, int64_t most_channels, Arena& arena)
    : isa_(isa), source_(source), edge_(edge) {
  const TensorView& view = source.view;
  const bool direct = source.in_place(DType::float32) && view.stride_w <= kMostSpread * view.c;
  const int64_t spread = direct ? kMostSpread : 1;
  zeros_size_ = (edge * spread + 1) * view.c;
  zeros_ = arena.take<float>(zeros_size_);
  if (direct) {
    tile_ = arena.take<float>(edge * edge * view.c);
  } else {
    band_ = arena.take<float>(edge * (view.w + 2 * edge) * most_channels);
    row_ = arena.take<float>(source_row_scratch({view.channels(0, most_channels), source.mask}));
  }
}

void TileReader::clear() const { std::fill_n(zeros_, zeros_size_, 0.0f); }

TileRows TileReader::zeros() const {
  TileRows tile{{}, 0};
  std::fill_n(tile.rows, edge_, zeros_);
  return tile;
}

TileRows TileReader::read(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t channels) {
  const TensorView& view = source_.view;
  if (h + edge_ <= 0 || h >= view.h || w + edge_ <= 0 || w >= view.w) return zeros();
  return band_ == nullptr ? in_place(image, h, w, channel, channels) : staged(image, h, w, channel, channels);
}

void TileReader::prefetch(int64_t image, int64_t h, int64_t w, int64_t columns, int64_t channel,
                          int64_t channels) const {
  const TensorView& view = source_.view;
  if (band_ != nullptr) return;
  constexpr int64_t kLine = 16;
  const float* data = view.as<float>() + channel;
  const int64_t begin = std::max<int64_t>(w + edge_ - columns, 0);
  const int64_t end = std::min(w + edge_, view.w);
  for (int64_t i = std::max<int64_t>(-h, 0); i < std::min(edge_, view.h - h); ++i) {
    for (int64_t j = begin; j < end; ++j) {
      const float* pixel = data + view.offset(image, h + i, j);
      for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(pixel + c, 0, 2);
    }
  }
}

TileRows TileReader::staged(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t channels) {
  const int64_t width = (source_.view.w + 2 * edge_) * channels;
  if (image != band_image_ || h != band_h_ || channel != band_channel_ || channels != band_channels_) {
    MaskedSource part{source_.view.channels(channel, channels), source_.mask};
    SourceMask mask{};
    if (source_.mask != nullptr) {
      mask = *source_.mask;
      mask.output = mask.output.channels(channel, channels);
      part.mask = &mask;
    }
    const int64_t margin = edge_ * channels;
    for (int64_t i = 0; i < edge_; ++i) {
      float* out = band_ + i * width;
      if (h + i < 0 || h + i >= part.view.h) {
        std::fill_n(out, width, 0.0f);
        continue;
      }
      load_source_row(ukernels<float>(isa_), part, image, h + i, row_);
      std::fill_n(out, margin, 0.0f);
      std::copy_n(row_, part.view.w * channels, out + margin);
      std::fill_n(out + width - margin, margin, 0.0f);
    }
    band_image_ = image;
    band_h_ = h;
    band_channel_ = channel;
    band_channels_ = channels;
  }
  TileRows tile{{}, channels};
  for (int64_t i = 0; i < edge_; ++i) tile.rows[i] = band_ + i * width + (w + edge_) * channels;
  return tile;
}

TileRows TileReader::in_place(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t channels) const {
  const TensorView& view = source_.view;
  const float* data = view.as<float>() + channel;
  const bool inside = w >= 0 && w + edge_ <= view.w;
  TileRows tile{{}, inside ? view.stride_w : channels};
  for (int64_t i = 0; i < edge_; ++i) {
    if (h + i < 0 || h + i >= view.h) {
      tile.rows[i] = zeros_;
    } else if (inside) {
      tile.rows[i] = data + view.offset(image, h + i, w);
    } else {
      float* out = tile_ + i * edge_ * channels;
      tile.rows[i] = out;
      for (int64_t j = 0; j < edge_; ++j, out += channels) {
        if (w + j < 0 || w + j >= view.w) {
          std::fill_n(out, channels, 0.0f);
        } else {
          std::copy_n(data + view.offset(image, h + i, w + j), channels, out);
        }
      }
    }
  }
  return tile;
}

}  // namespace segpose

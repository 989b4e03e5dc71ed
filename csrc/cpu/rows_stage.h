// SPDX-License-Identifier: BSD-3-Clause
// The bands of a rows plan: source rows with zeros around them.
#pragma once

#include "rows_plan.h"
#include "staging.h"

namespace segpose {

template <class T>
class BandStage {
 public:
  BandStage(const RowsPlan& plan, const MaskedSource& source, Arena& arena)
      : plan_(plan),
        source_(source),
        band_(arena.take<T>(staged_values(plan, source.view.c) + kSlack)),
        line_(source.in_place(compute_dtype<T>()) ? nullptr : arena.take<T>(source_row_scratch(source))) {}

  // Stages the images [image, image + count) for phase rows from `row` on.
  void load(const Ukernels<T>& kernels, int64_t image, int64_t count, int64_t row) {
    const TensorView& view = source_.view;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t h = 0; h < plan_.staged_h; ++h) {
        load_row(kernels, image + i, row * plan_.row_step + plan_.low_h + h,
                 band_ + (i * plan_.staged_h + h) * plan_.staged_w * view.c);
      }
    }
    // What vectors over ragged columns read past the end.
    std::fill_n(band_ + count * plan_.staged_h * plan_.staged_w * view.c, kSlack, T{0});
  }

  const T* data() const { return band_; }
  // Values from one staged row or image to the next.
  int64_t row_size() const { return plan_.staged_w * source_.view.c; }
  int64_t image_size() const { return plan_.staged_h * row_size(); }

 private:
  static constexpr int64_t kSlack = 64;

  void load_row(const Ukernels<T>& kernels, int64_t n, int64_t h, T* out) {
    const TensorView& view = source_.view;
    const int64_t begin = std::clamp<int64_t>(-plan_.low_w, 0, plan_.staged_w);
    const int64_t end = std::clamp<int64_t>(view.w - plan_.low_w, begin, plan_.staged_w);
    if (h < 0 || h >= view.h || end == begin) {
      std::fill_n(out, row_size(), T{0});
      return;
    }
    std::fill_n(out, begin * view.c, T{0});
    std::fill(out + end * view.c, out + row_size(), T{0});
    const int64_t from = begin + plan_.low_w;
    T* inside = out + begin * view.c;
    if (line_ != nullptr) {
      load_source_row(kernels, source_, n, h, line_);
      std::copy_n(line_ + from * view.c, (end - begin) * view.c, inside);
      return;
    }
    const T* line = view.template as<T>() + view.offset(n, h, from);
    if (view.stride_w == view.c) {
      std::copy_n(line, (end - begin) * view.c, inside);
    } else {
      for (int64_t w = begin; w < end; ++w, line += view.stride_w, inside += view.c) std::copy_n(line, view.c, inside);
    }
  }

  const RowsPlan& plan_;
  MaskedSource source_;
  T* band_;
  T* line_;
};

}  // namespace segpose

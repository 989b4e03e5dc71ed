// SPDX-License-Identifier: BSD-3-Clause
// Steps of a prepared model in one call: Python finds its way through a model once, and then only hands over tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "prepared.h"
#include "registry.h"
#include "results.h"
#include "sequence_entry.h"

namespace segpose {
namespace {

// The numbers are those of segpose_kernels/swap/blueprint.py.
// kPooledConv: the step after it pools, and nothing else reads what stands between.
enum StepKind : int64_t { kConv = 0, kPool = 1, kCopy = 2, kTranspose = 3, kPooledConv = 4 };
// Kind, handle of a convolution, and the places of what is read and written.
constexpr size_t kStepInts = 4;

// What lies at a place: memory that is there (its number among `fixed`), a tensor of the call (its number among
// `given`), a result (number of a fixed tensor with its dtype, N, C, H, W, whether in channels_last), or channels of
// what lies at an earlier place (that place, first channel, channels).
enum PlaceKind : int64_t { kFixed = 0, kGiven = 1, kResult = 2, kSlice = 3 };
constexpr size_t kPlaceInts = 7;
constexpr const char* kTensor = "a tensor of a sequence";

struct Step {
  int64_t kind;
  std::weak_ptr<const PreparedConv> conv;  // Python decides how long its packed filter is kept
  size_t input, output;
};

struct Place {
  int64_t kind;
  size_t number;
  std::array<int64_t, kPlaceInts - 2> rest;
};

size_t checked_number(int64_t number, size_t count, const char* what) {
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(count), "segpose: a sequence uses ", what, " ", number,
                  " of ", count);
  return static_cast<size_t>(number);
}

class Sequence {
 public:
  static constexpr const char* kName = "sequence";

  Sequence(const Ints& code, const Ints& places, std::vector<Tensor> fixed) : fixed_(std::move(fixed)) {
    STD_TORCH_CHECK(places.size() % kPlaceInts == 0, "segpose: places must hold ", kPlaceInts,
                    " numbers for each place, got ", places.size());
    for (size_t i = 0; i < places.size(); i += kPlaceInts) add_place(places.data() + i);
    STD_TORCH_CHECK(code.size() % kStepInts == 0, "segpose: code must hold ", kStepInts, " numbers for each step, got ",
                    code.size());
    for (size_t i = 0; i < code.size(); i += kStepInts) add_step(code.data() + i);
    for (size_t i = 0; i < steps_.size(); ++i) {
      const bool pooled = steps_[i].kind == kPooledConv;
      STD_TORCH_CHECK(
          !pooled || (i + 1 < steps_.size() && steps_[i + 1].kind == kPool && steps_[i + 1].input == steps_[i].output),
          "segpose: no pool reads what step ", i, " writes");
    }
  }

  // In the order of their places.
  std::vector<Tensor> allocate_results() const {
    std::vector<Tensor> results;
    for (const Place& place : places_) {
      if (place.kind != kResult) continue;
      const Ints shape(place.rest.begin(), place.rest.begin() + 4);
      results.push_back(allocate_result(fixed_[place.number], shape, place.rest[4] != 0));
    }
    return results;
  }

  // False, and nothing done, where a convolution is no longer as it was prepared.
  bool run(std::span<const TensorView> given, std::span<const TensorView> results) const {
    std::vector<std::shared_ptr<const PreparedConv>> convs;
    convs.reserve(steps_.size());
    for (const Step& step : steps_) {
      convs.push_back(step.conv.lock());
      const bool needed = step.kind == kConv || step.kind == kPooledConv;
      if (needed && (convs.back() == nullptr || !is_current(*convs.back()))) return false;
    }
    const std::vector<TensorView> views = find_views(given, results);
    for (size_t i = 0; i < steps_.size(); ++i) {
      const TensorView& input = views[steps_[i].input];
      const TensorView& output = views[steps_[i].output];
      switch (steps_[i].kind) {
        case kPooledConv:
          if (run_prepared_pooled(*convs[i], input, views[steps_[i + 1].output])) {
            ++i;
            break;
          }
          [[fallthrough]];
        case kConv:
          run_prepared(*convs[i], input, output);
          break;
        case kPool:
          max_pool2x2(input, output);
          break;
        case kCopy:
          copy_channels(input, output);
          break;
        default:
          write_contiguous(input, output);
      }
    }
    return true;
  }

 private:
  void add_place(const int64_t* numbers) {
    const int64_t kind = numbers[0];
    STD_TORCH_CHECK(kind >= kFixed && kind <= kSlice, "segpose: no place has the kind ", kind);
    Place place{kind, 0, {}};
    std::copy(numbers + 2, numbers + kPlaceInts, place.rest.begin());
    if (kind == kGiven) {
      STD_TORCH_CHECK(numbers[1] >= 0, "segpose: a place has the negative number ", numbers[1]);
      place.number = static_cast<size_t>(numbers[1]);
    } else {
      place.number = kind == kSlice ? checked_number(numbers[1], places_.size(), "place")
                                    : checked_number(numbers[1], fixed_.size(), "fixed tensor");
    }
    if (kind == kResult) {
      for (size_t axis = 0; axis < 4; ++axis) {
        STD_TORCH_CHECK(place.rest[axis] >= 0, "segpose: extents of a result must not be negative, got ",
                        place.rest[axis]);
      }
    }
    views_.push_back(kind == kFixed ? checked_view(fixed_[place.number], kTensor) : TensorView{});
    places_.push_back(std::move(place));
  }

  void add_step(const int64_t* numbers) {
    const int64_t kind = numbers[0];
    STD_TORCH_CHECK(kind >= kConv && kind <= kPooledConv, "segpose: no step has the kind ", kind);
    Step step{kind,
              {},
              checked_number(numbers[2], places_.size(), "place"),
              checked_number(numbers[3], places_.size(), "place")};
    if (kind == kConv || kind == kPooledConv) step.conv = find_prepared(numbers[1]);
    steps_.push_back(std::move(step));
  }

  std::vector<TensorView> find_views(std::span<const TensorView> given, std::span<const TensorView> results) const {
    std::vector<TensorView> views = views_;
    size_t result = 0;
    for (size_t i = 0; i < places_.size(); ++i) {
      const Place& place = places_[i];
      if (place.kind == kGiven) {
        STD_TORCH_CHECK(place.number < given.size(), "segpose: a sequence uses tensor ", place.number, " of ",
                        given.size(), " that are given");
        views[i] = given[place.number];
      } else if (place.kind == kResult) {
        STD_TORCH_CHECK(result < results.size(), "segpose: a sequence has more results than the ", results.size(),
                        " that it was given room for");
        views[i] = results[result++];
      } else if (place.kind == kSlice) {
        views[i] = slice(views[place.number], place.rest[0], place.rest[1]);
      }
    }
    return views;
  }

  static TensorView slice(const TensorView& whole, int64_t first, int64_t channels) {
    STD_TORCH_CHECK(first >= 0 && channels >= 0 && first + channels <= whole.c, "segpose: a slice has channels ", first,
                    " to ", first + channels, " of ", whole.c);
    return whole.channels(first, channels);
  }

  std::vector<Tensor> fixed_;
  std::vector<Place> places_;
  std::vector<TensorView> views_;  // of what is fixed
  std::vector<Step> steps_;
};

using Sequences = Registry<Sequence>;

int64_t prepare_sequence(Ints code, Ints places, std::vector<Tensor> fixed) {
  return Sequences::instance().add(std::make_shared<const Sequence>(code, places, std::move(fixed)));
}

std::tuple<bool, std::vector<Tensor>> run_sequence(int64_t handle, std::vector<Tensor> given) {
  const std::shared_ptr<const Sequence> sequence = Sequences::instance().get(handle);
  std::vector<TensorView> given_views, result_views;
  for (const Tensor& tensor : given) given_views.push_back(checked_view(tensor, kTensor));
  std::vector<Tensor> results = sequence->allocate_results();
  for (const Tensor& tensor : results) result_views.push_back(view_of(tensor));
  if (!sequence->run(given_views, result_views)) return {false, {}};
  return {true, std::move(results)};
}

// What fails here fails again in run_sequence, which says why.
bool run_views(int64_t handle, const TensorView* given, int64_t given_count, const TensorView* results,
               int64_t result_count) {
  try {
    return Sequences::instance().get(handle)->run({given, static_cast<size_t>(given_count)},
                                                  {results, static_cast<size_t>(result_count)});
  } catch (...) {
    return false;
  }
}

void release_sequence(int64_t handle) { Sequences::instance().remove(handle); }

Ints entries() {
  const RunSequence run = run_views;
  return {reinterpret_cast<int64_t>(run), reinterpret_cast<int64_t>(&release_sequence),
          reinterpret_cast<int64_t>(&release_prepared), kEntryVersion};
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CompositeExplicitAutograd, m) {
  m.impl("prepare_sequence", TORCH_BOX(&segpose::prepare_sequence));
  m.impl("run_sequence", TORCH_BOX(&segpose::run_sequence));
  m.impl("release_sequence", TORCH_BOX(&segpose::release_sequence));
  m.impl("entries", TORCH_BOX(&segpose::entries));
}

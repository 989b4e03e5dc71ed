// SPDX-License-Identifier: BSD-3-Clause
// How kernels get threads without knowing torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace segpose {

// Calls body(context, worker) once for every worker in [0, workers), possibly at the same time. conv.cpp backs it with
// torch's own thread pool; a plain loop is a valid executor too.
struct Executor {
  int64_t workers;
  void (*run)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);
};

// Runs fn(task, worker) for every task. A worker begins with a range of its own, the same in every layer, so that it
// finds in its cache what it wrote before; then it helps the others. Which worker runs a task must not influence its
// result: that keeps every result independent of the number of threads.
template <class Fn>
void for_each_task(const Executor& executor, int64_t tasks, const Fn& fn) {
  if (tasks <= 0) return;
  if (executor.workers <= 1 || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(task, int64_t{0});
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  constexpr int64_t kFew = 8;
  Range few[kFew];
  struct Context {
    int64_t workers;
    Range* ranges;
    const Fn* fn;
  } context;
  context.workers = executor.workers < tasks ? executor.workers : tasks;
  std::unique_ptr<Range[]> many;
  if (context.workers > kFew) many = std::make_unique<Range[]>(static_cast<size_t>(context.workers));
  context.ranges = many == nullptr ? few : many.get();
  for (int64_t worker = 0; worker < context.workers; ++worker) {
    context.ranges[worker].next = tasks * worker / context.workers;
    context.ranges[worker].end = tasks * (worker + 1) / context.workers;
  }
  context.fn = &fn;
  executor.run(
      context.workers,
      [](void* opaque, int64_t worker) {
        auto* shared = static_cast<Context*>(opaque);
        for (int64_t i = 0; i < shared->workers; ++i) {
          Range& range = shared->ranges[(worker + i) % shared->workers];
          for (int64_t task = range.next++; task < range.end; task = range.next++) (*shared->fn)(task, worker);
        }
      },
      &context);
}

}  // namespace segpose

// SPDX-License-Identifier: BSD-3-Clause
// How kernels get threads without knowing torch.
#pragma once

#include <atomic>
#include <cstdint>

namespace segpose {

// Calls body(context, worker) once for every worker in [0, workers), possibly at the same time. conv.cpp backs it with
// torch's own thread pool; a plain loop is a valid executor too.
struct Executor {
  int64_t workers;
  void (*run)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);
};

// Runs fn(task, worker) for every task; workers take the next task when they are free. Which worker runs a task must
// not influence its result: that keeps every result independent of the number of threads.
template <class Fn>
void for_each_task(const Executor& executor, int64_t tasks, const Fn& fn) {
  if (tasks <= 0) return;
  if (executor.workers <= 1 || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(task, int64_t{0});
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Fn* fn;
  } context;
  context.tasks = tasks;
  context.fn = &fn;
  executor.run(
      executor.workers < tasks ? executor.workers : tasks,
      [](void* opaque, int64_t worker) {
        auto* shared = static_cast<Context*>(opaque);
        for (int64_t task = shared->next++; task < shared->tasks; task = shared->next++) (*shared->fn)(task, worker);
      },
      &context);
}

}  // namespace segpose

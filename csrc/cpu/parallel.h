// Loops over independent tasks on OpenMP's threads. Built by gcc they are torch's own: both then use libgomp.so.1.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// work(task, thread) for every task, thread < threads. Which thread gets a task never changes a result.
template <class Work>
inline void run_tasks(int64_t tasks, int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) work(task, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) work(task, 0);
}

}  // namespace

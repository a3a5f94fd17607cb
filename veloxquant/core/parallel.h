// One pool of threads for everything that veloxquant computes itself.
#pragma once

#include <cstddef>
#include <functional>

namespace veloxquant {

/// Number of threads that parallel_for uses, the caller's included.  At start: the processors this process may run on, and has time
/// for by its control group (cpu.max).
int num_threads();

/// Sets it.  Throws std::invalid_argument unless 1 ≤ threads ≤ 1024.  Not while a parallel_for runs.
void set_num_threads(int threads);

/// Calls body(begin, end) for consecutive ranges of at most `grain` indices that cover [0, count), on several threads.
///
/// The ranges depend on `count` and `grain` alone, never on the number of threads: a reduction that keeps one partial result a
/// range and adds them in order gives the same bits everywhere.  A call from inside `body` runs on the calling thread alone.
/// The first exception that a body throws is rethrown here, after all threads have stopped.
///
/// After a job threads look out for the next one for some ten microseconds before they sleep.
void parallel_for(std::size_t count, std::size_t grain, const std::function<void(std::size_t begin, std::size_t end)>& body);

}  // namespace veloxquant

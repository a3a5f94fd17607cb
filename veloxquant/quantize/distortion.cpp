#include "veloxquant/quantize/distortion.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <vector>

#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"

namespace veloxquant {
namespace {

// Squared error of each channel, summed over all runs in order.
std::vector<double> channel_errors(const Quantizer& quantizer, std::span<const float> vectors, std::size_t run_tokens) {
  const auto dim = static_cast<std::size_t>(quantizer.dim()), run_values = run_tokens * dim;
  if (run_values == 0 || vectors.size() % run_values != 0)
    throw_invalid("distortion", "expected whole runs of {} tokens of {} values, got {} values", run_tokens, dim, vectors.size());
  const std::size_t runs = vectors.size() / run_values;
  std::vector<std::vector<double>> errors(runs, std::vector<double>(dim));
  parallel_for(runs, 1, [&](std::size_t run, std::size_t) {
    const auto part = vectors.subspan(run * run_values, run_values);
    std::vector<float> restored(run_values);
    quantizer.restore(part, restored);
    for (std::size_t begin = 0; begin < run_values; begin += dim) {
      for (std::size_t c = 0; c < dim; ++c) {
        const double error = static_cast<double>(part[begin + c]) - restored[begin + c];
        errors[run][c] += error * error;
      }
    }
  });
  std::vector<double> sums(dim);
  for (const auto& run : errors)
    for (std::size_t c = 0; c < dim; ++c) sums[c] += run[c];
  return sums;
}

double power_of(std::span<const float> vectors) {
  double power = 0;
  for (const float value : vectors) power += static_cast<double>(value) * value;
  return power;
}

double total(const std::vector<double>& errors) {
  return std::accumulate(errors.begin(), errors.end(), 0.0);
}

}  // namespace

double restored_distortion(const Quantizer& quantizer, std::span<const float> vectors, std::size_t run_tokens) {
  const double power = power_of(vectors);
  return power == 0 ? 0.0 : total(channel_errors(quantizer, vectors, run_tokens)) / power;
}

std::vector<double> relative_distortions(const QuantizerMethod& method, Side side, std::span<const float> vectors,
                                         std::size_t run_tokens, int dim, const std::vector<double>& rates, std::uint64_t seed) {
  check_dim(method, dim);
  const auto widths = method.widths(dim);
  const double power = power_of(vectors);
  std::map<double, std::vector<double>> measured;  // by width: rates between two share them
  const auto errors_at = [&](double width) -> const std::vector<double>& {
    auto& errors = measured[width];
    if (!errors.empty()) return errors;
    const auto quantizer = method.make(method.fit(vectors, dim, {.side = side, .width = width, .seed = seed}));
    return errors = channel_errors(*quantizer, vectors, run_tokens);
  };
  std::vector<double> distortions;
  for (const double rate : rates) {
    if (!(rate >= widths.front() && rate <= widths.back()))
      throw_invalid("distortion", "{} offers {} to {} bits for vectors of {}, got {}", method.name, widths.front(), widths.back(),
                    dim, rate);
    const auto above = std::lower_bound(widths.begin(), widths.end(), rate);
    const double wide = *above, narrow = wide == rate ? wide : *(above - 1);
    const double share = wide == narrow ? 1.0 : (rate - narrow) / (wide - narrow);
    double error = 0;
    for (int c = 0; c < dim && power > 0; ++c)
      error += errors_at(std::floor((c + 1) * share) > std::floor(c * share) ? wide : narrow)[static_cast<std::size_t>(c)];
    distortions.push_back(power > 0 ? error / power : 0);
  }
  return distortions;
}

}  // namespace veloxquant

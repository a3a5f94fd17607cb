#include "veloxquant/quantize/turboquant.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/bit_packing.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/kernels/ordered_product.h"
#include "veloxquant/quantize/half.h"
#include "veloxquant/quantize/parameters.h"

namespace veloxquant {
namespace {

constexpr std::size_t kNormBytes = 2;

// Beyond this, making a random matrix orthogonal takes seconds.
constexpr int kMaxMatrixDim = 1024;

constexpr std::string_view kDims = "2 to 1024 or a power of two";

std::vector<double> widths(int dim) {
  if (dim < 2 || (dim > kMaxMatrixDim && !is_power_of_two(static_cast<std::size_t>(dim)))) return {};
  return {1, 2, 3, 4, 5, 6, 7, 8};
}

double rate(int dim, double width) {
  return TurboQuantizer(dim, whole_bits("turboquant", dim, width), 0).rate();
}

QuantizerParameters fit(std::span<const float> vectors, int dim, const FitOptions& options) {
  check_vectors("turboquant", vectors, dim);
  const int bits = whole_bits("turboquant", dim, options.width);
  // JSON holds signed numbers: 63 bits of the seed are plenty.
  const auto seed = static_cast<std::int64_t>(options.seed & 0x7fffffffffffffff);
  return {.method = "turboquant", .side = options.side, .dim = dim, .numbers = {{"bits", bits}, {"seed", seed}}, .tensors = {}};
}

std::unique_ptr<const Quantizer> make(const QuantizerParameters& parameters) {
  expect_parameters(parameters, {"bits", "seed"}, {});
  check_dim(quantizer_method("turboquant"), parameters.dim);
  return std::make_unique<TurboQuantizer>(
      parameters.dim, static_cast<int>(number_in(parameters, "bits", 1, 8)),
      static_cast<std::uint64_t>(number_in(parameters, "seed", 0, std::numeric_limits<std::int64_t>::max())));
}

// Rows made orthonormal one after another (modified Gram–Schmidt, twice for the precision).
std::vector<float> random_orthogonal(std::size_t dim, std::uint64_t seed) {
  Random random(seed);
  std::vector<double> rows(dim * dim);
  for (auto& value : rows) value = random.normal();
  for (std::size_t i = 0; i < dim; ++i) {
    double* row = rows.data() + i * dim;
    for (int pass = 0; pass < 2; ++pass) {
      for (std::size_t j = 0; j < i; ++j) {
        const double* before = rows.data() + j * dim;
        double dot = 0;
        for (std::size_t c = 0; c < dim; ++c) dot += row[c] * before[c];
        for (std::size_t c = 0; c < dim; ++c) row[c] -= dot * before[c];
      }
    }
    double norm = 0;
    for (std::size_t c = 0; c < dim; ++c) norm += row[c] * row[c];
    for (std::size_t c = 0; c < dim; ++c) row[c] /= std::sqrt(norm);
  }
  return {rows.begin(), rows.end()};
}

}  // namespace

TurboQuantizer::TurboQuantizer(int dim, int bits, std::uint64_t seed) : dim_(dim), bits_(bits), seed_(seed) {}

const TurboQuantizer::Rotation& TurboQuantizer::rotation() const {
  std::call_once(made_, [this] {
    if (!is_power_of_two(static_cast<std::size_t>(dim_))) {
      const auto dim = static_cast<std::size_t>(dim_);
      rotation_.matrix = random_orthogonal(dim, seed_);
      rotation_.transposed.resize(dim * dim);
      for (std::size_t i = 0; i < dim * dim; ++i) rotation_.transposed[i % dim * dim + i / dim] = rotation_.matrix[i];
      return;
    }
    Random random(seed_);
    for (int i = 0; i < dim_; ++i) rotation_.signs.push_back(random.below(2) == 0 ? -1.0f : 1.0f);
  });
  return rotation_;
}

std::size_t TurboQuantizer::encoded_bytes(std::size_t tokens) const {
  return tokens * (kNormBytes + packed_bytes(static_cast<std::size_t>(dim_), bits_));
}

void TurboQuantizer::rotate(std::vector<float>& rows) const {
  const auto dim = static_cast<std::size_t>(dim_), count = rows.size() / dim;
  const auto& [signs, matrix, transposed] = rotation();
  if (matrix.empty()) {
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] *= signs[i % dim];
    hadamard(rows.data(), count, dim);
    return;
  }
  std::vector<float> rotated(rows.size());
  ordered_product(rows.data(), count, dim, dim, transposed.data(), dim, nullptr, rotated.data(), dim);
  rows.swap(rotated);
}

void TurboQuantizer::rotate_back(std::span<float> rows) const {
  const auto dim = static_cast<std::size_t>(dim_), count = rows.size() / dim;
  const auto& [signs, matrix, _] = rotation();
  if (matrix.empty()) {
    hadamard(rows.data(), count, dim);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] *= signs[i % dim];
    return;
  }
  const std::vector<float> rotated(rows.begin(), rows.end());
  gemm(false, false, static_cast<int>(count), dim_, dim_, 1.0f, rotated.data(), dim_, matrix.data(), dim_, 0.0f, rows.data(), dim_);
}

std::vector<float> TurboQuantizer::rotation_matrix() const {
  const auto dim = static_cast<std::size_t>(dim_);
  const auto& [signs, matrix, _] = rotation();
  if (!matrix.empty()) return matrix;
  std::vector<float> product = walsh_hadamard_matrix(dim);
  for (std::size_t i = 0; i < product.size(); ++i) product[i] *= signs[i % dim];
  return product;
}

void TurboQuantizer::encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const {
  const auto dim = static_cast<std::size_t>(dim_), tokens = vectors.size() / dim;
  const auto& boundaries = lloyd_max(bits_).boundaries;
  // Scaled before it is rotated: sums of very large values would overflow.
  std::vector<float> rotated(vectors.size());
  std::uint8_t* out = encoded.data();
  for (std::size_t token = 0; token < tokens; ++token, out += encoded_bytes(1)) {
    const auto row = vectors.subspan(token * dim, dim);
    double squares = 0;
    for (const float value : row) squares += static_cast<double>(value) * value;
    const double norm = std::sqrt(squares), to_unit = norm > 0 ? std::sqrt(static_cast<double>(dim)) / norm : 0.0;
    store_half(static_cast<float>(std::min<double>(norm, std::numeric_limits<float>::max())), out);
    for (std::size_t i = 0; i < dim; ++i) rotated[token * dim + i] = static_cast<float>(row[i] * to_unit);
  }
  rotate(rotated);
  std::vector<std::uint16_t> codes(dim);
  out = encoded.data() + kNormBytes;
  for (std::size_t token = 0; token < tokens; ++token, out += encoded_bytes(1)) {
    const float* row = rotated.data() + token * dim;
    std::fill(codes.begin(), codes.end(), std::uint16_t{0});
    // Counting the boundaries below is a handful of comparisons that the compiler turns into vector code.
    for (const float boundary : boundaries)
      for (std::size_t i = 0; i < dim; ++i) codes[i] = static_cast<std::uint16_t>(codes[i] + (row[i] > boundary));
    pack_bits(codes, bits_, out);
  }
}

void TurboQuantizer::decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const {
  const auto dim = static_cast<std::size_t>(dim_), tokens = vectors.size() / dim;
  const auto& levels = lloyd_max(bits_).levels;
  std::vector<std::uint16_t> codes(dim);
  const std::uint8_t* in = encoded.data();
  for (std::size_t token = 0; token < tokens; ++token, in += encoded_bytes(1)) {
    const float scale = load_half(in) / std::sqrt(static_cast<float>(dim));
    unpack_bits(in + kNormBytes, bits_, codes);
    for (std::size_t i = 0; i < dim; ++i) vectors[token * dim + i] = levels[codes[i]] * scale;
  }
  rotate_back(vectors);
}

QuantizerMethod turboquant_method() {
  return {"turboquant", kDims, widths, rate, fit, make, /* least_vectors= */ 0};
}

}  // namespace veloxquant

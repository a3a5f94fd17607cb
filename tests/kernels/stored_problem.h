// Matrices in every form that files have, made of random bits.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "veloxquant/core/random.h"
#include "veloxquant/kernels/stored_matrix.h"

namespace veloxquant::testing {

struct StoredForm {
  ElementType type;
  int bits;
  std::size_t group_size;
  ElementType scale_type;

  bool packed() const { return type >= ElementType::kAffine; }
};

inline const std::vector<StoredForm>& stored_forms() {
  static const std::vector<StoredForm> forms = [] {
    std::vector<StoredForm> list = {{ElementType::kFloat32, 32, 0, {}},
                                    {ElementType::kFloat16, 16, 0, {}},
                                    {ElementType::kBfloat16, 16, 0, {}},
                                    {ElementType::kMxfp4, 4, 32, {}},
                                    {ElementType::kMxfp8, 8, 32, {}}};
    for (const int bits : {2, 3, 4, 5, 6, 8}) list.push_back({ElementType::kAffine, bits, 32, ElementType::kFloat16});
    list.push_back({ElementType::kAffine, 4, 64, ElementType::kBfloat16});
    list.push_back({ElementType::kAffine, 3, 128, ElementType::kFloat32});
    return list;
  }();
  return forms;
}

/// [rows, columns] of that form, of magnitude 1 or so, subnormal numbers among them.  Arrays end where the matrix does, so that
/// AddressSanitizer sees what reads on.
class StoredProblem {
 public:
  StoredProblem(const StoredForm& form, std::size_t rows, std::size_t columns, std::uint64_t seed) : random_(seed) {
    matrix_.type = form.type;
    matrix_.bits = form.bits;
    if (!form.packed()) {
      matrix_.values = keep(numbers(form.type, rows * columns, 1.0));
      return;
    }
    std::vector<std::uint8_t> codes(rows * columns * static_cast<std::size_t>(form.bits) / 8);
    for (auto& code : codes) {
      code = static_cast<std::uint8_t>(random_.below(256));
      if (form.type == ElementType::kMxfp8 && (code & 0x7F) == 0x7F) code = 0x07;  // no number
      if (form.type == ElementType::kMxfp8 && (code & 0x7F) > 0x40) code ^= 0x40;  // not too large
    }
    matrix_.values = keep(codes);
    matrix_.group_size = form.group_size;
    matrix_.scale_type = form.scale_type;
    const std::size_t groups = rows * columns / form.group_size;
    if (form.type != ElementType::kAffine) {
      std::vector<std::uint8_t> scales(groups);
      for (auto& scale : scales) scale = static_cast<std::uint8_t>(124 + random_.below(4));
      scales[0] = 0;  // 2^-127, which is subnormal
      matrix_.scales = keep(scales);
      return;
    }
    matrix_.scales = keep(numbers(form.scale_type, groups, 1.0 / (1 << form.bits)));
    matrix_.biases = keep(numbers(form.scale_type, groups, 1.0));
  }

  const StoredMatrix& matrix() const { return matrix_; }

 private:
  const void* keep(const std::vector<std::uint8_t>& bytes) {
    auto& copy = kept_.emplace_back(new std::uint8_t[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), copy.get());
    return copy.get();
  }

  std::vector<std::uint8_t> numbers(ElementType type, std::size_t count, double size) {
    std::vector<std::uint8_t> bytes;
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = static_cast<float>(size * random_.normal() * (i % 37 == 5 ? 1e-6 : 1.0));
      const auto bits = std::bit_cast<std::uint32_t>(value);
      const std::uint32_t half =
          type == ElementType::kFloat16 ? std::bit_cast<std::uint16_t>(static_cast<_Float16>(value)) : bits >> 16;
      const auto write = [&](std::uint32_t x, int width) {
        for (int b = 0; b < width; ++b) bytes.push_back(static_cast<std::uint8_t>(x >> (8 * b)));
      };
      type == ElementType::kFloat32 ? write(bits, 4) : write(half, 2);
    }
    return bytes;
  }

  Random random_;
  StoredMatrix matrix_;
  std::vector<std::unique_ptr<std::uint8_t[]>> kept_;
};

inline std::string form_text(const StoredForm& form) {
  static constexpr std::array kNames = {"float32", "float16", "bfloat16", "affine", "mxfp4", "mxfp8"};
  return std::string(kNames[static_cast<std::size_t>(form.type)]) + " of " + std::to_string(form.bits) + " bits by " +
         std::to_string(form.group_size);
}

}  // namespace veloxquant::testing

#include "veloxquant/kernels/stored_matrix.h"

#include <gmock/gmock.h>

#include "tests/kernels/every_target.h"
#include "tests/kernels/stored_problem.h"

namespace veloxquant {
namespace {

using ::testing::HasSubstr;
using testing::StoredProblem;

template <class Restore>
std::vector<float> restored(Restore restore, const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part) {
  std::vector<float> values(part.rows * part.columns, -1.0f);
  restore(matrix, columns, part, values.data());
  return values;
}

// To the last bit, but for the rounding of scale · code + bias.
void expect_restored(const testing::StoredForm& form, const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part) {
  SCOPED_TRACE(testing::form_text(form));
  const auto ours = restored(restore, matrix, columns, part), expected = restored(reference::restore, matrix, columns, part);
  if (form.type == ElementType::kAffine) {
    testing::expect_near(ours, expected, 1e-6);
  } else {
    EXPECT_EQ(ours, expected);
  }
}

TEST(StoredMatrix, RestoredOnEveryTarget) {
  testing::for_each_target([] {
    for (const auto& form : testing::stored_forms()) {
      for (const std::size_t columns : {1, 15, 17, 37, 128, 384}) {
        if (form.packed() && columns % form.group_size != 0) continue;
        const StoredProblem problem(form, 5, columns, columns);
        expect_restored(form, problem.matrix(), columns, {0, 5, 0, columns});
        expect_restored(form, problem.matrix(), columns, {2, 1, 0, columns});
        expect_restored(form, problem.matrix().from_row(3, columns), columns, {1, 1, 0, columns});
        if (columns == 384) expect_restored(form, problem.matrix(), columns, {1, 4, 128, 128});
      }
    }
  });
}

TEST(StoredMatrix, AllHalves) {
  std::vector<std::uint16_t> bits;
  for (std::uint32_t b = 0; b < 1 << 16; ++b)
    if ((b & 0x7C00) != 0x7C00) bits.push_back(static_cast<std::uint16_t>(b));
  const StoredMatrix matrix(ElementType::kFloat16, bits.data());
  const MatrixPart all{0, 1, 0, bits.size()};
  testing::for_each_target(
      [&] { EXPECT_EQ(restored(restore, matrix, bits.size(), all), restored(reference::restore, matrix, bits.size(), all)); });
}

TEST(StoredMatrix, RefusesWhatCannotBe) {
  const auto problem = [](const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part) -> std::string {
    std::vector<float> out(1 << 12);
    try {
      restore(matrix, columns, part, out.data());
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "none";
  };
  const StoredProblem good({ElementType::kAffine, 4, 64, ElementType::kFloat16}, 4, 256, 1);
  const MatrixPart part{0, 4, 0, 256};
  EXPECT_EQ(problem(good.matrix(), 256, part), "none");
  EXPECT_THAT(problem(good.matrix(), 250, {0, 4, 0, 250}), HasSubstr("250 columns are no whole groups of 64"));
  EXPECT_THAT(problem(good.matrix(), 256, {0, 4, 64, 128}), HasSubstr("steps of 128, got 64 to 192"));
  EXPECT_THAT(problem(good.matrix(), 256, {0, 4, 128, 256}), HasSubstr("columns up to 256, got 128 to 384"));
  for (const auto& [field, change] : std::vector<std::pair<const char*, void (*)(StoredMatrix&)>>{
           {"expected codes of 2, 3, 4, 5, 6 or 8 bits, got 7", [](StoredMatrix& x) { x.bits = 7; }},
           {"expected groups of 32, 64 or 128, got 48", [](StoredMatrix& x) { x.group_size = 48; }},
           {"expected groups of 32, got 64", [](StoredMatrix& x) { x.type = ElementType::kMxfp4; }},
           {"expected codes of 8 bits, got 4", [](StoredMatrix& x) { x.type = ElementType::kMxfp8; }},
           {"expected elements of 16 bits, got 4", [](StoredMatrix& x) { x.type = ElementType::kFloat16; }},
           {"expected scales of", [](StoredMatrix& x) { x.scale_type = ElementType::kMxfp8; }}}) {
    StoredMatrix bad = good.matrix();
    change(bad);
    EXPECT_THAT(problem(bad, 256, part), HasSubstr(field));
  }
}

}  // namespace
}  // namespace veloxquant

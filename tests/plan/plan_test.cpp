#include "veloxquant/plan/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "tests/plan/some_plan.h"
#include "tests/temporary_folder.h"

namespace veloxquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;
using testing::some_plan;

// Dimension 4.  Layer 0: vecinfer keys of two 1-bit codes a vector, in one byte; affine values of four 2-bit codes, scale and bias,
// in 5 bytes. Layer 1: turboquant keys of four 3-bit codes and a norm, in 4 bytes; kivi values of four 1-bit codes, minimum and
// step, in 5 bytes.
TEST(Plan, CountsEverythingThatIsStored) {
  const Plan plan = some_plan();
  EXPECT_DOUBLE_EQ(effective_bits(plan), (1 + 5 + 4 + 5) * 8 / 4.0 / 4);
  EXPECT_DOUBLE_EQ(bytes_per_token(plan), (1 + 5 + 4 + 5) * 3);  // 3 KV heads
  EXPECT_EQ(constant_bytes(plan), (8 + 4) * sizeof(float));
}

TEST(Plan, NamesWhatDiffersFromTheModel) {
  const Plan plan = some_plan();
  EXPECT_NO_THROW(check_identity(plan, plan.model));
  const auto problem = [&](auto ModelIdentity::*field, auto value) {
    ModelIdentity other = plan.model;
    other.*field = value;
    return message_of<std::runtime_error>([&] { check_identity(plan, other); });
  };
  EXPECT_THAT(problem(&ModelIdentity::architecture, "qwen3"),
              AllOf(HasSubstr("architecture"), HasSubstr("llama"), HasSubstr("qwen3")));
  EXPECT_THAT(problem(&ModelIdentity::num_layers, 3), HasSubstr("num_layers is 2 in the plan, 3 in the model"));
  EXPECT_THAT(problem(&ModelIdentity::num_kv_heads, 9), HasSubstr("num_kv_heads"));
  EXPECT_THAT(problem(&ModelIdentity::head_dim, 9), HasSubstr("head_dim"));
  EXPECT_THAT(problem(&ModelIdentity::hidden_size, 9), HasSubstr("hidden_size"));
  EXPECT_THAT(problem(&ModelIdentity::vocab_size, 9), HasSubstr("vocab_size"));
  EXPECT_THAT(problem(&ModelIdentity::config_hash, "ff"), HasSubstr("config_hash"));
  EXPECT_THAT(problem(&ModelIdentity::weights_hash, "ff"), HasSubstr("weights_hash"));
}

TEST(Plan, UnitsCoverTheModelInOrder) {
  const auto problem = [](const auto& change) {
    Plan plan = some_plan();
    change(plan);
    return message_of<std::invalid_argument>([&] { check_plan(plan); });
  };
  EXPECT_EQ(problem([](Plan&) {}), "");
  EXPECT_THAT(problem([](Plan& plan) { plan.units.pop_back(); }), HasSubstr("units[3]: expected values of layer 1, got none"));
  EXPECT_THAT(problem([](Plan& plan) { plan.units.push_back(plan.units.back()); }), HasSubstr("got 5"));
  EXPECT_THAT(problem([](Plan& plan) { plan.units.clear(); }), HasSubstr("units[0]: expected keys of layer 0, got none"));
  EXPECT_THAT(problem([](Plan& plan) { std::swap(plan.units[0], plan.units[1]); }), HasSubstr("units[0]"));
  EXPECT_THAT(problem([](Plan& plan) { std::swap(plan.units[0], plan.units[2]); }), HasSubstr("units[0]"));
  EXPECT_THAT(problem([](Plan& plan) { plan.units[3] = plan.units[1]; }), HasSubstr("units[3]"));
  EXPECT_THAT(problem([](Plan& plan) { plan.units[2].quantizer.side = Side::kValues; }), HasSubstr("units[2]"));
  EXPECT_THAT(problem([](Plan& plan) { plan.units[1].quantizer.dim = 8; }), AllOf(HasSubstr("units[1]"), HasSubstr("head_dim 4")));
  EXPECT_THAT(problem([](Plan& plan) { plan.units[2].quantizer.numbers["bits"] = 99; }),
              AllOf(HasSubstr("units[2]"), HasSubstr("99")));
}

}  // namespace
}  // namespace veloxquant

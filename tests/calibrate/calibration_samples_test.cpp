#include "veloxquant/calibrate/calibration_samples.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/model/demo_model.h"
#include "tests/temporary_folder.h"
#include "veloxquant/core/safetensors.h"

namespace veloxquant {
namespace {

using testing::demo_model;
using testing::demo_tokenizer;
using ::testing::HasSubstr;

CalibrationSet set_of(const std::vector<std::string>& texts, int num_samples, int length) {
  return calibration_set(demo_model(), demo_tokenizer(), texts, num_samples, length, 5);
}

// 8 where the next token is one of an answer, 1 elsewhere.
void expect_weights(const CalibrationSet& set) {
  const auto length = static_cast<std::size_t>(set.samples.length);
  std::vector<float> expected(set.samples.tokens.size(), 1.0f);
  for (std::size_t i = 0; i < set.answers.size(); ++i) {
    EXPECT_FALSE(set.answers[i].empty());
    for (const auto& [begin, end] : set.answers[i])
      for (int token = begin; token < end; ++token)
        expected[(static_cast<std::size_t>(set.running_samples) + i) * length + static_cast<std::size_t>(token) - 1] = 8.0f;
  }
  EXPECT_EQ(set.weights, expected);
}

TEST(CalibrationSet, HalfIsRunningTextHalfHasFacts) {
  const auto set = set_of({}, 5, 256);
  EXPECT_EQ(set.samples.count, 5);
  EXPECT_EQ(set.samples.tokens.size(), 5u * 256);
  EXPECT_EQ(set.running_samples, 3);
  EXPECT_EQ(set.answers.size(), 2u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(set.samples.row(i)[0], demo_model().config().bos_token_id.value());
  expect_weights(set);
  EXPECT_EQ(set.samples.tokens, set_of({}, 5, 256).samples.tokens);
}

TEST(CalibrationSet, WithTextsAThirdEach) {
  std::string text;
  for (int i = 0; i < 4; ++i) text += testing::kText;
  const auto set = set_of({text}, 6, 256);
  EXPECT_EQ(set.samples.count, 6);
  EXPECT_EQ(set.running_samples, 4);
  EXPECT_EQ(set.answers.size(), 2u);
  const auto cut = cut_samples({demo_tokenizer().encode(text)}, 2, 256);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(std::ranges::equal(set.samples.row(2 + i), cut.row(i))) << i;
  expect_weights(set);
}

TEST(CalibrationSet, RunningTextAloneWhereFactsHaveNoRoom) {
  for (const auto& [count, length] : {std::pair(2, 256), std::pair(4, 255), std::pair(1, 64)}) {
    const auto set = set_of({}, count, length);
    EXPECT_EQ(set.samples.count, count);
    EXPECT_EQ(set.running_samples, count);
    EXPECT_TRUE(set.answers.empty());
    EXPECT_TRUE(set.weights.empty());
  }
  const auto one = set_of({testing::kText}, 1, 64);  // a text is given to be read
  EXPECT_TRUE(std::ranges::equal(one.samples.row(0), testing::text_samples(1, 64).row(0)));
}

// Every hidden state is the same, and the head's largest logit is that of token 5.
void write_stuck_model(const std::filesystem::path& folder) {
  testing::put(folder / "config.json",
               R"({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8,
                   "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 16,
                   "max_position_embeddings": 256, "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1,
                   "eos_token_id": 2, "tie_word_embeddings": false})");
  const auto filled = [](std::vector<std::int64_t> shape, float value) {
    const auto size = static_cast<std::size_t>(shape[0] * (shape.size() > 1 ? shape[1] : 1));
    return Tensor{std::move(shape), std::vector<float>(size, value)};
  };
  std::map<std::string, Tensor> tensors;
  const std::string layer = "model.layers.0.";
  for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                           "mlp.up_proj", "mlp.down_proj"})
    tensors.emplace(layer + name + ".weight", filled({8, 8}, 0));
  for (const char* name : {"input_layernorm", "post_attention_layernorm"})
    tensors.emplace(layer + name + ".weight", filled({8}, 1));
  tensors.emplace("model.norm.weight", filled({8}, 1));
  tensors.emplace("model.embed_tokens.weight", filled({16, 8}, 1));
  auto head = filled({16, 8}, 0);
  std::fill_n(head.values.begin() + 5 * 8, 8, 4.0f);
  tensors.emplace("lm_head.weight", std::move(head));
  write_safetensors(folder / "model.safetensors", tensors, {});
}

TEST(CalibrationSet, RefusesAModelThatWritesOneTokenOverAndOver) {
  const testing::TemporaryFolder folder;
  write_stuck_model(folder.path());
  const auto model = Model::load(folder.path());
  EXPECT_THAT(testing::message_of<std::runtime_error>([&] { calibration_set(model, demo_tokenizer(), {}, 2, 64, 1); }),
              HasSubstr("writes token 5 over and over"));
  EXPECT_EQ(testing::message_of<std::runtime_error>([&] { calibration_set(model, demo_tokenizer(), {}, 2, 31, 1); }), "");
}

// The ids of a vocabulary of 16.
class FewTokens : public TextEncoder {
 public:
  std::vector<std::int32_t> encode(std::string_view text) const override {
    auto tokens = demo_tokenizer().encode(text);
    for (auto& token : tokens) token %= 16;
    return tokens;
  }
};

TEST(CalibrationSet, TextsServeAloneWhereTheModelWritesNothingOfUse) {
  const testing::TemporaryFolder folder;
  write_stuck_model(folder.path());
  const auto model = Model::load(folder.path());
  const auto set = calibration_set(model, FewTokens(), {testing::kText}, 6, 64, 1);
  EXPECT_EQ(set.samples.count, 2);
  EXPECT_EQ(set.running_samples, 2);
  EXPECT_TRUE(std::ranges::equal(set.samples.tokens, cut_samples({FewTokens().encode(testing::kText)}, 2, 64).tokens));
}

// A short text gives what it holds; one that holds nothing is refused before own text is written.
TEST(CalibrationSet, ShortTexts) {
  const std::string text = testing::kText;
  const auto tokens = static_cast<int>(demo_tokenizer().encode(text).size());
  const auto set = set_of({text}, 6, tokens);
  EXPECT_EQ(set.samples.count, 6);
  EXPECT_TRUE(std::ranges::equal(set.samples.row(set.running_samples - 1), demo_tokenizer().encode(text)));
  EXPECT_THROW(set_of({text}, 6, tokens + 1), std::invalid_argument);
  EXPECT_THROW(set_of({""}, 6, 64), std::invalid_argument);
}

// Somebody else's tokenizer, of another model.
class Stranger : public TextEncoder {
 public:
  std::vector<std::int32_t> encode(std::string_view text) const override { return std::vector<std::int32_t>(text.size(), 1 << 20); }
};

TEST(CalibrationSamples, TokensMustBeTheModels) {
  EXPECT_THAT([] { calibration_samples(demo_model(), Stranger(), {std::string(500, 'a')}, 1, 16, 0); },
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("token 1048576, and the model has 8192")));
}

// As Gemma's, of which token 5 is the begin of text.
class WithBegin : public TextEncoder {
 public:
  std::vector<std::int32_t> encode(std::string_view text) const override { return demo_tokenizer().encode(text); }
  std::vector<std::int32_t> prefix() const override { return {5}; }
};

TEST(CalibrationSamples, TextsStandBehindABeginOfText) {
  const auto samples = calibration_samples(demo_model(), WithBegin(), {testing::kText}, 3, 64, 0);
  EXPECT_EQ(samples.tokens, cut_samples({demo_tokenizer().encode(testing::kText)}, 3, 64, std::vector{5}).tokens);
  std::string text;
  for (int i = 0; i < 4; ++i) text += testing::kText;
  const auto set = calibration_set(demo_model(), WithBegin(), {text}, 6, 256, 5);
  for (int i = 2; i < 6; ++i) EXPECT_EQ(set.samples.row(i)[0], 5) << i;  // of the text, and with facts
  expect_weights(set);
  const auto tokens = static_cast<int>(demo_tokenizer().encode(text).size());
  EXPECT_EQ(calibration_set(demo_model(), WithBegin(), {text}, 3, tokens + 1, 5).samples.row(1)[0], 5);
  EXPECT_THROW(calibration_set(demo_model(), WithBegin(), {text}, 3, tokens + 2, 5), std::invalid_argument);
}

class StrangeBegin : public WithBegin {
 public:
  std::vector<std::int32_t> prefix() const override { return {8192}; }
};

TEST(CalibrationSamples, TheBeginMustBeTheModelsToo) {
  EXPECT_THAT([] { calibration_samples(demo_model(), StrangeBegin(), {testing::kText}, 1, 16, 0); },
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("token 8192, and the model has 8192")));
}

}  // namespace
}  // namespace veloxquant

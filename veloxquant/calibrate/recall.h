// Whether a model still answers what a document told it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "veloxquant/model/language_model.h"
#include "veloxquant/text/recall.h"

namespace veloxquant {

/// Facts asked for, and those answered exactly.
struct RecallCount {
  std::size_t asked = 0, right = 0;

  RecallCount& operator+=(const RecallCount& other) {
    asked += other.asked;
    right += other.right;
    return *this;
  }

  /// Of the facts asked for; none where there were none.
  std::optional<double> share() const {
    if (asked == 0) return std::nullopt;
    return static_cast<double>(right) / static_cast<double>(asked);
  }
};

/// Reads `tokens` with caches of `factory`; an answer is right if every token of it is the likeliest one after what stands before.
RecallCount recall(const LanguageModel& model, std::span<const std::int32_t> tokens, const AnswerSpans& answers,
                   const CacheFactory& factory);

}  // namespace veloxquant

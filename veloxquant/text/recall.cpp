#include "veloxquant/text/recall.h"

#include <algorithm>
#include <limits>
#include <string>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

// Facts of a document for evaluation.
constexpr int kFewestFacts = 2, kMostFacts = 6;

// Tokens to a fact of a sample for calibration.
constexpr int kClosest = 150, kFarthest = 400;

// One in so many is asked for twice, and one question in so many asks for the whole note.
constexpr int kAskedAgain = 4, kRecited = 4;

// Shares of facts are then known to a tenth of a percent.
constexpr int kMostDocuments = 100'000;

// What a document holds beside its filler.
struct Parts {
  std::vector<std::vector<std::int32_t>> notes;
  std::vector<std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>>> questions;  // and answers

  std::size_t size() const {
    std::size_t sum = 0;
    for (const auto& note : notes) sum += note.size();
    for (const auto& [question, answer] : questions) sum += question.size() + answer.size();
    return sum;
  }

  // The shortest document: every note stands before a token of filler.
  std::size_t least_length() const { return size() + notes.size(); }
};

// A document under way: what stays to be drawn comes from the same numbers.
struct Draft {
  Random random;
  Parts parts;
};

std::vector<std::vector<std::int32_t>> notes_of(const TextEncoder& tokenizer, const FactWording& wording,
                                                const std::vector<Fact>& facts) {
  std::vector<std::vector<std::int32_t>> notes;
  for (const auto& fact : facts) notes.push_back(tokenizer.encode(fill_in(wording.note, fact)));
  return notes;
}

Parts draw_evaluation_parts(const TextEncoder& tokenizer, const FactWording& wording, Random& random) {
  const auto facts = draw_facts(wording, kFewestFacts + random.below(kMostFacts - kFewestFacts + 1), random);
  Parts parts{notes_of(tokenizer, wording, facts), {}};
  for (const std::size_t i : draw_distinct(random, facts.size(), facts.size()))
    parts.questions.emplace_back(tokenizer.encode(fill_in(wording.question, facts[i])),
                                 tokenizer.encode(fill_in(wording.answer, facts[i])));
  return parts;
}

// Never in the order of the notes; some come again at the end.
std::vector<std::size_t> draw_order(std::size_t count, Random& random) {
  auto order = draw_distinct(random, count, count);
  if (std::is_sorted(order.begin(), order.end())) std::rotate(order.begin(), order.begin() + 1, order.end());
  for (std::size_t i = 0; i < count; ++i)
    if (random.below(kAskedAgain) == 0) order.push_back(order[i]);
  return order;
}

Parts draw_calibration_parts(const TextEncoder& tokenizer, const FactWording& wording, std::size_t length, Random& random) {
  const std::size_t spacing = kClosest + random.below(kFarthest - kClosest + 1);
  auto facts = draw_facts(wording, std::max<std::size_t>(2, length / spacing), random);
  for (;; facts.pop_back()) {
    Parts parts{notes_of(tokenizer, wording, facts), {}};
    for (const std::size_t i : draw_order(facts.size(), random)) {
      const bool whole = random.below(kRecited) == 0;
      parts.questions.emplace_back(tokenizer.encode(fill_in(whole ? wording.recital : wording.question, facts[i])),
                                   whole ? parts.notes[i] : tokenizer.encode(fill_in(wording.answer, facts[i])));
    }
    if (parts.least_length() <= length || facts.size() == 1) return parts;
  }
}

// `prefix`, the parts, and `room` tokens of filler.
RecallDocument assemble(std::span<const std::int32_t> prefix, const Parts& parts, std::span<const std::int32_t> filler,
                        std::size_t room, Random& random) {
  const std::size_t start = random.below(filler.size() - room + 1);
  auto places = draw_distinct(random, room, parts.notes.size());
  std::sort(places.begin(), places.end());
  RecallDocument document;
  auto& tokens = document.tokens;
  const auto append = [&](std::span<const std::int32_t> piece) { tokens.insert(tokens.end(), piece.begin(), piece.end()); };
  append(prefix);
  std::size_t done = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    append(filler.subspan(start + done, places[i] - done));
    append(parts.notes[i]);
    done = places[i];
  }
  append(filler.subspan(start + done, room - done));
  for (const auto& [question, answer] : parts.questions) {
    append(question);
    const int begin = static_cast<int>(tokens.size());
    append(answer);
    document.answers.emplace_back(begin, static_cast<int>(tokens.size()));
  }
  return document;
}

void check_count(int count, int length) {
  if (count < 1) throw_invalid("recall", "count: expected at least 1 document, got {}", count);
  if (count > kMostDocuments) throw_invalid("recall", "count: expected at most {} documents, got {}", kMostDocuments, count);
  check_batch_size(count, length);
}

// draw(i, random): the parts of document i.
template <class Draw>
std::vector<Draft> draft(int count, std::uint64_t seed, const ProgressCallback& progress, const Draw& draw) {
  ProgressStage stage(progress, "sowing facts", static_cast<std::size_t>(count));
  std::vector<Draft> drafts;
  for (int i = 0; i < count; ++i) {
    Random random(seed, static_cast<std::uint64_t>(i));
    Parts parts = draw(static_cast<std::size_t>(i), random);
    drafts.push_back({random, std::move(parts)});
    stage.advance();
  }
  return drafts;
}

// Documents of `given` + `more` tokens, where `name` is what the caller calls `given`.
std::vector<RecallDocument> finish(std::vector<Draft> drafts, std::span<const std::int32_t> prefix,
                                   std::span<const std::int32_t> filler, const char* name, int given, int more) {
  std::size_t longest = 0, smallest = std::numeric_limits<std::size_t>::max();
  for (const auto& [random, parts] : drafts) {
    longest = std::max(longest, prefix.size() + parts.least_length());
    smallest = std::min(smallest, prefix.size() + parts.size());
  }
  const std::size_t length = static_cast<std::size_t>(std::max(given, 0)) + static_cast<std::size_t>(more);
  if (length < longest)
    throw_invalid("recall", "{}: expected at least {} tokens to hold the facts of these documents, got {}", name,
                  longest - static_cast<std::size_t>(more), given);
  if (filler.size() < length - smallest)
    throw_invalid("recall", "the text is too short: a document needs {} tokens of it, it has {}", length - smallest, filler.size());
  std::vector<RecallDocument> documents;
  for (auto& [random, parts] : drafts)
    documents.push_back(assemble(prefix, parts, filler, length - prefix.size() - parts.size(), random));
  return documents;
}

}  // namespace

std::vector<RecallDocument> make_recall_documents(const TextEncoder& tokenizer, std::span<const std::int32_t> filler, int count,
                                                  int context, std::uint64_t seed, Wording wording,
                                                  const ProgressCallback& progress) {
  check_count(count, context);
  return finish(
      draft(count, seed, progress,
            [&](std::size_t, Random& random) { return draw_evaluation_parts(tokenizer, evaluation_wording(wording), random); }),
      tokenizer.prefix(), filler, "context", context, 1);
}

FactSamples make_fact_samples(const TextEncoder& tokenizer, std::span<const std::int32_t> filler, int count, int length,
                              std::uint64_t seed, const ProgressCallback& progress) {
  check_count(count, length);
  const auto wordings = calibration_wordings();
  const auto prefix = tokenizer.prefix();
  const std::size_t tokens = static_cast<std::size_t>(std::max(length, 0)), room = tokens - std::min(tokens, prefix.size());
  const auto documents = finish(draft(count, seed, progress,
                                      [&](std::size_t i, Random& random) {
                                        return draw_calibration_parts(tokenizer, wordings[i % wordings.size()], room, random);
                                      }),
                                prefix, filler, "length", length, 0);
  FactSamples made{TokenBatch(count, length), {}};
  for (int i = 0; i < count; ++i) {
    const auto& [document, answers] = documents[static_cast<std::size_t>(i)];
    std::copy(document.begin(), document.end(), made.samples.row(i).begin());
    made.answers.push_back(answers);
  }
  return made;
}

}  // namespace veloxquant

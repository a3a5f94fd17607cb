#include "veloxquant/text/recall.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {
namespace {

constexpr std::array kTitles = {"Mr.", "Mrs.", "Miss", "Captain", "Doctor", "Colonel", "Lady", "Father"};
constexpr std::array kNames = {"Harwood", "Ellison",  "Pemberton", "Ashby",    "Thornton", "Marlowe",   "Whitcombe", "Fairfax",
                               "Langley", "Prescott", "Rowan",     "Sinclair", "Tresham",  "Underhill", "Vance",     "Wexford",
                               "Yardley", "Abbott",   "Bramwell",  "Carlisle", "Dunmore",  "Everett",   "Fenwick",   "Grantham",
                               "Hollis",  "Ingram",   "Jarvis",    "Kendall",  "Lockhart", "Merrick",   "Norwood",   "Oakley"};
constexpr std::array kThings = {"pass-word", "room number", "safe number", "ticket number", "cabin number", "ledger number"};
constexpr int kFewestFacts = 2, kMostFacts = 6, kDigits = 5;

// Shares of facts are then known to a tenth of a percent.
constexpr int kMostDocuments = 100'000;

struct Fact {
  std::string person, thing, value;
};

// The first `count` of 0 … n − 1 in random order.
std::vector<std::size_t> draw_distinct(Random& random, std::size_t n, std::size_t count) {
  std::vector<std::size_t> all(n);
  for (std::size_t i = 0; i < n; ++i) all[i] = i;
  for (std::size_t i = 0; i < count; ++i) std::swap(all[i], all[i + random.below(n - i)]);
  all.resize(count);
  return all;
}

std::vector<Fact> draw_facts(Random& random) {
  std::vector<Fact> facts;
  const std::size_t count = kFewestFacts + random.below(kMostFacts - kFewestFacts + 1);
  for (const std::size_t i : draw_distinct(random, kTitles.size() * kNames.size(), count)) {
    Fact fact{fmt::format("{} {}", kTitles[i / kNames.size()], kNames[i % kNames.size()]), kThings[random.below(kThings.size())],
              ""};
    for (int digit = 0; digit < kDigits; ++digit) fact.value += static_cast<char>('0' + random.below(10));
    facts.push_back(std::move(fact));
  }
  return facts;
}

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
};

Parts draw_parts(const Tokenizer& tokenizer, Random& random) {
  const auto facts = draw_facts(random);
  Parts parts;
  for (const auto& fact : facts)
    parts.notes.push_back(tokenizer.encode(fmt::format(" [Note: the {} of {} is {}.]", fact.thing, fact.person, fact.value)));
  for (const std::size_t i : draw_distinct(random, facts.size(), facts.size()))
    parts.questions.emplace_back(
        tokenizer.encode(fmt::format("\n\nQuestion: What is the {} of {}? Answer:", facts[i].thing, facts[i].person)),
        tokenizer.encode(fmt::format(" {}.", facts[i].value)));
  return parts;
}

RecallDocument assemble(const Parts& parts, std::span<const std::int32_t> filler, std::size_t room, Random& random) {
  const std::size_t start = random.below(filler.size() - room + 1);
  auto places = draw_distinct(random, room, parts.notes.size());
  std::sort(places.begin(), places.end());
  RecallDocument document;
  auto& tokens = document.tokens;
  const auto append = [&](std::span<const std::int32_t> piece) { tokens.insert(tokens.end(), piece.begin(), piece.end()); };
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

}  // namespace

std::vector<RecallDocument> make_recall_documents(const Tokenizer& tokenizer, std::span<const std::int32_t> filler, int count,
                                                  int context, std::uint64_t seed, const ProgressCallback& progress) {
  if (count < 1) throw_invalid("recall", "count: expected at least 1 document, got {}", count);
  if (count > kMostDocuments) throw_invalid("recall", "count: expected at most {} documents, got {}", kMostDocuments, count);
  check_batch_size(count, context);
  ProgressStage stage(progress, "sowing facts", static_cast<std::size_t>(count));
  std::vector<Random> randoms;
  std::vector<Parts> parts;
  std::size_t largest = 0, smallest = std::numeric_limits<std::size_t>::max();
  for (int i = 0; i < count; ++i) {
    randoms.emplace_back(seed, static_cast<std::uint64_t>(i));
    parts.push_back(draw_parts(tokenizer, randoms.back()));
    largest = std::max(largest, parts.back().size() + parts.back().notes.size());  // every note stands before a token of filler
    smallest = std::min(smallest, parts.back().size());
    stage.advance();
  }
  const std::size_t length = static_cast<std::size_t>(std::max(context, 0)) + 1;
  if (length < largest)
    throw_invalid("recall", "context: expected at least {} tokens to hold the facts of these documents, got {}", largest - 1,
                  context);
  if (filler.size() < length - smallest)
    throw_invalid("recall", "the text is too short: a document needs {} tokens of it, it has {}", length - smallest, filler.size());

  std::vector<RecallDocument> documents;
  for (std::size_t i = 0; i < parts.size(); ++i)
    documents.push_back(assemble(parts[i], filler, length - parts[i].size(), randoms[i]));
  return documents;
}

}  // namespace veloxquant

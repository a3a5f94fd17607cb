// How sown facts read: the wordings of notes and questions, and what they speak of.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/core/random.h"

namespace veloxquant {

/// The wordings that recall is measured in.
enum class Wording {
  kFirst,   // " [Note: the room number of Mr. Rowan is 40312.]": what the bundled model was trained to recall (examples/train.py)
  kSecond,  // what neither training nor calibration has seen
};

enum class ValueForm {
  kFiveDigits,
  kDigits,  // two to six
  kWord,
  kCode,  // "K7-42"
};

/// One wording.  Patterns may hold {number} (of the note), {name}, {thing} and {value}.
struct FactWording {
  std::string_view note;                                    // sown in the filler
  std::string_view question, answer;                        // of one value
  std::string_view recital;                                 // asks for a whole note by its number; empty: never asked for
  std::span<const std::string_view> titles, names, things;  // {name} is a title and a name
  std::span<const ValueForm> values;
};

const FactWording& evaluation_wording(Wording wording);

/// Those of calibration alone: they share no note, question, name or thing with the wordings of evaluation.
std::span<const FactWording> calibration_wordings();

struct Fact {
  int number = 0;
  std::string name, thing, value;
};

/// The first `count` of 0 … n − 1 in random order.
std::vector<std::size_t> draw_distinct(Random& random, std::size_t n, std::size_t count);

/// `count` facts about different names, or one about each where there are fewer.
std::vector<Fact> draw_facts(const FactWording& wording, std::size_t count, Random& random);

/// The pattern with the fact filled in.
std::string fill_in(std::string_view pattern, const Fact& fact);

}  // namespace veloxquant

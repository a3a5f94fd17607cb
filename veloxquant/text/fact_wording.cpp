#include "veloxquant/text/fact_wording.h"

#include <fmt/format.h>

#include <algorithm>

namespace veloxquant {
namespace {

using Words = std::string_view[];
using Forms = ValueForm[];

constexpr Forms kFiveDigits = {ValueForm::kFiveDigits};
constexpr Forms kNumbers = {ValueForm::kDigits};
constexpr Forms kNumbersAndCodes = {ValueForm::kDigits, ValueForm::kCode};
constexpr Forms kNumbersAndWords = {ValueForm::kDigits, ValueForm::kWord};
constexpr Forms kAll = {ValueForm::kDigits, ValueForm::kDigits, ValueForm::kWord, ValueForm::kCode};

constexpr Words kValueWords = {"amber",  "birch",  "cobalt",  "dagger",  "ember",  "falcon", "granite", "heather",
                               "indigo", "jasper", "kestrel", "lichen",  "marble", "nettle", "onyx",    "pepper",
                               "quartz", "raven",  "saffron", "thistle", "umber",  "velvet", "walnut",  "yarrow"};

// First wording: those of examples/train.py.
constexpr Words kTitles = {"Mr.", "Mrs.", "Miss", "Captain", "Doctor", "Colonel", "Lady", "Father"};
constexpr Words kSurnames = {"Harwood", "Ellison",  "Pemberton", "Ashby",    "Thornton", "Marlowe",   "Whitcombe", "Fairfax",
                             "Langley", "Prescott", "Rowan",     "Sinclair", "Tresham",  "Underhill", "Vance",     "Wexford",
                             "Yardley", "Abbott",   "Bramwell",  "Carlisle", "Dunmore",  "Everett",   "Fenwick",   "Grantham",
                             "Hollis",  "Ingram",   "Jarvis",    "Kendall",  "Lockhart", "Merrick",   "Norwood",   "Oakley"};
constexpr Words kNumberedThings = {"pass-word", "room number", "safe number", "ticket number", "cabin number", "ledger number"};

// Second wording.
constexpr Words kRanks = {"Sir", "Major", "Madame", "Judge", "Brother", "Aunt", "Nurse", "Dean"};
constexpr Words kGuests = {"Alden",  "Barrow", "Crane",   "Darnley", "Eversham", "Foley",   "Garrick", "Hawley",
                           "Irving", "Keane",  "Lorimer", "Mostyn",  "Nugent",   "Osborne", "Peyton",  "Quincey"};
constexpr Words kRegisterThings = {"account", "fortune", "pension", "house number", "coach number", "reckoning"};

// Calibration.
constexpr Words kRigs = {"brig", "barque", "schooner", "steamer", "cutter", "frigate", "lugger", "trawler"};
constexpr Words kShips = {"Ariadne", "Bellona", "Calypso",   "Dauntless", "Electra", "Fortuna",  "Galatea", "Halcyon",
                          "Ianthe",  "Juno",    "Kittiwake", "Leander",   "Minerva", "Nautilus", "Orion",   "Perseus",
                          "Ranger",  "Sirius",  "Triton",    "Undine",    "Vesta",   "Wanderer", "Xanthe",  "Zephyr"};
constexpr Words kShipThings = {"tonnage", "berth", "cargo", "signal", "flag", "last port", "crew", "insurance"};

constexpr Words kGivenNames = {"Amina", "Bogdan", "Chiara", "Dmitri", "Elif",  "Farid", "Greta", "Hiroshi",
                               "Ines",  "Jonas",  "Katya",  "Lucia",  "Mateo", "Nadia", "Oskar", "Priya"};
constexpr Words kFamilyNames = {"Achterberg", "Bianchi", "Castillo", "Dvorak",   "Eriksen", "Fontaine", "Gupta",  "Hansen",
                                "Ivanova",    "Jansen",  "Kowalski", "Lindgren", "Moreau",  "Nakamura", "Okafor", "Petrov"};
constexpr Words kOfficeThings = {"locker", "extension", "badge", "parking space", "favourite word", "login", "desk", "budget"};

constexpr Words kSquares = {"station", "harbour", "museum", "library", "airport", "market", "theatre", "hospital"};
constexpr Words kTowns = {"of Antwerp", "of Bergen", "of Cordoba", "of Dresden", "of Evora",  "of Florence",
                          "of Gdansk",  "of Haifa",  "of Izmir",   "of Jaipur",  "of Krakow", "of Lisbon",
                          "of Malaga",  "of Nagoya", "of Oslo",    "of Porto",   "of Quito",  "of Riga",
                          "of Seville", "of Tartu",  "of Utrecht", "of Vilnius", "of Wuhan",  "of Zagreb"};
constexpr Words kTownThings = {"postal code", "height", "founding year", "visitors", "gate", "area", "call sign", "line"};

constexpr Words kColours = {"red", "blue", "green", "yellow", "brown", "violet", "grey", "orange"};
constexpr Words kObjects = {"kettle", "bucket", "hammer", "lamp",  "basket", "mirror",   "violin", "clock",
                            "chisel", "carpet", "saddle", "anvil", "teapot", "umbrella", "ladder", "barrel"};
constexpr Words kObjectThings = {"price", "weight", "shelf", "crate", "batch", "maker", "stock", "label"};

constexpr Words kAges = {"old", "young", "tall", "stout", "lame", "merry", "deaf", "silent"};
constexpr Words kTrades = {"baker",   "cooper",   "miller", "weaver", "tanner",   "piper",   "mason",   "tailor",
                           "farrier", "chandler", "potter", "smith",  "thatcher", "cobbler", "glazier", "shepherd"};
constexpr Words kTradeThings = {"house", "debt", "watchword", "rent", "lucky number", "wage", "secret", "mark"};

constexpr Words kMachines = {"pump", "valve", "motor", "boiler", "turbine", "sensor", "relay", "furnace"};
constexpr Words kLetters = {"Alpha", "Bravo", "Charlie", "Delta", "Echo",   "Foxtrot", "Golf",   "Hotel",
                            "Kilo",  "Lima",  "Mike",    "Oscar", "Quebec", "Romeo",   "Sierra", "Tango"};
constexpr Words kMachineThings = {"pressure", "setting", "serial", "speed", "firmware", "load", "channel", "threshold"};

constexpr FactWording kEvaluation[] = {
    {" [Note: the {thing} of {name} is {value}.]", "\n\nQuestion: What is the {thing} of {name}? Answer:", " {value}.", "", kTitles,
     kSurnames, kNumberedThings, kFiveDigits},
    {" [Note: the {thing} of {name} was {value}.]", "\n\nQuestion: Tell me the {thing} of {name}. Answer:", " {value}.", "", kRanks,
     kGuests, kRegisterThings, kFiveDigits},
};

constexpr FactWording kCalibration[] = {
    {"\nNo. {number}. The {thing} of the {name} was put down as {value}.\n",
     "\nOf the {name} the clerk had put down, as her {thing},", " {value}.", "\nRead out no. {number} once more:", kRigs, kShips,
     kShipThings, kAll},
    {" (Memo {number}: {name} has {value} as {thing}.)", "\nWhich {thing} does {name} have? It must be", " {value}.",
     "\nMemo {number} in full:", kGivenNames, kFamilyNames, kOfficeThings, kAll},
    {" <fact id={number}> {name} | {thing} | {value} </fact>", "\nlookup {name} | {thing} |", " {value} </fact>",
     "\nprint fact {number}:", kSquares, kTowns, kTownThings, kNumbersAndCodes},
    {"\n{number}) {name}: {thing} = {value}\n", "\nFrom the list, {thing} for the {name} =", " {value}\n",
     "\nItem {number} of the list was", kColours, kObjects, kObjectThings, kAll},
    {" \"Mind you,\" said the {name} ({number}), \"my {thing} is {value}, and do not forget it.\"",
     "\n\"And what did the {name} say of the {thing}?\" \"That it is", " {value},\"", "\nSpeech {number} went:", kAges, kTrades,
     kTradeThings, kNumbersAndWords},
    {"\n#{number} {name} reports {thing} at {value}\n", "\nstatus of {name}: {thing} at", " {value}\n",
     "\nreplay #{number}:", kMachines, kLetters, kMachineThings, kNumbers},
};

// Numbers of notes begin anywhere up to this one, so that a number is no position.
constexpr int kMostFirstNumber = 60;

std::string draw_digits(std::size_t count, Random& random) {
  std::string digits;
  for (std::size_t i = 0; i < count; ++i) digits += static_cast<char>('0' + random.below(10));
  return digits;
}

std::string draw_value(std::span<const ValueForm> forms, Random& random) {
  switch (forms.size() == 1 ? forms[0] : forms[random.below(forms.size())]) {
    case ValueForm::kFiveDigits:
      return draw_digits(5, random);
    case ValueForm::kDigits:
      return draw_digits(2 + random.below(5), random);
    case ValueForm::kWord:
      return std::string(kValueWords[random.below(std::size(kValueWords))]);
    case ValueForm::kCode: {
      const char letter = static_cast<char>('A' + random.below(26));
      const std::string digits = draw_digits(3, random);
      return fmt::format("{}{}-{}", letter, digits[0], digits.substr(1));
    }
  }
  return {};
}

}  // namespace

const FactWording& evaluation_wording(Wording wording) {
  return kEvaluation[static_cast<std::size_t>(wording)];
}

std::span<const FactWording> calibration_wordings() {
  return kCalibration;
}

std::vector<std::size_t> draw_distinct(Random& random, std::size_t n, std::size_t count) {
  std::vector<std::size_t> all(n);
  for (std::size_t i = 0; i < n; ++i) all[i] = i;
  for (std::size_t i = 0; i < count; ++i) std::swap(all[i], all[i + random.below(n - i)]);
  all.resize(count);
  return all;
}

std::vector<Fact> draw_facts(const FactWording& wording, std::size_t count, Random& random) {
  const std::size_t names = wording.names.size(), all = wording.titles.size() * names;
  std::vector<Fact> facts;
  for (const std::size_t i : draw_distinct(random, all, std::min(count, all))) {
    Fact fact;
    fact.name = fmt::format("{} {}", wording.titles[i / names], wording.names[i % names]);
    fact.thing = wording.things[random.below(wording.things.size())];
    fact.value = draw_value(wording.values, random);
    facts.push_back(std::move(fact));
  }
  if (!wording.recital.empty()) {
    const int first = 1 + static_cast<int>(random.below(kMostFirstNumber));
    for (std::size_t i = 0; i < facts.size(); ++i) facts[i].number = first + static_cast<int>(i);
  }
  return facts;
}

std::string fill_in(std::string_view pattern, const Fact& fact) {
  return fmt::format(fmt::runtime(pattern), fmt::arg("number", fact.number), fmt::arg("name", fact.name),
                     fmt::arg("thing", fact.thing), fmt::arg("value", fact.value));
}

}  // namespace veloxquant

#include "veloxquant/evaluate/saved_logits.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <type_traits>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/matrix.h"

namespace veloxquant {
namespace {

constexpr const char* kFormat = "veloxquant-logits";
constexpr const char* kVersion = "1";

constexpr std::uint64_t kDrawSeed = 0x6c6f67697473;

// Tokens that a probe reads, and how far its logits may lie from those in a file, relative to the largest: devices differ by 10⁻⁵,
// other weights by more than a hundredth.
constexpr int kProbeTokens = 32;
constexpr float kProbeTolerance = 1e-3f;

// A token that cannot come.
constexpr double kLeastLogProbability = -1e4;

// p̃ of tokens that are all but excluded: so that its logarithm is one.
constexpr double kLeastMass = 1e-12;

// e^−d − 1 + d.
double gap(double d) {
  return std::expm1(-d) + d;
}

// Logits of a position, normalised.
class Row {
 public:
  Row(const float* logits, int size) : logits_(logits), size_(size) {
    top_ = static_cast<int>(std::max_element(logits, logits + size) - logits);
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += std::exp(logits[i] - logits[top_]);
    log_sum_ = std::log(sum);
  }

  int size() const { return size_; }
  int top() const { return top_; }
  double log_probability(int token) const { return static_cast<double>(logits_[token]) - logits_[top_] - log_sum_; }
  double probability(int token) const { return std::exp(log_probability(token)); }
  float cross_entropy(std::int32_t target) const { return target < 0 ? 0.0f : static_cast<float>(-log_probability(target)); }

 private:
  const float* logits_;
  int size_, top_;
  double log_sum_;
};

// use(position, row) for all positions of hidden [1, T, hidden_size], from many threads; some tens of MiB of logits at a time.
void for_rows(const LanguageModel& model, const mx::array& hidden,
              const std::function<void(std::size_t position, const Row& row)>& use) {
  const int tokens = hidden.shape(1), width = hidden.shape(2), vocabulary = model.config().vocab_size,
            chunk = std::min(model.logit_rows(), tokens);
  for (int begin = 0; begin < tokens; begin += chunk) {
    const int end = std::min(begin + chunk, tokens);
    const auto logits = on_cpu(model.logits(mx::reshape(mx::slice(hidden, {0, begin, 0}, {1, end, width}), {end - begin, width})));
    const float* values = logits.data<float>();
    parallel_for(static_cast<std::size_t>(end - begin), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t i = first; i < last; ++i)
        use(static_cast<std::size_t>(begin) + i, Row(values + i * static_cast<std::size_t>(vocabulary), vocabulary));
    });
  }
}

// The likeliest tokens, in order.
std::vector<std::int32_t> likeliest(const Row& row, int count) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(row.size()));
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const double pa = row.log_probability(a), pb = row.log_probability(b);
    return pa > pb || (pa == pb && a < b);
  };
  std::partial_sort(order.begin(), order.begin() + count, order.end(), before);
  order.resize(static_cast<std::size_t>(count));
  return order;
}

// Tokens of those that are not `taken`, by p, one of each of `count` strata of equal mass; and what they have together.
std::pair<std::vector<std::int32_t>, double> draw(const Row& row, const std::vector<std::int32_t>& taken, int count,
                                                  Random& random) {
  std::vector<double> mass(static_cast<std::size_t>(row.size()));
  for (int i = 0; i < row.size(); ++i) mass[static_cast<std::size_t>(i)] = row.probability(i);
  for (const auto token : taken) mass[static_cast<std::size_t>(token)] = -1;
  double rest = 0;
  for (const double some : mass) rest += std::max(some, 0.0);
  std::vector<std::int32_t> drawn;
  double passed = 0;
  std::int32_t last = 0;
  const auto target = [&] { return rest * (static_cast<double>(drawn.size()) + random.uniform()) / count; };
  double next = target();
  for (int i = 0; i < row.size() && static_cast<int>(drawn.size()) < count; ++i) {
    if (mass[static_cast<std::size_t>(i)] < 0) continue;
    last = i;
    passed += mass[static_cast<std::size_t>(i)];
    for (; passed > next && static_cast<int>(drawn.size()) < count; next = target()) drawn.push_back(i);
  }
  drawn.resize(static_cast<std::size_t>(count), last);  // rounding
  return {drawn, rest};
}

std::string name_of(const ModelIdentity& model) {
  return fmt::format("{} of {} layers, {} KV heads of {}, hidden_size {}, vocab_size {}, config {}, weights {}", model.architecture,
                     model.num_layers, model.num_kv_heads, model.head_dim, model.hidden_size, model.vocab_size,
                     model.config_hash.substr(0, 16), model.weights_hash.substr(0, 16));
}

std::string_view bytes_of(const auto& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0])};
}

std::vector<float> probe(const LanguageModel& model, const TokenBatch& windows) {
  const Float32Scope scope;
  const int count = std::min(windows.length, kProbeTokens);
  const auto tokens = mx::slice(token_array(windows, 0, 1), {0, 0}, {1, count});
  const auto hidden = model.forward(tokens, model.make_caches(FullCache::factory()));
  const auto logits = on_cpu(model.logits(mx::slice(hidden, {0, count - 1, 0}, hidden.shape())));
  return {logits.data<float>(), logits.data<float>() + logits.size()};
}

std::size_t first_position(const SavedLogits& logits, int window, int score_from) {
  return static_cast<std::size_t>(window) * static_cast<std::size_t>(logits.positions()) +
         static_cast<std::size_t>(score_from - logits.score_from);
}

}  // namespace

SavedLogits start_logits(const LanguageModel& model, const TokenBatch& windows, int score_from) {
  return {.model = name_of(model.identity()),
          .text = sha256(bytes_of(windows.tokens)),
          .windows = windows.count,
          .length = windows.length,
          .score_from = score_from,
          .probe = probe(model, windows),
          .top = std::min(kSavedTop, model.config().vocab_size - 1),
          .drawn = kSavedDrawn};
}

void add_window(const LanguageModel& model, const mx::array& hidden, std::span<const std::int32_t> targets, SavedLogits& logits) {
  const std::size_t begin = logits.log_rest.size(), end = begin + targets.size(), each = logits.each();
  logits.tokens.resize(end * each);
  logits.log_probabilities.resize(end * each);
  logits.log_rest.resize(end);
  logits.cross_entropy.resize(end);
  for_rows(model, hidden, [&](std::size_t t, const Row& row) {
    Random random(kDrawSeed, begin + t);
    auto tokens = likeliest(row, logits.top);
    const auto [drawn, rest] = draw(row, tokens, logits.drawn, random);
    tokens.insert(tokens.end(), drawn.begin(), drawn.end());
    std::copy(tokens.begin(), tokens.end(), logits.tokens.begin() + static_cast<std::ptrdiff_t>((begin + t) * each));
    for (std::size_t i = 0; i < each; ++i)
      logits.log_probabilities[(begin + t) * each + i] =
          static_cast<float>(std::max(row.log_probability(tokens[i]), kLeastLogProbability));
    logits.log_rest[begin + t] = static_cast<float>(std::max(std::log(rest), kLeastLogProbability));
    logits.cross_entropy[begin + t] = row.cross_entropy(targets[t]);
  });
}

void check_logits(const SavedLogits& logits, const LanguageModel& model, const TokenBatch& windows, int score_from) {
  const auto compare = [&](const char* what, const auto& saved, const auto& asked) {
    if (saved != asked) throw_failure("logits", "{}: {}: expected {}, got {}", logits.source, what, asked, saved);
  };
  compare("model", logits.model, name_of(model.identity()));
  compare("length", logits.length, windows.length);
  compare("windows", logits.windows, windows.count);
  compare("SHA-256 of the windows' tokens", logits.text, sha256(bytes_of(windows.tokens)));
  if (logits.score_from > score_from)
    throw_failure("logits", "{}: score_from: expected at most {}, got {}", logits.source, score_from, logits.score_from);
  const auto now = probe(model, windows);
  compare("vocab_size", logits.probe.size(), now.size());
  float largest = 0, difference = 0;
  for (std::size_t i = 0; i < now.size(); ++i) {
    largest = std::max(largest, std::abs(now[i]));
    difference = std::max(difference, std::abs(now[i] - logits.probe[i]));
  }
  if (!(difference <= kProbeTolerance * largest))
    throw_failure("logits", "{}: model: expected logits of its weights, got some that differ by {:.3g} at the first tokens",
                  logits.source, difference);
}

std::vector<PositionScore> reference_scores(const SavedLogits& logits, int window, int score_from) {
  std::vector<PositionScore> scores;
  const std::size_t first = first_position(logits, window, score_from), each = logits.each();
  for (std::size_t t = first; t < first + static_cast<std::size_t>(logits.length - score_from); ++t)
    scores.push_back({0, logits.cross_entropy[t], logits.tokens[t * each]});
  return scores;
}

SavedScores score_saved(const LanguageModel& model, const SavedLogits& logits, int window, int score_from, const mx::array& hidden,
                        std::span<const std::int32_t> targets) {
  const std::size_t first = first_position(logits, window, score_from), top = static_cast<std::size_t>(logits.top),
                    drawn = static_cast<std::size_t>(logits.drawn);
  SavedScores result{std::vector<PositionScore>(targets.size())};
  std::vector<double> variances(targets.size());
  for_rows(model, hidden, [&](std::size_t t, const Row& row) {
    const std::int32_t* tokens = logits.tokens.data() + (first + t) * (top + drawn);
    const float* log_p = logits.log_probabilities.data() + (first + t) * (top + drawn);
    const auto d = [&](std::size_t i) { return log_p[i] - row.log_probability(tokens[i]); };
    double kl = 0, mass = 0;
    for (std::size_t i = 0; i < top; ++i) {
      kl += std::exp(static_cast<double>(log_p[i])) * gap(d(i));
      mass += row.probability(tokens[i]);
    }
    const double rest = std::exp(static_cast<double>(logits.log_rest[first + t])),
                 d_rest = logits.log_rest[first + t] - std::log(std::max(1 - mass, kLeastMass));
    kl += rest * gap(d_rest);
    double sum = 0, squares = 0;
    for (std::size_t i = top; i < top + drawn; ++i) {
      const double within = gap(d(i) - d_rest);
      sum += within;
      squares += within * within;
    }
    const auto count = static_cast<double>(drawn);
    kl += rest * sum / count;
    variances[t] = rest * rest * std::max(squares - sum * sum / count, 0.0) / (count * (count - 1));
    result.scores[t] = {static_cast<float>(kl), row.cross_entropy(targets[t]), row.top()};
  });
  result.kl_variance = std::accumulate(variances.begin(), variances.end(), 0.0);
  return result;
}

namespace {

using Metadata = std::map<std::string, std::string>;

template <class T>
SafetensorsEntry entry_of(const std::vector<T>& values, std::vector<std::int64_t> shape) {
  return {std::is_same_v<T, float> ? "F32" : "I32", std::move(shape), std::as_bytes(std::span(values))};
}

std::string checksum(const Metadata& metadata, const std::map<std::string, SafetensorsEntry>& entries) {
  Sha256 hash;
  for (const auto& [name, value] : metadata)
    if (name != "checksum") hash.add(fmt::format("{}={}\n", name, value));
  for (const auto& [name, entry] : entries) {
    hash.add(name);
    hash.add({reinterpret_cast<const char*>(entry.data.data()), entry.data.size()});
  }
  return hash.hex();
}

// Reads one file, and names it in what it throws.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : path_(path.string()), file_(path) {
    expect("format", kFormat);
    expect("version", kVersion);
    if (text("checksum") != checksum(file_.metadata(), file_.tensors()))
      throw_failure("logits", "{}: the checksum does not match: the file is damaged", path_);
  }

  const std::string& text(const std::string& name) const {
    const auto found = file_.metadata().find(name);
    if (found == file_.metadata().end()) throw_failure("logits", "{}: no {} in the metadata: not a file of logits", path_, name);
    return found->second;
  }

  int number(const std::string& name, int least, int most = std::numeric_limits<int>::max()) const {
    const std::string& value = text(name);
    int number = 0;
    const auto [stop, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || stop != value.data() + value.size() || number < least || number > most)
      throw_failure("logits", "{}: {}: expected a whole number from {} to {}, got {}", path_, name, least, most, excerpt(value));
    return number;
  }

  template <class T>
  std::vector<T> values(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const auto found = file_.tensors().find(name);
    if (found == file_.tensors().end()) throw_failure("logits", "{}: no tensor {}", path_, name);
    const auto& [dtype, held, data] = found->second;
    const char* wanted = std::is_same_v<T, float> ? "F32" : "I32";
    if (dtype != wanted || held != shape)
      throw_failure("logits", "{}: {}: expected {} [{}], got {} [{}]", path_, name, wanted, fmt::join(shape, ", "), dtype,
                    fmt::join(held, ", "));
    std::vector<T> result(data.size() / sizeof(T));
    std::memcpy(result.data(), data.data(), data.size());
    return result;
  }

  // Of a tensor that says it.
  std::int64_t size(const std::string& name) const {
    const auto found = file_.tensors().find(name);
    if (found == file_.tensors().end() || found->second.shape.size() != 1)
      throw_failure("logits", "{}: {}: expected a tensor of one dimension", path_, name);
    return found->second.shape[0];
  }

  void check_tokens(const std::vector<std::int32_t>& tokens, std::int64_t vocabulary) const {
    for (const auto token : tokens)
      if (token < 0 || token >= vocabulary)
        throw_failure("logits", "{}: tokens: expected 0 to {}, got {}", path_, vocabulary - 1, token);
  }

  void check_finite(const char* name, const std::vector<float>& values) const {
    for (const float value : values)
      if (!std::isfinite(value)) throw_failure("logits", "{}: {}: expected finite values, got {}", path_, name, value);
  }

 private:
  void expect(const std::string& name, const std::string& expected) const {
    if (const auto& got = text(name); got != expected)
      throw_failure("logits", "{}: {}: expected {}, got {}", path_, name, expected, excerpt(got));
  }

  std::string path_;
  SafetensorsFile file_;
};

}  // namespace

void write_logits(const SavedLogits& logits, const std::filesystem::path& path) {
  const auto positions = static_cast<std::int64_t>(logits.log_rest.size());
  const std::int64_t each = logits.top + logits.drawn;
  const std::map<std::string, SafetensorsEntry> entries = {
      {"probe", entry_of(logits.probe, {static_cast<std::int64_t>(logits.probe.size())})},
      {"tokens", entry_of(logits.tokens, {positions, each})},
      {"log_probabilities", entry_of(logits.log_probabilities, {positions, each})},
      {"log_rest", entry_of(logits.log_rest, {positions})},
      {"cross_entropy", entry_of(logits.cross_entropy, {positions})}};
  Metadata metadata = {{"format", kFormat},
                       {"version", kVersion},
                       {"model", logits.model},
                       {"text", logits.text},
                       {"windows", std::to_string(logits.windows)},
                       {"length", std::to_string(logits.length)},
                       {"score_from", std::to_string(logits.score_from)},
                       {"top", std::to_string(logits.top)},
                       {"drawn", std::to_string(logits.drawn)}};
  metadata["checksum"] = checksum(metadata, entries);
  write_entries(path, entries, metadata);
}

SavedLogits read_logits(const std::filesystem::path& path) {
  const Reader file(path);
  SavedLogits logits;
  logits.source = path.string();
  logits.model = file.text("model");
  logits.text = file.text("text");
  logits.windows = file.number("windows", 1);
  logits.length = file.number("length", 2);
  logits.score_from = file.number("score_from", 0, logits.length - 2);
  const std::int64_t vocabulary = file.size("probe"), positions = std::int64_t{logits.windows} * logits.positions();
  logits.top = file.number("top", 1, static_cast<int>(std::min<std::int64_t>(vocabulary, 1 << 24)));
  logits.drawn = file.number("drawn", 2, 1 << 20);
  const std::int64_t each = std::int64_t{logits.top} + logits.drawn;
  logits.probe = file.values<float>("probe", {vocabulary});
  logits.tokens = file.values<std::int32_t>("tokens", {positions, each});
  logits.log_probabilities = file.values<float>("log_probabilities", {positions, each});
  logits.log_rest = file.values<float>("log_rest", {positions});
  logits.cross_entropy = file.values<float>("cross_entropy", {positions});
  file.check_tokens(logits.tokens, vocabulary);
  file.check_finite("probe", logits.probe);
  for (const auto& [name, values] : {std::pair("log_probabilities", &logits.log_probabilities),
                                     std::pair("log_rest", &logits.log_rest), std::pair("cross_entropy", &logits.cross_entropy)})
    file.check_finite(name, *values);
  return logits;
}

}  // namespace veloxquant

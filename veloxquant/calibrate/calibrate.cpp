#include "veloxquant/calibrate/calibrate.h"

#include <algorithm>

#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"

namespace veloxquant {
namespace {

// Samples of rotated_pq and of the other methods where the caller says nothing.
constexpr int kSetSamples = 40, kLongestSample = 2048;
constexpr int kSamples = 32, kSampleLength = 512;

bool is_rotated(const CalibrateOptions& options) {
  return options.method == "rotated_pq";
}

Units units_of(const CalibrateOptions& options) {
  if (options.units) return *options.units;
  if (is_rotated(options)) return Units::kHead;
  return quantizer_method(options.method).learns() ? Units::kUniform : Units::kLayer;
}

int or_default(int given, int otherwise) {
  return given > 0 ? given : otherwise;
}

void refuse_options_of_rotated_pq(const CalibrateOptions& options) {
  const auto refuse = [&](bool given, const char* option) {
    if (given) throw_invalid("calibrate", "{}: only for the method rotated_pq, got {}", option, options.method);
  };
  refuse(options.keys.has_value(), "keys");
  refuse(options.bytes.has_value(), "bytes");
  refuse(options.window.value_or(0) != 0, "window");
  refuse(options.sinks.value_or(0) != 0, "sinks");
}

// The documented ways: RateQuant for scalar quantizers, VecInfer.
Plan documented_plan(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts,
                     const CalibrateOptions& options, const ProgressCallback& progress) {
  refuse_options_of_rotated_pq(options);
  const PlanOptions wanted{.method = options.method,
                           .bits = options.bits,
                           .units = units_of(options),
                           .seed = options.seed,
                           .context = options.context,
                           .quantize_sliding = options.quantize_sliding};
  const int count = or_default(options.num_samples, kSamples), length = or_default(options.length, kSampleLength);
  check_plan_options(model.config(), wanted, count, length);
  const TokenBatch samples = reads_samples(wanted)
                                 ? calibration_samples(model, tokenizer, texts, count, length, options.seed, progress)
                                 : TokenBatch(0, 0);
  return make_plan(model, samples, wanted, progress);
}

AdjointPlan rotated_plan(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts,
                         const CalibrateOptions& options, const ProgressCallback& progress) {
  const AdjointPlanOptions wanted{.bits = options.bits,
                                  .bytes = options.bytes,
                                  .context = options.context,
                                  .units = units_of(options),
                                  .keys = options.keys.value_or(Rotation::kFull),
                                  .window = options.window.value_or(kDefaultWindow),
                                  .sinks = options.sinks.value_or(kDefaultSinks),
                                  .seed = options.seed,
                                  .quantize_sliding = options.quantize_sliding};
  const int count = or_default(options.num_samples, kSetSamples),
            length = or_default(options.length, std::min(model.config().max_position_embeddings, kLongestSample));
  check_adjoint_plan_options(model.config(), wanted, length);
  check_batch_size(count, length);
  const auto set = calibration_set(model, tokenizer, texts, count, length, options.seed, progress);
  return make_adjoint_plan(model, set, wanted, progress);
}

}  // namespace

AdjointPlan calibrate(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<NamedText>& texts,
                      const CalibrateOptions& options, const ProgressCallback& progress) {
  std::vector<std::string> contents;
  for (const auto& text : texts) contents.push_back(text.text);
  AdjointPlan made;
  if (is_rotated(options)) {
    made = rotated_plan(model, tokenizer, contents, options, progress);
  } else {
    made.plan = documented_plan(model, tokenizer, contents, options, progress);
  }
  if (made.plan.provenance.num_samples > 0)
    for (const auto& [name, text] : texts) made.plan.provenance.texts.push_back({name, sha256(text)});
  return made;
}

}  // namespace veloxquant

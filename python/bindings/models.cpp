#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "mlx/ops.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/generate/own_text.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/device.h"
#include "veloxquant/model/families/families.h"
#include "veloxquant/model/model.h"
#include "veloxquant/model/weights.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant::python {
namespace {

// A tokenizer of somebody else's: a Python callable, text → tokens.
class CallableEncoder : public TextEncoder {
 public:
  CallableEncoder(nb::object encode, std::vector<std::int32_t> prefix) : encode_(std::move(encode)), prefix_(std::move(prefix)) {}
  ~CallableEncoder() override {
    const nb::gil_scoped_acquire interpreter;
    encode_.reset();
  }

  std::vector<std::int32_t> encode(std::string_view text) const override {
    const nb::gil_scoped_acquire interpreter;
    return nb::cast<std::vector<std::int32_t>>(encode_(nb::str(text.data(), text.size())));
  }

  std::vector<std::int32_t> prefix() const override { return prefix_; }

 private:
  nb::object encode_;
  std::vector<std::int32_t> prefix_;
};

nb::dict to_dict(const ModelIdentity& identity) {
  nb::dict dict;
  dict["architecture"] = identity.architecture;
  dict["num_layers"] = identity.num_layers;
  dict["num_kv_heads"] = identity.num_kv_heads;
  dict["head_dim"] = identity.head_dim;
  dict["hidden_size"] = identity.hidden_size;
  dict["vocab_size"] = identity.vocab_size;
  dict["config_hash"] = identity.config_hash;
  dict["weights_hash"] = identity.weights_hash;
  return dict;
}

// Of one batch of tokens, read at full precision.
mx::array logits(const LanguageModel& model, const mx::array& tokens, const std::string& device) {
  const DeviceScope scope(resolve_device(device));
  auto result = model.logits(model.forward(tokens, model.make_caches(FullCache::factory())));
  result.eval();
  return result;
}

nb::ndarray<nb::numpy, std::int32_t> tokens_of(TokenBatch batch) {
  return numpy_of(std::move(batch.tokens), {batch.count, batch.length});
}

}  // namespace

void bind_models(nb::module_& module) {
  nb::class_<LanguageModel>(module, "LanguageModel", "What calibration sees of a model.")
      .def_prop_ro("num_layers", [](const LanguageModel& model) { return model.config().num_layers; })
      .def_prop_ro("num_kv_heads", [](const LanguageModel& model) { return model.config().num_kv_heads; })
      .def_prop_ro("head_dim", [](const LanguageModel& model) { return model.config().head_dim; })
      .def_prop_ro("vocab_size", [](const LanguageModel& model) { return model.config().vocab_size; })
      .def_prop_ro("max_position_embeddings", [](const LanguageModel& model) { return model.config().max_position_embeddings; })
      .def_prop_ro(
          "identity", [](const LanguageModel& model) { return to_dict(model.identity()); }, "Which model plans are for.")
      .def("logits", &logits, nb::arg("tokens"), nb::arg("device"), WithoutInterpreter(),
           "tokens [B, T] int32 → [B, T, vocab_size].");
  nb::class_<Model, LanguageModel>(module, "Model", "A model of a family that the C++ engine runs.")
      .def_static("load", &Model::load, nb::arg("folder"), WithoutInterpreter(),
                  "Read config.json and the safetensors of a folder.")
      .def_static(
          "from_arrays",
          [](const std::string& config, const std::map<std::string, mx::array>& arrays, const std::string& source,
             const std::string& device) {
            const nb::gil_scoped_release release;
            const DeviceScope scope(resolve_device_or_cpu(device));
            return Model::from_arrays(config, arrays, source);
          },
          nb::arg("config"), nb::arg("arrays"), nb::arg("source"), nb::arg("device"),
          "config: text of a config.json; arrays: the tensors by mlx_lm's names, shared where they can be; source: for messages.");

  module.def(
      "weights_hash", [](const std::filesystem::path& folder) { return Weights(folder).headers_hash(); }, nb::arg("folder"),
      WithoutInterpreter(), "What a model of this folder has for weights_hash in its identity.");
  module.def(
      "families",
      [] {
        std::vector<std::string> names;
        for (const auto& family : families()) names.emplace_back(family.model_type);
        return names;
      },
      "model_type of the families that the engine runs.");
  module.def(
      "resolve_device", [](const std::string& name) { return std::string(device_name(resolve_device_or_cpu(name))); },
      nb::arg("name"), "\"cpu\" or \"gpu\"; warns once where there is no GPU.");

  nb::class_<TextEncoder>(module, "TextEncoder", "What turns text into tokens.")
      .def("encode", nb::overload_cast<std::string_view>(&TextEncoder::encode, nb::const_), nb::arg("text"),
           "Text → list of tokens.")
      .def_prop_ro("prefix", &TextEncoder::prefix, "Tokens that it puts before a text where special tokens are asked for.");
  nb::class_<Tokenizer, TextEncoder>(module, "Tokenizer",
                                     "A tokenizer.json with a BPE model, read as Hugging Face's tokenizers do.")
      .def_static("load", &Tokenizer::load, nb::arg("folder"), WithoutInterpreter(), "Read folder/tokenizer.json.")
      .def_static("parse", &Tokenizer::parse, nb::arg("json"), nb::arg("source"), WithoutInterpreter(), "The text of such a file.")
      .def("encode", nb::overload_cast<std::string_view, bool>(&Tokenizer::encode, nb::const_), nb::arg("text"),
           nb::arg("add_special_tokens") = false, "Text → list of tokens.")
      .def(
          "decode", [](const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens) { return tokenizer.decode(tokens); },
          nb::arg("tokens"), "List of tokens → text, special tokens left out.")
      .def_prop_ro("vocabulary_size", &Tokenizer::vocabulary_size);
  nb::class_<CallableEncoder, TextEncoder>(module, "CallableEncoder", "A callable that takes text and gives a list of tokens.")
      .def(nb::init<nb::object, std::vector<std::int32_t>>(), nb::arg("encode"), nb::arg("prefix"),
           "prefix: tokens that stand before a text.");

  module.def(
      "generate_own_text",
      [](const LanguageModel& model, int num_samples, int length, std::uint64_t seed, const std::string& device,
         nb::object progress) {
        PythonProgress report(std::move(progress));
        return tokens_of(without_interpreter([&] {
          const DeviceScope scope(resolve_device_or_cpu(device));
          return generate_own_text(model, num_samples, length, seed, callback_of(report));
        }));
      },
      nb::arg("model"), nb::arg("num_samples"), nb::arg("length"), nb::arg("seed"), nb::arg("device"), nb::arg("progress").none(),
      "What the model writes itself → [num_samples, length] int32.");
  module.def(
      "cut_samples",
      [](const std::vector<std::vector<std::int32_t>>& texts, int num_samples, int length,
         const std::vector<std::int32_t>& prefix) { return tokens_of(cut_samples(texts, num_samples, length, prefix)); },
      nb::arg("texts"), nb::arg("num_samples"), nb::arg("length"), nb::arg("prefix") = std::vector<std::int32_t>{},
      "Texts as tokens → samples [num_samples, length] int32 at even distances over all of them, each behind the prefix.");
}

}  // namespace veloxquant::python

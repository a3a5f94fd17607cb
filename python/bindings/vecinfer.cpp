#include "veloxquant/allocators/vecinfer.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "veloxquant/model/device.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant::python {
namespace {

using namespace allocators;

auto factors(const LanguageModel& model, const TextEncoder& tokenizer, int num_samples, int sequence_length,
             const NamedTexts& texts, std::uint64_t seed, const std::string& device, nb::object progress) {
  PythonProgress report(std::move(progress));
  return numpy_of(without_interpreter([&] {
    const DeviceScope scope(resolve_device_or_cpu(device));
    return vecinfer::calibrate_smooth_factors(model, tokenizer, num_samples, sequence_length,
                                              {contents(texts), seed, callback_of(report)});
  }));
}

auto codebook(const LanguageModel& model, const TextEncoder& tokenizer, const FloatArray& factors, int num_samples,
              int num_centroids, int num_subspaces, int sequence_length, int max_iter, const NamedTexts& texts, std::uint64_t seed,
              const std::string& device, nb::object progress) {
  PythonProgress report(std::move(progress));
  return numpy_of(without_interpreter([&] {
    const DeviceScope scope(resolve_device_or_cpu(device));
    return vecinfer::train_codebook(model, tokenizer, tensor_of(factors), num_samples, num_centroids, num_subspaces,
                                    sequence_length, max_iter, {contents(texts), seed, callback_of(report)});
  }));
}

auto layer_factors(const FloatArray& keys, int head_dim) {
  return numpy_of(smooth_factors(span_of(keys), head_dim), {head_dim});
}

auto layer_codebook(const FloatArray& keys, const FloatArray& factors, const vecinfer::CodebookOptions& options, int layer) {
  return numpy_of(
      without_interpreter([&] { return vecinfer::train_layer_codebook(span_of(keys), span_of(factors), options, layer); }));
}

nb::object codes(const FloatArray& vectors, const FloatArray& codebook) {
  auto result = without_interpreter([&] { return vecinfer::quantize_vq(tensor_of(vectors), tensor_of(codebook)); });
  if (result.words.empty()) return nb::cast(numpy_of(std::move(result.bytes), result.shape));
  return nb::cast(numpy_of(std::move(result.words), result.shape));
}

auto vectors(const nb::ndarray<const std::uint16_t, nb::c_contig, nb::device::cpu>& codes, const FloatArray& codebook) {
  vecinfer::Codes given;
  given.words.assign(codes.data(), codes.data() + codes.size());
  for (std::size_t i = 0; i < codes.ndim(); ++i) given.shape.push_back(static_cast<std::int64_t>(codes.shape(i)));
  return numpy_of(without_interpreter([&] { return vecinfer::dequantize_vq(given, tensor_of(codebook)); }));
}

}  // namespace

void bind_vecinfer(nb::module_& module) {
  module.def("calibrate_smooth_factors", &factors, nb::arg("model"), nb::arg("tokenizer"), nb::arg("num_samples"),
             nb::arg("sequence_length"), nb::arg("texts"), nb::arg("seed"), nb::arg("device"), nb::arg("progress").none(),
             "→ [num_layers, head_dim].");
  module.def("train_codebook", &codebook, nb::arg("model"), nb::arg("tokenizer"), nb::arg("smooth_factors"), nb::arg("num_samples"),
             nb::arg("num_centroids"), nb::arg("num_subspaces"), nb::arg("sequence_length"), nb::arg("max_iter"), nb::arg("texts"),
             nb::arg("seed"), nb::arg("device"), nb::arg("progress").none(),
             "→ [num_layers, num_subspaces, num_centroids, head_dim / num_subspaces].");
  module.def("layer_smooth_factors", &layer_factors, nb::arg("keys"), nb::arg("head_dim"), "keys [.., head_dim] → [head_dim].");
  module.def(
      "check_codebook_options",
      [](int num_layers, int head_dim, const FloatArray& factors, int num_centroids, int num_subspaces, int max_iter) {
        vecinfer::check_codebook_options({num_centroids, num_subspaces, max_iter}, num_layers, head_dim, tensor_of(factors));
      },
      nb::arg("num_layers"), nb::arg("head_dim"), nb::arg("smooth_factors"), nb::arg("num_centroids"), nb::arg("num_subspaces"),
      nb::arg("max_iter"), "ValueError unless train_codebook takes these.");
  module.def(
      "train_layer_codebook",
      [](const FloatArray& keys, const FloatArray& factors, int num_centroids, int num_subspaces, int max_iter, std::uint64_t seed,
         int layer) {
        return layer_codebook(keys, factors, {num_centroids, num_subspaces, max_iter, seed}, layer);
      },
      nb::arg("keys"), nb::arg("smooth_factors"), nb::arg("num_centroids"), nb::arg("num_subspaces"), nb::arg("max_iter"),
      nb::arg("seed"), nb::arg("layer"), "keys [.., head_dim] of one layer → [num_subspaces, num_centroids, subspace_dim].");
  module.def(
      "walsh_hadamard_matrix", [](int d) { return numpy_of(vecinfer::walsh_hadamard_matrix(d)); }, nb::arg("d"), "→ [d, d].");
  module.def(
      "apply_dual_transform_keys",
      [](const FloatArray& keys, const FloatArray& factors) {
        return numpy_of(
            without_interpreter([&] { return vecinfer::apply_dual_transform_keys(tensor_of(keys), tensor_of(factors)); }));
      },
      nb::arg("keys"), nb::arg("smooth_factors"), "[.., head_dim] → the same shape.");
  module.def(
      "apply_dual_transform_queries",
      [](const FloatArray& queries, const FloatArray& factors) {
        return numpy_of(
            without_interpreter([&] { return vecinfer::apply_dual_transform_queries(tensor_of(queries), tensor_of(factors)); }));
      },
      nb::arg("queries"), nb::arg("smooth_factors"), "[.., head_dim] → the same shape.");
  module.def("quantize_vq", &codes, nb::arg("vectors"), nb::arg("codebook"), "[.., head_dim] → codes [.., num_subspaces].");
  module.def("dequantize_vq", &vectors, nb::arg("codes"), nb::arg("codebook"), "uint16 [.., num_subspaces] → [.., head_dim].");
  module.def(
      "compute_query_lut",
      [](const FloatArray& queries, const FloatArray& codebook) {
        return numpy_of(without_interpreter([&] { return vecinfer::compute_query_lut(tensor_of(queries), tensor_of(codebook)); }));
      },
      nb::arg("queries"), nb::arg("codebook"), "[.., head_dim] → [.., num_subspaces, num_centroids].");
}

}  // namespace veloxquant::python

// Parts of the module veloxquant_mlx._core, and what they share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "veloxquant/calibrate/calibrate.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/core/tensor.h"

namespace nb = nanobind;

namespace veloxquant::python {

void bind_models(nb::module_& module);
void bind_live_model(nb::module_& module);
void bind_ratequant(nb::module_& module);
void bind_vecinfer(nb::module_& module);
void bind_plans(nb::module_& module);

/// Has libmlx.so call the cblas_sgemm of this module; false where there is nothing to redirect.  Python loads modules with their
/// symbols bound at once (RTLD_NOW), so that standing among the global symbols helps only before mlx.core is imported; its table of
/// calls can be written at any time.
bool take_mlx_products();

/// What functions run in that work for long: no other thread waits for the interpreter.
using WithoutInterpreter = nb::call_guard<nb::gil_scoped_release>;

/// What `work` gives, while no other thread waits for the interpreter.
template <class Work>
auto without_interpreter(Work work) {
  const nb::gil_scoped_release release;
  return work();
}

/// float32 numpy array, row-major.
using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

inline std::span<const float> span_of(const FloatArray& array) {
  return {array.data(), array.size()};
}

inline Tensor tensor_of(const FloatArray& array) {
  Tensor tensor{{}, {array.data(), array.data() + array.size()}};
  for (std::size_t i = 0; i < array.ndim(); ++i) tensor.shape.push_back(static_cast<std::int64_t>(array.shape(i)));
  return tensor;
}

/// A numpy array that owns `values`, in this shape.
template <class T>
nb::ndarray<nb::numpy, T> numpy_of(std::vector<T> values, const std::vector<std::int64_t>& shape) {
  auto* owned = new std::vector<T>(std::move(values));
  const nb::capsule owner(owned, [](void* data) noexcept { delete static_cast<std::vector<T>*>(data); });
  return nb::ndarray<nb::numpy, T>(owned->data(), shape.size(), reinterpret_cast<const std::size_t*>(shape.data()), owner);
}

inline nb::ndarray<nb::numpy, float> numpy_of(Tensor tensor) {
  return numpy_of(std::move(tensor.values), tensor.shape);
}

/// Reports to a Python callable (stage, done, total), or to nobody, some times a second; an interrupt (Ctrl-C) or an exception of
/// the callable stops the work.
class PythonProgress {
 public:
  explicit PythonProgress(nb::object callable) : callable_(std::move(callable)) {}

  void operator()(std::string_view stage, std::size_t done, std::size_t total);

 private:
  nb::object callable_;
  std::string stage_;
  std::chrono::steady_clock::time_point last_{};
};

/// Which keeps a reference: `progress` outlives the call-back.
inline ProgressCallback callback_of(PythonProgress& progress) {
  return std::ref(progress);
}

/// Names of texts, and the texts.
using NamedTexts = std::vector<std::pair<std::string, std::string>>;

inline std::vector<std::string> contents(const NamedTexts& texts) {
  std::vector<std::string> result;
  for (const auto& [name, text] : texts) result.push_back(text);
  return result;
}

}  // namespace veloxquant::python

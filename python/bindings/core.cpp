#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "bindings.h"
#include "mlx/ops.h"
#include "veloxquant/core/warning.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/openblas.h"
#include "veloxquant/model/memory.h"

namespace veloxquant::python {

void PythonProgress::operator()(std::string_view stage, std::size_t done, std::size_t total) {
  constexpr auto kInterval = std::chrono::milliseconds(100);
  const auto now = std::chrono::steady_clock::now();
  if (stage == stage_ && done < total && now - last_ < kInterval) return;
  last_ = now;
  stage_ = stage;
  const nb::gil_scoped_acquire interpreter;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
  if (!callable_.is_none()) callable_(nb::str(stage.data(), stage.size()), done, total);
}

namespace {

// Warnings of the library become Python's.
void warn_in_python(std::string_view message) {
  const nb::gil_scoped_acquire interpreter;
  if (PyErr_WarnEx(PyExc_UserWarning, std::string(message).c_str(), 1) != 0) throw nb::python_error();
}

}  // namespace
}  // namespace veloxquant::python

// MLX throws what CUDA says as any other error.
void translate_out_of_memory(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const nb::python_error&) {
    throw;
  } catch (const std::exception& thrown) {
    const auto text = veloxquant::out_of_memory(thrown);
    if (!text) throw;
    PyErr_SetString(PyExc_MemoryError, text->c_str());
  }
}

NB_MODULE(_core, module) {
  using namespace veloxquant::python;
  nb::register_exception_translator(translate_out_of_memory);
  module.doc() = "The C++ side of veloxquant_mlx.";
  module.attr("__version__") = VELOXQUANT_VERSION;
  veloxquant::set_warning_handler(warn_in_python);
  module.def("take_mlx_products", &take_mlx_products, "Have MLX multiply with this module's cblas_sgemm; whether it does.");
  module.def("gemm_calls", &veloxquant::gemm_calls, "Calls of this module's cblas_sgemm so far.");
  module.def("blas_description", &veloxquant::blas_description, "The BLAS that matrix products of this module come through.");
  module.def("warn_of_narrow_kernel", &veloxquant::openblas::warn_of_narrow_kernel,
             "Warns, once, where the BLAS has a kernel for an older processor.");
  bind_models(module);
  bind_live_model(module);
  bind_ratequant(module);
  bind_vecinfer(module);
  bind_plans(module);
}

#include "veloxquant/model/memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <new>
#include <string_view>

#include "mlx/memory.h"
#include "veloxquant/core/text_table.h"

namespace veloxquant {
namespace {

// MLX has no type for it: the words of CUDA's runtime, of cuBLAS, and of MLX's allocators.
constexpr std::string_view kWords[] = {"out of memory", "ALLOC_FAILED", "to allocate"};

}  // namespace

std::optional<std::string> out_of_memory(const std::exception& error) {
  const std::string_view what = error.what();
  const bool said = std::any_of(std::begin(kWords), std::end(kWords),
                                [&](std::string_view words) { return what.find(words) != std::string_view::npos; });
  if (!said && !dynamic_cast<const std::bad_alloc*>(&error)) return std::nullopt;
  return fmt::format(
      "out of memory: arrays took {} at most, of {} that they may take; a shorter prompt, fewer or shorter samples, windows or "
      "documents need less",
      bytes_text(mlx::core::get_peak_memory()), bytes_text(mlx::core::get_memory_limit()));
}

}  // namespace veloxquant

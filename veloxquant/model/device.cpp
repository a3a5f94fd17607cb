#include "veloxquant/model/device.h"

#include <atomic>

#include "mlx/memory.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/warning.h"

namespace veloxquant {
namespace {

bool gpu_available() {
  return mx::is_available(mx::Device(mx::Device::gpu));
}

}  // namespace

mx::Device resolve_device(std::string_view name) {
  if (name == "cpu") return mx::Device::cpu;
  if (name == "auto") return gpu_available() ? mx::Device::gpu : mx::Device::cpu;
  if (name != "gpu") throw_invalid("device", "expected \"cpu\", \"gpu\" or \"auto\", got \"{}\"", name);
  if (!gpu_available())
    throw_failure("device", "\"gpu\" asked for, but this build of MLX has no GPU back end (install mlx[cuda13])");
  return mx::Device::gpu;
}

mx::Device resolve_device_or_cpu(std::string_view name) {
  if (name != "gpu" || gpu_available()) return resolve_device(name);
  static std::atomic<bool> warned = false;
  if (!warned.exchange(true)) warn("no GPU back end in this build of MLX: running on the CPU");
  return mx::Device::cpu;
}

std::string_view device_name(mx::Device device) {
  return device == mx::Device::gpu ? "gpu" : "cpu";
}

void limit_kept_buffers() {
  constexpr std::size_t kShare = 4;
  if (mx::get_cache_memory() > mx::get_memory_limit() / kShare) mx::clear_cache();
}

}  // namespace veloxquant

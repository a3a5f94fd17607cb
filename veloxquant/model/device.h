// Where a model runs.
#pragma once

#include <string>
#include <string_view>

#include "mlx/device.h"

namespace veloxquant {

namespace mx = mlx::core;

/// The documented word for a device, "cpu" or "gpu", or the command line's "auto" (the GPU where there is one).
/// Throws std::invalid_argument for any other word, and std::runtime_error for "gpu" where MLX has no GPU back end.
mx::Device resolve_device(std::string_view name);

/// As resolve_device, but "gpu" without a GPU back end warns (once a process) and gives the CPU: "gpu" is the documented default of
/// functions that must also work on machines without one.
mx::Device resolve_device_or_cpu(std::string_view name);

/// "cpu" or "gpu".
std::string_view device_name(mx::Device device);

/// Gives buffers that MLX keeps for later ones back once they are a quarter of what it may use.  It keeps them up to nearly all of a
/// GPU, and takes one again only for an array of about its size, which the arrays of a growing context are not: a context of 32k
/// tokens filled an H200 with them, and CUDA then moved weights and keys to the host and back for every token.
void limit_kept_buffers();

/// Makes `device` MLX's default for its own life.
class DeviceScope {
 public:
  explicit DeviceScope(mx::Device device) : before_(mx::default_device()) { mx::set_default_device(device); }
  ~DeviceScope() { mx::set_default_device(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  mx::Device before_;
};

}  // namespace veloxquant

// The text of our CUDA kernels, for NVRTC.
#pragma once

namespace veloxquant {

/// packed_entries.cuh and all that it includes.
extern const char* const kCudaSource;

}  // namespace veloxquant

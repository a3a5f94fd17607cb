// The text of our CUDA kernels, for MLX's run-time compiler.
#pragma once

namespace veloxquant {

// Each with packed_units.h and packed_common.cuh before it.
extern const char* const kAttentionSource;  // packed_tiles.cuh, packed_plane_keys.cuh, packed_full_keys.cuh, packed_attention.cuh
extern const char* const kAttentionEndSource;  // packed_attention_end.cuh
extern const char* const kEncodingSource;      // packed_encoding.cuh

}  // namespace veloxquant

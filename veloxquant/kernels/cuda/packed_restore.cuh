// Keys and values of any plan out of their codes, for queries of many tokens.
#pragma once

#include "veloxquant/kernels/cuda/packed_look_up.cuh"

namespace veloxquant {

// A tile of one side of one head → vectors [kTileTokens, dim] at `to`, keys turned by their positions; of the last one only the
// tokens that there are, `count`.  A block of kLookUpThreads, restore_floats() of shared memory.
__device__ __forceinline__ void restore_tile(const LayerCodes& codes, int side, int head, int tile, int count, float* to,
                                             float* shared) {
  const LayerTables& layer = codes.layer();
  const SideTables& of = codes.side(side, head);
  const Tile here{codes, of, tile};
  const int dim = layer.dim;
  float *columns = shared, *vectors = shared + dim * kTileStride;
  here.look_up(columns, layer.sinks, threadIdx.x / 32, kLookUpWarps);
  __syncthreads();
  here.add_patches(columns, layer.sinks);
  __syncthreads();
  if (!of.planes) {
    here.multiply_back(columns, vectors, side == 0, layer.sinks);
    __syncthreads();
  }
  const float* from = of.planes ? columns : vectors;
  const int* dims = side == 0 ? codes.at<int>(of.dims) : nullptr;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * dim; i += kLookUpThreads) {
    const int token = i / dim, column = i % dim;
    to[token * dim + (dims ? dims[column] : column)] = from[column * kTileStride + token];
  }
}

}  // namespace veloxquant

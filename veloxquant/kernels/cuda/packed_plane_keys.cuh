// Keys that RoPE turns in the planes of which their units consist (Rotation::kPlane), for packed_attention.cuh: what is looked up
// is a piece of a key.
#pragma once

#include "veloxquant/kernels/cuda/packed_tiles.cuh"

namespace veloxquant {

// Tokens of the two classes of packed_attention.cuh take units in different orders.
template <int kUnits, int kThreads>
class PlaneKeys {
 public:
  static constexpr int kSteps = kUnits / 4;

  struct Memory {
    uint4 angles[kTileTokens][kUnits];                 // cosines of planes 0 and 1, sines, those of planes 2 and 3
    float4 phases[kUnits][2];                          // of the step from a warp's tile to its next: cosine and sine of each plane
    float queries[kQueriesAtOnce][kUnits][kUnitDims];  // as the units' bytes have them, not turned back
  };

  // What is copied with the small tables, before load().
  __device__ static void copy_tables(Memory&, const AttentionTables&, int) {}

  __device__ static void load(Memory& memory, const KeyUnit* units, const AttentionTables&, int, const QueryRows& queries,
                              int sequence_head, int first_row, int stride) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kQueriesAtOnce * kUnits * kUnitDims; i += kThreads) {
      const int row = i / (kUnits * kUnitDims), unit = i / kUnitDims % kUnits;
      const int at = units[unit].columns[i % kUnitDims];
      float q = 0;
      if (first_row + row < queries.rows && at >= 0)
        q = queries.q[(static_cast<long long>(sequence_head) * queries.rows + first_row + row) * queries.dim + at];
      memory.queries[row][unit][i % kUnitDims] = queries.scale * units[unit].scale * q;
    }
    // Neighbouring groups of lanes read rows whose banks would be the same: every other group of four rows is shifted.
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileTokens * kUnits; i += kThreads) {
      const int token = i / kUnits, unit = i % kUnits;
      float c[4], s[4];
      for (int plane = 0; plane < 4; ++plane) {
        const float2 angle = cosine_and_sine(units[unit].turns[plane], token);
        c[plane] = queries.magnitude * angle.x, s[plane] = queries.magnitude * angle.y;
      }
      memory.angles[token][unit ^ (token >> 2 & 1) << 2] = {
          bits_of(__floats2half2_rn(c[0], c[1])), bits_of(__floats2half2_rn(s[0], s[1])), bits_of(__floats2half2_rn(c[2], c[3])),
          bits_of(__floats2half2_rn(s[2], s[3]))};
    }
#pragma unroll 1
    for (int unit = threadIdx.x; unit < kUnits; unit += kThreads)
      for (int both = 0; both < 2; ++both) {
        const float2 a = cosine_and_sine(units[unit].turns[2 * both], stride),
                     b = cosine_and_sine(units[unit].turns[2 * both + 1], stride);
        memory.phases[unit][both] = {a.x, a.y, b.x, b.y};
      }
  }

  // The unit that a lane looks up.
  __device__ __forceinline__ static int unit(int step, int group, int column) {
    return 4 * (step ^ (group >> 1 & 1)) + column;
  }

  // A lane's column is a query and a class: its query, turned back to `position`, in the order of units of its class.
  __device__ void load_queries(const Memory& memory, const KeyUnit* units, int group, int column, unsigned position) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int unit = 4 * (step ^ group >> 2) + column;
#pragma unroll
      for (int plane = 0; plane < 4; ++plane) {
        float &x = q_[step][2 * plane], &y = q_[step][2 * plane + 1];
        x = memory.queries[group & 3][unit][2 * plane], y = memory.queries[group & 3][unit][2 * plane + 1];
        const float2 angle = cosine_and_sine(units[unit].turns[plane], position);
        turn_back(x, y, angle.x, angle.y);
      }
    }
  }

  __device__ __forceinline__ void turn_on(const Memory& memory, int group, int column) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int both = 0; both < 2; ++both) {
        const float4 phases = memory.phases[4 * (step ^ group >> 2) + column][both];
        turn_back(q_[step][4 * both], q_[step][4 * both + 1], phases.x, phases.y);
        turn_back(q_[step][4 * both + 2], q_[step][4 * both + 3], phases.z, phases.w);
      }
  }

  // look_up(unit, keys): what CodeAttention::look_up_keys gives of a lane's four tokens.
  template <class LookUp>
  __device__ __forceinline__ void score_tile(const Memory& memory, LookUp look_up, int group, int column,
                                             float (&scores)[2][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int unit = this->unit(step, group, column);
      unsigned keys[4][4], x[4], y[4], z[4], w[4];
      look_up(unit, keys);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __half2 x01 = halves(keys[i][0]), y01 = halves(keys[i][1]), x23 = halves(keys[i][2]), y23 = halves(keys[i][3]);
        const uint4 angles = memory.angles[4 * group + i][unit ^ (group & 1) << 2];
        const __half2 c01 = halves(angles.x), s01 = halves(angles.y), c23 = halves(angles.z), s23 = halves(angles.w);
        x[i] = bits_of(__hfma2(x01, c01, __hneg2(__hmul2(y01, s01))));
        y[i] = bits_of(__hfma2(x01, s01, __hmul2(y01, c01)));
        z[i] = bits_of(__hfma2(x23, c23, __hneg2(__hmul2(y23, s23))));
        w[i] = bits_of(__hfma2(x23, s23, __hmul2(y23, c23)));
      }
      const float(&q)[kUnitDims] = q_[step];
      const unsigned q0 = bits_of(__floats2half2_rn(q[0], q[2])), q1 = bits_of(__floats2half2_rn(q[1], q[3])),
                     q2 = bits_of(__floats2half2_rn(q[4], q[6])), q3 = bits_of(__floats2half2_rn(q[5], q[7]));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply(scores[i], x[2 * i], x[2 * i + 1], y[2 * i], y[2 * i + 1], q0, q1);
        multiply(scores[i], z[2 * i], z[2 * i + 1], w[2 * i], w[2 * i + 1], q2, q3);
      }
    }
  }

  // Of patches, as rows `group` and group + 8 of a product.  Rests become units of a key, which are turned and multiplied with the
  // queries.
  __device__ static void score_patches(const Memory& memory, const KeyUnit* units, const __half* rests, int rest_columns,
                                       const unsigned char* const (&patches)[2], const unsigned (&positions)[2], float magnitude,
                                       int group, int column, float (&scores)[1][4]) {
#pragma unroll 1
    for (int unit = 0; unit < kUnits; unit += 2) {
      unsigned turned[2][2];
      for (int next = 0; next < 2; ++next) {
        const KeyUnit& of = units[unit + next];
        const __half* of_dimension = rests + ((unit + next) * kUnitDims + group) * rest_columns;
        float key[4] = {};
#pragma unroll 1
        for (int i = 0; i < of.rest_count; i += 8) {
          const int at = i + 2 * column;
          const bool here = at < of.rest_count;
          const unsigned a0 = here ? bits_of(patch_rests(patches[0], of.rest_begin + at)) : 0,
                         a1 = here ? bits_of(patch_rests(patches[1], of.rest_begin + at)) : 0;
          multiply(key, a0, a1, 0, 0, *reinterpret_cast<const unsigned*>(of_dimension + at), 0);
        }
        for (int i = 0; i < 2; ++i) {
          const float2 angle = cosine_and_sine(of.turns[column], positions[i]);
          turn_back(key[2 * i], key[2 * i + 1], magnitude * angle.x, -magnitude * angle.y);
          turned[next][i] = bits_of(__floats2half2_rn(key[2 * i], key[2 * i + 1]));
        }
      }
      const auto queries_of = [&](int of) {
        const float* q = memory.queries[group & 3][of] + 2 * column;
        return bits_of(__floats2half2_rn(q[0], q[1]));
      };
      multiply(scores[0], turned[0][0], turned[0][1], turned[1][0], turned[1][1], queries_of(unit), queries_of(unit + 1));
    }
  }

 private:
  float q_[kSteps][kUnitDims];
};

}  // namespace veloxquant

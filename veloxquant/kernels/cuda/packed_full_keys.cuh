// Keys whose sub-spaces mix any dimensions (Rotation::kFull), for packed_attention.cuh: what is looked up is multiplied with A⁻¹ on
// tensor cores before it is turned.  Dimensions come in the order of places: x and y of plane 4j + c are places 8j + 2c and the
// next.
#pragma once

#include "veloxquant/kernels/cuda/packed_tiles.cuh"

namespace veloxquant {

template <int kUnits, int kDim, int kThreads>
class FullKeys {
 public:
  static constexpr int kSteps = kUnits / 4, kProducts = kDim / 8, kPlanes = kDim / 2;

  struct Memory {
    uint2 inverse[kProducts][kUnits / 2][32];
    unsigned angles[kTileTokens][kPlanes + 1];  // a row more than there are, so that lanes read different banks
    float2 phases[kPlanes];                     // of the step from a warp's tile to its next
    unsigned turns[kPlanes];
    float mean[kDim], queries[kQueriesAtOnce][kDim];
  };

  // What is copied with the small tables, before load().
  __device__ static void copy_tables(Memory& memory, const AttentionTables& tables, int table) {
    const auto* from = reinterpret_cast<const uint4*>(tables.full.inverse + table * (kProducts * (kUnits / 2) * 32));
#pragma unroll 2
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(memory.inverse) / 16); i += kThreads)
      copy_later(reinterpret_cast<uint4*>(memory.inverse) + i, from + i);
  }

  __device__ static void load(Memory& memory, const KeyUnit*, const AttentionTables& all_tables, int table,
                              const QueryRows& queries, int sequence_head, int first_row, int stride) {
    const FullKeyTables& tables = all_tables.full;
#pragma unroll 1
    for (int i = threadIdx.x; i < kDim; i += kThreads) {
      memory.mean[i] = tables.mean[table * kDim + i];
      const int at = tables.columns[i];
      for (int row = 0; row < kQueriesAtOnce; ++row)
        memory.queries[row][i] =
            first_row + row < queries.rows
                ? queries.scale * queries.q[(static_cast<long long>(sequence_head) * queries.rows + first_row + row) * kDim + at]
                : 0.0f;
    }
#pragma unroll 1
    for (int plane = threadIdx.x; plane < kPlanes; plane += kThreads) {
      memory.turns[plane] = tables.turns[plane];
      memory.phases[plane] = cosine_and_sine(tables.turns[plane], stride);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileTokens * kPlanes; i += kThreads) {
      const float2 angle = cosine_and_sine(tables.turns[i % kPlanes], i / kPlanes);
      memory.angles[i / kPlanes][i % kPlanes] =
          bits_of(__floats2half2_rn(queries.magnitude * angle.x, queries.magnitude * angle.y));
    }
  }

  // A lane's column is a query, turned back to `position`.
  __device__ void load_queries(const Memory& memory, const KeyUnit*, int group, int column, unsigned position) {
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      const int plane = 4 * j + column;
      q_[j][0] = memory.queries[group & 3][2 * plane], q_[j][1] = memory.queries[group & 3][2 * plane + 1];
      const float2 angle = cosine_and_sine(memory.turns[plane], position);
      turn_back(q_[j][0], q_[j][1], angle.x, angle.y);
    }
  }

  __device__ __forceinline__ void turn_on(const Memory& memory, int, int column) {
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      const float2 phase = memory.phases[4 * j + column];
      turn_back(q_[j][0], q_[j][1], phase.x, phase.y);
    }
  }

  // z: of each step the operands of rows `group` and group + 8 of kRows / 2 products.  angle(row, plane): cosine and sine of a
  // key's turn; query(j): a lane's operand of product j.
  template <int kRows, class Angle, class Query>
  __device__ __forceinline__ static void score(const Memory& memory, const unsigned (&z)[kSteps][kRows][4], int column, float mean,
                                               Angle angle, Query query, float (&scores)[kRows / 2][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int both = 0; both < kProducts; both += 2) {
      unsigned turned[2][kRows];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int j = both + next;
        const float2 begin = *reinterpret_cast<const float2*>(&memory.mean[8 * j + 2 * column]);
        float keys[kRows / 2][4];
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) keys[i][0] = keys[i][2] = mean * begin.x, keys[i][1] = keys[i][3] = mean * begin.y;
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint2 b = memory.inverse[j][2 * step + half][lane];
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i)
              multiply(keys[i], z[step][2 * i][2 * half], z[step][2 * i + 1][2 * half], z[step][2 * i][2 * half + 1],
                       z[step][2 * i + 1][2 * half + 1], b.x, b.y);
          }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float &x = keys[row / 2][row % 2 * 2], &y = keys[row / 2][row % 2 * 2 + 1];
          const float2 turn = angle(row, 4 * j + column);
          turn_back(x, y, turn.x, -turn.y);
          turned[next][row] = bits_of(__floats2half2_rn(x, y));
        }
      }
      const unsigned b0 = query(both), b1 = query(both + 1);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i)
        multiply(scores[i], turned[0][2 * i], turned[0][2 * i + 1], turned[1][2 * i], turned[1][2 * i + 1], b0, b1);
    }
  }

  // look_up(unit, keys): what CodeAttention::look_up_keys gives of a lane's four tokens.
  template <class LookUp>
  __device__ __forceinline__ void score_tile(const Memory& memory, LookUp look_up, int group, int column,
                                             float (&scores)[2][4]) const {
    unsigned z[kSteps][4][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) look_up(4 * step + column, z[step]);
    score<4>(
        memory, z, column, 1.0f, [&](int row, int plane) { return __half22float2(halves(memory.angles[4 * group + row][plane])); },
        [&](int j) { return bits_of(__floats2half2_rn(q_[j][0], q_[j][1])); }, scores);
  }

  // Of patches, as rows of one product.
  __device__ static void score_patches(const Memory& memory, const KeyUnit* units, const __half*, int,
                                       const unsigned char* const (&patches)[2], const unsigned (&positions)[2], float magnitude,
                                       int group, int column, float (&scores)[1][4]) {
    unsigned z[kSteps][2][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const KeyUnit& unit = units[4 * step + column];
      const float by_scale = unit.rest_count > 0 ? 1.0f / unit.scale : 0.0f;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const auto rest = [&](int i) {
          return i < unit.rest_count ? by_scale * patch_rest(patches[row], unit.rest_begin + i) : 0.0f;
        };
#pragma unroll
        for (int i = 0; i < 4; ++i)
          z[step][row][i] = bits_of(__floats2half2_rn(rest(i / 2 * 4 + i % 2), rest(i / 2 * 4 + i % 2 + 2)));
      }
    }
    score<2>(
        memory, z, column, 0.0f,
        [&](int row, int plane) {
          const float2 angle = cosine_and_sine(memory.turns[plane], positions[row]);
          return float2{magnitude * angle.x, magnitude * angle.y};
        },
        [&](int j) {
          const float2 q = *reinterpret_cast<const float2*>(&memory.queries[group & 3][8 * j + 2 * column]);
          return bits_of(__floats2half2_rn(q.x, q.y));
        },
        scores);
  }

 private:
  float q_[kProducts][2];
};

}  // namespace veloxquant

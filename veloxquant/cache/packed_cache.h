// A cache that really is that small: codes of the tokens, 8 bits of the window and the sinks, and attention over them.
#pragma once

#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/packed_step.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// Keys and values of one layer as codes, on the CPU.
///
/// Tokens are rounded to 8 bits as they arrive; the first `sinks` stay so.  A token that leaves the window of the last `window` is
/// encoded, from what the window held.  Memory grows by blocks of kPackedBlockTokens tokens.  Attention reads the codes: nothing is
/// restored but a tile at a time.  It sees what RestoringCache does, but for the block that still grows: its patches are chosen
/// among the tokens that have left the window.
class PackedCache : public PackedAttentionCache {
 public:
  explicit PackedCache(std::shared_ptr<const PackedLayer> layer);
  ~PackedCache() override;

  /// A node of the graph: what it does to the cache is done when it is evaluated, in the order of the calls.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return static_cast<int>(offset_); }
  std::vector<int> tokens() const override;

  /// Allocated for tokens: blocks, window and sinks; codebooks are the layer's.
  std::size_t nbytes() const override;

  std::string kernels() const override { return "cpu"; }

  int trim(int tokens) override;
  std::unique_ptr<SavableCache> clone() const override;
  CacheState state() const override;
  void restore(const CacheState& state) override;

 private:
  struct Counts {
    std::size_t tokens = 0, coded = 0;
  };

  std::vector<SequenceStep> steps(int batch, int tokens, const AttentionSpec& spec) const;
  void check_shapes(const mx::array& q, const mx::array& k, const mx::array& v) const;
  std::size_t coded_of(const Counts& counts) const;  // once the window is as full as it may be

  // Whether the last call is still to be evaluated.  Throws std::logic_error if another thread made it.
  bool pending() const;

  // What the calls so far leave in memory, once they are evaluated.
  std::vector<PackedSequence>& sequences() const;

  std::shared_ptr<const PackedLayer> layer_;
  std::vector<Counts> counts_;  // of each sequence, after the calls so far
  std::size_t kv_heads_ = 0, offset_ = 0;
  std::shared_ptr<std::vector<PackedSequence>> sequences_;
  mutable std::optional<mx::array> last_call_;  // until it is known to be evaluated
  std::thread::id caller_;
  mutable Busy busy_;
};

/// Packed caches for every layer of a plan, full ones for those that slide: PackedCache on the CPU, PackedArrays elsewhere.  Throws
/// std::invalid_argument that names the method for one that cannot be packed.
CacheFactory packed_factory(const Plan& plan);

}  // namespace veloxquant

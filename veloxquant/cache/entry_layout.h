// Codebooks of any widths as entry_scan.h reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/kernels/entry_scan.h"
#include "veloxquant/quantize/byte_tables.h"

namespace veloxquant {

/// A sub-space, and where its codes of a tile stand.
struct BytePiece {
  CodePlace codes[2];
  const ByteTables* tables;
};

enum class EntryOrder {
  kPlain,   // for add_bytes: in any order
  kTurned,  // for score_bytes: pairs of columns are planes
};

/// Pieces of a vector in groups of kEntryColumns columns, a multiple of kTurnGroups groups: wide ones cut, narrow ones together,
/// and zeros where nothing is left.
class EntryLayout {
 public:
  /// In the order of the columns.  Tables are copied.
  EntryLayout(std::span<const BytePiece> pieces, EntryOrder order);

  // Groups point into tables, which moving leaves where they are.
  EntryLayout(EntryLayout&&) = default;

  std::span<const EntryColumns> groups() const { return groups_; }

  /// Tables on their way to the caches: look-ups would wait for one line after the other.
  void fetch() const;

  /// Columns of a row in groups.
  std::size_t columns() const { return groups_.size() * kEntryColumns; }

  /// Where column i of a vector stands in such a row.
  const std::vector<std::size_t>& places() const { return places_; }

  // Of each column of a row, [columns]: it is scale · (sum of bytes − offset), and sums of bytes are at most so large.
  const std::vector<float>& scales() const { return scales_; }
  const std::vector<float>& offsets() const { return offsets_; }
  const std::vector<int>& largest() const { return largest_; }

  /// kPlain: sums[r] += Σ_t weights[r · weight_stride + t] · v[t], sums [num_queries, dim], of what was looked up of the groups.
  void add(const std::uint8_t* bytes, std::size_t tokens, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const;

 private:
  std::size_t add_group();
  bool has_room(std::size_t group, std::size_t stages) const;
  void add_columns(const BytePiece& piece, std::size_t column, std::size_t from, std::size_t count, std::size_t group);

  static constexpr std::size_t kTableEntries = 256;  // any byte is a code

  EntryOrder order_;
  std::vector<EntryColumns> groups_;
  std::vector<std::size_t> used_;  // columns of each group
  std::vector<std::size_t> places_;
  std::vector<float> scales_, offsets_;
  std::vector<int> largest_;
  std::vector<std::vector<std::uint8_t>> tables_;  // each [kTableEntries, kEntryColumns]
};

}  // namespace veloxquant

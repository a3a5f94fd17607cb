// Codebooks of any widths as entry_scan.h reads them.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "veloxquant/kernels/entry_scan.h"

namespace veloxquant {

/// Pieces of a vector in groups of kEntryColumns columns: wide ones cut, those of one table and half a group or less two by two,
/// and zeros where nothing is left.
class EntryLayout {
 public:
  EntryLayout() = default;

  /// As sum_entries takes them, tables of 256 entries, which are copied.
  explicit EntryLayout(std::span<const LookupPiece> pieces);

  // Groups point into tables, which moving leaves where they are.
  EntryLayout(EntryLayout&&) = default;
  EntryLayout& operator=(EntryLayout&&) = default;

  std::span<const EntryColumns> groups() const { return groups_; }

  /// Columns of a row in groups.
  std::size_t columns() const { return groups_.size() * kEntryColumns; }

  /// Where column i of a vector stands in such a row.
  const std::vector<std::size_t>& places() const { return places_; }

  /// sums[r] += Σ_t weights[r · weight_stride + t] · v[t], sums [num_queries, dim].
  void add(const BlockOfTiles& block, const float* weights, std::size_t num_queries, std::size_t weight_stride, float* sums) const;

 private:
  void add_group(const LookupPiece& piece, std::size_t from);
  void add_pair(const LookupPiece& first, const LookupPiece& second);
  const float* table(const float* entries, std::size_t width, std::size_t from, std::size_t count, std::size_t to);

  std::vector<EntryColumns> groups_;
  std::vector<std::size_t> places_;
  std::vector<std::vector<float>> tables_;
};

}  // namespace veloxquant

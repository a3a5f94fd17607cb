// What samples are between two layers, kept in memory or, past a limit, in a file.
#pragma once

#include <cstddef>
#include <optional>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// A list of float32 arrays.  What goes beyond the limit lies in a temporary file without a name in TMPDIR (or /tmp; one in memory
/// would win nothing), which is gone with this object.
class Activations {
 public:
  explicit Activations(std::size_t memory_limit = std::size_t{512} << 20) : memory_limit_(memory_limit) {}
  ~Activations();
  Activations(Activations&& other) noexcept;
  Activations& operator=(const Activations&) = delete;

  /// Evaluates x and appends it.  Throws std::runtime_error that names the folder if the disk is full.
  void add(const mx::array& x);

  /// Replaces array `index` by one of the same shape.
  void set(std::size_t index, const mx::array& x);

  mx::array get(std::size_t index) const;

  /// Row `row` along the first axis of array `index`, as [1, …]: reads no more of a file than that.
  mx::array get_row(std::size_t index, int row) const;

  std::size_t size() const { return slots_.size(); }

 private:
  struct InFile {
    mx::Shape shape;
    std::size_t offset;
  };
  using Slot = std::variant<mx::array, InFile>;

  void open_file();
  mx::array read(const mx::Shape& shape, std::size_t offset) const;
  void write(const InFile& place, const mx::array& x);

  std::vector<Slot> slots_;
  std::size_t memory_limit_, memory_ = 0, file_size_ = 0;
  int file_ = -1;
};

}  // namespace veloxquant

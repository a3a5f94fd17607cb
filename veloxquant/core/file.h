// Files: read whole or mapped, written whole or not at all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace veloxquant {

/// Reads a whole file.  Throws std::runtime_error that names the path if it is missing, not a regular file, unreadable or larger
/// than `max_bytes`.
std::string read_file(const std::filesystem::path& path, std::size_t max_bytes = std::size_t{1} << 32);

/// Writes `contents` to a temporary file beside `path`, flushes it to disk and renames it to `path`: a reader, or a crash, sees the
/// old file or the new one, never a part.  Symbolic links are followed and stay.  Throws std::runtime_error that names the path,
/// also for what is there and no regular file; the temporary file is then gone.
void write_file_atomically(const std::filesystem::path& path, std::string_view contents);

/// Throws std::runtime_error unless a file could be written at `path`: called before long work, so that it is not lost at its end.
void check_writable(const std::filesystem::path& path);

/// A file mapped read-only into memory for the life of this object.
class MappedFile {
 public:
  /// Throws std::runtime_error that names the path.  An empty file gives an empty span.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace veloxquant

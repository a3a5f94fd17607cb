// Text that a model reads, from a file.
#pragma once

#include <filesystem>
#include <string>

namespace veloxquant {

/// The text of a file, byte by byte: line ends stay what they are, and so does one at the end.  Throws std::runtime_error that
/// names the file where it cannot be read (core/file.h), is empty, or is not UTF-8: the byte, and where it stands.
std::string read_text(const std::filesystem::path& path);

}  // namespace veloxquant

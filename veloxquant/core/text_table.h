// Numbers and tables as people read them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace veloxquant {

/// Rows under a header, columns aligned: the first to the left, others to the right.
std::string table(const std::vector<std::vector<std::string>>& rows);

/// "1.2 MiB" and the like.
std::string bytes_text(std::size_t bytes);

}  // namespace veloxquant

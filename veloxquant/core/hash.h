// SHA-256, which ties plans to models and guards files against damage.
#pragma once

#include <string>
#include <string_view>

namespace veloxquant {

/// SHA-256 (FIPS 180-4) of bytes added in parts.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void add(std::string_view bytes);

  /// 64 lower-case hex digits; once, at the end.
  std::string hex();

 private:
  void* context_;
};

/// Of one piece, in hex.
std::string sha256(std::string_view bytes);

}  // namespace veloxquant

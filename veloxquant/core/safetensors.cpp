#include "veloxquant/core/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <tuple>

#include "veloxquant/core/error.h"
#include "veloxquant/core/half.h"
#include "veloxquant/core/json.h"
#include "veloxquant/core/parallel.h"

namespace veloxquant {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as the reference reader has it
constexpr std::size_t kMaxRank = 16;
constexpr std::size_t kDataAlignment = 64;
constexpr const char* kMetadata = "__metadata__";

struct TypeSize {
  std::string_view dtype;
  std::uint64_t bytes;
};
constexpr TypeSize kTypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
                               {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
                               {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8},     {"C64", 8}};

struct Range {
  std::uint64_t begin, end;
  std::string name;
};

// 0 for a type that the format does not have.
std::uint64_t type_bytes(std::string_view dtype) {
  const auto found = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeSize& type) { return type.dtype == dtype; });
  return found == std::end(kTypes) ? 0 : found->bytes;
}

// Product of the shape and the size of an element; sizes that overflow are refused.
std::uint64_t read_shape(const JsonObject& entry, std::vector<std::int64_t>& shape) {
  const auto& list = entry.at("shape");
  if (!list.is_array() || list.size() > kMaxRank) entry.refuse("shape", fmt::format("a list of at most {} sizes", kMaxRank));
  std::uint64_t bytes = type_bytes(entry.string("dtype"));
  if (bytes == 0) entry.refuse("dtype", "a type of the safetensors format");
  for (const auto& size : list) {
    if (!size.is_number_unsigned() || size.get<std::uint64_t>() > (std::uint64_t{1} << 62))
      entry.refuse("shape", "sizes from 0 to 2^62");
    shape.push_back(size.get<std::int64_t>());
    if (__builtin_mul_overflow(bytes, size.get<std::uint64_t>(), &bytes)) entry.refuse("shape", "a product below 2^64 bytes");
  }
  return bytes;
}

Range read_offsets(const JsonObject& entry, const std::string& name, std::uint64_t data_bytes) {
  const auto& offsets = entry.at("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned())
    entry.refuse("data_offsets", "two offsets");
  const Range range{offsets[0].get<std::uint64_t>(), offsets[1].get<std::uint64_t>(), name};
  if (range.begin > range.end || range.end > data_bytes) entry.refuse("data_offsets", fmt::format("begin ≤ end ≤ {}", data_bytes));
  return range;
}

void check_cover(std::vector<Range> ranges, std::uint64_t data_bytes, const std::string& file) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  std::uint64_t covered = 0;
  for (const auto& range : ranges) {
    if (range.begin != covered)
      throw_failure("safetensors", "{}: tensor {} starts at byte {} of the data, expected {}", file, range.name, range.begin,
                    covered);
    covered = range.end;
  }
  if (covered != data_bytes)
    throw_failure("safetensors", "{}: the tensors cover {} bytes of data, the file has {}", file, covered, data_bytes);
}

std::map<std::string, std::string> read_metadata(const nlohmann::json& value, const std::string& file) {
  std::map<std::string, std::string> metadata;
  if (value.is_null()) return metadata;
  const JsonObject object(value, fmt::format("{}: {}", file, kMetadata));
  for (const auto& [key, text] : value.items()) metadata[key] = object.string(key);
  return metadata;
}

void check_entry(const std::string& name, const SafetensorsEntry& entry) {
  if (name == kMetadata) throw_invalid("safetensors", "a tensor may not be named {}", kMetadata);
  const std::uint64_t bytes = type_bytes(entry.dtype);
  if (bytes == 0) throw_invalid("safetensors", "tensor {}: expected a type of the format, got {}", name, entry.dtype);
  const auto times = [](std::uint64_t a, std::int64_t b) { return a * static_cast<std::uint64_t>(b); };
  const auto size = std::accumulate(entry.shape.begin(), entry.shape.end(), std::uint64_t{1}, times);
  if (size * bytes != entry.data.size())
    throw_invalid("safetensors", "tensor {}: its shape takes {} values, got {}", name, size, entry.data.size() / bytes);
}

std::string dump(const nlohmann::json& header) try { return header.dump(); } catch (const nlohmann::json::exception&) {
  throw_invalid("safetensors", "names and metadata: expected text in UTF-8");
}

template <class Bits, class Convert>
void convert_all(std::span<const std::byte> data, std::vector<float>& values, const Convert& convert) {
  parallel_for(values.size(), 1 << 18, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, data.data() + i * sizeof(Bits), sizeof(Bits));
      values[i] = convert(bits);
    }
  });
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(path) {
  const std::string name = path.string();
  const auto bytes = file_.bytes();
  std::uint64_t header_bytes = 0;
  if (bytes.size() < kLengthBytes)
    throw_failure("safetensors", "{}: {} bytes are too few for a safetensors file", name, bytes.size());
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - kLengthBytes)
    throw_failure("safetensors", "{}: header of {} bytes, at most {} are possible", name, header_bytes,
                  std::min<std::uint64_t>(kMaxHeaderBytes, bytes.size() - kLengthBytes));
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, header_bytes);
  const auto data = bytes.subspan(kLengthBytes + header_bytes);

  const auto document = parse_json(header, name);
  const JsonObject object(document, name);
  std::vector<Range> ranges;
  for (const auto& [key, value] : document.items()) {
    if (key == kMetadata) {
      metadata_ = read_metadata(value, name);
      continue;
    }
    const JsonObject entry(value, fmt::format("{}: tensor {}", name, key));
    entry.expect_only({"dtype", "shape", "data_offsets"});
    SafetensorsEntry tensor{.dtype = entry.string("dtype"), .shape = {}, .data = {}};
    const std::uint64_t expected = read_shape(entry, tensor.shape);
    const Range range = read_offsets(entry, key, data.size());
    if (range.end - range.begin != expected)
      throw_failure("safetensors", "{}: tensor {}: {} bytes for a shape that takes {}", name, key, range.end - range.begin,
                    expected);
    tensor.data = data.subspan(range.begin, expected);
    ranges.push_back(range);
    tensors_.emplace(key, std::move(tensor));
  }
  check_cover(std::move(ranges), data.size(), name);
}

Tensor to_float32(const SafetensorsEntry& entry, std::string_view tensor, std::string_view source) {
  Tensor result{entry.shape, {}};
  const std::size_t width = entry.dtype == "F32" ? 4 : 2;
  if (entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16")
    throw_failure("safetensors", "{}: tensor {}: expected F32, F16 or BF16, got {}", source, tensor, entry.dtype);
  result.values.resize(entry.data.size() / width);
  if (entry.dtype == "F32") convert_all<float>(entry.data, result.values, [](float value) { return value; });
  if (entry.dtype == "F16") convert_all<std::uint16_t>(entry.data, result.values, from_half);
  if (entry.dtype == "BF16") convert_all<std::uint16_t>(entry.data, result.values, from_bfloat);
  return result;
}

std::string serialize_entries(const std::map<std::string, SafetensorsEntry>& entries,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  std::uint64_t offset = 0;
  for (const auto& [name, entry] : entries) {
    check_entry(name, entry);
    const std::uint64_t end = offset + entry.data.size();
    header[name] = {{"dtype", entry.dtype}, {"shape", entry.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = dump(header);
  text.append((kDataAlignment - (kLengthBytes + text.size()) % kDataAlignment) % kDataAlignment, ' ');

  const std::uint64_t length = text.size();
  std::string bytes(reinterpret_cast<const char*>(&length), kLengthBytes);
  bytes.reserve(kLengthBytes + text.size() + offset);
  bytes += text;
  for (const auto& [name, entry] : entries) bytes.append(reinterpret_cast<const char*>(entry.data.data()), entry.data.size());
  return bytes;
}

std::string serialize_safetensors(const std::map<std::string, Tensor>& tensors,
                                  const std::map<std::string, std::string>& metadata) {
  std::map<std::string, SafetensorsEntry> entries;
  for (const auto& [name, tensor] : tensors)
    entries.emplace(name, SafetensorsEntry{"F32", tensor.shape, std::as_bytes(std::span(tensor.values))});
  return serialize_entries(entries, metadata);
}

void write_entries(const std::filesystem::path& path, const std::map<std::string, SafetensorsEntry>& entries,
                   const std::map<std::string, std::string>& metadata) {
  write_file_atomically(path, serialize_entries(entries, metadata));
}

void write_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  write_file_atomically(path, serialize_safetensors(tensors, metadata));
}

}  // namespace veloxquant

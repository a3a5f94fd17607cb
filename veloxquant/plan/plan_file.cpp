#include "veloxquant/plan/plan_file.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/json.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

using Json = nlohmann::ordered_json;
// By name.  Views of what is in a plan, or in a file.
using Entries = std::map<std::string, SafetensorsEntry>;

constexpr const char* kFormat = "veloxquant-plan";
// 1: units have neither head nor predicted_kl; 2: no layer slides; 3: entries of rotated_pq are float32.
constexpr int kVersion = 4;
constexpr std::int64_t kMaxSize = 1 << 24;

// As config.json may say; far beyond any model.
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxHeadDim = 1 << 16;
constexpr std::int64_t kMaxSamples = std::numeric_limits<int>::max();

std::string tensor_name(const UnitPlan& unit, const std::string& name) {
  return fmt::format("layers.{}.{}{}.{}", unit.layer, to_string(unit.side), unit.head ? fmt::format(".{}", *unit.head) : "", name);
}

Json model_json(const ModelIdentity& model) {
  return {{"architecture", model.architecture}, {"num_layers", model.num_layers},    {"num_kv_heads", model.num_kv_heads},
          {"head_dim", model.head_dim},         {"hidden_size", model.hidden_size},  {"vocab_size", model.vocab_size},
          {"config_hash", model.config_hash},   {"weights_hash", model.weights_hash}};
}

ModelIdentity read_model(const JsonObject& json) {
  json.expect_only(
      {"architecture", "num_layers", "num_kv_heads", "head_dim", "hidden_size", "vocab_size", "config_hash", "weights_hash"});
  const auto size = [&](const char* field, std::int64_t max = kMaxSize) { return static_cast<int>(json.integer(field, 1, max)); };
  return {.architecture = json.string("architecture"),
          .num_layers = size("num_layers", kMaxLayers),
          .num_kv_heads = size("num_kv_heads"),
          .head_dim = size("head_dim", kMaxHeadDim),
          .hidden_size = size("hidden_size"),
          .vocab_size = size("vocab_size"),
          .config_hash = json.string("config_hash"),
          .weights_hash = json.string("weights_hash")};
}

Json unit_json(const UnitPlan& unit) {
  auto tensors = Json::object();
  for (const auto& [name, tensor] : unit.quantizer.tensors) tensors[name] = tensor_name(unit, name);
  for (const auto& [name, tensor] : unit.quantizer.byte_tensors) tensors[name] = tensor_name(unit, name);
  return {{"layer", unit.layer},
          {"side", to_string(unit.side)},
          {"head", unit.head ? Json(*unit.head) : Json(nullptr)},
          {"method", unit.quantizer.method},
          {"dim", unit.quantizer.dim},
          {"numbers", Json(unit.quantizer.numbers)},
          {"tensors", std::move(tensors)},
          {"predicted_kl", unit.predicted_kl ? Json(*unit.predicted_kl) : Json(nullptr)}};
}

// Takes the tensors of the unit out of `entries`.
UnitPlan read_unit(const JsonObject& json, int version, Entries& entries) {
  if (version == 1) {
    json.expect_only({"layer", "side", "method", "dim", "numbers", "tensors"});
  } else {
    json.expect_only({"layer", "side", "head", "method", "dim", "numbers", "tensors", "predicted_kl"});
  }
  const std::string side = json.string("side");
  if (side != "keys" && side != "values") json.refuse("side", "\"keys\" or \"values\"");
  UnitPlan unit{.layer = static_cast<int>(json.integer("layer", 0, kMaxSize)),
                .side = side == "keys" ? Side::kKeys : Side::kValues,
                .quantizer = {}};
  if (version > 1 && !json.at("head").is_null()) unit.head = static_cast<int>(json.integer("head", 0, kMaxSize));
  unit.quantizer.method = json.string("method");
  unit.quantizer.side = unit.side;
  unit.quantizer.dim = static_cast<int>(json.integer("dim", 1, kMaxSize));
  const JsonObject numbers = json.object("numbers"), names = json.object("tensors");
  for (const auto& [name, value] : json.at("numbers").items()) unit.quantizer.numbers[name] = numbers.integer(name);
  for (const auto& [name, value] : json.at("tensors").items()) {
    const std::string in_file = names.string(name);
    const auto found = entries.find(in_file);
    if (in_file != tensor_name(unit, name) || found == entries.end())
      names.refuse(name, fmt::format("the name of a tensor in the file, {}", tensor_name(unit, name)));
    const auto& [type, shape, data] = found->second;
    if (type == "U8" && version > 3) {
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(data.data());
      unit.quantizer.byte_tensors.emplace(name, ByteTensor{shape, {bytes, bytes + data.size()}});
    } else if (type == "F32") {
      unit.quantizer.tensors.emplace(name, to_float32(found->second, in_file, json.where()));
    } else {
      throw_failure("plan", "{}: tensor {}: expected F32{}, got {}", json.where(), in_file, version > 3 ? " or U8" : "", type);
    }
    entries.erase(found);
  }
  if (version <= 3 && unit.quantizer.method == rotated_pq_method().name) {
    try {
      unit.quantizer = with_byte_tables(std::move(unit.quantizer));
    } catch (const std::invalid_argument& error) {
      throw_failure("plan", "{}: {}", json.where(), error.what());
    }
  }
  if (version > 1 && !json.at("predicted_kl").is_null()) unit.predicted_kl = json.number("predicted_kl", 0);
  return unit;
}

Json provenance_json(const Provenance& provenance) {
  auto texts = Json::array();
  for (const auto& text : provenance.texts) texts.push_back({{"name", text.name}, {"sha256", text.sha256}});
  return {{"program", provenance.program},
          {"method", provenance.method},
          {"units", provenance.units},
          {"bits", provenance.bits},
          {"context", provenance.context},
          {"texts", std::move(texts)},
          {"num_samples", provenance.num_samples},
          {"sequence_length", provenance.sequence_length},
          {"seed", provenance.seed},
          {"device", provenance.device}};
}

std::string one_of(const JsonObject& json, std::string_view field, const std::vector<std::string>& words) {
  std::string word = json.string(field);
  if (std::find(words.begin(), words.end(), word) == words.end())
    json.refuse(field, fmt::format("one of {}", fmt::join(words, ", ")));
  return word;
}

Provenance read_provenance(const JsonObject& json) {
  json.expect_only({"program", "method", "units", "bits", "context", "texts", "num_samples", "sequence_length", "seed", "device"});
  Provenance provenance;
  provenance.program = json.string("program");
  provenance.method = one_of(json, "method", quantizer_names());
  provenance.units = one_of(json, "units", {"uniform", "layer", "kv", "head"});
  provenance.bits = json.number("bits", 0, 64);
  provenance.context = static_cast<int>(json.integer("context", 1, kMaxContext));
  if (!json.at("texts").is_array()) json.refuse("texts", "a list");
  for (const auto& item : json.at("texts")) {
    const JsonObject text(item, json.where() + ": texts");
    text.expect_only({"name", "sha256"});
    provenance.texts.push_back({text.string("name"), text.string("sha256")});
  }
  const bool read_any = json.integer("num_samples", 0, kMaxSamples) > 0;
  if (!read_any && !provenance.texts.empty()) json.refuse("texts", "none where there are no samples");
  provenance.num_samples = static_cast<int>(json.integer("num_samples"));
  provenance.sequence_length = static_cast<int>(json.integer("sequence_length", read_any ? 1 : 0, read_any ? kMaxContext : 0));
  if (!json.at("seed").is_number_unsigned()) json.refuse("seed", "a whole number from 0");
  provenance.seed = json.at("seed").get<std::uint64_t>();
  provenance.device = one_of(json, "device", {"cpu", "gpu"});
  return provenance;
}

Json plan_json(const Plan& plan) {
  auto units = Json::array();
  for (const auto& unit : plan.units) units.push_back(unit_json(unit));
  auto sliding = Json::array();
  for (const auto& [layer, window] : plan.sliding) sliding.push_back({{"layer", layer}, {"window", window}});
  Json json = {
      {"model", model_json(plan.model)}, {"window", plan.window},         {"sinks", plan.sinks},
      {"units", std::move(units)},       {"sliding", std::move(sliding)}, {"provenance", provenance_json(plan.provenance)}};
  json["predicted_kl"] = plan.predicted_kl ? Json(*plan.predicted_kl) : Json(nullptr);
  json["effective_bits"] = effective_bits(plan);
  return json;
}

// Names of text files need not be UTF-8, and a plan must not be lost for that.
std::string plan_text(const Plan& plan) {
  return plan_json(plan).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Over the JSON and, in order of name, the shapes and bytes of all tensors.
std::string checksum(const std::string& json, const Entries& entries) {
  Sha256 hash;
  hash.add(json);
  for (const auto& [name, entry] : entries) {
    hash.add(fmt::format("\n{}", name));
    for (const auto size : entry.shape) hash.add(fmt::format(" {}", size));
    hash.add({reinterpret_cast<const char*>(entry.data.data()), entry.data.size()});
  }
  return hash.hex();
}

Entries all_entries(const Plan& plan) {
  Entries entries;
  const auto add = [&](const UnitPlan& unit, const auto& tensors, const char* type) {
    for (const auto& [name, tensor] : tensors)
      entries.emplace(tensor_name(unit, name), SafetensorsEntry{type, tensor.shape, std::as_bytes(std::span(tensor.values))});
  };
  for (const auto& unit : plan.units) {
    add(unit, unit.quantizer.tensors, "F32");
    add(unit, unit.quantizer.byte_tensors, "U8");
  }
  return entries;
}

const std::string& metadata_field(const SafetensorsFile& file, const std::string& field, const std::string& path) {
  const auto found = file.metadata().find(field);
  if (found == file.metadata().end()) throw_failure("plan", "{}: no {} in the metadata: not a plan", path, field);
  return found->second;
}

Plan parse_plan(const std::string& text, int version, Entries entries, const std::string& where) {
  const auto document = parse_json(text, where);
  const JsonObject json(document, where);
  std::vector<std::string_view> fields = {"model", "window", "sinks", "units", "provenance", "predicted_kl", "effective_bits"};
  if (version > 2) fields.push_back("sliding");
  json.expect_only(fields);
  Plan plan;
  plan.model = read_model(json.object("model"));
  plan.window = static_cast<int>(json.integer("window", 0, kMaxSize));
  plan.sinks = static_cast<int>(json.integer("sinks", 0, kMaxSize));
  if (!json.at("units").is_array()) json.refuse("units", "a list");
  for (const auto& item : json.at("units"))
    plan.units.push_back(read_unit({item, fmt::format("{}: units[{}]", where, plan.units.size())}, version, entries));
  if (version > 2) {
    if (!json.at("sliding").is_array()) json.refuse("sliding", "a list");
    for (const auto& item : json.at("sliding")) {
      const JsonObject layer(item, fmt::format("{}: sliding[{}]", where, plan.sliding.size()));
      layer.expect_only({"layer", "window"});
      plan.sliding.push_back(
          {static_cast<int>(layer.integer("layer", 0, kMaxLayers)), static_cast<int>(layer.integer("window", 1, kMaxContext))});
    }
  }
  plan.provenance = read_provenance(json.object("provenance"));
  if (!json.at("predicted_kl").is_null()) plan.predicted_kl = json.number("predicted_kl", 0);
  if (!entries.empty()) throw_failure("plan", "{}: tensor {} belongs to no unit", where, entries.begin()->first);
  try {
    check_plan(plan);
  } catch (const std::invalid_argument& error) {
    throw_failure("plan", "{}: {}", where, error.what());
  }
  const double bits = effective_bits(plan);
  json.number("effective_bits", bits * (1 - 1e-9), bits * (1 + 1e-9));
  return plan;
}

}  // namespace

void write_plan(const Plan& plan, const std::filesystem::path& path) {
  const std::string json = plan_text(plan);
  const Entries entries = all_entries(plan);
  parse_plan(json, kVersion, entries, path.string());  // so that what is written can be read
  write_entries(
      path, entries,
      {{"format", kFormat}, {"version", std::to_string(kVersion)}, {"plan", json}, {"checksum", checksum(json, entries)}});
}

Plan read_plan(const std::filesystem::path& path) {
  const std::string where = path.string();
  const SafetensorsFile file(path);
  if (metadata_field(file, "format", where) != kFormat)
    throw_failure("plan", "{}: format: expected {}, got {}", where, kFormat, file.metadata().at("format"));
  const std::string& version = metadata_field(file, "version", where);
  if (version.size() != 1 || version[0] < '1' || version[0] > '0' + kVersion)
    throw_failure("plan", "{}: version: expected 1 to {}, got {}", where, kVersion, version);
  if (file.metadata().size() != 4)
    throw_failure("plan", "{}: expected the metadata format, version, plan and checksum, got {} fields", where,
                  file.metadata().size());
  const std::string& json = metadata_field(file, "plan", where);
  if (metadata_field(file, "checksum", where) != checksum(json, file.tensors()))
    throw_failure("plan", "{}: the checksum does not match: the file is damaged", where);
  return parse_plan(json, version[0] - '0', file.tensors(), where);
}

std::string plan_identity(const Plan& plan) {
  return fmt::format("{} {} {:.3g} bits {}", plan.model.architecture, plan.provenance.method, effective_bits(plan),
                     checksum(plan_text(plan), all_entries(plan)));
}

Json describe_plan(const Plan& plan) {
  Json json = plan_json(plan);
  json["constant_bytes"] = constant_bytes(plan);
  json["bytes_per_token"] = bytes_per_token(plan);
  json["sliding_bytes"] = sliding_bytes(plan.model, plan.sliding, plan.provenance.context);
  auto contexts = Json::object();  // 16 bits: of the same keys and values
  for (const std::int64_t tokens : {std::int64_t{plan.provenance.context}, std::int64_t{32768}})
    contexts[std::to_string(tokens)] = {{"effective_bits", effective_bits(plan, tokens)},
                                        {"bytes", cache_bytes(plan, tokens)},
                                        {"bytes_at_16_bits", full_bytes(plan, tokens)}};
  json["contexts"] = std::move(contexts);
  for (std::size_t i = 0; i < plan.units.size(); ++i) json["units"][i]["bits"] = make_quantizer(plan.units[i].quantizer)->rate();
  return json;
}

}  // namespace veloxquant

// The file of a plan (docs/plan_format.md).
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// Writes a safetensors file atomically: same plan, same bytes.  Throws std::runtime_error for a plan that read_plan() would
/// refuse.
void write_plan(const Plan& plan, const std::filesystem::path& path);

/// Reads it strictly.  Throws std::runtime_error that names the file and what is wrong: damage (by the checksum), another version,
/// fields or tensors that are missing, unknown or of the wrong shape, values that are not finite, units that do not cover the
/// model.
Plan read_plan(const std::filesystem::path& path);

/// Names a plan among all others: what it is for and how it stores, for people, and the checksum of its file.
std::string plan_identity(const Plan& plan);

/// What the file's JSON says, for people and tools: the plan without its tensors, and what follows from it (effective bits, bytes).
nlohmann::ordered_json describe_plan(const Plan& plan);

}  // namespace veloxquant

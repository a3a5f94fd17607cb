// Caches of a model in a file, to go on from another day.
#pragma once

#include <filesystem>
#include <memory>
#include <span>

#include "veloxquant/model/attention_cache.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// Writes the caches of all layers, as packed_factory(plan) made them, into a safetensors file atomically: the same caches, the
/// same bytes.  Tensors are layers.{layer}.{name of SavableCache::state}; the metadata names the plan (plan_identity) and has a
/// checksum over names, shapes and data.  Throws std::invalid_argument for other caches, std::runtime_error where it cannot be
/// written.
void save_caches(const std::filesystem::path& path, std::span<const std::unique_ptr<AttentionCache>> caches, const Plan& plan);

/// Reads them strictly.  Throws std::runtime_error that names the file and what is wrong: damage, another version, caches of
/// another plan, arrays that do not fit.
AttentionCaches load_caches(const std::filesystem::path& path, const Plan& plan);

}  // namespace veloxquant

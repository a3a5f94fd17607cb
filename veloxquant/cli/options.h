// Options that several commands share, under one name with one meaning.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "veloxquant/model/model.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant::cli {

/// Where a command runs and what it draws at random.
struct RunOptions {
  std::string device = "auto";
  std::uint64_t seed = 0;
  bool json = false;

  void add_to(CLI::App& command);

  /// The device that the user asked for; "gpu" on a machine without one is an error.
  DeviceScope enter() const { return DeviceScope(resolve_device(device)); }
};

/// The text that a command lets the model read.
struct TextOptions {
  std::vector<std::string> files;  // none: the model's own text
  int num_samples;
  int length;

  void add_to(CLI::App& command);
};

/// A model and its tokenizer, from one folder; they must fit each other.
struct LoadedModel {
  Model model;
  Tokenizer tokenizer;
};

LoadedModel load_model(const std::string& folder);

/// "table or JSON": prints JSON if asked for.
void print_json(const nlohmann::ordered_json& json);

}  // namespace veloxquant::cli

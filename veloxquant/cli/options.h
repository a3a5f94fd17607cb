// Options that several commands share, under one name with one meaning.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "veloxquant/model/model.h"
#include "veloxquant/plan/plan.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant::cli {

/// Where a command runs and what it draws at random.
struct RunOptions {
  std::string device = "auto";
  std::uint64_t seed = 0;

  /// `remark` stands behind what help says of both options.
  void add_to(CLI::App& command, const std::string& remark = "");

  /// The device that the user asked for; "gpu" on a machine without one is an error.
  DeviceScope enter() const { return DeviceScope(resolve_device(device)); }
};

/// The text that a command lets the model read.
struct TextOptions {
  std::vector<std::string> files;  // none: the model's own text

  void add_to(CLI::App& command);

  /// Contents of the files.
  std::vector<std::string> read() const;
};

/// How much of it calibration reads.
struct SampleOptions {
  int num_samples = 32, length = 512;

  /// `defaults`, where neither number is set, says in help what a command takes then.
  void add_to(CLI::App& command, const std::string& defaults = "");
};

/// What help says of RunOptions in commands that run no model and draw nothing: they take them so that every command does.
inline constexpr const char* kNoEffect = " (no effect on this command)";

/// Accepts finite numbers above 0 (CLI11's own check lets NaN pass).
CLI::Validator positive_number();

/// Accepts whole numbers from `least` to `most` (CLI11 wraps negative ones and says nothing of a range).
CLI::Validator whole_number(std::uint64_t least, std::uint64_t most = std::numeric_limits<int>::max());

/// Accepts a positive number of tokens and writes it out: "2048" or "2k" (k: 1024).  For transform(), not check().
CLI::Validator token_count();

/// Accepts a positive number of bytes and writes it out: "1000000", "2GiB", "1.5 GB".  For transform(), not check().
CLI::Validator byte_count();

void add_json_flag(CLI::App& command, bool& json);

/// A model and its tokenizer, from one folder; they must fit each other.
struct LoadedModel {
  Model model;
  Tokenizer tokenizer;
};

LoadedModel load_model(const std::string& folder);

/// A plan that must have been made for the model in `folder`; otherwise throws std::runtime_error that names both.
Plan read_plan_for(const Model& model, const std::string& folder, const std::string& path);

void print_json(const nlohmann::ordered_json& json);

/// A word of a shell command, quoted where it has to be.
std::string shell_word(const std::string& word);

}  // namespace veloxquant::cli

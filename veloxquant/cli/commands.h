// The commands of the program: one file each, found through this table.
#pragma once

#include <CLI/CLI.hpp>

#include "veloxquant/plan/plan.h"

namespace veloxquant::cli {

/// Each adds one command with its options, help and example; parsing it runs the command, whose failures are exceptions.
void add_calibrate(CLI::App& program);
void add_sensitivity(CLI::App& program);
void add_allocate(CLI::App& program);
void add_inspect(CLI::App& program);
void add_verify(CLI::App& program);
void add_evaluate(CLI::App& program);
void add_generate(CLI::App& program);

}  // namespace veloxquant::cli

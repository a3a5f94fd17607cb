// A plan in words and tables.
#pragma once

#include <optional>
#include <string>

#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// "layer_3 keys head 1"; without a head all of the side.
std::string unit_name(int layer, Side side, std::optional<int> head);

/// What it is for and where it came from, its bits and bytes, the bits of every layer, and the units with most at stake.
std::string plan_summary(const Plan& plan);

}  // namespace veloxquant

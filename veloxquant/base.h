// The stable interface of veloxquant::base: plans, quantizers, allocation and text, without models and without MLX.
//
// Stable: the names below, in backticks, keep their parameters, fields and meaning in all releases of one minor version, and the
// changelog says how the next one differs.  Everything else in these headers, and every other header, may change in any release.
// Plan files are stable on their own: docs/plan_format.md.
#pragma once

// Failures are std::invalid_argument (what the caller passed) and std::runtime_error (files, devices), "[where] what was wrong".
// The library prints nothing: `set_warning_handler` receives warnings, a `ProgressCallback` hears of long work and stops it by
// throwing, such as `Interrupted`.
#include "veloxquant/core/progress.h"
#include "veloxquant/core/warning.h"

// Plans: a `Plan` says by `UnitPlan` how each `Side` of every layer is stored, and by `Provenance` and `ModelIdentity` where it
// came from and what it is for.  Files: `read_plan`, `write_plan`; checks: `check_plan`, `check_identity`; for people:
// `describe_plan`. Sizes: `effective_bits`, `cache_bytes`, `bytes_per_token`, `constant_bytes`, `exact_parameters` (window and
// sinks).
#include "veloxquant/plan/plan.h"
#include "veloxquant/plan/plan_file.h"

// Quantizers: `make_quantizer` turns the `QuantizerParameters` of a unit into a `Quantizer`, which encodes and decodes from many
// threads.  `quantizer_methods` and `quantizer_method` list each `QuantizerMethod`: its widths, its rate, and how it fits to a
// `Tensor`'s rows with `FitOptions`.
#include "veloxquant/quantize/registry.h"

// Allocation: `allocate` gives every unit one `AllocationOption` within a budget, exactly; `allocation_frontier` says what other
// budgets buy.  RateQuant's way from a `SensitivityResult` (`sensitivities_from_json` reads what `veloxquant sensitivity --json`
// writes) over a `DistortionCurve` (`fit_distortion_curve`) to bits by layer (`allocate_bits_ratequant`, a `LayerMap`).
#include "veloxquant/plan/allocation.h"
#include "veloxquant/plan/distortion_curve.h"
#include "veloxquant/plan/sensitivity.h"

// Text: a `Tokenizer` of a Hugging Face folder; a `TokenBatch` of samples, by `cut_samples` or `leading_windows`.
#include "veloxquant/text/samples.h"
#include "veloxquant/text/tokenizer.h"

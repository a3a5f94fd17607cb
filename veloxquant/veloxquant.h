// The stable interface of veloxquant: what base.h holds, models, making plans, and measuring them.  base.h says what stable means.
#pragma once

#include "veloxquant/base.h"

// Models: `Model` loads a Hugging Face folder and says its `ModelConfig`; it runs on the device of a `DeviceScope`, which
// `resolve_device` gives by name.  On CUDA set MLX_ENABLE_TF32=0 in the environment first, as the program does: divergences of 1e-4
// nats drown in TF32.
#include "veloxquant/model/device.h"
#include "veloxquant/model/model.h"

// Making plans: `calibration_set` (the model's own text, yours, or both, with facts sown in) is what `make_adjoint_plan` reads for
// the best plan within `AdjointPlanOptions` (`Units` with widths of their own, `Rotation` of keys) → `AdjointPlan`.  The published
// methods: `calibration_samples`, or `generate_own_text` alone, and `make_plan` with `PlanOptions`.
#include "veloxquant/calibrate/adjoint_plan.h"
#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/generate/own_text.h"

// The documented allocators: `allocators::ratequant::calibrate_layer_sensitivities`, `allocators::vecinfer::train_codebook` and
// what stands beside them in these two headers, all of it stable.
#include "veloxquant/allocators/ratequant.h"
#include "veloxquant/allocators/vecinfer.h"

// Running: `Model::make_caches` takes a `CacheFactory`, `FullCache` or `restoring_factory` of a plan, and `Model::forward` and
// `Model::logits` run with these caches.
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/model/attention.h"

// Measuring: `evaluate` compares each `Storage` (`plan_storage`, `peer_storage`, `peer_names`) with full precision → an
// `EvaluationRow` each, with `Measures` of its KL, their standard errors and a `PairedDifference` to every other row; with
// `RecallDocuments` of `make_recall_documents` also what facts are still answered.  `ScoringOptions` say from which position windows
// are scored, in which steps, and by which `SavedLogits` (`read_logits`, `write_logits`).
#include "veloxquant/evaluate/evaluate.h"
#include "veloxquant/evaluate/peers.h"
#include "veloxquant/text/recall.h"

// The plan: how every unit of a model's cache is stored, and where that came from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "veloxquant/plan/model_identity.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// One side of one layer, all KV heads together, keys after RoPE.
struct UnitPlan {
  int layer = 0;
  Side side = Side::kKeys;
  QuantizerParameters quantizer;

  bool operator==(const UnitPlan&) const = default;
};

struct TextSource {
  std::string name;    // file name, without folders
  std::string sha256;  // of its bytes, in hex

  bool operator==(const TextSource&) const = default;
};

/// Where a plan came from: enough to make it again.
struct Provenance {
  std::string program;            // "veloxquant 0.1.0"
  std::string method;             // as asked for
  std::string units;              // "uniform" or "layer"
  double bits = 0;                // as asked for
  int context = 0;                // tokens at which bits are counted; with neither window nor sinks they are the same at any
  std::vector<TextSource> texts;  // none: the model's own text, if there are samples
  int num_samples = 0;            // 0 where nothing had to be read: no text then, and a length of 0
  int sequence_length = 0;
  std::uint64_t seed = 0;
  std::string device;

  bool operator==(const Provenance&) const = default;
};

struct Plan {
  ModelIdentity model;
  std::vector<UnitPlan> units;  // keys, then values, of layer 0, then of layer 1, …
  Provenance provenance;
  std::optional<double> predicted_kl;  // nats a token, where sensitivities were measured

  bool operator==(const Plan&) const = default;
};

/// Bits stored per element of keys and values, averaged over units: codes, scales and norms.  What is constant per model is
/// constant_bytes().  With neither window nor sinks it is the same at any context.
double effective_bits(const Plan& plan);

/// Bytes of the tensors that a plan needs beside the tokens: codebooks, smooth factors.
std::size_t constant_bytes(const Plan& plan);

/// Bytes that the keys and values of one token take in all layers and KV heads.
double bytes_per_token(const Plan& plan);

/// Throws std::runtime_error that names what differs, unless the plan was made for this model.
void check_identity(const Plan& plan, const ModelIdentity& model);

/// Throws std::invalid_argument that names the unit and the field, unless the units cover each side of every layer once, in order,
/// and every quantizer can be made and fits the model's head_dim.
void check_plan(const Plan& plan);

}  // namespace veloxquant

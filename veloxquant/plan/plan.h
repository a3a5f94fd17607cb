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

/// One side of one layer: all KV heads together, or one of them.  Keys after RoPE, or before it where the method says so.
struct UnitPlan {
  int layer = 0;
  Side side = Side::kKeys;
  QuantizerParameters quantizer;
  std::optional<int> head = std::nullopt;             // none: all
  std::optional<double> predicted_kl = std::nullopt;  // nats a token, where it was predicted

  bool operator==(const UnitPlan&) const = default;
};

/// A layer whose queries see a sliding window, of which the plan leaves the last `window` tokens as they are (16 bits).
struct SlidingLayer {
  int layer = 0, window = 0;

  bool operator==(const SlidingLayer&) const = default;
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
  std::string units;              // "uniform", "layer", "kv" or "head"
  double bits = 0;                // as asked for, or what as many bytes as asked for are
  int context = 0;                // tokens at which bits are counted
  std::vector<TextSource> texts;  // none: the model's own text, if there are samples
  int num_samples = 0;            // 0 where nothing had to be read: no text then, and a length of 0
  int sequence_length = 0;
  std::uint64_t seed = 0;
  std::string device;

  bool operator==(const Provenance&) const = default;
};

struct Plan {
  ModelIdentity model;
  int window = 0;                          // so many of the most recent tokens are kept at 8 bits
  int sinks = 0;                           // and so many of the first
  std::vector<UnitPlan> units;             // keys, then values, of layer 0, then of layer 1, …; head by head where they are apart
  std::vector<SlidingLayer> sliding = {};  // layers without units, ascending
  Provenance provenance;
  std::optional<double> predicted_kl;  // nats a token, where it was predicted

  bool operator==(const Plan&) const = default;
};

/// Tokens kept at 8 bits where nothing else is said.
inline constexpr int kDefaultWindow = 32, kDefaultSinks = 4;

/// Longest context at which a plan may count bits: far beyond any model.
inline constexpr std::int64_t kMaxContext = 1 << 30;

/// How tokens of the window and sinks are stored: 8-bit codes, with a scale and an offset of 16 bits for each 64 channels.
QuantizerParameters exact_parameters(Side side, int head_dim);

/// Bytes of the keys and values of one sequence of `tokens` tokens in the layers that have units, everything stored per token
/// counted: codes, scales, norms, patches, window and sinks.
std::int64_t cache_bytes(const Plan& plan, std::int64_t tokens);

/// What cache_bytes would be with every element in 16 bits.
std::int64_t full_bytes(const Plan& plan, std::int64_t tokens);

/// Bytes of the layers that slide beside them: 16 bits an element.
std::int64_t sliding_bytes(const ModelIdentity& model, const std::vector<SlidingLayer>& sliding, std::int64_t tokens);

/// cache_bytes as bits per element of keys and values, at a context of `tokens`, or at the one that the plan was made for.
double effective_bits(const Plan& plan, std::int64_t tokens);
double effective_bits(const Plan& plan);

/// Bytes of the tensors that a plan needs beside the tokens: codebooks, rotations, smooth factors.
std::size_t constant_bytes(const Plan& plan);

/// Bytes that each further token takes in all layers and KV heads, once window and sinks are full.
double bytes_per_token(const Plan& plan);

/// Throws std::runtime_error that names what differs, unless the plan was made for this model.
void check_identity(const Plan& plan, const ModelIdentity& model);

/// Throws std::invalid_argument that names the unit and the field, unless the units cover each side of every layer that is not in
/// `sliding` once, in order of layer, side and head, window and sinks are 0 to 65,536, and every quantizer can be made and fits the
/// model's head_dim.
void check_plan(const Plan& plan);

}  // namespace veloxquant

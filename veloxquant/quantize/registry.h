// The table of quantizers.  A new one is its own file and a row here (docs/add_a_quantiser.md).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/core/tensor.h"
#include "veloxquant/quantize/quantizer.h"

namespace veloxquant {

enum class Side { kKeys, kValues };

/// "keys" or "values".
std::string_view to_string(Side side);

/// All that a quantizer is made from, in the form in which plans store it.
struct QuantizerParameters {
  std::string method;                           // a name in quantizer_methods()
  Side side = Side::kKeys;                      // KIVI groups keys and values differently; others ignore it
  int dim = 0;                                  // elements of a vector
  std::map<std::string, std::int64_t> numbers;  // such as "bits", "group_size", "seed"
  std::map<std::string, Tensor> tensors;  // such as "smooth_factors" [dim], "codebook" [num_subspaces, num_centroids, subspace_dim]
  std::map<std::string, ByteTensor> byte_tensors = {};  // such as "entries"; names are other ones than those of tensors

  bool operator==(const QuantizerParameters&) const = default;
};

struct FitOptions {
  Side side = Side::kKeys;
  double width = 2;        // bits of codes per element, one of the method's widths()
  std::uint64_t seed = 0;  // of everything random in fitting
  int max_iter = 100;      // of K-means, where the method has any
};

struct QuantizerMethod {
  std::string_view name;

  /// The dims that the method offers widths for, in words: "a power of two".
  std::string_view dims;

  /// Widths (bits of codes per element, ascending) that the method offers for vectors of `dim`; empty: it cannot store such
  /// vectors.
  std::vector<double> (*widths)(int dim);

  /// Bits stored per element at a width, scales and norms included: what Quantizer::rate() of the fitted quantizer says.  Throws
  /// for a width or dim that the method does not offer, as fit does.
  double (*rate)(int dim, double width);

  /// Fits to vectors [tokens, dim].  Throws std::invalid_argument for a width or dim that the method does not offer, and for values
  /// that are not finite.
  QuantizerParameters (*fit)(std::span<const float> vectors, int dim, const FitOptions& options);

  /// Builds the quantizer, checking every number and tensor: throws std::invalid_argument that names the one that is missing, of
  /// the wrong shape, not finite, out of range or not known to the method.
  std::unique_ptr<const Quantizer> (*make)(const QuantizerParameters& parameters);

  /// Vectors that fitting needs at least; 0: it looks at none (scalar quantizers).
  std::int64_t least_vectors;

  /// Whether keys are stored as the model's linear map gives them, to be turned by RoPE when they are read.
  bool keys_before_rope = false;

  bool learns() const { return least_vectors > 0; }
};

/// affine, kivi, turboquant, vecinfer, rotated_pq.
std::span<const QuantizerMethod> quantizer_methods();

/// Throws std::invalid_argument that lists the names there are.
const QuantizerMethod& quantizer_method(std::string_view name);

/// Names of all methods, or of those that need no vectors to fit to.
std::vector<std::string> quantizer_names();
std::vector<std::string> scalar_quantizer_names();

/// Throws std::invalid_argument that says what is accepted, unless the method offers widths for `dim`.
void check_dim(const QuantizerMethod& method, int dim);

/// quantizer_method(parameters.method).make(parameters).
std::unique_ptr<const Quantizer> make_quantizer(const QuantizerParameters& parameters);

}  // namespace veloxquant

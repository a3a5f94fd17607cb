#include "veloxquant/model/ops.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <stdexcept>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "veloxquant/kernels/gate.h"
#include "veloxquant/kernels/linear.h"
#include "veloxquant/kernels/rms_norm.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

std::size_t rows_of(const mx::array& x) {
  return x.size() / static_cast<std::size_t>(x.shape(-1));
}

mx::Shape with_last(mx::Shape shape, int size) {
  shape.back() = size;
  return shape;
}

// Gradients go through activations alone; weights are fixed here.
[[noreturn]] void refuse_weight_gradient(const char* operation) {
  throw std::logic_error(std::string(operation) + " has no gradient by its weights");
}

// Biases are the inputs from the second one on, for those maps that have one.
std::vector<LinearMap> maps_of(const std::vector<Matrix>& weights, const std::vector<bool>& biased,
                               const std::vector<mx::array>& inputs) {
  std::vector<LinearMap> maps;
  std::size_t bias = 1;
  for (std::size_t i = 0; i < weights.size(); ++i)
    maps.push_back(
        {weights[i].stored(), biased[i] ? inputs[bias++].data<float>() : nullptr, static_cast<std::size_t>(weights[i].rows())});
  return maps;
}

int total_rows(const std::vector<Matrix>& weights) {
  return std::accumulate(weights.begin(), weights.end(), 0, [](int sum, const Matrix& weight) { return sum + weight.rows(); });
}

}  // namespace

void Linear::add(Matrix weight, std::optional<mx::array> bias) {
  weights_.push_back(std::move(weight));
  biases_.push_back(std::move(bias));
}

void Linear::prepare() const {
  for (const auto& weight : weights_) weight.stored();
}

mx::array Linear::operator()(const mx::array& x, const std::optional<mx::array>& residual) const {
  if (!own_kernels()) {
    const auto outputs = parts(x);
    const auto joined = outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, -1);
    return residual ? mx::add(*residual, joined) : joined;
  }
  prepare();
  std::vector<mx::array> inputs = {mx::contiguous(x)};
  std::vector<bool> biased;
  for (const auto& bias : biases_) {
    biased.push_back(bias.has_value());
    if (bias) inputs.push_back(*bias);
  }
  if (residual) inputs.push_back(mx::contiguous(*residual));
  return cpu_operation(
      "Linear", std::move(inputs), {with_last(x.shape(), total_rows(weights_))},
      [weights = weights_, biased, has_residual = residual.has_value()](const auto& in, auto& out) {
        linear(in[0].template data<float>(), rows_of(in[0]), static_cast<std::size_t>(in[0].shape(-1)),
               maps_of(weights, biased, in), has_residual ? in.back().template data<float>() : nullptr,
               out[0].template data<float>());
      },
      [self = *this, has_residual = residual.has_value()](const auto& in, const auto&, const auto& gradients, const auto& wanted) {
        std::vector<mx::array> results;
        for (const int input : wanted) {
          if (input == 0) {
            results.push_back(self.backward(gradients[0]));
          } else if (has_residual && input == static_cast<int>(in.size()) - 1) {
            results.push_back(gradients[0]);
          } else {
            refuse_weight_gradient("Linear");
          }
        }
        return results;
      })[0];
}

mx::array Linear::backward(const mx::array& gradient) const {
  if (!own_kernels()) {
    std::optional<mx::array> sum;
    int begin = 0;
    for (const auto& weight : weights_) {
      mx::Shape first(gradient.ndim(), 0), last = gradient.shape();
      first.back() = begin;
      last.back() = begin += weight.rows();
      const auto part = weight.product_back(mx::slice(gradient, first, last));
      sum = sum ? mx::add(*sum, part) : part;
    }
    return *sum;
  }
  prepare();
  return cpu_operation("LinearBackward", {mx::contiguous(gradient)}, {with_last(gradient.shape(), weights_[0].columns())},
                       [weights = weights_](const auto& in, auto& out) {
                         linear_backward(in[0].template data<float>(), rows_of(in[0]), static_cast<std::size_t>(out[0].shape(-1)),
                                         maps_of(weights, std::vector<bool>(weights.size(), false), in),
                                         out[0].template data<float>());
                       })[0];
}

std::vector<mx::array> Linear::parts(const mx::array& x) const {
  if (own_kernels()) {
    if (weights_.size() == 1) return {(*this)(x)};
    mx::Shape ends;
    for (std::size_t i = 0; i + 1 < weights_.size(); ++i) ends.push_back((i > 0 ? ends.back() : 0) + weights_[i].rows());
    return mx::split((*this)(x), ends, -1);
  }
  std::vector<mx::array> outputs;
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    const auto product = weights_[i].product(x);
    outputs.push_back(biases_[i] ? mx::add(product, *biases_[i]) : product);
  }
  return outputs;
}

mx::array embed(const Matrix& table, const mx::array& tokens) {
  if (!own_kernels()) return table.take(tokens);
  table.stored();  // kernels find it there
  auto shape = tokens.shape();
  shape.push_back(table.columns());
  return cpu_operation("Embed", {mx::contiguous(tokens)}, {shape}, [table](const auto& in, auto& out) {
    const std::int32_t* token = in[0].template data<std::int32_t>();
    float* row = out[0].template data<float>();
    const auto columns = static_cast<std::size_t>(table.columns());
    for (std::size_t i = 0; i < in[0].size(); ++i, row += columns)
      restore(table.stored(), columns, {static_cast<std::size_t>(token[i]), 1, 0, columns}, row);
  })[0];
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  if (!own_kernels()) return mx::fast::rms_norm(x, weight, eps);
  const auto backward = [eps](const mx::array& input, const mx::array& scale, const mx::array& gradient) {
    return cpu_operation(
        "RmsNormBackward", {input, scale, mx::contiguous(gradient)}, {input.shape()}, [eps](const auto& in, auto& out) {
          rms_norm_backward(in[0].template data<float>(), in[1].template data<float>(), in[2].template data<float>(),
                            out[0].template data<float>(), rows_of(in[0]), in[1].size(), eps);
        })[0];
  };
  return cpu_operation(
      "RmsNorm", {mx::contiguous(x), weight}, {x.shape()},
      [eps](const auto& in, auto& out) {
        rms_norm(in[0].template data<float>(), in[1].template data<float>(), out[0].template data<float>(), rows_of(in[0]),
                 in[1].size(), eps);
      },
      [backward](const auto& in, const auto&, const auto& gradients, const auto& wanted) {
        if (wanted != std::vector<int>{0}) refuse_weight_gradient("RmsNorm");
        return std::vector<mx::array>{backward(in[0], in[1], gradients[0])};
      })[0];
}

mx::array activate(Activation activation, const mx::array& x) {
  if (activation == Activation::kSilu) return mx::multiply(x, mx::sigmoid(x));
  const auto cubic = mx::multiply(x, mx::add(mx::array(1.0f), mx::multiply(mx::array(0.044715f), mx::square(x))));
  const float scale = 2 * std::sqrt(2 / std::numbers::pi_v<float>);
  return mx::multiply(x, mx::sigmoid(mx::multiply(mx::array(scale), cubic)));
}

mx::array gate(Activation activation, const Linear& gate_up, const mx::array& x) {
  if (!own_kernels()) {
    const auto parts = gate_up.parts(x);
    return mx::multiply(activate(activation, parts[0]), parts[1]);
  }
  const auto joined = gate_up(x);
  const int width = joined.shape(-1) / 2;
  return cpu_operation(
      "Gate", {joined}, {with_last(joined.shape(), width)},
      [activation](const auto& in, auto& out) {
        gate_joined(activation, in[0].template data<float>(), out[0].template data<float>(), rows_of(out[0]),
                    static_cast<std::size_t>(out[0].shape(-1)));
      },
      [activation](const auto& in, const auto&, const auto& gradients, const auto&) {
        return cpu_operation(
            "GateBackward", {in[0], mx::contiguous(gradients[0])}, {in[0].shape()}, [activation](const auto& read, auto& out) {
              gate_joined_backward(activation, read[0].template data<float>(), read[1].template data<float>(),
                                   out[0].template data<float>(), rows_of(read[1]), static_cast<std::size_t>(read[1].shape(-1)));
            });
      })[0];
}

}  // namespace veloxquant

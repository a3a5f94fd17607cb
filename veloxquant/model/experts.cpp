#include "veloxquant/model/experts.h"

#include <algorithm>
#include <utility>

#include "mlx/ops.h"
#include "veloxquant/kernels/gate.h"
#include "veloxquant/kernels/linear.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

// The tokens that the expert of an index sees, and what it makes of them.
class Visit {
 public:
  // x [tokens, hidden]; chosen [tokens, per_token].
  Visit(const ExpertStacks& experts, Activation activation, const float* x, const std::int32_t* chosen, int index,
        std::size_t tokens, std::size_t per_token)
      : activation_(activation),
        hidden_(static_cast<std::size_t>(experts.gate.columns())),
        inner_(static_cast<std::size_t>(experts.gate.rows())),
        gate_up_{{experts.gate.stored(index), nullptr, inner_}, {experts.up.stored(index), nullptr, inner_}},
        down_{{experts.down.stored(index), nullptr, hidden_}} {
    for (std::size_t i = 0; i < tokens * per_token; ++i) {
      if (chosen[i] != index) continue;
      places_.push_back(i);
      const float* from = x + i / per_token * hidden_;
      input_.insert(input_.end(), from, from + hidden_);
    }
    joined_.resize(count() * 2 * inner_);
    activated_.resize(count() * inner_);
    output_.resize(count() * hidden_);
    if (count() == 0) return;
    linear(input_.data(), count(), hidden_, gate_up_, nullptr, joined_.data());
    gate_joined(activation_, joined_.data(), activated_.data(), count(), inner_);
    linear(activated_.data(), count(), inner_, down_, nullptr, output_.data());
  }

  std::size_t count() const { return places_.size(); }

  // Where in `chosen` the n-th of its tokens stands.
  std::size_t place(std::size_t n) const { return places_[n]; }
  const float* output(std::size_t n) const { return output_.data() + n * hidden_; }

  // By the input [count, hidden] from those by the output.
  std::vector<float> backward(const std::vector<float>& by_output) const {
    std::vector<float> by_activated(activated_.size()), by_joined(joined_.size()), by_input(input_.size());
    linear_backward(by_output.data(), count(), inner_, down_, by_activated.data());
    gate_joined_backward(activation_, joined_.data(), by_activated.data(), by_joined.data(), count(), inner_);
    linear_backward(by_joined.data(), count(), hidden_, gate_up_, by_input.data());
    return by_input;
  }

 private:
  Activation activation_;
  std::size_t hidden_, inner_;
  std::vector<LinearMap> gate_up_, down_;
  std::vector<std::size_t> places_;
  std::vector<float> input_, joined_, activated_, output_;
};

// Inputs: x [tokens, hidden], chosen [tokens, per_token], weights [tokens, per_token].
template <class Each>
void visit_experts(const ExpertStacks& experts, Activation activation, const std::vector<mx::array>& in, Each each) {
  const auto tokens = static_cast<std::size_t>(in[1].shape(0)), per_token = static_cast<std::size_t>(in[1].shape(1));
  for (int e = 0; e < experts.gate.count(); ++e) {
    const Visit visit(experts, activation, in[0].data<float>(), in[1].data<std::int32_t>(), e, tokens, per_token);
    if (visit.count() > 0) each(visit, per_token);
  }
}

void forward(const ExpertStacks& experts, Activation activation, const std::vector<mx::array>& in, mx::array& out) {
  const auto hidden = static_cast<std::size_t>(out.shape(1));
  float* sum = out.data<float>();
  const float* weights = in[2].data<float>();
  std::fill_n(sum, out.size(), 0.0f);
  visit_experts(experts, activation, in, [&](const Visit& visit, std::size_t per_token) {
    for (std::size_t n = 0; n < visit.count(); ++n) {
      float* to = sum + visit.place(n) / per_token * hidden;
      for (std::size_t i = 0; i < hidden; ++i) to[i] += weights[visit.place(n)] * visit.output(n)[i];
    }
  });
}

// in: as forward's, then the gradient by its output; out: by x and by weights.
void backward(const ExpertStacks& experts, Activation activation, const std::vector<mx::array>& in, std::vector<mx::array>& out) {
  const auto hidden = static_cast<std::size_t>(in[0].shape(1));
  const float *weights = in[2].data<float>(), *gained = in[3].data<float>();
  float *by_x = out[0].data<float>(), *by_weights = out[1].data<float>();
  std::fill_n(by_x, out[0].size(), 0.0f);
  visit_experts(experts, activation, in, [&](const Visit& visit, std::size_t per_token) {
    std::vector<float> by_output(visit.count() * hidden);
    for (std::size_t n = 0; n < visit.count(); ++n) {
      const std::size_t place = visit.place(n);
      const float* from = gained + place / per_token * hidden;
      double product = 0;
      for (std::size_t i = 0; i < hidden; ++i) {
        product += static_cast<double>(from[i]) * visit.output(n)[i];
        by_output[n * hidden + i] = weights[place] * from[i];
      }
      by_weights[place] = static_cast<float>(product);
    }
    const auto by_input = visit.backward(by_output);
    for (std::size_t n = 0; n < visit.count(); ++n) {
      float* to = by_x + visit.place(n) / per_token * hidden;
      for (std::size_t i = 0; i < hidden; ++i) to[i] += by_input[n * hidden + i];
    }
  });
}

}  // namespace

Experts::Experts(Linear router, ExpertStacks experts, const ExpertsConfig& config, Activation activation)
    : router_(std::move(router)), experts_(std::move(experts)), config_(config), activation_(activation) {}

mx::array Experts::operator()(const mx::array& x) const {
  const auto flat = mx::reshape(x, {-1, x.shape(-1)});
  const auto scores = mx::softmax(router_(flat), -1, /* precise= */ true);
  const int tokens = flat.shape(0), chosen_count = config_.per_token;
  const auto order = mx::argpartition(mx::stop_gradient(mx::negative(scores)), chosen_count - 1, -1);
  const auto chosen = mx::astype(mx::slice(order, {0, 0}, {tokens, chosen_count}), mx::int32);
  auto weights = mx::take_along_axis(scores, chosen, -1);
  if (config_.normalized) weights = mx::divide(weights, mx::sum(weights, -1, /* keepdims= */ true));
  if (!own_kernels()) return mx::reshape(by_mlx(flat, chosen, weights), x.shape());
  for (int i = 0; i < experts_.gate.count(); ++i)
    for (const auto* stack : {&experts_.gate, &experts_.up, &experts_.down}) stack->stored(i);  // kernels find them there
  const auto sum = cpu_operation(
      "Experts", {mx::contiguous(flat), mx::contiguous(chosen), mx::contiguous(weights)}, {flat.shape()},
      [experts = experts_, activation = activation_](const auto& in, auto& out) { forward(experts, activation, in, out[0]); },
      [experts = experts_, activation = activation_](const auto& in, const auto&, const auto& gradients, const auto& wanted) {
        const auto all =
            cpu_operation("ExpertsBackward", {in[0], in[1], in[2], mx::contiguous(gradients[0])}, {in[0].shape(), in[2].shape()},
                          [experts, activation](const auto& read, auto& out) { backward(experts, activation, read, out); });
        std::vector<mx::array> results;
        for (const int input : wanted) results.push_back(input == 0 ? all[0] : input == 2 ? all[1] : mx::zeros_like(in[1]));
        return results;
      })[0];
  return mx::reshape(sum, x.shape());
}

mx::array Experts::by_mlx(const mx::array& x, const mx::array& chosen, const mx::array& weights) const {
  const int tokens = x.shape(0), hidden = x.shape(1), visits = tokens * config_.per_token;
  const bool many = in_float32(static_cast<std::size_t>(tokens));
  auto which = mx::astype(mx::flatten(chosen), mx::uint32);
  auto visitors = mx::reshape(mx::broadcast_to(mx::expand_dims(x, 1), {tokens, config_.per_token, hidden}), {visits, 1, hidden});
  // Few wait for their weights alone; many go through each expert together.
  const auto order = mx::argsort(which);
  if (many) which = mx::take(which, order), visitors = mx::take(visitors, order, 0);
  const auto inner =
      mx::multiply(activate(activation_, experts_.gate.product(visitors, which, many)), experts_.up.product(visitors, which, many));
  auto said = experts_.down.product(inner, which, many);
  if (many) said = mx::take(said, mx::argsort(order), 0);
  return mx::sum(mx::multiply(mx::reshape(said, {tokens, config_.per_token, hidden}), mx::expand_dims(weights, -1)), 1);
}

}  // namespace veloxquant

#include "veloxquant/model/matrix.h"

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

// As it was given, and what was made of that.
struct Matrix::Forms {
  std::shared_ptr<const void> owner;
  const float* data = nullptr;
  std::optional<mx::array> array;
  std::optional<PackedMatrix> packed;
  std::once_flag data_made, array_made;
};

namespace {

mx::array rows_of(const mx::array& x, int begin, int end) {
  return mx::slice(x, {begin, 0}, {end, x.shape(1)});
}

mx::array to_float32(const mx::array& x) {
  return mx::astype(x, mx::float32);
}

// Products of few rows, as when text is written token by token, only wait for their weights, which are read as they are stored.
// Those of many are what is measured: activations rounded to bfloat16 alone change a model by more than the storage that is
// measured does.
constexpr std::size_t kFewRows = 64;

mx::Dtype precision_for(const mx::array& x, const mx::array& weights) {
  return x.size() / static_cast<std::size_t>(x.shape(-1)) <= kFewRows ? weights.dtype() : mx::float32;
}

}  // namespace

mx::array restored(const PackedMatrix& x) {
  return mx::dequantize(x.weight, x.scales, x.biases, x.packing.group_size, x.packing.bits, x.packing.mode, std::nullopt,
                        mx::float32);
}

Matrix::Matrix(std::shared_ptr<const void> owner, const float* data, int rows, int columns)
    : forms_(std::make_shared<Forms>()), rows_(rows), columns_(columns) {
  forms_->owner = std::move(owner);
  forms_->data = data;
}

Matrix::Matrix(const mx::array& values) : forms_(std::make_shared<Forms>()), rows_(values.shape(0)), columns_(values.shape(1)) {
  forms_->array = values;
}

Matrix::Matrix(const PackedMatrix& packed)
    : forms_(std::make_shared<Forms>()),
      rows_(packed.scales.shape(0)),
      columns_(packed.scales.shape(1) * packed.packing.group_size) {
  forms_->packed = packed;
}

Matrix Matrix::part(int begin, int end) const {
  auto forms = std::make_shared<Forms>();
  if (own_kernels() || forms_->data) {
    forms->owner = forms_;
    forms->data = data() + static_cast<std::ptrdiff_t>(begin) * columns_;
  } else if (forms_->packed) {
    const auto& x = *forms_->packed;
    const auto some = [&](const mx::array& y) { return mx::contiguous(rows_of(y, begin, end)); };
    forms->packed =
        PackedMatrix{some(x.weight), some(x.scales), x.biases ? std::optional(some(*x.biases)) : std::nullopt, x.packing};
  } else {
    forms->array = mx::contiguous(rows_of(*forms_->array, begin, end));
  }
  return {std::move(forms), end - begin, columns_};
}

const float* Matrix::data() const {
  std::call_once(forms_->data_made, [this] {
    if (forms_->data) return;
    const auto values =
        std::make_shared<mx::array>(mx::contiguous(forms_->packed ? restored(*forms_->packed) : to_float32(*forms_->array)));
    values->eval();
    forms_->data = values->data<float>();
    forms_->owner = values;
  });
  return forms_->data;
}

mx::array Matrix::product(const mx::array& x) const {
  if (const auto& p = forms_->packed)
    return to_float32(
        mx::quantized_matmul(x, p->weight, p->scales, p->biases, true, p->packing.group_size, p->packing.bits, p->packing.mode));
  const auto& w = array();
  const auto type = precision_for(x, w);
  return to_float32(mx::matmul(mx::astype(x, type), mx::transpose(mx::astype(w, type))));
}

mx::array Matrix::product_back(const mx::array& x) const {
  if (const auto& p = forms_->packed)
    return to_float32(
        mx::quantized_matmul(x, p->weight, p->scales, p->biases, false, p->packing.group_size, p->packing.bits, p->packing.mode));
  return mx::matmul(x, to_float32(array()));
}

mx::array Matrix::take(const mx::array& indices) const {
  const auto some = [&](const mx::array& x) { return mx::take(x, indices, 0); };
  if (const auto& p = forms_->packed)
    return restored({some(p->weight), some(p->scales), p->biases ? std::optional(some(*p->biases)) : std::nullopt, p->packing});
  return to_float32(some(array()));
}

const mx::array& Matrix::array() const {
  std::call_once(forms_->array_made, [this] {
    if (!forms_->array) forms_->array = mx::array(forms_->data, {rows_, columns_});
  });
  return *forms_->array;
}

MatrixStack::MatrixStack(const std::vector<Matrix>& matrices) {
  const auto stacked = [&](auto part) {
    std::vector<mx::array> parts;
    for (const auto& matrix : matrices) parts.push_back(part(matrix));
    return mx::stack(parts, 0);
  };
  if (const auto& first = matrices.at(0).forms_->packed) {
    packed_ = PackedMatrix{
        stacked([](const Matrix& m) { return m.forms_->packed->weight; }),
        stacked([](const Matrix& m) { return m.forms_->packed->scales; }),
        first->biases ? std::optional(stacked([](const Matrix& m) { return *m.forms_->packed->biases; })) : std::nullopt,
        first->packing};
  } else {
    values_ = stacked([](const Matrix& m) { return m.array(); });
  }
}

mx::array MatrixStack::product(const mx::array& x, const mx::array& which) const {
  if (packed_)
    return to_float32(mx::gather_qmm(x, packed_->weight, packed_->scales, packed_->biases, std::nullopt, which, true,
                                     packed_->packing.group_size, packed_->packing.bits, packed_->packing.mode));
  const auto type = precision_for(x, *values_);
  return to_float32(mx::gather_mm(mx::astype(x, type), mx::swapaxes(mx::astype(*values_, type), -1, -2), std::nullopt, which));
}

}  // namespace veloxquant

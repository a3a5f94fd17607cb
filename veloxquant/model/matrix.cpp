#include "veloxquant/model/matrix.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <tuple>
#include <utility>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

ElementType type_of(const PackingConfig& packing) {
  return packing.mode == "affine" ? ElementType::kAffine : packing.mode == "mxfp4" ? ElementType::kMxfp4 : ElementType::kMxfp8;
}

// As it was given, and what was made of that.
struct Matrix::Forms {
  std::shared_ptr<const void> owner;
  std::optional<StoredMatrix> stored;
  std::optional<mx::array> array;
  std::optional<PackedMatrix> packed;
  std::once_flag stored_made, array_made;
};

namespace {

std::atomic<int> float32_scopes = 0;

mx::array rows_of(const mx::array& x, int begin, int end) {
  return mx::slice(x, {begin, 0}, {end, x.shape(1)});
}

mx::array to_float32(const mx::array& x) {
  return mx::astype(x, mx::float32);
}

bool is_float_type(mx::Dtype type) {
  return type == mx::float32 || type == mx::float16 || type == mx::bfloat16;
}

ElementType type_of(mx::Dtype type) {
  return type == mx::float32 ? ElementType::kFloat32 : type == mx::float16 ? ElementType::kFloat16 : ElementType::kBfloat16;
}

mx::array evaluated(const mx::array& x) {
  auto values = mx::contiguous(x);
  values.eval();
  return values;
}

// As our kernels read it, and what holds it.
std::pair<StoredMatrix, std::shared_ptr<const void>> stored_of(const PackedMatrix& packed) {
  const bool affine = packed.packing.mode == "affine";
  const auto type = packed.biases && packed.biases->dtype() != packed.scales.dtype() ? mx::float32 : packed.scales.dtype();
  auto held = std::make_shared<std::vector<mx::array>>();
  held->push_back(evaluated(packed.weight));
  held->push_back(evaluated(affine ? mx::astype(packed.scales, type) : packed.scales));
  if (packed.biases) held->push_back(evaluated(mx::astype(*packed.biases, type)));
  const auto data = [&](std::size_t i) -> const void* { return i < held->size() ? (*held)[i].data<std::uint8_t>() : nullptr; };
  StoredMatrix stored;
  stored.type = type_of(packed.packing);
  stored.values = data(0);
  stored.bits = packed.packing.bits;
  stored.group_size = static_cast<std::size_t>(packed.packing.group_size);
  if (affine) stored.scale_type = type_of(type);
  stored.scales = data(1);
  stored.biases = data(2);
  return {stored, std::move(held)};
}

using Map = std::function<mx::array(const mx::array&)>;

// forward(x), whose gradient is `backward` of that by its output.  MLX's own would keep weights in float32 until then.
mx::array with_gradient(const mx::array& x, const Map& forward, const Map& backward) {
  const auto evaluated = [&](const std::vector<mx::array>& in) {
    auto y = forward(in[0]);
    y.set_tracer(false);  // what is evaluated while MLX traces keeps its inputs otherwise
    return std::vector<mx::array>{y};
  };
  return mx::custom_vjp(evaluated, [backward](const auto&, const auto& gradients, const auto&) {
    return std::vector<mx::array>{backward(gradients[0])};
  })({x})[0];
}

}  // namespace

mx::array restored(const PackedMatrix& x) {
  return mx::dequantize(x.weight, x.scales, x.biases, x.packing.group_size, x.packing.bits, x.packing.mode, std::nullopt,
                        mx::float32);
}

Float32Scope::Float32Scope() {
  ++float32_scopes;
}
Float32Scope::~Float32Scope() {
  --float32_scopes;
}

bool in_float32(std::size_t tokens) {
  return tokens > static_cast<std::size_t>(kFewTokens) || float32_scopes > 0;
}

Matrix::Matrix(std::shared_ptr<const void> owner, const StoredMatrix& stored, int rows, int columns)
    : forms_(std::make_shared<Forms>()), rows_(rows), columns_(columns) {
  stored.check("matrix", static_cast<std::size_t>(columns));
  forms_->owner = std::move(owner);
  forms_->stored = stored;
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
  if (own_kernels() || forms_->stored) {
    forms->owner = forms_;
    forms->stored = stored().from_row(static_cast<std::size_t>(begin), static_cast<std::size_t>(columns_));
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

const StoredMatrix& Matrix::stored() const {
  std::call_once(forms_->stored_made, [this] {
    if (forms_->stored) return;
    if (forms_->packed) {
      std::tie(forms_->stored, forms_->owner) = stored_of(*forms_->packed);
    } else {
      const auto& array = *forms_->array;
      const auto values = std::make_shared<mx::array>(evaluated(is_float_type(array.dtype()) ? array : to_float32(array)));
      forms_->stored = StoredMatrix(type_of(values->dtype()), values->data<std::uint8_t>());
      forms_->owner = values;
    }
    forms_->stored->check("matrix", static_cast<std::size_t>(columns_));
  });
  return *forms_->stored;
}

std::vector<float> Matrix::floats() const {
  const auto rows = static_cast<std::size_t>(rows_), columns = static_cast<std::size_t>(columns_);
  std::vector<float> values(rows * columns);
  restore(stored(), columns, {0, rows, 0, columns}, values.data());
  return values;
}

mx::array Matrix::product(const mx::array& x) const {
  if (const auto& p = forms_->packed)
    return to_float32(
        mx::quantized_matmul(x, p->weight, p->scales, p->biases, true, p->packing.group_size, p->packing.bits, p->packing.mode));
  const bool many = in_float32(x.size() / static_cast<std::size_t>(columns_));
  const auto forward = [&](const mx::array& rows) {
    const auto w = many ? to_float32(array()) : array();
    return to_float32(mx::matmul(mx::astype(rows, w.dtype()), mx::transpose(w)));
  };
  return many ? with_gradient(x, forward, [self = *this](const mx::array& y) { return self.product_back(y); }) : forward(x);
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
    if (forms_->array) return;
    const bool in_float32 = forms_->stored && forms_->stored->type == ElementType::kFloat32;
    forms_->array = in_float32 ? mx::array(static_cast<const float*>(forms_->stored->values), {rows_, columns_})
                               : mx::array(floats().data(), {rows_, columns_});
  });
  return *forms_->array;
}

struct MatrixStack::Forms {
  std::vector<Matrix> single;
  std::optional<Matrix> joined;
  std::once_flag joined_made;
};

MatrixStack::MatrixStack(std::vector<Matrix> matrices)
    : forms_(std::make_shared<Forms>()),
      count_(static_cast<int>(matrices.size())),
      rows_(matrices.at(0).rows()),
      columns_(matrices.at(0).columns()) {
  forms_->single = std::move(matrices);
  if (own_kernels()) return;
  joined();
  forms_->single.clear();  // memory is held once
}

MatrixStack::MatrixStack(Matrix joined, int count)
    : forms_(std::make_shared<Forms>()), count_(count), rows_(joined.rows() / count), columns_(joined.columns()) {
  forms_->joined = std::move(joined);
}

StoredMatrix MatrixStack::stored(int i) const {
  if (!forms_->single.empty()) return forms_->single[static_cast<std::size_t>(i)].stored();
  return forms_->joined->stored().from_row(static_cast<std::size_t>(i) * static_cast<std::size_t>(rows_),
                                           static_cast<std::size_t>(columns_));
}

const Matrix& MatrixStack::joined() const {
  std::call_once(forms_->joined_made, [this] {
    if (forms_->joined) return;
    const auto& single = forms_->single;
    const auto& first = single[0].forms_->packed;
    const auto all = [&](auto part) {
      std::vector<mx::array> parts;
      for (const auto& matrix : single) parts.push_back(part(matrix));
      auto rows = mx::concatenate(parts, 0);
      rows.eval();  // so that it does not hold the parts
      return rows;
    };
    const bool packed_alike = first && std::all_of(single.begin(), single.end(), [&](const Matrix& matrix) {
                                const auto& packed = matrix.forms_->packed;
                                return packed && packed->packing == first->packing;
                              });
    if (packed_alike) {
      forms_->joined = Matrix(
          PackedMatrix{all([](const Matrix& m) { return m.forms_->packed->weight; }),
                       all([](const Matrix& m) { return m.forms_->packed->scales; }),
                       first->biases ? std::optional(all([](const Matrix& m) { return *m.forms_->packed->biases; })) : std::nullopt,
                       first->packing});
    } else {
      forms_->joined = Matrix(all([](const Matrix& m) { return m.forms_->packed ? restored(*m.forms_->packed) : m.array(); }));
    }
  });
  return *forms_->joined;
}

mx::array MatrixStack::product(const mx::array& x, const mx::array& which, bool many) const {
  const auto forward = [&](const mx::array& rows) { return gathered(rows, which, many, true); };
  if (!many) return forward(x);
  return with_gradient(x, forward, [self = *this, which](const mx::array& y) { return self.gathered(y, which, true, false); });
}

// By the matrices, or transposed by their transposes.
mx::array MatrixStack::gathered(const mx::array& x, const mx::array& which, bool many, bool transposed) const {
  const auto& forms = *joined().forms_;
  const auto stacked = [&](const mx::array& rows) { return mx::reshape(rows, {count_, rows_, rows.shape(-1)}); };
  if (const auto& p = forms.packed)
    return to_float32(mx::gather_qmm(x, stacked(p->weight), stacked(p->scales),
                                     p->biases ? std::optional(stacked(*p->biases)) : std::nullopt, std::nullopt, which, transposed,
                                     p->packing.group_size, p->packing.bits, p->packing.mode, std::nullopt, many));
  auto weights = stacked(joined().array());
  if (many) weights = to_float32(weights);
  return to_float32(mx::gather_mm(mx::astype(x, weights.dtype()), transposed ? mx::swapaxes(weights, -1, -2) : weights,
                                  std::nullopt, which, many));
}

}  // namespace veloxquant

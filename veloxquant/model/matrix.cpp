#include "veloxquant/model/matrix.h"

namespace veloxquant {

Matrix::Matrix(std::shared_ptr<const void> owner, const float* data, int rows, int columns)
    : owner_(std::move(owner)), data_(data), rows_(rows), columns_(columns), copy_(std::make_shared<Copy>()) {}

const mx::array& Matrix::array() const {
  std::call_once(copy_->made, [this] { copy_->array = mx::array(data_, {rows_, columns_}); });
  return *copy_->array;
}

}  // namespace veloxquant

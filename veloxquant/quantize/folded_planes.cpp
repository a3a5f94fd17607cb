#include "veloxquant/quantize/folded_planes.h"

namespace veloxquant {

std::vector<FoldedSubspace> folded_planes(const RotatedPqQuantizer& quantizer) {
  const auto dim = static_cast<std::size_t>(quantizer.dim()), half = dim / 2;
  const auto &transform = quantizer.transform(), &inverse = quantizer.inverse();
  std::vector<FoldedSubspace> folded;
  std::size_t column = 0, code = 0, planes = 0;
  for (const auto& subspace : quantizer.subspaces()) {
    const auto width = static_cast<std::size_t>(subspace.dim()), stages = static_cast<std::size_t>(subspace.stages());
    FoldedSubspace piece{code, column, {}, {}, {}};
    for (std::size_t plane = 0; 2 * half == dim && plane < half; ++plane) {
      bool here = false;
      for (const std::size_t row : {plane, plane + half})
        for (std::size_t i = column; i < column + width; ++i) here |= transform[row * dim + i] != 0;
      if (here) piece.planes.push_back(plane);
    }
    if (2 * piece.planes.size() != width) return {};
    std::vector<std::size_t> dimensions;
    for (const std::size_t plane : piece.planes) dimensions.insert(dimensions.end(), {plane, plane + half});
    for (std::size_t i = 0; i < width; ++i)
      for (const std::size_t to : dimensions) piece.inverse.push_back(inverse[(column + i) * dim + to]);
    for (std::size_t stage = 0; stage < stages; ++stage) {
      auto& table = piece.tables.emplace_back();
      for (std::size_t entry = 0; entry < static_cast<std::size_t>(subspace.num_centroids()); ++entry)
        for (std::size_t j = 0; j < width; ++j) {
          double sum = stage == 0 ? quantizer.mean()[dimensions[j]] : 0.0f;
          for (std::size_t i = 0; i < width; ++i)
            sum += static_cast<double>(subspace.entry(static_cast<int>(stage), entry)[i]) * piece.inverse[i * width + j];
          table.push_back(static_cast<float>(sum));
        }
    }
    folded.push_back(std::move(piece));
    column += width, code += stages, planes += width / 2;
  }
  return planes == half ? folded : std::vector<FoldedSubspace>();
}

}  // namespace veloxquant

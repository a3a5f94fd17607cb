#include "veloxquant/quantize/folded_planes.h"

namespace veloxquant {

std::vector<FoldedSubspace> folded_planes(const RotatedPqQuantizer& quantizer) {
  const auto dim = static_cast<std::size_t>(quantizer.dim()), half = dim / 2;
  std::vector<FoldedSubspace> folded;
  std::size_t column = 0, code = 0;
  for (std::size_t s = 0; s < quantizer.planes().size(); ++s) {
    const ByteTables& tables = quantizer.byte_tables()[s];
    FoldedSubspace piece{code, column, quantizer.planes()[s], &tables, {}};
    for (std::size_t i = 0; i < tables.width; ++i)
      for (const std::size_t plane : piece.planes)
        for (const std::size_t to : {plane, plane + half}) piece.inverse.push_back(quantizer.inverse()[(column + i) * dim + to]);
    column += tables.width, code += tables.entries.size();
    folded.push_back(std::move(piece));
  }
  return folded;
}

}  // namespace veloxquant

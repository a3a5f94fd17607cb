// The bundled model, loaded once for all tests of a program.
#pragma once

#include <filesystem>

#include "veloxquant/model/model.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant::testing {

inline std::filesystem::path demo_folder() {
  return std::filesystem::path(VELOXQUANT_SOURCE_DIR) / "examples" / "demo";
}

inline const Model& demo_model() {
  static const Model model = Model::load(demo_folder());
  return model;
}

inline const Tokenizer& demo_tokenizer() {
  static const Tokenizer tokenizer = Tokenizer::load(demo_folder());
  return tokenizer;
}

/// English in the style of what the model was trained on, about 300 tokens.
inline const char* kText =
    "It was a cold evening in November, and the rain had been falling upon the roofs of the town since the morning. Mr. Harwood "
    "sat before the "
    "fire with a book upon his knee, but he was not reading. He was thinking of the letter which had come by the second post, and "
    "of the hand in "
    "which it was written; for he had known that hand very well, twenty years before. \"If she is in London,\" he said to himself, "
    "\"I must go to "
    "her at once; and if she is not, then somebody has played a very cruel trick upon an old man.\" The clock on the stairs struck "
    "nine. He rose, "
    "put on his great-coat, and went down to the door, where his servant was waiting with a lantern. \"You will not go out "
    "to-night, sir?\" said the "
    "man. \"The river is over the road at the bridge, and there has been no coach since noon.\" But Mr. Harwood only shook his "
    "head, and took the "
    "lantern out of his hand, and went out into the rain. The street was empty, and the wind came up from the water with the sound "
    "of the sea. He "
    "walked on quickly, keeping close to the wall, and as he went he counted the doors, as he had done when he was a boy, until he "
    "came to the one "
    "with the iron lamp above it, and there he stopped, and lifted his hand to knock, and did not knock.";

inline TokenBatch text_samples(int count, int length) {
  return cut_samples({demo_tokenizer().encode(kText)}, count, length);
}

}  // namespace veloxquant::testing

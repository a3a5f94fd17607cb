// Which model a plan is for.
#pragma once

#include <string>

namespace veloxquant {

struct ModelIdentity {
  std::string architecture;  // model_type of config.json
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int hidden_size = 0;
  int vocab_size = 0;
  std::string config_hash;   // SHA-256, in hex, of config.json; of a model in memory whose file is not known empty
  std::string weights_hash;  // SHA-256, in hex, over names, types and shapes of the tensors; likewise

  bool operator==(const ModelIdentity&) const = default;
};

}  // namespace veloxquant

// measure MODEL PLAN [TEXT]: what a plan costs a model, on a text or on what the model writes itself.
#include <cstdio>
#include <fstream>
#include <iterator>

#include "veloxquant/veloxquant.h"

using namespace veloxquant;

int main(int argc, char** argv) try {
  if (argc < 3) throw std::invalid_argument("usage: measure MODEL PLAN [TEXT]");
  const DeviceScope scope(resolve_device("auto"));
  const Model model = Model::load(argv[1]);
  const Plan plan = read_plan(argv[2]);
  check_identity(plan, model.identity());

  constexpr int kWindows = 4, kLength = 256;
  TokenBatch windows(0, 0);
  if (argc > 3) {
    std::ifstream file(argv[3], std::ios::binary);
    const std::string text(std::istreambuf_iterator<char>(file), {});
    const Tokenizer tokenizer = Tokenizer::load(argv[1]);
    windows = leading_windows(tokenizer.encode(text), kWindows, kLength, tokenizer.prefix());
  } else {
    windows = generate_own_text(model, kWindows, kLength, /* seed= */ 1);
  }
  const std::vector<Storage> storages = {plan_storage("plan", plan), peer_storage("mlx4", model)};
  for (const auto& row : evaluate(model, windows, storages, {}))
    std::printf("%-5s %6.3f bits  perplexity %9.3f  KL %.5f nats a token\n", row.storage.c_str(), row.effective_bits,
                row.perplexity, row.kl_mean);
} catch (const std::exception& error) {
  std::fprintf(stderr, "measure: %s\n", error.what());
  return 1;
}

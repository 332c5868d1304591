#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/distillation/model.h>

#include <cstring>

#include "distillation/scoped.h"

namespace rarefy::distillation {
namespace {

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15ULL;
  return hash ^ (hash >> 32);
}

/// Four chains, since each multiplication waits for the one before it: near the speed of memory.
uint64_t hash_bytes(uint64_t seed, const char* data, size_t size) {
  uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
  size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    uint64_t words[4];
    std::memcpy(words, data + i, 32);
    for (int k = 0; k < 4; ++k) {
      lanes[k] = mix(lanes[k], words[k]);
    }
  }
  uint64_t rest[4] = {0, 0, 0, 0};
  std::memcpy(rest, data + i, size - i);
  uint64_t hash = mix(seed, size);
  for (int k = 0; k < 4; ++k) {
    hash = mix(mix(hash, lanes[k]), rest[k]);
  }
  return hash;
}

uint64_t hash_text(uint64_t seed, const std::string& text) { return hash_bytes(seed, text.data(), text.size()); }

uint64_t hash_tensor(const std::string& name, const torch::Tensor& tensor) {
  uint64_t hash = mix(hash_text(0, name), static_cast<uint64_t>(tensor.scalar_type()));
  for (const int64_t size : tensor.sizes()) {
    hash = mix(hash, static_cast<uint64_t>(size));
  }
  const auto dense = tensor.detach().to(torch::kCPU).contiguous();
  return hash_bytes(hash, static_cast<const char*>(dense.const_data_ptr()), dense.nbytes());
}

using Hashes = std::vector<std::pair<std::string, uint64_t>>;

Hashes hashes_of(const std::vector<std::pair<std::string, torch::Tensor>>& tensors) {
  Hashes all;
  for (const auto& [name, tensor] : tensors) {
    all.emplace_back(name, hash_tensor(name, tensor));
  }
  return all;
}

std::string combined(const Hashes& hashes) {
  if (hashes.empty()) {
    return {};
  }
  uint64_t hash = 0;
  for (const auto& item : hashes) {
    hash = mix(hash, item.second);
  }
  return fmt::format("{:016x}", hash);
}

}  // namespace

std::string fingerprint(const std::vector<std::pair<std::string, torch::Tensor>>& tensors) {
  return combined(hashes_of(tensors));
}

Outputs Teacher::operator()(const Batch& batch) const {
  const torch::NoGradGuard no_grad;
  return model_.forward(batch);
}

Model::Restore Teacher::enter() const { return enter_model(model_, false); }

void Teacher::after_step() const {
  if (model_.after_step) {
    model_.after_step();
  }
}

Hashes Teacher::hashes() const { return model_.tensors && !model_.after_step ? hashes_of(model_.tensors()) : Hashes(); }

std::string Teacher::fingerprint() const { return combined(hashes()); }

void Teacher::check_unchanged(const std::vector<std::pair<std::string, uint64_t>>& expected) const {
  const auto now = hashes();
  std::string changed;
  TORCH_CHECK_VALUE(now.size() == expected.size(),
                    "[DistillationTrainer] a teacher must not change during training, got ", now.size(),
                    " parameters and buffers where ", expected.size(), " were");
  for (size_t i = 0; i < now.size(); ++i) {
    if (now[i] != expected[i]) {
      changed += (changed.empty() ? "" : ", ") + expected[i].first;
    }
  }
  TORCH_CHECK_VALUE(changed.empty(),
                    "[DistillationTrainer] a teacher must not change during training, changed: ", changed);
}

}  // namespace rarefy::distillation

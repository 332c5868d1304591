// Structured pruning of small models: what is left computes what the original computes without what was removed.
#include <rarefy/pruning/structured.h>

#include <algorithm>
#include <map>

#include "absence.h"
#include "catch.h"
#include "structures.h"

namespace {

using absence::difference;
using absence::run_without;

const structures::Structure& find(const std::string& name) {
  for (const auto& structure : structures::all()) {
    if (structure.name == name) return structure;
  }
  throw std::runtime_error("no structure " + name);
}

absence::Kept rows(absence::Kept kept, const std::string& layer, const std::vector<int64_t>& indices) {
  kept[layer + ".weight"][0] = kept[layer + ".bias"][0] = indices;
  return kept;
}

void cut(structures::Model& model, const absence::Kept& kept) {
  const torch::NoGradGuard no_grad;
  auto tensors = absence::named_tensors(*model.net);
  for (const auto& [name, dims] : kept) {
    for (const auto& [dim, indices] : dims) {
      auto& tensor = tensors.at(name);
      tensor.set_data(tensor.index_select(dim, torch::tensor(indices, torch::kLong)));
    }
  }
}

}  // namespace

TEST_CASE("the structures are those of Python", "[structures]") {
  std::vector<std::string> names;
  for (const auto& structure : structures::all()) names.push_back(structure.name);
  std::sort(names.begin(), names.end());
  CHECK(names == structures::expected_names());
  CHECK(names.size() >= 44);
}

TEST_CASE("without a removed slice the reference is the model", "[structures]") {
  const torch::NoGradGuard no_grad;
  for (const auto& structure : structures::all()) {
    auto model = structure.build();
    const auto inputs = structure.inputs();
    const auto expected = model.forward(inputs);
    INFO(structure.name);
    CHECK(difference(expected, run_without(model, {}, inputs)) == "");
  }
}

TEST_CASE("the reference is a model that was pruned by hand", "[structures]") {
  const torch::NoGradGuard no_grad;
  const std::vector<int64_t> few{0, 4, 7}, stream{0, 3, 5, 6, 7};
  std::map<std::string, absence::Kept> cases;
  cases["chain"] = rows({{"conv2.weight", {{1, few}}}}, "conv1", few);
  cases["layer_norm_residual"] =
      rows(rows({{"up.weight", {{1, stream}}}, {"out.weight", {{1, stream}}}}, "embed", stream), "down", stream);
  cases["layer_norm_residual"] = rows(cases["layer_norm_residual"], "norm", stream);
  for (const auto& [name, kept] : cases) {
    INFO(name);
    const auto& structure = find(name);
    auto original = structure.build(), pruned = structure.build();
    cut(pruned, kept);
    if (name == "layer_norm_residual") {
      for (const auto* norm : {"norm", "final"}) {
        auto layer = std::dynamic_pointer_cast<torch::nn::LayerNormImpl>(pruned.net->named_children()[norm]);
        layer->options.normalized_shape({5});
      }
    }
    const auto inputs = structure.inputs();
    const auto before = original.forward(inputs);
    const auto expected = run_without(original, kept, inputs);
    CHECK(difference(expected, pruned.forward(inputs)) == "");
    CHECK(difference(before, expected) != "");
  }
  // The column of another channel than the one that is gone.
  const auto& chain = find("chain");
  auto original = chain.build(), pruned = chain.build();
  auto wrong = cases["chain"];
  wrong["conv2.weight"][1] = {0, 1, 4};
  cut(pruned, wrong);
  const auto inputs = chain.inputs();
  CHECK(difference(run_without(original, wrong, inputs), pruned.forward(inputs)).find("differs by") !=
        std::string::npos);
}

namespace {

using namespace rarefy::pruning;

struct Pruned {
  structures::Model original, model;
  StructuredReport report;
  absence::Kept kept;
};

Pruned prune(const structures::Structure& structure, uint64_t seed, double fraction, UnitScope scope, bool fold,
             const std::vector<torch::optim::Optimizer*>& optimizers = {}, structures::Model* model = nullptr) {
  Pruned out{structure.build(seed), model ? *model : structure.build(seed), {}, {}};
  const auto inputs = structure.inputs(seed);
  StructuredOptions options;
  options.choice.target = Channels{fraction};
  options.choice.scope = scope;
  options.importance.criterion = Random{seed};
  options.fold_constants = fold;
  StructuredPruner pruner(*out.model.net, [&] { return out.model.forward(inputs); }, inputs, options);
  out.report = pruner.prune(optimizers);
  for (const auto& cut : out.report.cuts) out.kept[cut.tensor][cut.dim] = cut.kept;
  return out;
}

/// Groups that only Python can remove. torch::nn::MultiheadAttention takes its heads and its scale from its width, and
/// torch::nn::LayerNorm without parameters holds its shape in its options, where nothing says which operator is its own.
const std::map<std::string, std::string> kStaysInCpp = {{"layer_norm_residual", "8 "},
                                                        {"multihead_attention", "4 12 "},
                                                        {"multihead_attention_cross", "4 6 6 8 "},
                                                        {"transformer_encoder", "3 3 12 "},
                                                        {"transformer_decoder", "3 3 12 "}};

/// The expected groups that were not found.
std::string missing_groups(const structures::Structure& structure, const StructuredReport& report) {
  std::vector<int64_t> found;
  for (const auto& group : report.groups) found.push_back(group.units);
  std::string missing;
  for (const auto units : structure.groups) {
    const auto at = std::find(found.begin(), found.end(), units);
    if (at == found.end()) {
      missing += std::to_string(units) + " ";
    } else {
      found.erase(at);
    }
  }
  return missing;
}

}  // namespace

TEST_CASE("what is left computes what the original computes without the rest", "[structures]") {
  const torch::NoGradGuard no_grad;
  for (const auto& structure : structures::all()) {
    for (const uint64_t seed : {0, 1}) {
      DYNAMIC_SECTION(structure.name << " " << seed) {
        auto pruned = prune(structure, seed, seed == 0 ? 0.3 : 0.5, seed == 0 ? UnitScope::global : UnitScope::local,
                            /*fold=*/false);
        INFO(pruned.report.to_string());
        const auto stays = kStaysInCpp.find(structure.name);
        CHECK((!pruned.kept.empty() || stays != kStaysInCpp.end()));
        CHECK(missing_groups(structure, pruned.report) == (stays == kStaysInCpp.end() ? "" : stays->second));
        for (const auto& pin : structure.pins) {
          const auto reason =
              std::find_if(pruned.report.pinned.begin(), pruned.report.pinned.end(), [&](const Pinned& pinned) {
                return pinned.tensor == pin.tensor && pinned.dim == pin.dim &&
                       pinned.reason.find(pin.word) != std::string::npos;
              });
          CHECK(reason != pruned.report.pinned.end());
          CHECK(pruned.kept[pin.tensor].count(pin.dim) == 0);
        }
        const auto inputs = structure.inputs(50 + seed);
        const auto found = pruned.model.forward(inputs);
        CHECK(difference(run_without(pruned.original, pruned.kept, inputs), found) == "");
      }
    }
  }
}

// What becomes of fake quantizers.
#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

/// Whether it rounds rows of a table (nn::Embedding), which the lookup gave on the grid already.
bool rounds_rows(const Call& c) {
  auto scale = c.node().input(1);
  if (const auto* maker = c.t.maker(scale); maker != nullptr && maker->op.name == "aten::index_select") {
    scale = maker->input(0);
  }
  return c.t.options().table_scales.contains(c.t.graph().values[scale].name);
}

/// Of activations: those of weights are folded into integers before (Translator::integers).
std::vector<Value*> fake_quantize(const Call& c) {
  if (rounds_rows(c)) {
    return {c.tensor("x")};
  }
  const auto scale = c.constant("scale"), zero_point = c.constant("zero_point");
  if (!scale.defined() || !zero_point.defined()) {
    c.refuse("scale and zero point must not depend on the input");
  }
  const auto axis = c.has("axis") ? std::optional(c.integer("axis")) : std::nullopt;
  return {quantize_on_grid(c, scale, zero_point, axis, c.integer("qmin"), c.integer("qmax"))};
}

}  // namespace

Value* quantize_on_grid(const Call& c, const at::Tensor& scale, const at::Tensor& zero_point,
                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  if (qmin < -32768 || qmax > 65535 || (qmin < 0 && qmax > 32767)) {
    c.refuse("the integers must fit into 16 bits");
  }
  const bool wide = qmin < -128 || qmax > (qmin < 0 ? 127 : 255);
  auto* x = c.tensor("x");
  if (x->dtype != at::kFloat) {
    c.refuse("its input must be float32");
  }
  const auto integers = zero_point.to(qmin < 0 ? (wide ? at::kShort : at::kChar) : (wide ? at::kUInt16 : at::kByte));
  const auto grid =
      c.t.as_written({axis ? scale : scale.reshape({}), axis ? integers : integers.reshape({}), axis, qmin, qmax});
  return c.t.dequantize(c.t.quantize(x, grid), grid);
}

void add_quantization_rules(Rules& rules) { rules["rarefy::fake_quantize"] = fake_quantize; }

}  // namespace rarefy::onnx

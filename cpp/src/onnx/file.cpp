#include "onnx/file.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <unordered_map>

#include "pending_file.h"

// Initializers are the tensors' bytes, and ONNX's are little-endian.
static_assert(std::endian::native == std::endian::little, "tensors are copied to files as they are in memory");

namespace rarefy::onnx {
namespace {

constexpr int64_t kLargestMessage = (int64_t{1} << 31) - 1;  // of protobuf
constexpr int64_t kAlignment = 4096;                         // of tensors in a file of their own, for those who map it
constexpr size_t kInline = 1024;                             // smaller tensors stay in the model's file

enum Wire : uint64_t { varint = 0, bytes = 2, fixed32 = 5 };

/// One message as it grows. Its fields are numbered as in onnx.proto.
class Message {
 public:
  void integer(uint64_t field, int64_t value) {
    tag(field, Wire::varint);
    number(static_cast<uint64_t>(value));
  }
  void real(uint64_t field, float value) {
    tag(field, Wire::fixed32);
    std::array<char, sizeof(value)> raw{};
    std::memcpy(raw.data(), &value, sizeof(value));
    text_.append(raw.data(), raw.size());
  }
  void string(uint64_t field, const std::string& value) {
    announce(field, value.size());
    text_ += value;
  }
  void message(uint64_t field, const Message& value) { string(field, value.text_); }
  /// The head of a field of `size` bytes that follow by other means.
  void announce(uint64_t field, size_t size) {
    tag(field, Wire::bytes);
    number(size);
  }
  const std::string& text() const { return text_; }

 private:
  void tag(uint64_t field, Wire wire) { number(field << 3 | wire); }
  void number(uint64_t value) {
    for (; value >= 0x80; value >>= 7) {
      text_ += static_cast<char>(value | 0x80);
    }
    text_ += static_cast<char>(value);
  }

  std::string text_;
};

namespace model_proto {
enum : uint64_t { ir_version = 1, producer_name = 2, producer_version = 3, graph = 7, opset_import = 8 };
}
namespace graph_proto {
enum : uint64_t { node = 1, name = 2, initializer = 5, input = 11, output = 12, value_info = 13 };
}
namespace node_proto {
enum : uint64_t { input = 1, output = 2, name = 3, op_type = 4, attribute = 5 };
}
namespace attribute_proto {
enum : uint64_t { name = 1, f = 2, i = 3, s = 4, ints = 8, type = 20 };
enum : int64_t { type_float = 1, type_int = 2, type_string = 3, type_ints = 7 };
}  // namespace attribute_proto
namespace tensor_proto {
enum : uint64_t { dims = 1, data_type = 2, name = 8, raw_data = 9, external_data = 13, data_location = 14 };
}

/// The oldest version of the format that has the operator set: what most runtimes can read.
int64_t ir_version(int64_t opset) {
  return opset <= 14 ? 7 : opset <= 18 ? 8 : opset <= 20 ? 9 : opset <= 22 ? 10 : 11;
}

Message attribute(const std::string& name, const AttributeValue& value) {
  namespace field = attribute_proto;
  Message out;
  out.string(field::name, name);
  if (const auto* number = std::get_if<int64_t>(&value)) {
    out.integer(field::i, *number);
    out.integer(field::type, field::type_int);
  } else if (const auto* real = std::get_if<float>(&value)) {
    out.real(field::f, *real);
    out.integer(field::type, field::type_float);
  } else if (const auto* text = std::get_if<std::string>(&value)) {
    out.string(field::s, *text);
    out.integer(field::type, field::type_string);
  } else {
    for (auto item : std::get<std::vector<int64_t>>(value)) {
      out.integer(field::ints, item);
    }
    out.integer(field::type, field::type_ints);
  }
  return out;
}

Message node_message(const Node& node) {
  namespace field = node_proto;
  Message out;
  for (const auto* value : node.inputs) {
    out.string(field::input, value == nullptr ? "" : value->name);
  }
  for (const auto* value : node.outputs) {
    out.string(field::output, value->name);
  }
  out.string(field::name, node.name);
  out.string(field::op_type, node.op);
  for (const auto& [name, value] : node.attributes) {
    out.message(field::attribute, attribute(name, value));
  }
  return out;
}

/// ValueInfoProto: name = 1, type = 2 { tensor_type = 1 { elem_type = 1, shape = 2 { dim = 1 { dim_value = 1, dim_param = 2 } } } }.
Message value_info(const Value& value) {
  Message shape;
  for (const auto& dim : value.shape) {
    Message size;
    if (dim.is_fixed()) {
      size.integer(1, dim.size);
    } else if (dim.per_batch > 0) {
      size.string(2, dim.per_batch == 1 ? "batch" : std::to_string(dim.per_batch) + "*batch");
    }
    shape.message(1, size);
  }
  Message tensor, type, out;
  tensor.integer(1, type_number(value.dtype));
  tensor.message(2, shape);
  type.message(1, tensor);
  out.string(1, value.name);
  out.message(2, type);
  return out;
}

/// An initializer as it is written.
struct Stored {
  const Value* value;
  at::Tensor data;                // its bytes
  std::optional<int64_t> offset;  // in the other file; unset: in the message
};

/// Two values of 4 bits in a byte, the first one in the lower half.
at::Tensor packed(const at::Tensor& values) {
  const auto count = values.numel();
  auto out = at::zeros({(count + 1) / 2}, at::TensorOptions().dtype(at::kByte));
  const auto* from = static_cast<const uint8_t*>(values.const_data_ptr());
  auto* to = out.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < count; ++i) {
    to[i / 2] = static_cast<uint8_t>(to[i / 2] | (from[i] & 0xF) << (i % 2 * 4));
  }
  return out;
}

constexpr int64_t kUint4 = 21, kInt4 = 22;  // TensorProto.DataType

/// The head of a TensorProto; where the data belongs into the message it follows.
Message tensor_head(const Stored& stored, const std::string& data_file) {
  namespace field = tensor_proto;
  const auto& tensor = stored.value->constant;
  Message out;
  for (auto size : tensor.sizes()) {
    out.integer(field::dims, size);
  }
  const auto half_byte = tensor.scalar_type() == at::kByte ? kUint4 : kInt4;
  out.integer(field::data_type, stored.value->is_int4 ? half_byte : type_number(tensor.scalar_type()));
  out.string(field::name, stored.value->name);
  if (!stored.offset.has_value()) {
    out.announce(field::raw_data, stored.data.nbytes());
    return out;
  }
  for (const auto& [key, value] : {std::pair<std::string, std::string>{"location", data_file},
                                   {"offset", std::to_string(*stored.offset)},
                                   {"length", std::to_string(stored.data.nbytes())}}) {
    Message entry;
    entry.string(1, key);
    entry.string(2, value);
    out.message(field::external_data, entry);
  }
  out.integer(field::data_location, 1);
  return out;
}

/// Which initializers go to another file, and where in it.
std::vector<Stored> place(const Model& model, int64_t external_above) {
  std::vector<Stored> out;
  int64_t total = 0, end = 0;
  for (const auto* value : model.constants()) {
    out.push_back({value, value->is_int4 ? packed(value->constant) : value->constant, std::nullopt});
    total += static_cast<int64_t>(out.back().data.nbytes());
  }
  for (auto& stored : out) {
    const auto size = stored.data.nbytes();
    if (total > external_above && size >= kInline) {
      stored.offset = (end + kAlignment - 1) / kAlignment * kAlignment;
      end = *stored.offset + static_cast<int64_t>(size);
    }
  }
  return out;
}

/// What of the graph is no initializer.
Message graph_message(const Model& model) {
  namespace field = graph_proto;
  Message out;
  for (const auto& node : model.nodes()) {
    out.message(field::node, node_message(*node));
  }
  out.string(field::name, "rarefy");
  for (const auto* value : model.inputs) {
    out.message(field::input, value_info(*value));
  }
  for (const auto* value : model.outputs) {
    out.message(field::output, value_info(*value));
  }
  for (const auto& node : model.nodes()) {
    for (const auto* value : node->outputs) {
      if (value->has_shape && !model.is_output(value)) {
        out.message(field::value_info, value_info(*value));
      }
    }
  }
  return out;
}

}  // namespace

int64_t type_number(at::ScalarType dtype) {
  static const std::unordered_map<at::ScalarType, int64_t> numbers = {
      {at::kFloat, 1},     {at::kByte, 2},           {at::kChar, 3},        {at::kShort, 5}, {at::kInt, 6},
      {at::kUInt16, 4},    {at::kLong, 7},           {at::kBool, 9},        {at::kHalf, 10}, {at::kDouble, 11},
      {at::kBFloat16, 16}, {at::kFloat8_e4m3fn, 17}, {at::kFloat8_e5m2, 19}};
  const auto found = numbers.find(dtype);
  TORCH_CHECK_TYPE(found != numbers.end(), "[export_onnx] ONNX has no tensors of ", dtype);
  return found->second;
}

int64_t write_file(const Model& model, const std::filesystem::path& path, const FileOptions& options) {
  model.check();
  const auto data_path = std::filesystem::path(path.string() + ".data");
  const auto initializers = place(model, options.external_above);
  const auto graph = graph_message(model);
  std::vector<Message> heads;  // of each initializer: the field of the graph, and the tensor's own
  int64_t graph_size = static_cast<int64_t>(graph.text().size()), data_size = 0;
  for (const auto& stored : initializers) {
    const auto head = tensor_head(stored, data_path.filename().string());
    const auto size = stored.data.nbytes();
    const auto inside = stored.offset.has_value() ? 0 : size;
    Message field;
    field.announce(graph_proto::initializer, head.text().size() + inside);
    graph_size += static_cast<int64_t>(field.text().size() + head.text().size() + inside);
    heads.push_back(field);
    heads.push_back(head);
    data_size = stored.offset.has_value() ? *stored.offset + static_cast<int64_t>(size) : data_size;
  }
  Message opset, begin;
  opset.string(1, "");
  opset.integer(2, options.opset);
  begin.integer(model_proto::ir_version, ir_version(options.opset));
  begin.string(model_proto::producer_name, "rarefy");
  begin.string(model_proto::producer_version, options.producer_version);
  begin.message(model_proto::opset_import, opset);
  begin.announce(model_proto::graph, static_cast<size_t>(graph_size));
  const auto model_size = static_cast<int64_t>(begin.text().size()) + graph_size;
  TORCH_CHECK_VALUE(model_size <= kLargestMessage, "[export_onnx] one ONNX file holds up to ", kLargestMessage,
                    " bytes beside its tensors' own file, got ", model_size);

  PendingFile file(path, "export_onnx");
  const auto write = [](PendingFile& to, const std::string& text) { to.write(text.data(), text.size()); };
  std::optional<PendingFile> data;
  if (data_size > 0) {
    data.emplace(data_path, "export_onnx");
  }
  write(file, begin.text());
  write(file, graph.text());
  int64_t end = 0;
  for (size_t i = 0; i < initializers.size(); ++i) {
    const auto& tensor = initializers[i].data;
    write(file, heads[2 * i].text());
    write(file, heads[2 * i + 1].text());
    if (const auto offset = initializers[i].offset) {
      write(*data, std::string(static_cast<size_t>(*offset - end), '\0'));
      end = *offset + static_cast<int64_t>(tensor.nbytes());
    }
    (initializers[i].offset.has_value() ? *data : file).write(tensor.const_data_ptr(), tensor.nbytes());
  }
  if (data) {
    data->commit_with(file);
  } else {
    file.commit();
  }
  return model_size + data_size;
}

}  // namespace rarefy::onnx

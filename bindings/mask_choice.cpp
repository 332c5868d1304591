#include <rarefy/pruning/mask_choice.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

/// What every pattern has.
template <typename Type>
void def_pattern(py::class_<Type>& type) {
  type.def("__repr__", &Type::to_string)
      .def("__hash__", [](const Type& self) { return std::hash<std::string>()(self.to_string()); })
      .def(
          "__eq__", [](const Type& a, const Type& b) { return a == b; }, py::is_operator())
      .def_property_readonly(
          "name", [](const Type& self) { return short_name(self); },
          "The text that stands for the pattern, as in '2:4'.");
}

template <typename Type>
Type validated(Type value) {
  value.validate();
  return value;
}

/// A pattern without numbers.
template <typename Type>
void init_plain(py::module_& m, const char* name, const char* text) {
  py::class_<Type> type(m, name, text);
  type.def(py::init([] { return Type{}; }))
      .def(py::pickle([](const Type&) { return py::tuple(); }, [](const py::tuple&) { return Type{}; }));
  def_pattern(type);
}

void init_patterns(py::module_& m) {
  init_plain<Unstructured>(m, "Unstructured", "Every element by itself.");
  py::class_<NM> nm(m, "NM",
                    "At most n of every m consecutive elements along dimension 1 are kept: in every row of a linear\n"
                    "layer, and for a convolution at every place of the kernel, along the input channels. When m does\n"
                    "not divide the size, the last, shorter group keeps at most n too.");
  nm.def(py::init([](int64_t n, int64_t m) { return validated(NM{n, m}); }), py::arg("n") = 2, py::arg("m") = 4)
      .def_readonly("n", &NM::n)
      .def_readonly("m", &NM::m)
      .def(py::pickle([](const NM& p) { return py::make_tuple(p.n, p.m); },
                      [](const py::tuple& t) { return validated(NM{t[0].cast<int64_t>(), t[1].cast<int64_t>()}); }));
  def_pattern(nm);
  py::class_<Block> block(
      m, "Block",
      "Blocks of rows x columns of the weight as a matrix: dimension 0 by all others. Where a side\n"
      "is not a multiple, the last blocks are smaller.");
  block
      .def(py::init([](int64_t rows, int64_t columns) { return validated(Block{rows, columns}); }), py::arg("rows") = 4,
           py::arg("columns") = 1)
      .def_readonly("rows", &Block::rows)
      .def_readonly("columns", &Block::columns)
      .def(py::pickle([](const Block& p) { return py::make_tuple(p.rows, p.columns); },
                      [](const py::tuple& t) { return validated(Block{t[0].cast<int64_t>(), t[1].cast<int64_t>()}); }));
  def_pattern(block);
  init_plain<Row>(m, "Row", "All weights of an output feature or channel: an index of dimension 0.");
  init_plain<Column>(m, "Column", "All weights of an input feature or channel: an index of dimension 1.");
  init_plain<Filter>(m, "Filter", "The filter of an output channel of a convolution.");
  py::class_<Head> head(m, "Head", "`size` consecutive rows, which divide dimension 0: an attention head.");
  head.def(py::init([](int64_t size) { return validated(Head{size}); }), py::arg("size") = 64)
      .def_readonly("size", &Head::size)
      .def(py::pickle([](const Head& p) { return py::make_tuple(p.size); },
                      [](const py::tuple& t) { return validated(Head{t[0].cast<int64_t>()}); }));
  def_pattern(head);
}

}  // namespace

void init_mask_choice(py::module_& m) {
  init_patterns(m);
  m.def(
      "parse_pattern",
      [](const std::variant<std::string, Pattern>& pattern) {
        const auto* text = std::get_if<std::string>(&pattern);
        return text != nullptr ? parse_pattern(*text) : std::get<Pattern>(pattern);
      },
      py::arg("pattern"),
      "The pattern of a text: 'unstructured', '2:4', '4x1', 'row', 'column', 'filter' or 'head:64'. A pattern is returned\n"
      "as it is. Raises ValueError for anything else.");
  m.def(
      "misfit", [](const Pattern& pattern, const std::vector<int64_t>& shape) { return misfit(pattern, shape); },
      py::arg("pattern"), py::arg("shape"), "Why a weight of this shape cannot have the pattern; '' when it can.");
  m.def("implied_sparsity", &implied_sparsity, py::arg("pattern"),
        "1 - n / m for N:M, the largest sparsity that it has; None for other patterns.");

  py::class_<Candidate>(m, "Candidate", "A weight whose elements compete for being kept.")
      .def(py::init([](std::string name, at::Tensor value, const std::optional<at::Tensor>& score,
                       const std::optional<at::Tensor>& mask) {
             return Candidate{std::move(name), std::move(value), score.value_or(at::Tensor()),
                              mask.value_or(at::Tensor())};
           }),
           py::arg("name"), py::arg("value"), py::arg("score") = py::none(), py::arg("mask") = py::none());
  py::class_<MaskChoice>(m, "MaskChoice", "Checked options of choose_masks().")
      .def(py::init([](double sparsity, const std::string& scope, const Pattern& pattern,
                       std::vector<std::pair<std::string, double>> layers, bool regrow) {
             return validated(MaskChoice{sparsity, parse_scope(scope), pattern, std::move(layers), regrow});
           }),
           py::arg("sparsity") = 0.5, py::arg("scope") = "global", py::arg("pattern") = Pattern(Unstructured{}),
           py::arg("layers") = std::vector<std::pair<std::string, double>>(), py::arg("regrow") = false)
      .def_readonly("sparsity", &MaskChoice::sparsity)
      .def_property_readonly("scope", [](const MaskChoice& self) { return name(self.scope); })
      .def_readonly("pattern", &MaskChoice::pattern)
      .def_readonly("layers", &MaskChoice::layers)
      .def_readonly("regrow", &MaskChoice::regrow);
  m.def("choose_masks", &choose_masks, py::arg("candidates"), py::arg("choice"),
        py::call_guard<py::gil_scoped_release>(), "Packed masks, one per candidate.");
  m.def("erk_sparsities", &erk_sparsities, py::arg("shapes"), py::arg("sparsity"),
        "The fraction of each tensor to prune (Erdos-Renyi-Kernel, Evci et al., 2020, arXiv:1911.11134), so that all\n"
        "together have exactly round(sparsity * elements) zeros.");
}

}  // namespace rarefy::python

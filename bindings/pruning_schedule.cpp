#include <rarefy/pruning/regrowth.h>
#include <rarefy/pruning/schedule.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

template <typename Type>
Type validated(Type value) {
  value.validate();
  return value;
}

/// A Python callable that C++ may call, copy and drop without holding the interpreter's lock.
class PythonFunction {
 public:
  explicit PythonFunction(py::function function)
      : function_(new py::function(std::move(function)), [](py::function* held) {
          const py::gil_scoped_acquire gil;
          delete held;
        }) {}
  double operator()(int64_t step) const {
    const py::gil_scoped_acquire gil;
    return (*function_)(step).cast<double>();
  }
  const py::function& get() const { return *function_; }

 private:
  std::shared_ptr<py::function> function_;
};

/// The callable that a schedule was made of.
const py::function& function_of(const CustomSchedule& schedule) {
  return schedule.function->target<PythonFunction>()->get();
}

bool equal(const CustomSchedule& a, const CustomSchedule& b) {
  return function_of(a).equal(function_of(b)) && a.updates == b.updates && a.regrow == b.regrow;
}

template <typename Type>
bool equal(const Type& a, const Type& b) {
  return a == b;
}

/// What values have.
template <typename Type>
void def_value(py::class_<Type>& type) {
  type.def("__repr__", &Type::to_string)
      .def("__hash__", [](const Type& self) { return std::hash<std::string>()(self.to_string()); })
      .def(
          "__eq__", [](const Type& a, const Type& b) { return equal(a, b); }, py::is_operator())
      .def("updates_at", &Type::updates_at, py::arg("step"), "True when masks are updated at this step.");
}

/// What every schedule has.
template <typename Type>
void def_schedule(py::class_<Type>& type) {
  def_value(type);
  type.def("sparsity_at", &Type::sparsity_at, py::arg("step"), py::arg("final"),
           "The sparsity at a step, for a schedule that ends at `final`.")
      .def("last_update", &Type::last_update, "The last step with an update of masks; -1 without any.");
  if constexpr (requires(const Type& schedule) { schedule.releases_at(int64_t{}); }) {
    type.def("releases_at", &Type::releases_at, py::arg("step"),
             "True when what is pruned competes again at this update.");
  } else {
    type.def(
        "releases_at", [](const Type&, int64_t) { return false; }, py::arg("step"),
        "True when what is pruned competes again at this update: never.");
  }
}

constexpr const char* kRising =
    "\n\nMasks are updated every `every` steps from `begin` on and always at `end`, where the final sparsity is reached\n"
    "exactly. Steps count completed optimizer steps; x = (t - begin) / (end - begin).";

template <typename Type>
void init_rising(py::module_& m, const char* name, const char* formula) {
  py::class_<Type> type(m, name, (std::string(formula) + kRising).c_str());
  type.def(py::init([](int64_t begin, int64_t end, int64_t every, double initial) {
             return validated(Type{begin, end, every, initial});
           }),
           py::arg("begin"), py::arg("end"), py::arg("every") = 1, py::arg("initial") = 0.0)
      .def_readonly("begin", &Type::begin)
      .def_readonly("end", &Type::end)
      .def_readonly("every", &Type::every)
      .def_readonly("initial", &Type::initial)
      .def(py::pickle([](const Type& s) { return py::make_tuple(s.begin, s.end, s.every, s.initial); },
                      [](const py::tuple& t) {
                        return validated(Type{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                              t[3].cast<double>()});
                      }));
  def_schedule(type);
}

void init_polynomial(py::module_& m) {
  py::class_<PolynomialSchedule> polynomial(
      m, "PolynomialSchedule",
      (std::string("A sparsity that rises along a polynomial, fast first and slowly at the end:\n\n"
                   "    s(t) = final + (initial - final) * (1 - x) ** power\n\n"
                   "(automated gradual pruning, Zhu & Gupta, 2017, arXiv:1710.01878).") +
       kRising)
          .c_str());
  polynomial
      .def(py::init([](int64_t begin, int64_t end, int64_t every, double initial, double power) {
             return validated(PolynomialSchedule{begin, end, every, initial, power});
           }),
           py::arg("begin"), py::arg("end"), py::arg("every") = 1, py::arg("initial") = 0.0, py::arg("power") = 3.0)
      .def_readonly("begin", &PolynomialSchedule::begin)
      .def_readonly("end", &PolynomialSchedule::end)
      .def_readonly("every", &PolynomialSchedule::every)
      .def_readonly("initial", &PolynomialSchedule::initial)
      .def_readonly("power", &PolynomialSchedule::power)
      .def(py::pickle(
          [](const PolynomialSchedule& s) { return py::make_tuple(s.begin, s.end, s.every, s.initial, s.power); },
          [](const py::tuple& t) {
            return validated(PolynomialSchedule{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                                t[3].cast<double>(), t[4].cast<double>()});
          }));
  def_schedule(polynomial);
}

void init_single(py::module_& m) {
  py::class_<ConstantSchedule> constant(
      m, "ConstantSchedule", "The final sparsity from step `begin` on, 0 before it: one mask update (\"one-shot\").");
  constant.def(py::init([](int64_t begin) { return validated(ConstantSchedule{begin}); }), py::arg("begin") = 0)
      .def_readonly("begin", &ConstantSchedule::begin)
      .def(py::pickle([](const ConstantSchedule& s) { return py::make_tuple(s.begin); },
                      [](const py::tuple& t) { return validated(ConstantSchedule{t[0].cast<int64_t>()}); }));
  def_schedule(constant);

  py::class_<FixedSchedule> fixed(m, "FixedSchedule",
                                  "Masks are never updated: those that the model has, or is loaded with, hold.");
  fixed.def(py::init<>())
      .def(py::pickle([](const FixedSchedule&) { return py::tuple(); },
                      [](const py::tuple&) { return FixedSchedule{}; }));
  def_schedule(fixed);
}

void init_cyclic(py::module_& m) {
  py::class_<CyclicSchedule> cyclic(
      m, "CyclicSchedule",
      "Gradual pruning again and again: the steps after `begin` up to `end` are split into `cycles` of equal length; each\n"
      "begins dense and ends at the final sparsity, along the curve of PolynomialSchedule. What one cycle pruned starts\n"
      "the next one from zero (Srinivas et al., 2022, arXiv:2202.01290). Updates come at the first step of a cycle, every\n"
      "`every` after that, and always at its last.");
  cyclic
      .def(py::init([](int64_t begin, int64_t end, int64_t cycles, int64_t every, double power) {
             return validated(CyclicSchedule{begin, end, cycles, every, power});
           }),
           py::arg("begin"), py::arg("end"), py::arg("cycles"), py::arg("every") = 1, py::arg("power") = 3.0)
      .def_readonly("begin", &CyclicSchedule::begin)
      .def_readonly("end", &CyclicSchedule::end)
      .def_readonly("cycles", &CyclicSchedule::cycles)
      .def_readonly("every", &CyclicSchedule::every)
      .def_readonly("power", &CyclicSchedule::power)
      .def(
          py::pickle([](const CyclicSchedule& s) { return py::make_tuple(s.begin, s.end, s.cycles, s.every, s.power); },
                     [](const py::tuple& t) {
                       return validated(CyclicSchedule{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                                       t[3].cast<int64_t>(), t[4].cast<double>()});
                     }));
  def_schedule(cyclic);

  py::class_<ACDC> acdc(
      m, "ACDC",
      "Alternating compressed and decompressed training (Peste et al., 2021, arXiv:2106.12379): from `begin` on, `sparse`\n"
      "steps at the final sparsity and `dense` steps without masks take turns; from `end` on the model stays sparse. The\n"
      "masks of a sparse phase are chosen at its first step, from the dense weights.");
  acdc.def(py::init([](int64_t begin, int64_t end, int64_t sparse, int64_t dense) {
             return validated(ACDC{begin, end, sparse, dense});
           }),
           py::arg("begin"), py::arg("end"), py::arg("sparse"), py::arg("dense"))
      .def_readonly("begin", &ACDC::begin)
      .def_readonly("end", &ACDC::end)
      .def_readonly("sparse", &ACDC::sparse)
      .def_readonly("dense", &ACDC::dense)
      .def(py::pickle([](const ACDC& s) { return py::make_tuple(s.begin, s.end, s.sparse, s.dense); },
                      [](const py::tuple& t) {
                        return validated(ACDC{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                              t[3].cast<int64_t>()});
                      }));
  def_schedule(acdc);
}

void init_iterative(py::module_& m) {
  py::class_<Iterative> iterative(
      m, "Iterative",
      "Train, prune, rewind, again: `rounds` updates, each of which prunes the same fraction of what is left. The first\n"
      "comes at `steps_per_round`, the end of the training schedule. With `rewind`, training then is at step `rewind_to` of\n"
      "its schedule again, and the next update comes when it is back at the end. \"weights\" sets all parameters and\n"
      "buffers of the model to what they were after step `rewind_to` (Frankle et al., 2020, arXiv:1912.05671);\n"
      "\"learning_rate\" leaves them (Renda et al., 2020, arXiv:2003.02389). Set the learning rate by\n"
      "Pruner.training_step.");
  iterative
      .def(py::init([](int64_t rounds, int64_t steps_per_round, const std::optional<std::string>& rewind,
                       int64_t rewind_to) {
             return validated(Iterative{rounds, steps_per_round, parse_rewind(rewind.value_or("none")), rewind_to});
           }),
           py::arg("rounds"), py::arg("steps_per_round"), py::arg("rewind") = py::none(), py::arg("rewind_to") = 0)
      .def_readonly("rounds", &Iterative::rounds)
      .def_readonly("steps_per_round", &Iterative::steps_per_round)
      .def_property_readonly("rewind", [](const Iterative& self) { return name(self.rewind); })
      .def_readonly("rewind_to", &Iterative::rewind_to)
      .def("training_step", &Iterative::training_step, py::arg("step"),
           "Where training is in its own schedule after `step` steps.")
      .def(py::pickle(
          [](const Iterative& s) { return py::make_tuple(s.rounds, s.steps_per_round, name(s.rewind), s.rewind_to); },
          [](const py::tuple& t) {
            return validated(Iterative{t[0].cast<int64_t>(), t[1].cast<int64_t>(),
                                       parse_rewind(t[2].cast<std::string>()), t[3].cast<int64_t>()});
          }));
  def_schedule(iterative);
}

void init_custom(py::module_& m) {
  const auto make = [](py::function function, std::vector<int64_t> updates, bool regrow) {
    return validated(
        CustomSchedule{std::make_shared<const CustomSchedule::Function>(PythonFunction(std::move(function))),
                       std::move(updates), regrow});
  };
  py::class_<CustomSchedule> custom(
      m, "CustomSchedule",
      "A sparsity that a function of the step gives, at the ascending steps `updates`. The last of them has exactly the\n"
      "final sparsity, whatever the function says. With `regrow`, what is pruned competes again at each update, so that\n"
      "the sparsity may fall; without, masks only grow.");
  custom.def(py::init(make), py::arg("function"), py::arg("updates"), py::arg("regrow") = false)
      .def_property_readonly("function", [](const CustomSchedule& self) { return function_of(self); })
      .def_property_readonly("updates", [](const CustomSchedule& self) { return py::tuple(py::cast(self.updates)); })
      .def_readonly("regrow", &CustomSchedule::regrow)
      .def(py::pickle([](const CustomSchedule& s) { return py::make_tuple(function_of(s), s.updates, s.regrow); },
                      [make](const py::tuple& t) {
                        return make(t[0].cast<py::function>(), t[1].cast<std::vector<int64_t>>(), t[2].cast<bool>());
                      }));
  def_schedule(custom);
}

void init_regrowth(py::module_& m) {
  py::class_<SET> set(
      m, "SET",
      "Sparse evolutionary training (Mocanu et al., 2018, arXiv:1707.04780): at begin + every, begin + 2 * every, ...\n"
      "before `end`, each tensor drops a fraction of its kept weights, those with the lowest scores, and grows as many at\n"
      "random from zero. `decay` (\"cosine\", \"linear\", \"constant\") is how the fraction falls from begin to end. Random\n"
      "numbers depend on seed, step, the parameter's name and the element alone.");
  set.def(py::init([](int64_t begin, int64_t end, int64_t every, double fraction, const std::string& decay,
                      uint64_t seed) { return validated(SET{begin, end, every, fraction, parse_decay(decay), seed}); }),
          py::arg("begin"), py::arg("end"), py::arg("every") = 100, py::arg("fraction") = 0.3,
          py::arg("decay") = "cosine", py::arg("seed") = 0)
      .def_readonly("begin", &SET::begin)
      .def_readonly("end", &SET::end)
      .def_readonly("every", &SET::every)
      .def_readonly("fraction", &SET::fraction)
      .def_property_readonly("decay", [](const SET& self) { return name(self.decay); })
      .def_readonly("seed", &SET::seed)
      .def("fraction_at", &SET::fraction_at, py::arg("step"), "The fraction that is exchanged at a step.")
      .def(py::pickle(
          [](const SET& s) { return py::make_tuple(s.begin, s.end, s.every, s.fraction, name(s.decay), s.seed); },
          [](const py::tuple& t) {
            return validated(SET{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<double>(),
                                 parse_decay(t[4].cast<std::string>()), t[5].cast<uint64_t>()});
          }));
  def_value(set);

  py::class_<RigL> rigl(
      m, "RigL",
      "The rigged lottery (Evci et al., 2020, arXiv:1911.11134): as SET, but what grows has the largest gradients of the\n"
      "step. The paper: end = 3/4 of training.");
  rigl.def(py::init([](int64_t begin, int64_t end, int64_t every, double fraction, const std::string& decay) {
             return validated(RigL{begin, end, every, fraction, parse_decay(decay)});
           }),
           py::arg("begin"), py::arg("end"), py::arg("every") = 100, py::arg("fraction") = 0.3,
           py::arg("decay") = "cosine")
      .def_readonly("begin", &RigL::begin)
      .def_readonly("end", &RigL::end)
      .def_readonly("every", &RigL::every)
      .def_readonly("fraction", &RigL::fraction)
      .def_property_readonly("decay", [](const RigL& self) { return name(self.decay); })
      .def("fraction_at", &RigL::fraction_at, py::arg("step"), "The fraction that is exchanged at a step.")
      .def(py::pickle([](const RigL& s) { return py::make_tuple(s.begin, s.end, s.every, s.fraction, name(s.decay)); },
                      [](const py::tuple& t) {
                        return validated(RigL{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                              t[3].cast<double>(), parse_decay(t[4].cast<std::string>())});
                      }));
  def_value(rigl);

  py::class_<StraightThrough> soft(
      m, "StraightThrough",
      "Soft masks: up to `end` the optimizer works on dense weights, the forward pass sees w * mask, and the gradient with\n"
      "respect to w * mask is taken for that of w, so pruned weights go on learning. Masks are chosen anew every `every`\n"
      "steps and at `end`, from where on they are fixed. `decay` adds decay * w to the gradients of pruned weights (SR-STE,\n"
      "Zhou et al., 2021, arXiv:2102.04010).");
  soft.def(py::init(
               [](int64_t end, int64_t every, double decay) { return validated(StraightThrough{end, every, decay}); }),
           py::arg("end"), py::arg("every") = 1, py::arg("decay") = 0.0)
      .def_readonly("end", &StraightThrough::end)
      .def_readonly("every", &StraightThrough::every)
      .def_readonly("decay", &StraightThrough::decay)
      .def(py::pickle([](const StraightThrough& s) { return py::make_tuple(s.end, s.every, s.decay); },
                      [](const py::tuple& t) {
                        return validated(
                            StraightThrough{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<double>()});
                      }));
  def_value(soft);
}

}  // namespace

void init_pruning_schedule(py::module_& m) {
  init_single(m);
  init_rising<LinearSchedule>(m, "LinearSchedule",
                              "A sparsity that rises evenly:\n\n    s(t) = initial + (final - initial) * x");
  init_polynomial(m);
  init_rising<CosineSchedule>(m, "CosineSchedule",
                              "A sparsity that rises slowly at both ends:\n\n"
                              "    s(t) = final + (initial - final) * (1 + cos(pi * x)) / 2");
  init_rising<ExponentialSchedule>(m, "ExponentialSchedule",
                                   "A sparsity that takes the same fraction of what is left in equal times:\n\n"
                                   "    1 - s(t) = (1 - initial) * ((1 - final) / (1 - initial)) ** x");
  init_cyclic(m);
  init_iterative(m);
  init_custom(m);
  init_regrowth(m);
}

}  // namespace rarefy::python

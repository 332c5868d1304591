#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

/// Errors of the core become the Python exception of the same kind, with the message alone (no C++ backtrace).
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) {
      std::rethrow_exception(pointer);
    }
  } catch (python_error& e) {  // raised by Python code that the autograd engine called
    e.restore();
  } catch (const c10::IndexError& e) {
    py::set_error(PyExc_IndexError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    py::set_error(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    py::set_error(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    py::set_error(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of rarefy. Its tensor functions are registered as torch.ops.rarefy.*";
  py::register_local_exception_translator(&translate);
  init_config(m);
  init_graph(m);
  init_graph_timing(m);
  init_pruning_surgery(m);  // plans of the next one hold cuts
  init_pruning(m);
  init_pruning_latency(m);
  init_observer(m);
  init_quantization(m);
  init_quantized_checkpoint(m);
  init_target(m);
  init_distillation(m);
  init_teacher_cache(m);
}

}  // namespace rarefy::python

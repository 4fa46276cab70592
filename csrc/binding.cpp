// The Python module: launchers with pointers as integers, and what the library was built for. No torch: see README.md.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

#ifndef LMF_ARCHITECTURES
#define LMF_ARCHITECTURES "cpu"
#endif
#ifndef LMF_MODULE
#define LMF_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

// How Python gives a parameter: pointers come as integers.
template <class T>
struct Parameter {
  using Given = T;
  static T pass(T given) { return given; }
};
template <class T>
struct Parameter<T*> {
  using Given = std::uintptr_t;
  static T* pass(std::uintptr_t given) { return reinterpret_cast<T*>(given); }
};

// A launcher that raises where the C++ one returns an error code.
template <class... P>
void add(py::module_& module, const char* name, int (*launcher)(P...)) {
  module.def(name, [name, launcher](typename Parameter<P>::Given... given) {
    const int code = launcher(Parameter<P>::pass(given)...);
    if (code != 0) {
      throw std::runtime_error("the CUDA kernel of " + std::string(name) + " could not be started: " +
                               lmf::error_text(code) + " (CUDA error " + std::to_string(code) + ").");
    }
  });
}

py::dict capabilities() {
  int count = 0;
  const int code = lmf::count_devices(&count);
  py::dict found;
  found["architectures"] = LMF_ARCHITECTURES;
  found["cuda"] = lmf::runtime_version();
  found["driver"] = lmf::driver_version();
  found["devices"] = count;
  found["missing"] = py::none();
  if (code != 0)
    found["missing"] = std::string("no CUDA device answers: ") + lmf::error_text(code);
  else if (count == 0)
    found["missing"] = "the CUDA driver sees no device";
  return found;
}

}  // namespace

PYBIND11_MODULE(LMF_MODULE, module) {
  module.doc() = "CUDA kernels of llava_mini_fast, called by llava_mini_fast.ops.cuda.";
  module.def("capabilities", &capabilities,
             "architectures (str), cuda and driver (versions as CUDA counts them, 0 for none), devices (int), and "
             "missing: why no kernel can run here, or None.");
  add(module, "rms_norm", &lmf::rms_norm);
  add(module, "rope", &lmf::rope);
  add(module, "swiglu", &lmf::swiglu);
  add(module, "add_frames", &lmf::add_frames);
  add(module, "attention", &lmf::attention);
  add(module, "compressor_attention", &lmf::compressor_attention);
  module.def("compressor_shared_bytes", &lmf::compressor_shared_bytes,
             "Bytes of shared memory that a block of compressor_attention takes, by dtype code, queries and width.");
}

// What the binding asks CUDA itself.
#include "common/platform.h"
#include "launchers.h"

namespace lmf {

#ifdef LMF_CPU

int runtime_version() { return 0; }
int driver_version() { return 0; }
int count_devices(int* count) {
  *count = 1;
  return 0;
}
const char* error_text(int code) { return code == 1 ? "invalid argument" : "unknown error"; }

#else

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : CUDART_VERSION;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int count_devices(int* count) {
  *count = 0;
  return cudaGetDeviceCount(count);
}

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#endif

}  // namespace lmf

// The Python module jdkd._C: what the build knows about itself, and every binding that JDKD_BINDINGS declares.
// It includes no header of torch, so that importing it depends on no particular torch version.
#include "common/bindings.h"
#include "jdkd_build_config.h"

#include <string>

namespace py = pybind11;

namespace jdkd {

std::vector<Binder>& binders() {
  static std::vector<Binder> registered;
  return registered;
}

namespace {

py::list split(const std::string& text, char separator) {
  py::list parts;
  for (size_t start = 0; start < text.size();) {
    const size_t end = std::min(text.find(separator, start), text.size());
    parts.append(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["torch"] = JDKD_TORCH_VERSION;
  info["cuda"] = text_or_none(JDKD_CUDA_VERSION);
  info["arch_list"] = split(JDKD_ARCH_LIST, ';');
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["cpu_ops"] = split(JDKD_CPU_OPS, ',');
  info["cuda_ops"] = split(JDKD_CUDA_OPS, ',');
  return info;
}

}  // namespace
}  // namespace jdkd

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of jdkd; its operators are under torch.ops.jdkd_C.";
  m.def(
      "build_info",
      &jdkd::build_info,
      "torch and CUDA versions compiled with, architectures, compiler, OpenMP, and the operators compiled per device.");
  for (jdkd::Binder bind : jdkd::binders()) {
    bind(m);
  }
}

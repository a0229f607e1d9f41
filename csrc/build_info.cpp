// What the build knows of itself, as an operator.
#include "common/checks.h"
#include "jdkd_build_config.h"

#include <tuple>

namespace jdkd {
namespace {

#if defined(__clang__)
constexpr auto kCompiler = "clang " __clang_version__;
#else
constexpr auto kCompiler = "g++ " __VERSION__;
#endif

std::tuple<std::string, std::string> build_info() { return {JDKD_BUILD_CONFIG, kCompiler}; }

}  // namespace
}  // namespace jdkd

STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) {
  // (what setup.py knew, in JSON, the compiler)
  m.def("build_info() -> (str, str)");
}

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&jdkd::build_info)); }

// How a translation unit adds Python functions to jdkd._C without a shared list.
//
//   #include "common/bindings.h"
//   JDKD_BINDINGS(pearson_planner) { m.def("pearson_plan", &plan, ...); }
//
// For host-side code that is no operator, such as a launch planner. Operators are registered with the dispatcher
// (see common/checks.h). A file cannot do both: pybind11 belongs here, TORCH_TARGET_VERSION there.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace jdkd {

using Binder = void (*)(pybind11::module_&);

// The functions that PYBIND11_MODULE runs, in no particular order. Defined in module.cpp.
std::vector<Binder>& binders();

struct BinderRegistration {
  explicit BinderRegistration(Binder binder) { binders().push_back(binder); }
};

}  // namespace jdkd

#define JDKD_BINDINGS(name)                                                  \
  static void jdkd_bind_##name(pybind11::module_& m);                        \
  static const jdkd::BinderRegistration jdkd_registration_##name(            \
      &jdkd_bind_##name);                                                    \
  static void jdkd_bind_##name(pybind11::module_& m)

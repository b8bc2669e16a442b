// The part without torch, for tests and `rmipo-lite info`: how it was compiled, and the host side
// of the arithmetic that the kernels share.
#include <pybind11/pybind11.h>

#include "pair_math.h"
#include "row_math.h"

namespace py = pybind11;

#ifdef _MSC_VER
constexpr const char* kCompiler = "MSVC " PYBIND11_TOSTRING(_MSC_FULL_VER);
constexpr long kStandard = _MSVC_LANG;  // its __cplusplus stays at 1997
#else
constexpr const char* kCompiler = __VERSION__;
constexpr long kStandard = __cplusplus;
#endif

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "torch-free host functions of the extension";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = kCompiler;
    info["cplusplus"] = kStandard;
    return info;
  });
  m.def("row_offset", &rmipo::row_offset, py::arg("row"), py::arg("row_stride"), py::arg("column"),
        "Offset of an element in 64 bits.");
  m.def(
      "classify",
      [](int64_t id, int64_t vocab_size) {
        switch (rmipo::classify(id, vocab_size)) {
          case rmipo::Target::kScored:
            return "scored";
          case rmipo::Target::kIgnored:
            return "ignored";
          default:
            return "invalid";
        }
      },
      py::arg("id"), py::arg("vocab_size"), "What a target id asks of its row.");
  m.def("adaptive_gamma", &rmipo::adaptive_gamma, py::arg("pmi_gap"), py::arg("gamma_min"),
        py::arg("gamma_max"), "The margin of a pair.");
}

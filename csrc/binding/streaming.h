// What the stepper and the slots share as Python types: the memory of x and out, which are tensors,
// arrays or other buffers, and the layers that they are made of.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "binding/cpu_kernel.h"
#include "cpu/registry.h"

namespace fastrnn {

// A dtype, and how its numbers are recognised.
struct Kind {
  at::ScalarType type;
  const char* name;
  char code;  // of the buffer protocol; none for bfloat16
  int64_t itemsize;
};

// The shape that x or out should have: [rows, width] or [rows, steps, width].
struct FrameShape {
  static constexpr int64_t kNone = -1;  // steps of two dimensions
  static constexpr int64_t kAny = -2;   // steps that are not known yet

  int64_t rows = 0;
  int64_t steps = kNone;
  int64_t width = 0;
  bool single = false;       // whether [width] will do if there is one row
  const char* meaning = "";  // of the dimensions, for an error
};

// The memory of x or of out.
struct View {
  View() { buffer.obj = nullptr; }
  ~View() {
    if (buffer.obj) PyBuffer_Release(&buffer);
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  char* data = nullptr;
  int64_t row = 0;    // numbers from row to row,
  int64_t step = 0;   // and from step to step
  int64_t steps = 1;  // number of steps
  int dims = 0;
  Py_buffer buffer;  // keeps the memory of x or out in place, if that is a buffer
};

// Views x or out, which should be of this kind and shape, with the numbers of a row side by side.
// Raises and returns false otherwise.
bool view_of(const Kind* kind, PyObject* object, const char* name, const FrameShape& shape,
             bool written, View& view);
// Whether an object is a numpy.ndarray; NumPy is not imported for this.
bool is_array(PyObject* object);
// Allocates a result like x, with the same dimensions but `width`; a new reference, or null with an
// error set.
PyObject* result_like(const Kind* kind, PyObject* x, const View& view, int64_t rows, int64_t width);
// Whether out may be written while x is read: they do not overlap, or each row of out begins where
// the row of x does. Raises and returns false otherwise.
bool may_write(const Kind* kind, const View& x, const FrameShape& from, const View& out,
               const FrameShape& to);

// A layer as fastrnn's Weights: w_ih, w_hh, b_ih, b_hh, w_hr, of which some may be missing, and
// then the cell's learned parameters.
using LayerWeights = std::vector<std::optional<at::Tensor>>;

// The arguments (cell, like, layers, format, scales, number, threads, release_gil) of a stepper, as
// fastrnn/nn/stream.py checks them: `like` has the dtype of x, the weights of a layer with their
// scales are those of pack(), and `number` is one of rows or slots.
struct Layers {
  explicit Layers(PyObject* args);

  const CompiledCell& code() const { return cell->code(format); }
  Storage storage() const { return storage_of(kind->type); }
  // Packs the weights of all layers into the stepper.
  template <class Stepper>
  void give_weights(Stepper& stepper) const {
    for (size_t l = 0; l < weights.size(); ++l) {
      const at::Tensor packed = pack(*cell, format, weights[l], scales[l]);
      stepper.set_weights(static_cast<int64_t>(l), packed.const_data_ptr());
    }
  }

  const CellFacts* cell = nullptr;
  Format format = Format::kFloat;
  const Kind* kind = nullptr;
  std::vector<LayerWeights> weights;
  std::vector<std::vector<at::Tensor>> scales;
  std::vector<RecurrenceSizes> sizes;
  int64_t number = 0;
  int32_t threads = 1;
  bool release_gil = true;
};

// Tensors in the compute type, of these shapes, from the states that Python gave.
std::vector<at::Tensor> states_from(PyObject* given, const Kind* kind,
                                    const std::vector<std::vector<int64_t>>& shapes,
                                    const char* dimensions);
at::Tensor empty_state(const Kind* kind, const std::vector<int64_t>& shape);

}  // namespace fastrnn

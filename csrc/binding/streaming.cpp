#include "binding/streaming.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "binding/callbacks.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

constexpr Kind kKinds[] = {{at::kFloat, "float32", 'f', 4},
                           {at::kDouble, "float64", 'd', 8},
                           {at::kHalf, "float16", 'e', 2},
                           {at::kBFloat16, "bfloat16", '\0', 2}};

bool wrong_shape(const char* name, const FrameShape& shape, const std::string& got) {
  std::string wanted = std::to_string(shape.rows) + ", ";
  if (shape.steps != FrameShape::kNone)
    wanted += shape.steps == FrameShape::kAny ? "T, " : std::to_string(shape.steps) + ", ";
  PyErr_Format(PyExc_ValueError, "%s should have shape (%s%lld)%s, %s, got (%s)", name,
               wanted.c_str(), static_cast<long long>(shape.width),
               shape.single && shape.rows == 1 ? " or without the first dimension" : "",
               shape.meaning, got.c_str());
  return false;
}

// Whether two rows of `width` numbers overlap.
bool overlaps_itself(const View& view, int64_t rows, int64_t width) {
  int64_t near = std::abs(view.step), far = std::abs(view.row), count = view.steps, others = rows;
  if (near > far) {
    std::swap(near, far);
    std::swap(count, others);
  }
  if (count > 1) {
    if (near < width) return true;
    width += near * (count - 1);
  }
  return others > 1 && far < width;
}

// Fills `view` and checks that it has the shape, with the numbers of a row side by side, that is
// `unit` apart. Raises and returns false otherwise.
template <class Int>
bool check_shape(const Kind* kind, const char* name, const FrameShape& shape, bool written,
                 int dims, const Int* sizes, const Int* strides, int64_t unit, View& view) {
  const int64_t B = shape.rows, width = shape.width;
  const int wanted = shape.steps == FrameShape::kNone ? 2 : 3;
  const bool fits =
      dims == wanted ? sizes[0] == B && sizes[dims - 1] == width &&
                           (dims == 2 || shape.steps == FrameShape::kAny || sizes[1] == shape.steps)
                     : shape.single && dims == 1 && B == 1 && sizes[0] == width;
  if (__builtin_expect(!fits, false)) {
    std::string got;
    for (int d = 0; d < dims; ++d) got += (d ? ", " : "") + std::to_string(sizes[d]);
    return wrong_shape(name, shape, dims == 1 ? got + "," : got);
  }
  view.dims = dims;
  view.row = B == 1 ? width : static_cast<int64_t>(strides[0]) / unit;
  if (dims == 3) {
    view.steps = sizes[1];
    view.step = view.steps == 1 ? width : static_cast<int64_t>(strides[1]) / unit;
  }
  if (__builtin_expect(B == 0 || view.steps == 0, false)) return true;
  const bool dense = (width == 1 || strides[dims - 1] == unit) &&
                     (B == 1 || strides[0] % unit == 0) &&
                     (view.steps == 1 || strides[1] % unit == 0) &&
                     reinterpret_cast<uintptr_t>(view.data) % kind->itemsize == 0;
  if (__builtin_expect(!dense, false)) {
    PyErr_Format(PyExc_ValueError,
                 "the numbers of %s should lie side by side within a row, aligned: pass "
                 "%s.contiguous() or numpy.ascontiguousarray(%s)",
                 name, name, name);
    return false;
  }
  if (written && (B > 1 || view.steps > 1) && overlaps_itself(view, B, width)) {
    PyErr_Format(PyExc_ValueError, "the rows of %s overlap in memory", name);
    return false;
  }
  return true;
}

bool wrong_dtype(const Kind* kind, const char* name, const char* got) {
  PyErr_Format(PyExc_ValueError,
               "%s should be %s, the dtype of the weights, got %s; convert it, or the layer before "
               "layer.stream()",
               name, kind->name, got);
  return false;
}

bool view_of(const Kind* kind, const at::Tensor& t, const char* name, const FrameShape& shape,
             bool written, View& view) {
  if (t.scalar_type() != kind->type) {
    for (const Kind& other : kKinds)
      if (other.type == t.scalar_type()) return wrong_dtype(kind, name, other.name);
    return wrong_dtype(kind, name, c10::toString(t.scalar_type()));
  }
  const c10::DispatchKeySet unusual{
      c10::DispatchKey::Python,           c10::DispatchKey::Negative,
      c10::DispatchKey::Conjugate,        c10::DispatchKey::ZeroTensor,
      c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper};
  if (!t.is_cpu() || t.layout() != at::kStrided || t.key_set().has_any(unusual)) {
    PyErr_Format(PyExc_ValueError,
                 "%s should be a plain dense tensor on the CPU: torch cannot trace, transform or "
                 "move a stepper",
                 name);
    return false;
  }
  if (t.requires_grad() && (written || at::GradMode::is_enabled())) {
    PyErr_Format(PyExc_RuntimeError,
                 "%s requires gradients, but a stepper has no derivative: pass %s.detach()%s", name,
                 name, written ? "" : ", or call it under torch.no_grad()");
    return false;
  }
  if (written) {
    view.data = static_cast<char*>(t.mutable_data_ptr());
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  } else {
    view.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  }
  return check_shape(kind, name, shape, written, static_cast<int>(t.dim()), t.sizes().data(),
                     t.strides().data(), 1, view);
}

// numpy.ndarray, or null until NumPy is loaded. Nothing here needs NumPy, so it is not imported.
PyTypeObject* ndarray() {
  static PyTypeObject* type = nullptr;
  if (!type) {
    PyObject* key = PyUnicode_FromString("numpy");
    PyObject* numpy = key ? PyImport_GetModule(key) : nullptr;
    if (numpy) type = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(numpy, "ndarray"));
    Py_XDECREF(numpy);
    Py_XDECREF(key);
    PyErr_Clear();
  }
  return type;
}

}  // namespace

bool is_array(PyObject* object) {
  PyTypeObject* type = ndarray();
  return type && PyObject_TypeCheck(object, type);
}

namespace {

// Reads NumPy's own fields: its buffer protocol allocates memory and takes three times as long.
bool view_of_array(const Kind* kind, PyObject* object, const char* name, const FrameShape& shape,
                   bool written, View& view) {
  using py::detail::npy_api;
  const auto* array = py::detail::array_proxy(static_cast<const void*>(object));
  const auto* dtype = py::detail::array_descriptor_proxy(array->descr);
  if (dtype->type != kind->code || dtype->byteorder != '=') {
    PyObject* text = PyObject_Str(array->descr);
    if (text) wrong_dtype(kind, name, PyUnicode_AsUTF8(text));
    Py_XDECREF(text);
    return false;
  }
  if (written && !(array->flags & npy_api::NPY_ARRAY_WRITEABLE_)) {
    PyErr_Format(PyExc_ValueError, "%s is read-only", name);
    return false;
  }
  view.data = array->data;
  return check_shape(kind, name, shape, written, array->nd, array->dimensions, array->strides,
                     kind->itemsize, view);
}

// For any other object with a buffer.
bool view_of_buffer(const Kind* kind, PyObject* object, const char* name, const FrameShape& shape,
                    bool written, View& view) {
  Py_buffer& buffer = view.buffer;
  if (PyObject_GetBuffer(object, &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    buffer.obj = nullptr;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError,
                 "%s should be a torch.Tensor, a numpy.ndarray or another buffer, got %s", name,
                 Py_TYPE(object)->tp_name);
    return false;
  }
  const char* format = buffer.format ? buffer.format : "B";
  const char* code = *format == '@' || *format == '=' ? format + 1 : format;
  if (*code != kind->code || *code == '\0' || code[1] != '\0')
    return wrong_dtype(kind, name, format);
  if (written && buffer.readonly) {
    PyErr_Format(PyExc_ValueError, "%s is read-only", name);
    return false;
  }
  view.data = static_cast<char*>(buffer.buf);
  return check_shape(kind, name, shape, written, buffer.ndim, buffer.shape, buffer.strides,
                     kind->itemsize, view);
}

}  // namespace

bool view_of(const Kind* kind, PyObject* object, const char* name, const FrameShape& shape,
             bool written, View& view) {
  // Exact types first: torch takes 50 ns to tell whether an object is an instance of a tensor.
  if (!THPVariable_CheckExact(object) && is_array(object))
    return view_of_array(kind, object, name, shape, written, view);
  if (THPVariable_Check(object))
    return view_of(kind, THPVariable_Unpack(object), name, shape, written, view);
  return view_of_buffer(kind, object, name, shape, written, view);
}

PyObject* result_like(const Kind* kind, PyObject* x, const View& view, int64_t rows,
                      int64_t width) {
  const std::vector<int64_t> size = view.dims == 3   ? std::vector{rows, view.steps, width}
                                    : view.dims == 2 ? std::vector{rows, width}
                                                     : std::vector{width};
  if (THPVariable_Check(x)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return THPVariable_Wrap(at::empty(size, at::TensorOptions(kind->type)));
  }
  if (is_array(x)) return py::array(py::dtype(std::string(1, kind->code)), size).release().ptr();
  PyErr_Format(PyExc_TypeError,
               "pass out=: a result is made only if x is a tensor or an array, and x is a %s",
               Py_TYPE(x)->tp_name);
  return nullptr;
}

bool may_write(const Kind* kind, const View& x, const FrameShape& from, const View& out,
               const FrameShape& to) {
  const auto extent = [kind](const View& view, const FrameShape& shape) {
    const int64_t row = (shape.rows - 1) * view.row, step = (view.steps - 1) * view.step;
    const int64_t first = std::min<int64_t>(row, 0) + std::min<int64_t>(step, 0);
    const int64_t last = std::max<int64_t>(row, 0) + std::max<int64_t>(step, 0) + shape.width;
    return std::make_pair(view.data + first * kind->itemsize, view.data + last * kind->itemsize);
  };
  const int64_t rows = from.rows, steps = x.steps;
  if (rows == 0 || steps == 0 || (rows == 1 && steps == 1)) return true;
  const auto read = extent(x, from), written = extent(out, to);
  if (read.second <= written.first || written.second <= read.first) return true;
  if (x.data == out.data && (rows == 1 || x.row == out.row) && (steps == 1 || x.step == out.step) &&
      !overlaps_itself(x, rows, from.width))
    return true;
  PyErr_SetString(PyExc_ValueError,
                  "out overlaps x in memory: its rows should begin where those of x do, or it "
                  "should lie apart from x");
  return false;
}

namespace {

RecurrenceSizes sizes_of(const CellFacts& cell, const LayerWeights& layer) {
  TORCH_CHECK(
      layer.size() >= 5 && layer[0] && layer[1] && layer[0]->dim() == 2 && layer[1]->dim() == 2 &&
          layer[2].has_value() == layer[3].has_value(),
      "a stepper's layer should be (w_ih, w_hh, b_ih, b_hh, w_hr, *params), with matrices and with "
      "both biases or none");
  const bool projected = layer[4].has_value();
  const int64_t H = layer[0]->size(0) / cell.input_gates;
  return {layer[0]->size(1), H, projected ? layer[1]->size(1) : H, projected};
}

}  // namespace

Layers::Layers(PyObject* args) {
  const char *name = nullptr, *format_name = nullptr;
  PyObject *like = nullptr, *layer_list = nullptr, *scale_list = nullptr;
  long long count = 0;
  int threads_asked = 1, release = 1;
  if (!PyArg_ParseTuple(args, "sOOsOLip", &name, &like, &layer_list, &format_name, &scale_list,
                        &count, &threads_asked, &release))
    throw py::error_already_set();
  weights = py::cast<std::vector<LayerWeights>>(py::handle(layer_list));
  scales = py::cast<std::vector<std::vector<at::Tensor>>>(py::handle(scale_list));
  number = count;
  threads = threads_asked;
  release_gil = release;
  TORCH_CHECK(number >= 1 && threads >= 1 && !weights.empty() && scales.size() == weights.size(),
              "a stepper needs a batch, a thread and a layer");
  const at::ScalarType stored = py::cast<at::Tensor>(py::handle(like)).scalar_type();
  format = format_named(format_name);
  cell = &known_cell(name, at::kCPU, format);
  for (const Kind& candidate : kKinds)
    if (candidate.type == stored) kind = &candidate;
  TORCH_CHECK(kind && (format == Format::kDouble) == (stored == at::kDouble),
              "a stepper computes float32, float64, bfloat16 and float16, not ", stored, " in ",
              format_name);
  at::AutoDispatchBelowADInplaceOrView below;
  for (const LayerWeights& layer : weights) {
    sizes.push_back(sizes_of(*cell, layer));
    TORCH_CHECK(sizes.back().hidden == sizes[0].hidden &&
                    (sizes.size() < 2 || sizes.back().inputs == sizes.end()[-2].recurrent),
                "a stepper needs layers that fit onto each other");
  }
}

at::Tensor empty_state(const Kind* kind, const std::vector<int64_t>& shape) {
  return at::empty(shape, at::TensorOptions(kind->type == at::kDouble ? at::kDouble : at::kFloat));
}

std::vector<at::Tensor> states_from(PyObject* given, const Kind* kind,
                                    const std::vector<std::vector<int64_t>>& shapes,
                                    const char* dimensions) {
  const auto states = py::cast<std::vector<at::Tensor>>(py::handle(given));
  TORCH_CHECK_VALUE(states.size() == shapes.size(), "state should hold ", shapes.size(),
                    " tensors, got ", states.size());
  std::vector<at::Tensor> ready;
  for (size_t s = 0; s < shapes.size(); ++s) {
    const at::Tensor to = empty_state(kind, shapes[s]);
    TORCH_CHECK_VALUE(states[s].sizes() == to.sizes() && states[s].is_floating_point(), "state ", s,
                      " should be floating-point ", to.sizes(), " (", dimensions, "), got ",
                      states[s].scalar_type(), " ", states[s].sizes());
    ready.push_back(states[s].detach().to(to.options()).contiguous());
  }
  return ready;
}

}  // namespace fastrnn

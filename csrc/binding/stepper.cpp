// The stepper as a Python type. A step of a small layer takes less time than pybind11 needs to
// call a function, so this one is bound by hand: no argument is converted, no memory is allocated.
#include "cpu/stepper.h"

#include <ATen/Functions.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <vector>

#include "binding/streaming.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

struct StepperObject {
  PyObject_HEAD std::unique_ptr<Stepper> stepper;
  const Kind* kind;
  FrameShape x_shape, out_shape;
  bool release_gil;
  std::atomic<bool> busy;
};

StepperObject* as_stepper(PyObject* self) { return reinterpret_cast<StepperObject*>(self); }

bool take_arguments(PyObject* const* args, Py_ssize_t count, PyObject* names, PyObject*& x,
                    PyObject*& out) {
  if (count > 0) x = args[0];
  if (count > 1) out = args[1];
  bool valid = count <= 2;
  for (Py_ssize_t k = 0; valid && names && k < PyTuple_GET_SIZE(names); ++k) {
    PyObject* name = PyTuple_GET_ITEM(names, k);
    PyObject*& to = PyUnicode_CompareWithASCIIString(name, "out") == 0 ? out : x;
    valid = !to && (&to == &out || PyUnicode_CompareWithASCIIString(name, "x") == 0);
    to = args[count + k];
  }
  if (valid && x) return true;
  PyErr_SetString(PyExc_TypeError, "step(x, out=None) takes x and optionally out");
  return false;
}

// Held while a thread uses the states, which one thread can do at a time.
class InUse {
 public:
  explicit InUse(StepperObject* self) : self_(self->busy.exchange(true) ? nullptr : self) {
    if (!self_)
      PyErr_SetString(PyExc_RuntimeError,
                      "this stepper is in use by another thread: make one stepper per stream");
  }
  ~InUse() {
    if (self_) self_->busy = false;
  }
  explicit operator bool() const { return self_; }

 private:
  StepperObject* self_;
};

PyObject* step(PyObject* object, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  StepperObject* self = as_stepper(object);
  PyObject *x = nullptr, *out = nullptr;
  if (!take_arguments(args, count, names, x, out)) return nullptr;
  View from, to;
  if (!view_of(self->kind, x, "x", self->x_shape, false, from)) return nullptr;
  if (out && out != Py_None) {
    Py_INCREF(out);
  } else {
    out = result_like(self->kind, x, from, self->stepper->batch(), self->stepper->outputs());
    if (!out) return nullptr;
  }
  py::object result = py::reinterpret_steal<py::object>(out);
  if (!view_of(self->kind, out, "out", self->out_shape, true, to)) return nullptr;
  InUse use(self);
  if (!use) return nullptr;
  if (self->release_gil) {
    PyThreadState* state = PyEval_SaveThread();
    self->stepper->step(from.data, from.row, to.data, to.row);
    PyEval_RestoreThread(state);
  } else {
    self->stepper->step(from.data, from.row, to.data, to.row);
  }
  return result.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* reset(PyObject* object, PyObject*) {
  StepperObject* self = as_stepper(object);
  InUse use(self);
  if (!use) return nullptr;
  self->stepper->reset();
  Py_RETURN_NONE;
}

// Of a state in Python.
std::vector<int64_t> state_shape(const Stepper& stepper, int32_t s) {
  return {stepper.layers(), stepper.batch(), stepper.width(s)};
}

PyObject* read(PyObject* object, PyObject*) {
  HANDLE_TH_ERRORS
  StepperObject* self = as_stepper(object);
  at::AutoDispatchBelowADInplaceOrView below;
  InUse use(self);
  if (!use) return nullptr;
  py::list states;
  for (int32_t s = 0; s < self->stepper->states(); ++s) {
    const at::Tensor state = empty_state(self->kind, state_shape(*self->stepper, s));
    self->stepper->read(s, state.mutable_data_ptr());
    states.append(state.to(self->kind->type));
  }
  return states.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* write(PyObject* object, PyObject* value) {
  HANDLE_TH_ERRORS
  StepperObject* self = as_stepper(object);
  at::AutoDispatchBelowADInplaceOrView below;
  const int32_t S = self->stepper->states();
  std::vector<std::vector<int64_t>> shapes;
  for (int32_t s = 0; s < S; ++s) shapes.push_back(state_shape(*self->stepper, s));
  const std::vector<at::Tensor> ready =
      states_from(value, self->kind, shapes, "layers, batch, width");
  InUse use(self);
  if (!use) return nullptr;
  for (int32_t s = 0; s < S; ++s) self->stepper->write(s, ready[s].const_data_ptr());
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const Layers layers(args);
  at::AutoDispatchBelowADInplaceOrView below;
  auto stepper = std::make_unique<Stepper>(layers.code(), layers.format, layers.storage(),
                                           layers.number, layers.sizes, layers.threads);
  layers.give_weights(*stepper);

  PyObject* object = type->tp_alloc(type, 0);
  if (!object) return nullptr;
  StepperObject* self = as_stepper(object);
  new (&self->stepper) std::unique_ptr<Stepper>(std::move(stepper));
  new (&self->busy) std::atomic<bool>(false);
  self->kind = layers.kind;
  const Stepper& made = *self->stepper;
  const char* meaning = "the batch size of the stepper and its features";
  self->x_shape = {made.batch(), FrameShape::kNone, made.inputs(), true, meaning};
  self->out_shape = {made.batch(), FrameShape::kNone, made.outputs(), true, meaning};
  self->release_gil = layers.release_gil;
  return object;
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  as_stepper(object)->stepper.~unique_ptr();
  type->tp_free(object);
  Py_DECREF(type);
}

template <int64_t (Stepper::*number)() const>
PyObject* get(PyObject* object, void*) {
  return PyLong_FromLongLong((as_stepper(object)->stepper.get()->*number)());
}

PyObject* threads(PyObject* object, void*) {
  return PyLong_FromLong(as_stepper(object)->stepper->threads());
}

PyObject* weights(PyObject* object, void*) {
  return PyUnicode_FromString(name_of(as_stepper(object)->stepper->format()));
}

}  // namespace

void bind_stepper(py::module_& m) {
  static PyMethodDef methods[] = {
      {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
       METH_FASTCALL | METH_KEYWORDS, nullptr},
      {"reset", reset, METH_NOARGS, nullptr},
      {"_read", read, METH_NOARGS, nullptr},
      {"_write", write, METH_O, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"num_layers", get<&Stepper::layers>, nullptr, nullptr, nullptr},
      {"batch_size", get<&Stepper::batch>, nullptr, nullptr, nullptr},
      {"input_size", get<&Stepper::inputs>, nullptr, nullptr, nullptr},
      {"output_size", get<&Stepper::outputs>, nullptr, nullptr, nullptr},
      {"threads", threads, nullptr, nullptr, nullptr},
      {"weights", weights, nullptr, nullptr, nullptr},
      {"nbytes", get<&Stepper::weight_bytes>, nullptr, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                {Py_tp_methods, methods},
                                {Py_tp_getset, properties},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastrnn._C.Stepper", sizeof(StepperObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  m.add_object("Stepper", py::reinterpret_steal<py::object>(PyType_FromSpec(&spec)));
}

}  // namespace fastrnn

// The slots of many streams as a Python type, bound by hand like the stepper.
#include "cpu/slots.h"

#include <ATen/Functions.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "binding/streaming.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// Members change under the GIL alone, but for the states of the chosen slots of a running call.
struct SlotsMembers {
  std::unique_ptr<Slots> slots;
  const Kind* kind = nullptr;
  bool release_gil = true;
  bool running = false;
  std::vector<int64_t> chosen;  // [capacity], the slots of a call
  std::vector<uint64_t> call;   // [capacity], the last call that chose each slot
  uint64_t calls = 0;
};

struct SlotsObject {
  PyObject_HEAD SlotsMembers members;
};

SlotsMembers& members_of(PyObject* object) {
  return reinterpret_cast<SlotsObject*>(object)->members;
}

// One call at a time chooses slots and runs them.
class Running {
 public:
  explicit Running(SlotsMembers& self) : self_(self.running ? nullptr : &self) {
    if (!self_) {
      PyErr_SetString(PyExc_RuntimeError,
                      "another thread runs these slots: call them from one thread at a time, or "
                      "make slots for each thread");
      return;
    }
    self.running = true;
    ++self.calls;
  }
  ~Running() {
    if (self_) self_->running = false;
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  explicit operator bool() const { return self_; }

 private:
  SlotsMembers* self_;
};

bool taken(const SlotsMembers& self, int64_t slot) {
  if (self.slots->taken(slot)) return true;
  PyErr_Format(PyExc_ValueError, "no stream has slot %lld: add() returns a slot",
               static_cast<long long>(slot));
  return false;
}

// The number that Python gave as a slot, or -1 with an error set. No stream has a slot below zero
// or one that overflows.
int64_t number_of(PyObject* given) {
  int overflow = 0;
  const long long slot = PyLong_AsLongLongAndOverflow(given, &overflow);
  if ((slot >= 0 && !overflow) || PyErr_Occurred()) return slot;
  PyErr_Format(PyExc_ValueError, "no stream has slot %S: add() returns a slot", given);
  return -1;
}

// Makes a slot that of row `n` of the call.
bool choose(SlotsMembers& self, int64_t n, int64_t slot) {
  if (!taken(self, slot)) return false;
  if (self.call[slot] == self.calls) {
    PyErr_Format(PyExc_ValueError,
                 "slot %lld is given twice: a call takes each stream once; give the frames of a "
                 "stream to run() as [n, T, I]",
                 static_cast<long long>(slot));
    return false;
  }
  self.call[slot] = self.calls;
  self.chosen[n] = slot;
  return true;
}

bool choose(SlotsMembers& self, const char* data, int64_t n, int64_t stride) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t slot;
    std::memcpy(&slot, data + k * stride, sizeof(slot));
    if (!choose(self, k, slot)) return false;
  }
  return true;
}

int64_t wrong_slots(const char* got) {
  PyErr_Format(PyExc_TypeError,
               "slots should be a list or tuple of integers, or an int64 tensor or array of one "
               "dimension, got %s",
               got);
  return -1;
}

// Reads the slots of a call; returns their number, or -1 with an error set.
int64_t choose(SlotsMembers& self, PyObject* given) {
  if (PyList_Check(given) || PyTuple_Check(given)) {
    int64_t n = 0;
    for (; n < PySequence_Fast_GET_SIZE(given); ++n) {
      PyObject* item = PySequence_Fast_GET_ITEM(given, n);
      if (!PyIndex_Check(item)) return wrong_slots(Py_TYPE(item)->tp_name);
      const int64_t slot = number_of(item);
      if (slot < 0 || !choose(self, n, slot)) return -1;
    }
    return n;
  }
  if (THPVariable_Check(given)) {
    const at::Tensor& t = THPVariable_Unpack(given);
    if (!t.is_cpu() || t.layout() != at::kStrided || t.scalar_type() != at::kLong || t.dim() != 1 ||
        t.key_set().has(c10::DispatchKey::Python))
      return wrong_slots("another tensor");
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    return choose(self, data, t.size(0), t.stride(0) * 8) ? t.size(0) : -1;
  }
  if (is_array(given)) {
    const auto* array = py::detail::array_proxy(static_cast<const void*>(given));
    if (array->nd != 1 || !py::isinstance<py::array_t<int64_t>>(given))
      return wrong_slots("another array");
    return choose(self, array->data, array->dimensions[0], array->strides[0])
               ? static_cast<int64_t>(array->dimensions[0])
               : -1;
  }
  return wrong_slots(Py_TYPE(given)->tp_name);
}

struct Arguments {
  PyObject* x = nullptr;
  PyObject* slots = nullptr;
  PyObject* out = nullptr;
};

bool take(const char* method, PyObject* const* args, Py_ssize_t count, PyObject* names,
          Arguments& to) {
  PyObject** const places[] = {&to.x, &to.slots, &to.out};
  const char* const known[] = {"x", "slots", "out"};
  bool valid = count <= 3;
  for (Py_ssize_t k = 0; valid && k < count; ++k) *places[k] = args[k];
  for (Py_ssize_t k = 0; valid && names && k < PyTuple_GET_SIZE(names); ++k) {
    int which = 0;
    while (which < 3 &&
           PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, k), known[which]) != 0)
      ++which;
    valid = which < 3 && !*places[which];
    if (valid) *places[which] = args[count + k];
  }
  if (valid && to.x && to.slots) return true;
  PyErr_Format(PyExc_TypeError, "%s(x, slots, out=None) takes x, slots and optionally out", method);
  return false;
}

template <bool kBlock>
PyObject* run(PyObject* object, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  SlotsMembers& self = members_of(object);
  Slots& slots = *self.slots;
  Arguments given;
  if (!take(kBlock ? "run" : "step", args, count, names, given)) return nullptr;
  Running running(self);
  if (!running) return nullptr;
  const int64_t n = choose(self, given.slots);
  if (n < 0) return nullptr;
  const char* meaning = kBlock ? "the slots, their frames and features" : "the slots and features";
  const FrameShape from{n, kBlock ? FrameShape::kAny : FrameShape::kNone, slots.stepper().inputs(),
                        false, meaning};
  View x, y;
  if (!view_of(self.kind, given.x, "x", from, false, x)) return nullptr;
  const FrameShape to{n, kBlock ? x.steps : FrameShape::kNone, slots.stepper().outputs(), false,
                      meaning};
  PyObject* out = given.out;
  if (out && out != Py_None) {
    Py_INCREF(out);
  } else {
    out = result_like(self.kind, given.x, x, n, to.width);
    if (!out) return nullptr;
  }
  py::object result = py::reinterpret_steal<py::object>(out);
  if (!view_of(self.kind, out, "out", to, true, y) || !may_write(self.kind, x, from, y, to))
    return nullptr;
  const Slots::Frames read{x.data, x.row, x.step}, written{y.data, y.row, y.step};
  if (self.release_gil) {
    PyThreadState* state = PyEval_SaveThread();
    slots.run(self.chosen.data(), n, x.steps, read, written);
    PyEval_RestoreThread(state);
  } else {
    slots.run(self.chosen.data(), n, x.steps, read, written);
  }
  return result.release().ptr();
  END_HANDLE_TH_ERRORS
}

// A slot that a stream has and that no other thread runs; raises and returns -1 otherwise.
int64_t slot_of(const SlotsMembers& self, PyObject* given) {
  const int64_t slot = number_of(given);
  if (slot < 0 || !taken(self, slot)) return -1;
  if (!self.running || self.call[slot] != self.calls) return slot;
  PyErr_Format(PyExc_RuntimeError, "another thread runs slot %lld: wait until its call returns",
               static_cast<long long>(slot));
  return -1;
}

PyObject* add(PyObject* object, PyObject*) {
  SlotsMembers& self = members_of(object);
  const int64_t slot = self.slots->add();
  if (slot >= 0) return PyLong_FromLongLong(slot);
  PyErr_Format(PyExc_RuntimeError,
               "all %lld slots are taken: remove() a stream, or make more slots",
               static_cast<long long>(self.slots->capacity()));
  return nullptr;
}

PyObject* remove(PyObject* object, PyObject* given) {
  SlotsMembers& self = members_of(object);
  const int64_t slot = slot_of(self, given);
  if (slot < 0) return nullptr;
  self.slots->remove(slot);
  Py_RETURN_NONE;
}

PyObject* reset(PyObject* object, PyObject* given) {
  SlotsMembers& self = members_of(object);
  const int64_t slot = slot_of(self, given);
  if (slot < 0) return nullptr;
  self.slots->reset(slot);
  Py_RETURN_NONE;
}

// Of a state in Python.
std::vector<int64_t> state_shape(const Stepper& stepper, int32_t s) {
  return {stepper.layers(), stepper.width(s)};
}

PyObject* read(PyObject* object, PyObject* given) {
  HANDLE_TH_ERRORS
  SlotsMembers& self = members_of(object);
  const int64_t slot = slot_of(self, given);
  if (slot < 0) return nullptr;
  at::AutoDispatchBelowADInplaceOrView below;
  py::list states;
  for (int32_t s = 0; s < self.slots->stepper().states(); ++s) {
    const at::Tensor state = empty_state(self.kind, state_shape(self.slots->stepper(), s));
    self.slots->read(slot, s, state.mutable_data_ptr());
    states.append(state.to(self.kind->type));
  }
  return states.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* write(PyObject* object, PyObject* args) {
  HANDLE_TH_ERRORS
  SlotsMembers& self = members_of(object);
  PyObject *given = nullptr, *value = nullptr;
  if (!PyArg_ParseTuple(args, "OO", &given, &value)) return nullptr;
  at::AutoDispatchBelowADInplaceOrView below;
  const int32_t S = self.slots->stepper().states();
  std::vector<std::vector<int64_t>> shapes;
  for (int32_t s = 0; s < S; ++s) shapes.push_back(state_shape(self.slots->stepper(), s));
  const std::vector<at::Tensor> ready = states_from(value, self.kind, shapes, "layers, width");
  const int64_t slot = slot_of(self, given);
  if (slot < 0) return nullptr;
  for (int32_t s = 0; s < S; ++s) self.slots->write(slot, s, ready[s].const_data_ptr());
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const Layers layers(args);
  at::AutoDispatchBelowADInplaceOrView below;
  SlotsMembers made;
  made.slots = std::make_unique<Slots>(layers.code(), layers.format, layers.storage(),
                                       layers.number, layers.sizes, layers.threads);
  layers.give_weights(*made.slots);
  made.kind = layers.kind;
  made.release_gil = layers.release_gil;
  made.chosen.resize(layers.number);
  made.call.resize(layers.number);
  PyObject* object = type->tp_alloc(type, 0);
  if (object) new (&members_of(object)) SlotsMembers(std::move(made));
  return object;
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  members_of(object).~SlotsMembers();
  type->tp_free(object);
  Py_DECREF(type);
}

Py_ssize_t length(PyObject* object) {
  return static_cast<Py_ssize_t>(members_of(object).slots->size());
}

int contains(PyObject* object, PyObject* given) {
  if (!PyIndex_Check(given)) return 0;
  int overflow = 0;
  const long long slot = PyLong_AsLongLongAndOverflow(given, &overflow);
  if (PyErr_Occurred()) return -1;
  return !overflow && members_of(object).slots->taken(slot);
}

template <int64_t (Stepper::*number)() const>
PyObject* get(PyObject* object, void*) {
  return PyLong_FromLongLong((members_of(object).slots->stepper().*number)());
}

PyObject* capacity(PyObject* object, void*) {
  return PyLong_FromLongLong(members_of(object).slots->capacity());
}

PyObject* threads(PyObject* object, void*) {
  return PyLong_FromLong(members_of(object).slots->stepper().threads());
}

PyObject* weights(PyObject* object, void*) {
  return PyUnicode_FromString(name_of(members_of(object).slots->stepper().format()));
}

template <bool kBlock>
PyCFunction run_function() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run<kBlock>));
}

}  // namespace

void bind_slots(py::module_& m) {
  static PyMethodDef methods[] = {
      {"step", run_function<false>(), METH_FASTCALL | METH_KEYWORDS, nullptr},
      {"run", run_function<true>(), METH_FASTCALL | METH_KEYWORDS, nullptr},
      {"add", add, METH_NOARGS, nullptr},
      {"remove", remove, METH_O, nullptr},
      {"reset", reset, METH_O, nullptr},
      {"_read", read, METH_O, nullptr},
      {"_write", write, METH_VARARGS, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"num_layers", get<&Stepper::layers>, nullptr, nullptr, nullptr},
      {"capacity", capacity, nullptr, nullptr, nullptr},
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
                                {Py_sq_length, reinterpret_cast<void*>(length)},
                                {Py_sq_contains, reinterpret_cast<void*>(contains)},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastrnn._C.Slots", sizeof(SlotsObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  m.add_object("Slots", py::reinterpret_steal<py::object>(PyType_FromSpec(&spec)));
}

}  // namespace fastrnn

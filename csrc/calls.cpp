// SPDX-License-Identifier: BSD-3-Clause
// The module `_calls`: runs a prepared sequence (csrc/cpu/sequence.cpp) on torch's tensors, which DLPack's exchange
// functions describe in a few instructions. Through torch's dispatcher a call takes lists of values from Python to C++
// and back: with what it pushes out of the caches, and the Python code around it, that was 14 us of the 22 of a first
// layer of one image, and 48 of 174 with 64 images (Zen 3).
#include <Python.h>

// Python.h first
#include <ATen/dlpack.h>

#include <array>
#include <vector>

#include "cpu/sequence_entry.h"

namespace {

using segpose::DType;
using segpose::RunSequence;
using segpose::TensorView;

// Of torch; held for as long as the process runs. Null where torch describes its tensors in a version of DLPack that is
// not known here: the operators do it all then.
const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyObject* is_neg = nullptr;

// A dense tensor on the CPU, of no subclass. No error is left behind where it is none.
bool describe(PyObject* object, DLTensor* tensor) {
  if (exchange == nullptr || Py_TYPE(object) != tensor_type) return false;
  if (exchange->dltensor_from_py_object_no_sync(object, tensor) != 0) {
    PyErr_Clear();  // sparse, nested or without memory
    return false;
  }
  return tensor->device.device_type == kDLCPU;
}

bool to_dtype(const DLDataType& type, DType* dtype) {
  if (type.lanes != 1) return false;
  if (type.code == kDLBfloat && type.bits == 16) return *dtype = DType::bfloat16, true;
  if (type.code != kDLFloat) return false;
  switch (type.bits) {
    case 16:
      return *dtype = DType::float16, true;
    case 32:
      return *dtype = DType::float32, true;
    case 64:
      return *dtype = DType::float64, true;
    default:
      return false;
  }
}

// As the kernels read it: 4-D, its values in memory. A view of a complex tensor may be negated on reading, and
// torch's zero tensors have no memory.
bool view(PyObject* object, TensorView* result) {
  DLTensor tensor;
  if (!describe(object, &tensor) || tensor.ndim != 4 || !to_dtype(tensor.dtype, &result->dtype)) return false;
  if (tensor.data == nullptr) return false;
  PyObject* negated = PyObject_CallFunctionObjArgs(is_neg, object, nullptr);
  if (negated == nullptr) PyErr_Clear();
  const bool plain = negated == Py_False;
  Py_XDECREF(negated);
  result->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  int64_t* const extents[] = {&result->n, &result->c, &result->h, &result->w};
  int64_t* const strides[] = {&result->stride_n, &result->stride_c, &result->stride_h, &result->stride_w};
  for (int axis = 0; axis < 4; ++axis) {
    *extents[axis] = tensor.shape[axis];
    *strides[axis] = tensor.strides[axis];
  }
  return plain;
}

PyObject* layouts(PyObject*, PyObject* tensors) {
  if (PyTuple_Check(tensors) == 0) {
    PyErr_SetString(PyExc_TypeError, "layouts takes a tuple");
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_Size(tensors);
  std::vector<int64_t> words;
  for (Py_ssize_t i = 0; i < count; ++i) {
    DLTensor tensor;
    if (!describe(PyTuple_GetItem(tensors, i), &tensor)) Py_RETURN_NONE;
    words.push_back(tensor.dtype.code << 16 | tensor.dtype.bits << 8 | tensor.ndim);
    words.insert(words.end(), tensor.shape, tensor.shape + tensor.ndim);
    words.insert(words.end(), tensor.strides, tensor.strides + tensor.ndim);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   static_cast<Py_ssize_t>(words.size() * sizeof(int64_t)));
}

// Tensors of one call, without an allocation for the few that most have.
struct Views {
  static constexpr Py_ssize_t kFew = 8;
  std::array<TensorView, kFew> few;
  std::vector<TensorView> many;
  TensorView* data;

  explicit Views(Py_ssize_t count) : many(count > kFew ? static_cast<size_t>(count) : 0) {
    data = count > kFew ? many.data() : few.data();
  }
};

PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || PyTuple_Check(args[2]) == 0 || PyTuple_Check(args[3]) == 0) {
    PyErr_SetString(PyExc_TypeError, "run takes two numbers and two tuples");
    return nullptr;
  }
  const auto entry = reinterpret_cast<RunSequence>(PyLong_AsVoidPtr(args[0]));
  const int64_t handle = PyLong_AsLongLong(args[1]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  const Py_ssize_t given_count = PyTuple_Size(args[3]), result_count = PyTuple_Size(args[2]);
  Views given(given_count), written(result_count);
  for (Py_ssize_t i = 0; i < given_count; ++i) {
    if (!view(PyTuple_GetItem(args[3], i), given.data + i)) Py_RETURN_NONE;
  }
  PyObject* results = PyList_New(result_count);
  if (results == nullptr) return nullptr;
  bool done = true;
  for (Py_ssize_t i = 0; done && i < result_count; ++i) {
    PyObject* result = PyObject_CallNoArgs(PyTuple_GetItem(args[2], i));
    if (result == nullptr) {
      Py_DECREF(results);
      return nullptr;
    }
    PyList_SetItem(results, i, result);
    done = view(result, written.data + i);
  }
  if (done) {
    PyThreadState* state = PyEval_SaveThread();
    done = entry(handle, given.data, given_count, written.data, result_count);
    PyEval_RestoreThread(state);
  }
  if (done) return results;
  Py_DECREF(results);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"layouts", layouts, METH_O,
     "layouts(tensors): bytes that are equal for tensors with equal shapes, strides and dtypes; None where not all are "
     "dense tensors on the CPU."},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
     "run(entry, handle, allocate, given): runs the sequence with that handle through the address `entry`, on the "
     "tensors of `given`, into what the functions of `allocate` return; gives a list of these. None, and nothing done, "
     "where it cannot: the operator run_sequence takes every tensor and says what is wrong."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_calls", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

bool find_torch() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* type = torch == nullptr ? nullptr : PyObject_GetAttrString(torch, "Tensor");
  is_neg = type == nullptr ? nullptr : PyObject_GetAttrString(type, "is_neg");
  Py_XDECREF(torch);
  if (is_neg == nullptr) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  const void* found = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_XDECREF(capsule);
  if (found == nullptr) PyErr_Clear();
  const auto* api = static_cast<const DLPackExchangeAPI*>(found);
  const bool known = api != nullptr && api->header.version.major == DLPACK_MAJOR_VERSION;
  if (known && api->dltensor_from_py_object_no_sync != nullptr) exchange = api;
  return true;
}

}  // namespace

PyMODINIT_FUNC PyInit__calls() {
  PyObject* created = find_torch() ? PyModule_Create(&module) : nullptr;
  if (created != nullptr) PyModule_AddIntConstant(created, "ENTRY_VERSION", segpose::kEntryVersion);
  return created;
}

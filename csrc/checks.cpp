// SPDX-License-Identifier: BSD-3-Clause
// The module `_checks`: whether a model is as it was when it was written out, asked before every run. In Python the
// question took 19 of the 148 us of a call of SegNet with one image (Zen 3): each look is a few instructions, but of an
// interpreter whose code values have pushed out of the caches.
#include <Python.h>

namespace {

enum class Answer { yes, no, error };

Answer is_same(PyObject* table, PyObject* name, PyObject* value) {
  PyObject* found = PyDict_GetItemWithError(table, name);
  if (found == nullptr && PyErr_Occurred() != nullptr) return Answer::error;
  return (found == nullptr ? Py_None : found) == value ? Answer::yes : Answer::no;
}

Answer are_equal(PyObject* found, PyObject* value) {
  const int equal = PyObject_RichCompareBool(found, value, Py_EQ);
  if (equal < 0) {
    if (PyErr_ExceptionMatches(PyExc_Exception) == 0) return Answer::error;  // an interrupt
    PyErr_Clear();  // what cannot be compared, an array for example, is not equal
  }
  return equal == 1 ? Answer::yes : Answer::no;
}

// Of an item of a table, or an attribute of another object.
Answer is_equal(PyObject* owner, PyObject* name, PyObject* value) {
  PyObject* found = nullptr;
  if (PyDict_Check(owner) != 0) {
    found = PyDict_GetItemWithError(owner, name);
    Py_XINCREF(found);
  } else {
    found = PyObject_GetAttr(owner, name);
  }
  if (found == nullptr) {
    if (PyErr_Occurred() == nullptr) return Answer::no;
    if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) return Answer::error;
    PyErr_Clear();
    return Answer::no;
  }
  const Answer answer = are_equal(found, value);
  Py_DECREF(found);
  return answer;
}

Answer answers(PyObject* function, PyObject* value) {
  PyObject* found = PyObject_CallNoArgs(function);
  if (found == nullptr) return Answer::error;
  const Answer answer = are_equal(found, value);
  Py_DECREF(found);
  return answer;
}

Answer has_values(PyObject* table, PyObject* values) {
  const Py_ssize_t size = PyTuple_Size(values);
  if (size < 0) return Answer::error;
  if (PyDict_Size(table) != size) return PyErr_Occurred() != nullptr ? Answer::error : Answer::no;
  Py_ssize_t position = 0;
  PyObject* value = nullptr;
  for (Py_ssize_t i = 0; PyDict_Next(table, &position, nullptr, &value) != 0; ++i) {
    if (PyTuple_GetItem(values, i) != value) return Answer::no;
  }
  return Answer::yes;
}

// Calls check with every `Count` of the items, as long as the answer is yes.
template <Py_ssize_t Count, class Check>
Answer all_of(PyObject* tuple, const Check& check) {
  const Py_ssize_t size = PyTuple_Size(tuple);
  for (Py_ssize_t first = 0; first + Count <= size; first += Count) {
    PyObject* items[Count];
    for (Py_ssize_t i = 0; i < Count; ++i) items[i] = PyTuple_GetItem(tuple, first + i);
    const Answer answer = check(items);
    if (answer != Answer::yes) return answer;
  }
  return Answer::yes;
}

PyObject* hold(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool tuples = count == 4;
  for (Py_ssize_t i = 0; tuples && i < count; ++i) tuples = PyTuple_Check(args[i]) != 0;
  if (!tuples) {
    PyErr_SetString(PyExc_TypeError, "hold takes four tuples");
    return nullptr;
  }
  Answer answer = all_of<2>(args[3], [](PyObject* const(&items)[2]) { return answers(items[0], items[1]); });
  if (answer == Answer::yes) {
    answer = all_of<2>(args[2], [](PyObject* const(&items)[2]) { return has_values(items[0], items[1]); });
  }
  if (answer == Answer::yes) {
    answer = all_of<3>(args[0], [](PyObject* const(&items)[3]) { return is_same(items[0], items[1], items[2]); });
  }
  if (answer == Answer::yes) {
    answer = all_of<3>(args[1], [](PyObject* const(&items)[3]) { return is_equal(items[0], items[1], items[2]); });
  }
  if (answer == Answer::error) return nullptr;
  return PyBool_FromLong(answer == Answer::yes);
}

PyMethodDef methods[] = {
    {"hold", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hold)), METH_FASTCALL,
     "hold(same, equal, values, answers): whether table.get(name) is value for the tables, names and values of `same`, "
     "one after the other, owner[name] or owner.name == value for those of `equal`, whether the tables of `values` "
     "hold "
     "exactly the objects of the tuple after each, in that order, and whether the functions of `answers` return what "
     "follows each."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_checks", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__checks() { return PyModule_Create(&module); }

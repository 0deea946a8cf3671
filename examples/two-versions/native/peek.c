/* A C extension with the fault that many have: it reads where it is told to, and does not look whether it may. */

#include <Python.h>

static PyObject *at(PyObject *self, PyObject *address)
{
    const unsigned char *place = PyLong_AsVoidPtr(address);
    if (place == NULL && PyErr_Occurred())
        return NULL;
    return PyLong_FromLong(*place);
}

static PyMethodDef methods[] = {{"at", at, METH_O, "The byte at an address."}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "peek", NULL, -1, methods};

PyMODINIT_FUNC PyInit_peek(void)
{
    return PyModule_Create(&module);
}

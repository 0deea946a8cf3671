"""python -m miniplug, as a person meets it."""

import pytest
from conftest import WORKSHOP, run_python

import miniplug


@pytest.mark.parametrize("arguments, said", [
    ((), "VERB"),
    (("serve",), "SPEC"),
    (("nothing", "x"), "'nothing'"),
    (("--no",), "VERB"),
])
def test_bad_usage_is_status_2(arguments, said):
    status, out, err = run_python(miniplug.__file__, *arguments)
    assert (status, out) == (2, "") and err.startswith("python -m miniplug") and said in err and err.count("\n") == 1


def test_help_and_version():
    status, out, err = run_python(miniplug.__file__, "--version")
    assert (status, out, err) == (0, f"miniplug {miniplug.__version__}\n", "")
    status, out, err = run_python(miniplug.__file__, "--help")
    assert (status, err) == (0, "") and "serve" in out


def test_serving_by_hand_says_that_this_is_a_plugin():
    status, out, err = run_python(miniplug.__file__, "serve", WORKSHOP)
    assert (status, out) == (1, "") and err.startswith("This program is a plugin") and err.count("\n") == 1


@pytest.mark.parametrize("specs, said", [
    ([WORKSHOP, WORKSHOP], "the name 'workshop' is taken: write name="),
    (["system=" + WORKSHOP], "the name 'system' is reserved: write name="),
    (["no-spec"], "'no-spec' is no spec: write module:Attr"),
])
def test_bad_specs_are_one_line(specs, said):
    import sys

    with pytest.raises(miniplug.LaunchError) as caught:
        miniplug.launch([sys.executable, miniplug.__file__, "serve", *specs])
    assert len(caught.value.output) == 1 and said in caught.value.output[0] and caught.value.exit_code == 1

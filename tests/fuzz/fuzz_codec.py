"""Coverage-guided fuzzing of the codec, apart from the tests. One command, from the repository:

    pip install atheris && python tests/fuzz/fuzz_codec.py -max_total_time=300

Options are libFuzzer's. What fails is written to a file `crash-...`, and runs alone if it is given as the last argument. The
oracles are those of the tests, in oracle.py: no code is run, only documented exceptions are raised, time is in proportion,
what arrives can be sent on unchanged, and an error can be printed, chained, copied and pickled.
"""

import json
import os
import sys
import tempfile

import atheris

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]
with atheris.instrument_imports(include=["miniplug"]):
    import miniplug
import oracle

NAMES = [
    *miniplug._TAGS,
    "$ref",
    "$own",
    "$?",
    "a",
    "args",
    "state",
    "kind",
    "type",
    "message",
    "traceback",
    "registered",
    "parts",
    "own",
    "__notes__",
    "with_traceback",
    "errno",
    "filename",
    "name",
    "x",
    "y",
]
TEXTS = [
    "",
    "nan",
    "inf",
    "1e5",
    "1E+9999",
    "2026-01-31",
    "2026-01-31T12:05:00+00:00",
    "12:05",
    "AAAA",
    "q",
    "d",
    "h",
    "little",
    "big",
    "UTC",
    "0x10",
    "f" * 32,
    "/a",
    "fuzz.Point",
    "fuzz.Mode",
    "fuzz.Failure",
    "fuzz.Syntax",
    "ExceptionGroup",
    *oracle.BUILTIN_ERRORS,
]
SEEDS = [
    '{"$datetime":["2026-01-31T12:05:00",1,{"$timezone":[{"$timedelta":[0,3600,0]},"CET"]}]}',
    '{"$set":[1,{"$tuple":[{"$int":"0x7"}]}]}',
    '{"$each":["$dict",[[1,2],[]]]}',
    '{"$numbers":["q",{"$bytes":"AAAAAAAAAAA="}]}',
    '{"$type":["fuzz.Point",{"x":1,"y":{"$bytes":0}}]}',
    '{"type":"T","message":"m","kind":"OSError","args":[2,"x"],"state":{"errno":2,"__notes__":["n"]}}',
    '{"$zone":"Europe/Berlin"}',
    '{"parts":[{"kind":"SyntaxError","args":["m",["f",1,2,"t",1,9]]},{}],"args":["t"]}',
    '{"$decimal":"1E+9"}',
    '{"$fraction":[1,3]}',
]


def value(data, depth=5):
    """A value as JSON has it, from what the fuzzer gives."""
    choice = data.ConsumeIntInRange(0, 9)
    if choice < 2 or not depth or not data.remaining_bytes():
        return data.PickValueInList(TEXTS)
    if choice == 2:
        return data.PickValueInList([None, True, False, 0, -1, 1, 2**53, 2**63, 0.5, 1e308])
    if choice == 3:
        return data.ConsumeInt(data.ConsumeIntInRange(1, 12))
    if choice == 4:
        return data.ConsumeUnicode(8)
    if choice < 7:
        items = [value(data, depth - 1) for _ in range(data.ConsumeIntInRange(0, 4))]
        return items * (40 if choice == 6 and depth < 3 else 1)
    return {data.PickValueInList(NAMES): value(data, depth - 1) for _ in range(1 if choice < 9 else data.ConsumeIntInRange(0, 6))}


def test_one_input(data):
    if data[:1] >= b"\x80":
        provider = atheris.FuzzedDataProvider(data[1:])
        data = json.dumps(value(provider)).encode("utf-8", "surrogatepass")
    oracle.check_value(data)
    oracle.check_error(data)


def main():
    corpus = tempfile.mkdtemp(prefix="fuzz-")
    for number, seed in enumerate(SEEDS):
        with open(os.path.join(corpus, str(number)), "w") as file:
            file.write(seed)
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    atheris.Setup([sys.argv[0], "-max_len=4096", *sys.argv[1:], *([] if given else [corpus])], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

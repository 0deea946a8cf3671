// A plugin in Node.js: a few things to do with numbers. ../python/plugin.py and ../go/plugin.go are the same.

import { failure, log, serve } from "./wire.mjs";

const numbers = {
  // divide(one, other, digits=2): a plain method, and an error that is a ZeroDivisionError in the host.
  divide(call) {
    const [one, other, digits = 2] = call.take("one", "other", "digits?");
    log("debug", "numbers", "dividing", { one, other });
    if (other === 0) throw failure("ZeroDivisionError", "division by zero");
    return Number((one / other).toFixed(digits));
  },

  // primes(below=None): a stream, which waits for its reader. Its `finally` runs also when the host closes.
  *primes(call) {
    const [below] = call.take("below?"), found = [];
    try {
      for (let number = 2; number < (below ?? Infinity); number++) {
        if (found.some((prime) => number % prime === 0)) continue;
        found.push(number);
        yield number;
      }
    } finally {
      log("info", "numbers", "no more primes", { given: found.length });
    }
  },

  // find(items, test): the first item that passes the test, a function of the host's.
  async find(call) {
    const [items, test] = call.take("items", "test");
    for (const [asked, item] of items.entries()) {
      if (call.signal.aborted) {
        log("warn", "numbers", "given up", { asked });
        throw call.signal.reason;
      }
      if (await test(item)) return item;
    }
    throw failure("LookupError", `none of ${items.length} passes`);
  },
};

serve("numbers", numbers, { language: "JavaScript", version: process.version });

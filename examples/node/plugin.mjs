// A plugin in Node.js: a few things to do with numbers. ../python/plugin.py and ../go/plugin.go are the same.

import { Failure, lend, log, serve } from "./wire.mjs";

let counters = 0; // how many of them the host has

const numbers = {
  // divide(one, other, digits=2): a plain method, and an error that is a ZeroDivisionError in the host.
  divide(call) {
    const [one, other, digits = 2] = call.take("one", "other", "digits?");
    log("debug", "numbers", "dividing", { one, other });
    if (other === 0) throw new Failure("ZeroDivisionError", "division by zero");
    return Number((one / other).toFixed(digits));
  },

  // primes(below=None): a stream, which waits for its reader. It runs its `finally` also when the host closes it.
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

  // each(items, function): a stream of what a function of the host's makes of each item.
  async *each(call) {
    const [items, convert] = call.take("items", "function");
    for (const item of items) yield await convert(item);
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
    throw new Failure("LookupError", `none of ${items.length} passes`);
  },

  // counter(start=0): an object that stays here, and is called from the host for as long as the host likes.
  counter(call) {
    let [next = 0] = call.take("start?");
    counters++;
    return lend({ next: () => next++ }, () => counters--);
  },

  // counters(): how many of those the host still has.
  counters: () => counters,
};

serve({ numbers }, { language: "JavaScript", version: process.version });

// A plugin in JavaScript, written from docs/protocol.md. It needs Node.js and nothing else.

import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import { connect } from "node:net";

// What is served: plugin name to object. A method gets the positional arguments, and the named ones as a last object.
let closed = 0; // streams of `count` that have ended, however they did
const plugins = {
  calculator: {
    add: (...numbers) => numbers.slice(0, -1).reduce((sum, each) => sum + each, 0),
    divide: (one, other, { digits = 2 }) => {
      if (other === 0) throw new RangeError("division by zero");
      return Number((one / other).toFixed(digits));
    },
    echo: (value) => value,
    log: (text) => {
      const record = { "@level": "warn", "@message": text, "@module": "calculator", length: text.length };
      process.stderr.write(JSON.stringify(record) + "\n");
      return null;
    },
    environment: () => Object.keys(process.env).filter((name) => name.startsWith("MINIPLUG_")),
    nap: (milliseconds) => new Promise((wake) => setTimeout(() => wake("rested"), milliseconds)),
    leave: (status) => process.exit(status),
    *count(limit, { fail_at: failAt }) {
      try {
        for (let number = 0; number < limit; number++) {
          if (number === failAt) throw new RangeError(`no further than ${failAt}`);
          yield number;
        }
      } finally {
        closed++;
      }
    },
    closed: () => closed,
    each: async (items, callback) => {
      const results = [];
      for (const item of items) results.push(await callback(item));
      return results;
    },
  },
  greeter: { greet: (name) => `Hello, ${name}!` },
};
const openNames = new Set(["greeter"]); // these answer every name, so that the host leaves checking to the plugin

// -- environment

const { MINIPLUG_ADDRESS: address, MINIPLUG_AUTHKEY: key } = process.env;
for (const name of Object.keys(process.env)) if (name.startsWith("MINIPLUG_")) delete process.env[name];
const die = (why) => {
  process.stderr.write(`${why}\n`);
  process.exit(1);
};
if (!address) die("This program is a plugin: its application starts it, not a person.");

// -- frames

const [, host, port] = /^\[?(.*?)\]?:(\d+)$/.exec(address) ?? [];
const socket = connect(address.includes("/") ? { path: address } : { host, port: Number(port) });
socket.on("error", () => process.exit(1)).on("end", () => process.exit(0));

async function* frames() {
  let data = Buffer.alloc(0);
  for await (const chunk of socket) {
    data = Buffer.concat([data, chunk]);
    for (;;) {
      if (data.length < 4) break;
      const long = data.readInt32BE(0) === -1;
      if (long && data.length < 12) break;
      const start = long ? 12 : 4;
      const end = start + (long ? Number(data.readBigUInt64BE(4)) : data.readInt32BE(0));
      if (data.length < end) break;
      yield data.subarray(start, end);
      data = data.subarray(end);
    }
  }
}

const incoming = frames();
const receive = async () => (await incoming.next()).value ?? process.exit(0);

const number32 = (value) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};
const send = (frame) => socket.write(Buffer.concat([number32(frame.length), frame]));

// -- handshake

const said = [];
const hear = async () => {
  said.push(await receive());
  return JSON.parse(said.at(-1));
};
const say = (message) => {
  said.push(Buffer.from(JSON.stringify(message)));
  send(said.at(-1));
};
const proofOf = (role) => {
  const mac = createHmac("sha256", Buffer.from(key, "hex"));
  for (const part of [Buffer.from(role), Buffer.from(address), ...said]) mac.update(number32(part.length)).update(part);
  return mac.digest("hex");
};

await hear();
say({
  miniplug: 1, role: "plugin", nonce: randomBytes(16).toString("hex"), protocol_versions: [1],
  max_message: 1 << 20, features: [], codecs: ["json"],
});
say({ proof: proofOf("plugin") });
const choice = await hear();
const expected = Buffer.from(proofOf("host"));
const proof = Buffer.from(String((await hear()).proof));
if (proof.length !== expected.length || !timingSafeEqual(proof, expected)) die("The host does not hold the key.");
if (choice.refusal) die(`The host refused this plugin: ${choice.refusal}`);

// -- messages

const CALL = 1, NOTIFY = 2, RESULT = 3, ERROR = 4, ITEM = 5, END = 6, CREDIT = 7, CANCEL = 8, RELEASE = 9, PING = 10,
  PONG = 11, SHUTDOWN = 12;
const TAGGED = 1, IGNORABLE = 2, STREAM = 4;
const WINDOW = 64; // items that the host takes unread
const lent = new Map();
let lastLoan = 0;

const post = (kind, number, value, flags = 0, parent = 0n) => {
  const header = Buffer.alloc(24);
  header.writeUInt8(1, 0);
  header.writeUInt8(kind, 1);
  header.writeUInt16BE(flags, 2);
  header.writeBigUInt64BE(BigInt(number), 8);
  header.writeBigUInt64BE(parent, 16);
  send(Buffer.concat([header, Buffer.from(value === undefined ? "" : JSON.stringify(value))]));
};

// -- what the host lends: functions, each for the one call that brings it

const asked = new Map(); // calls of the host's functions that are not answered yet
let lastCall = 0n;

const borrow = (target, parent) => (...args) =>
  new Promise((resolve, reject) => {
    asked.set(++lastCall, { resolve, reject });
    post(CALL, lastCall, [target, "", args, {}], 0, parent);
  });

// A call's body, with functions for what is lent in it. The numbers of those are added to `borrowed`.
const parseCall = (body, flags, number, borrowed) =>
  JSON.parse(body, (_, value) => {
    if (!(flags & TAGGED) || !Array.isArray(value?.$ref)) return value;
    borrowed.push(value.$ref[0]);
    return borrow(value.$ref[0], number);
  });

function settle(kind, number, body) {
  const { resolve, reject } = asked.get(number) ?? {};
  asked.delete(number);
  if (kind === RESULT) resolve?.(body);
  else reject?.(Object.assign(new Error(body.message), { body })); // to be passed on as it came
}

// -- streams

const streams = new Map(); // those that are open, by the number of their call

async function stream(number, values) {
  const state = { credit: WINDOW, over: false, wake: () => {} };
  streams.set(number, state);
  post(RESULT, number, undefined, STREAM);
  try {
    for await (const value of values) {
      while (!state.credit && !state.over) await new Promise((wake) => (state.wake = wake));
      if (state.over) return; // which closes `values`
      state.credit--;
      post(ITEM, number, [value]);
    }
    post(END, number);
  } finally {
    streams.delete(number);
  }
}

function steer(kind, number, body) {
  const state = streams.get(number);
  if (!state) return; // it has ended meanwhile
  if (kind === CREDIT) state.credit += body;
  else state.over = true;
  state.wake();
}

// -- calls

const system = {
  dispense(name) {
    const served = plugins[name];
    if (!served) throw Object.assign(new Error(`no plugin ${name} is served`), { own: "PluginNotFound", state: { names: Object.keys(plugins) } });
    lent.set(++lastLoan, served);
    return { $ref: [lastLoan, openNames.has(name) ? null : Object.keys(served), false] };
  },
  info: () => ({ runtime: "node" }),
};

async function answer(kind, number, [target, method, args, named]) {
  try {
    const object = target === 0 ? system : lent.get(target);
    if (!object) throw Object.assign(new Error(`reference ${target} is not lent`), { own: "DeadReference" });
    if (!Object.hasOwn(object, method)) {
      throw Object.assign(new Error(`no method ${method}`), { own: "MethodNotFound", state: { name: method, matches: [] } });
    }
    const value = await object[method](...args, named);
    if (kind !== CALL) value?.return?.();
    else if (typeof value?.next === "function") await stream(number, value);
    else post(RESULT, number, value, target === 0 && method === "dispense" ? TAGGED : 0);
  } catch (error) {
    const body = error.body ?? { type: error.own ?? error.name, message: error.message, state: error.state ?? {} };
    if (error.own) body.own = true;
    else body.traceback ??= error.stack;
    if (kind === CALL) post(ERROR, number, body);
    else process.stderr.write(`${error.stack}\n`);
  }
}

for (;;) {
  const frame = await receive();
  const kind = frame.readUInt8(1), flags = frame.readUInt16BE(2), number = frame.readBigUInt64BE(8);
  for (let count = frame.readUInt32BE(4); count > 0; count--) await receive(); // this plugin's interface is plain data
  const text = frame.length > 24 ? frame.subarray(24) : "null";
  if (frame.readUInt8(0) !== 1) die("another wire version");
  else if (kind === CALL || kind === NOTIFY) {
    const borrowed = [];
    const call = parseCall(text, flags, number, borrowed);
    answer(kind, number, call).then(() => borrowed.forEach((reference) => post(RELEASE, reference)));
  } else if (kind === RESULT || kind === ERROR) settle(kind, number, JSON.parse(text));
  else if (kind === CREDIT || kind === CANCEL) steer(kind, number, JSON.parse(text));
  else if (kind === PING) post(PONG, number);
  else if (kind === RELEASE) lent.delete(Number(number));
  else if (kind === SHUTDOWN) break;
  else if (!(flags & IGNORABLE)) die(`a message of kind ${kind}`);
}
socket.end(() => process.exit(0));

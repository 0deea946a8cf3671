// The protocol (docs/protocol.md) for a plugin in Node.js. Copy this file, and serve objects of your own.
//
// The host can call each function of a served object, but those that begin with `_`. It gets one argument, the Call. What
// it returns, or its promise brings, is the result: plain data, or what lend() gave. A generator makes a stream.

import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import { writeSync } from "node:fs";
import { connect } from "node:net";
import { overPipe } from "./pipe.mjs";

const CALL = 1, NOTIFY = 2, RESULT = 3, ERROR = 4, ITEM = 5, END = 6, CREDIT = 7, CANCEL = 8, RELEASE = 9, PING = 10,
  PONG = 11, SHUTDOWN = 12;
const TAGGED = 1, IGNORABLE = 2, STREAM = 4; // flags
const HEADER = 24; // bytes
const WINDOW = 64; // items of a stream that the host takes unread
const LIMIT = 16 << 20; // the longest message that this side takes, in bytes

const { MINIPLUG_ADDRESS: address, MINIPLUG_AUTHKEY: key, MINIPLUG_LOG_LEVEL: threshold = "0" } = process.env;
for (const name of Object.keys(process.env)) if (name.startsWith("MINIPLUG_")) delete process.env[name];

/** An error that is raised in the host as a builtin exception of Python: `new Failure("KeyError", "pears")`. */
export class Failure extends Error {
  constructor(kind, ...args) {
    super(String(args[0] ?? ""));
    this.body = { type: kind, message: this.message, kind, args };
  }
}

/** Log with the host's logger, below the plugin's own: `log("warn", "store.disk", "is full", { free: 12 })`. */
export function log(level, module, message, fields = {}) {
  if ({ debug: 10, info: 20, warn: 30, error: 40 }[level] < Number(threshold)) return; // the host would drop it
  const record = { "@level": level, "@module": module, "@message": message, "@timestamp": new Date().toISOString() };
  writeSync(2, JSON.stringify({ ...fields, ...record }) + "\n"); // in one piece, and at once
}

/** To be returned: an object that stays here, and is called from the host. `released` runs once it is given back. */
export function lend(object, released = () => {}, number = ++lastLent) {
  lent.set(number, { object, released });
  const tag = { $ref: [number, methodsOf(object), false] };
  tags.add(tag);
  return tag;
}

function own(type, message, state = {}) { // an error of miniplug's own, about the call itself
  return Object.assign(new Error(message), { body: { type, message, own: true, state } });
}

function die(why) {
  writeSync(2, `${why}\n`);
  process.exit(1);
}

// -- frames

let socket, wake = () => {};

async function read(size) { // that many bytes; null when the connection has ended
  for (;;) {
    const data = size === 0 ? Buffer.alloc(0) : socket.read(size);
    if (data?.length === size) return data;
    if (data || socket.readableEnded || socket.destroyed) return null;
    await new Promise((resolve) => (wake = resolve));
  }
}

async function receive(limit) { // a frame; null when the connection has ended
  const head = await read(4), size = head?.readInt32BE(); // -1 if that needs 8 bytes, which is too much in any case
  if (size < 0 || size > limit) die(`The host sent a frame of ${size} bytes.`);
  return head && read(size);
}

function number32(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

const send = (frame) => socket.write(Buffer.concat([number32(frame.length), frame]));

async function shakeHands() {
  const said = [];
  const hear = async () => JSON.parse(said[said.push((await receive(4096)) ?? die("The host is gone.")) - 1]);
  const say = (message) => send(said[said.push(Buffer.from(JSON.stringify(message))) - 1]);
  const proofOf = (role) => {
    const mac = createHmac("sha256", Buffer.from(key, "hex"));
    for (const part of [Buffer.from(role), Buffer.from(address), ...said]) mac.update(number32(part.length)).update(part);
    return mac.digest("hex");
  };
  hostLimit = (await hear()).max_message;
  say({ miniplug: 1, role: "plugin", nonce: randomBytes(16).toString("hex"), protocol_versions: [1],
        max_message: LIMIT, features: [], codecs: ["json"] });
  say({ proof: proofOf("plugin") });
  const choice = await hear(), expected = Buffer.from(proofOf("host"));
  const proof = Buffer.from(String((await hear()).proof));
  if (proof.length !== expected.length || !timingSafeEqual(proof, expected)) die("The host does not hold the key.");
  if (choice.refusal) die(`The host refused this plugin: ${choice.refusal}`);
}

// -- messages

const lent = new Map(), tags = new WeakSet(); // what the host holds: number to { object, released }; and how it is told
const calls = new Map(); // the host's calls that it still waits for
const running = new Set(); // the promises of all calls that have not ended
const asked = new Map(); // our calls of what the host has lent, which it has not answered yet
let hostLimit, lastLent = 0, lastAsked = 0n, stopping = false;

function post(kind, number, value, flags = 0, parent = 0n) {
  const body = Buffer.isBuffer(value) ? value : Buffer.from(value === undefined ? "" : JSON.stringify(value, refuse));
  const size = body.length;
  if (size > hostLimit) throw own("MessageTooLarge", `${size} bytes are too many`, { size, limit: hostLimit });
  const header = Buffer.alloc(HEADER);
  header.writeUInt8(1, 0);
  header.writeUInt8(kind, 1);
  header.writeUInt16BE(flags, 2);
  header.writeBigUInt64BE(BigInt(number), 8);
  header.writeBigUInt64BE(parent, 16);
  send(Buffer.concat([header, body]));
}

function refuse(key, value) { // what JSON.stringify would drop, or change without a word
  const changed = typeof value === "function" || (typeof value === "number" && !Number.isFinite(value));
  if (changed || (key !== "" && tags.has(value))) throw new Failure("TypeError", `this cannot travel here: ${value}`);
  return value;
}

const methodsOf = (object) => Object.keys(object).filter((name) => !name.startsWith("_"));

class Call {
  #abort = new AbortController();
  signal = this.#abort.signal; // aborted once the host has given the call up, or ends the plugin
  #borrowed = []; // the numbers of what the host has lent with it, to be given back after it
  #credit = WINDOW;
  #wake = () => {};

  constructor(number) {
    this.number = number;
  }

  /** The arguments in the order of these names, however they came. A name that ends in `?` may be left out. */
  take(...names) {
    const { args, named } = this, known = names.map((name) => name.replace("?", ""));
    const values = known.map((name, place) => (place < args.length ? args[place] : named[name]));
    const extra = Object.keys(named).find((name) => !known.slice(args.length).includes(name));
    const missing = names.find((name, place) => !name.endsWith("?") && values[place] === undefined);
    if (extra || args.length > names.length) throw new Failure("TypeError", `unexpected argument ${extra ?? ""}`);
    if (missing) throw new Failure("TypeError", `missing argument ${missing}`);
    return values;
  }

  steer(credit) { // how many more items the host takes; 0 if it wants no more
    if (credit) this.#credit += credit;
    else this.#abort.abort();
    this.#wake();
  }

  decode(text, flags) {
    return JSON.parse(text, flags & TAGGED ? (_, value) => this.#untag(value) : undefined);
  }

  #untag(value) {
    const [tag, ...others] = Object.keys(value ?? {});
    if (typeof value !== "object" || others.length || !tag?.startsWith("$")) return value;
    if (tag === "$ref") return this.#borrow(value.$ref[0]);
    throw own("NotSerializable", `this plugin takes plain data, and no ${tag}`, { path: "", type_name: tag });
  }

  #borrow(target) { // a function that calls one of the host's, on behalf of this call
    this.#borrowed.push(target);
    return (...args) => new Promise((resolve, reject) => {
      post(CALL, ++lastAsked, [target, "", args, {}], 0, this.number);
      asked.set(lastAsked, { call: this, resolve, reject });
    });
  }

  async stream(values) {
    post(RESULT, this.number, undefined, STREAM);
    for await (const value of values) {
      while (!this.#credit && !this.signal.aborted) await new Promise((resolve) => (this.#wake = resolve));
      if (this.signal.aborted) return; // which closes `values`
      this.#credit--;
      post(ITEM, this.number, [value]);
    }
    post(END, this.number);
  }

  async run(target, method) {
    const { object } = lent.get(target) ?? {};
    if (stopping) throw own("PluginClosed", "the plugin is ending");
    if (!object) throw own("DeadReference", `reference ${target} is not lent`);
    if (methodsOf(object).includes(method)) return (await object[method](this)) ?? null;
    throw own("MethodNotFound", `no method ${method}`, { name: method, matches: [] });
  }

  async answer(kind, text, flags) {
    try {
      const [target, method, ...rest] = this.decode(text, flags);
      [this.args, this.named] = rest;
      const value = await this.run(target, method);
      if (kind === NOTIFY) await value?.return?.();
      else if (typeof value?.next === "function") await this.stream(value);
      else if (calls.has(this.number)) post(RESULT, this.number, value, tags.has(value) ? TAGGED : 0);
    } catch (error) {
      if (kind === NOTIFY) writeSync(2, `${error.stack}\n`);
      else if (!calls.has(this.number)) return; // nobody waits for it
      else if (error.raw) post(ERROR, this.number, error.raw, error.flags); // of the host's own, as it came
      else post(ERROR, this.number, { type: error.name, message: error.message, traceback: error.stack, ...error.body });
    } finally {
      calls.delete(this.number);
      for (const target of this.#borrowed) post(RELEASE, target);
    }
  }
}

function settle(kind, number, text, flags) {
  const { call, resolve, reject } = asked.get(number) ?? {};
  asked.delete(number);
  try {
    if (kind === RESULT) return resolve?.(call.decode(text, flags));
    const { own, type, message } = JSON.parse(text);
    const home = String(text).replace(/^\s*\{(?=\s*")/, `{"home":${number},`); // passed on, it is the host's very own again
    const raw = Buffer.from(home);
    reject?.(Object.assign(new Error(message), own ? { name: type } : { raw, flags }));
  } catch (error) {
    reject?.(error);
  }
}

// -- the plugin

/** Serve objects by name until the host says stop, or is gone; then end the process. `info`: plain data about it. */
export async function serve(plugins, info = {}) {
  if (!address) die("This program is a plugin: its application starts it, not a person.");
  const [, host, port] = /^\[?([^/]*?)\]?:(\d+)$/.exec(address) ?? []; // else it is a path
  socket = connect(host === undefined ? { path: address } : { host, port: Number(port) });
  if (address.startsWith("\\\\.\\pipe\\")) socket = overPipe(socket);
  for (const event of ["readable", "end", "close"]) socket.on(event, () => wake());
  socket.on("error", () => {}); // "close" follows
  await shakeHands();
  const names = Object.keys(plugins);
  const system = { // what a plugin tells about itself
    info: () => info,
    dispense(call) {
      const [name] = call.take("name?"), found = name ?? (names.length === 1 ? names[0] : "");
      if (name === "system") return lend(system, undefined, 0);
      if (!names.includes(found)) throw own("PluginNotFound", `no plugin ${name} is served`, { names });
      return lend(plugins[found]);
    },
  };
  lend(system, undefined, 0);
  for (let frame; (frame = await receive(LIMIT + HEADER)); ) {
    if (frame.length < HEADER || frame[0] !== 1) die("The host does not speak this version of the wire.");
    const kind = frame[1], flags = frame.readUInt16BE(2), number = frame.readBigUInt64BE(8);
    for (let count = frame.readUInt32BE(4); count > 0; count--) await receive(LIMIT); // bytes: #untag refuses the call
    handle(kind, flags, number, frame.length > HEADER ? frame.subarray(HEADER) : Buffer.from("null"));
  }
  await end(2); // the host is gone
}

function handle(kind, flags, number, text) {
  if (kind === CALL || kind === NOTIFY) {
    const call = new Call(number);
    calls.set(number, call);
    const done = call.answer(kind, text, flags).then(() => running.delete(done));
    running.add(done);
  } else if (kind === RESULT || kind === ERROR) settle(kind, number, text, flags);
  else if (kind === CREDIT) calls.get(number)?.steer(JSON.parse(text));
  else if (kind === CANCEL) {
    calls.get(number)?.steer(0);
    calls.delete(number);
  } else if (kind === RELEASE && number !== 0n) {
    lent.get(Number(number))?.released();
    lent.delete(Number(number));
  } else if (kind === PING) post(PONG, number);
  else if (kind === SHUTDOWN) end(JSON.parse(text));
  else if (kind !== RELEASE && kind !== PONG && !(flags & IGNORABLE)) die(`The host sent the unknown kind ${kind}.`);
}

async function end(grace) { // within that many seconds
  stopping = true;
  for (const call of calls.values()) call.steer(0);
  await Promise.race([Promise.all(running), new Promise((resolve) => setTimeout(resolve, 500 * grace))]);
  if (socket.destroyed) process.exit(0);
  socket.end(() => process.exit(0));
}

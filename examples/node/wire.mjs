// The protocol (docs/protocol.md) for a plugin in Node.js. Copy this file, and serve functions of your own.
//
// A function gets a Call. What it returns, or its promise brings, is the result, as JSON.stringify writes it.
// A generator makes a stream. What it throws is raised in the host.

import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import { writeSync } from "node:fs";
import { connect } from "node:net";

const CALL = 1, NOTIFY = 2, RESULT = 3, ERROR = 4, ITEM = 5, END = 6, CREDIT = 7, CANCEL = 8, RELEASE = 9;
const PING = 10, PONG = 11, SHUTDOWN = 12; // kinds of messages
const TAGGED = 1, IGNORABLE = 2, STREAM = 4; // flags
const WINDOW = 64; // items of a stream that the host takes unread
const HEADER = 24, LIMIT = 16 << 20; // bytes: of a header, and of the longest message that this side takes

const { MINIPLUG_ADDRESS: address, MINIPLUG_AUTHKEY: key } = process.env;
for (const name of Object.keys(process.env)) if (name.startsWith("MINIPLUG_")) delete process.env[name];

/** An error that is a builtin exception of Python in the host: `throw failure("KeyError", "pears")`. */
export function failure(type, message, more = { kind: type, args: [message] }) {
  return Object.assign(new Error(message), { body: { type, message, ...more } });
}

const own = (type, message, state = {}) => failure(type, message, { own: true, state }); // miniplug's own

/** Log with the host's logger, below the plugin's own: `log("warn", "disk", "is full", { free: 12 })`. */
export function log(level, module, message, fields) {
  const record = { "@level": level, "@module": module, "@message": message };
  const line = JSON.stringify({ ...fields, ...record, "@timestamp": new Date().toISOString() });
  writeSync(2, `${line}\n`); // in one piece, and at once
}

function die(why) {
  writeSync(2, `${why}\n`);
  process.exit(1);
}

// -- frames

const onPipe = address?.startsWith("\\\\"); // as on Windows
let socket, written = Promise.resolve(), header = 0; // of the handshake's frames: they are JSON alone

async function* receive() { // all frames, until the connection ends
  const [start, findEnd] = onPipe ? [0, endOnPipe] : [4, endOnSocket];
  let data = Buffer.alloc(0), end;
  try {
    for await (const chunk of socket) {
      data = Buffer.concat([data, chunk]);
      for (; (end = findEnd(data)) <= data.length; data = data.subarray(end)) yield data.subarray(start, end);
    }
  } catch {} // it was cut off, which is an end as well
}

function endOnSocket(data) {
  const size = data.length < 4 ? 0 : data.readInt32BE();
  if (size < 0 || size > (header ? LIMIT + HEADER : 4096)) die(`The host sent a frame of ${size} bytes.`);
  return 4 + size;
}

// On a pipe a frame is a message, without its length, but Node.js reads bytes. It ends before the byte 1, as
// the next header begins with it, or where all that has come is JSON. In the handshake there is no header.
function endOnPipe(data) {
  const ready = header && data.length > header;
  if (ready && data.readUInt32BE(4)) die("This plugin cannot take bytes beside a message over a pipe.");
  const next = header ? data.indexOf(1, header) : data.toString("latin1").search(/}[{\x01]/) + 1;
  if (next > 0) return next;
  try {
    if (data.length > header) JSON.parse(data.subarray(header));
    return Math.max(data.length, header, 1); // more than there is, if that is less than a header
  } catch {
    return Infinity;
  }
}

function prefixed(data) { // with its length
  const size = Buffer.alloc(4);
  size.writeUInt32BE(data.length);
  return Buffer.concat([size, data]);
}

function send(frame) { // once the one before it is written, or on a pipe both would be one message
  const data = onPipe ? frame : prefixed(frame);
  written = written.then(() => new Promise((done) => socket.write(data, done)));
}

async function shakeHands(frames) {
  const hear = async () => (await frames.next()).value ?? die("The host is gone.");
  const proof = (role, ...said) => {
    const mac = createHmac("sha256", Buffer.from(key, "hex"));
    for (const part of [Buffer.from(role), Buffer.from(address), ...said]) mac.update(prefixed(part));
    return mac.digest("hex");
  };
  const theirs = await hear(), nonce = randomBytes(16).toString("hex");
  const ours = Buffer.from(JSON.stringify({ miniplug: 1, role: "plugin", nonce, protocol_versions: [1],
    max_message: LIMIT, features: [], codecs: ["json"] }));
  const ourProof = Buffer.from(JSON.stringify({ proof: proof("plugin", theirs, ours) }));
  send(ours);
  send(ourProof);
  const choice = await hear(), shown = Buffer.from(`${JSON.parse(await hear()).proof}`);
  const right = Buffer.from(proof("host", theirs, ours, ourProof, choice));
  if (shown.length !== right.length || !timingSafeEqual(shown, right)) die("The host does not hold the key.");
  if (JSON.parse(choice).refusal) die(`The host refused this plugin: ${JSON.parse(choice).refusal}`);
  hostLimit = JSON.parse(theirs).max_message;
  header = HEADER;
}

// -- messages

const objects = []; // what the host can call, by number: the system, and the plugin
const calls = new Map(); // the host's calls that have not ended, by number
const asked = new Map(); // who waits for the answer to a call of this side, by number
const namesOf = (object) => Object.keys(object).filter((name) => !name.startsWith("_"));
let hostLimit, lastAsked = 0n, stopping = false;

function post(kind, number, value = null, flags = 0, parent = 0n) {
  const head = Buffer.alloc(HEADER), body = Buffer.from(JSON.stringify(value));
  if (body.length > hostLimit) throw own("MessageTooLarge", `${body.length} bytes are too many`);
  head.set([1, kind, 0, flags]);
  head.writeBigUInt64BE(number, 8);
  head.writeBigUInt64BE(parent, 16);
  send(Buffer.concat([head, body]));
}

/** A call of the host's. */
class Call {
  #abort = new AbortController();
  signal = this.#abort.signal; // aborted once the host has given the call up, or ends the plugin
  flags = 0; // of the answer
  #borrowed = []; // the numbers of what the host has lent with it, to be given back after it
  #credit = WINDOW;
  #wake = () => {};

  constructor(number, message) {
    this.number = number;
    calls.set(number, this);
    this.done = this.#answer(message);
  }

  /** The arguments in the order of these names, however they came. One with a `?` may be left out. */
  take(...names) {
    const { args, named } = this, known = names.map((name) => name.replace("?", ""));
    const values = known.map((name, place) => (place < args.length ? args[place] : named[name]));
    const missing = names.some((name, place) => !name.endsWith("?") && values[place] === undefined);
    const unused = Object.keys(named).some((name) => !known.slice(args.length).includes(name));
    if (!missing && !unused && args.length <= names.length) return values;
    throw failure("TypeError", `the arguments are ${names.join(", ")}`);
  }

  #decode({ flags, text }) {
    return JSON.parse(text, flags & TAGGED ? (_, value) => this.#untag(value) : undefined);
  }

  #untag(value) {
    const [tag, ...others] = Object.keys(value ?? {});
    if (typeof value !== "object" || others.length || !tag?.startsWith("$")) return value;
    if (tag !== "$ref") throw own("NotSerializable", `this plugin takes plain data, no ${tag}`);
    this.#borrowed.push(BigInt(value.$ref[0]));
    return (...args) => this.#ask([value.$ref[0], "", args, {}]);
  }

  async #ask(body) { // calls a function of the host's on behalf of this call
    const number = ++lastAsked;
    post(CALL, number, body, 0, this.number);
    const answer = await new Promise((resolve) => asked.set(number, resolve));
    asked.delete(number);
    if (answer.kind === RESULT) return this.#decode(answer);
    const { type, message } = JSON.parse(answer.text);
    throw failure(type, message, { home: Number(number) }); // in the host it is its very own exception again
  }

  grant(items) { // the host takes so many more; none if it has given the call up
    if (!items) this.#abort.abort();
    this.#credit += items;
    this.#wake();
  }

  async #stream(values) {
    post(RESULT, this.number, null, STREAM);
    for await (const value of values) {
      while (!this.#credit && !this.signal.aborted) await new Promise((resolve) => (this.#wake = resolve));
      if (this.signal.aborted) return; // which closes `values`
      this.#credit--;
      post(ITEM, this.number, [value]);
    }
    post(END, this.number);
  }

  async #run(message) {
    let target, method;
    [target, method, this.args, this.named] = this.#decode(message);
    if (stopping) throw own("PluginClosed", "the plugin is ending");
    if (!objects[target]) throw own("DeadReference", `${target} is not lent`);
    if (namesOf(objects[target]).includes(method)) return objects[target][method](this);
    throw own("MethodNotFound", `no method ${method}`);
  }

  async #answer(message) {
    try {
      const value = await this.#run(message);
      if (message.kind === NOTIFY) await value?.return?.();
      else if (typeof value?.next === "function") await this.#stream(value);
      else if (!this.signal.aborted) post(RESULT, this.number, value, this.flags);
    } catch (error) {
      const body = { type: error.name, message: error.message, traceback: error.stack, ...error.body };
      if (message.kind === NOTIFY) writeSync(2, `${error.stack}\n`);
      else if (!this.signal.aborted) post(ERROR, this.number, body);
    }
    calls.delete(this.number);
    for (const number of this.#borrowed) post(RELEASE, number);
  }
}

// -- the plugin

/** Serve an object's functions until the host says stop, or is gone; then end the process. */
export async function serve(name, plugin, info = {}) {
  if (!address) die("This program is a plugin: its application starts it, not a person.");
  const system = {
    info: () => info,
    dispense(call) {
      const wanted = call.take("name?")[0] ?? name, number = ["system", name].indexOf(wanted);
      if (number < 0) throw own("PluginNotFound", `no plugin ${wanted}`, { names: [name] });
      call.flags = TAGGED;
      return { $ref: [number, namesOf(objects[number]), false] };
    },
  };
  objects.push(system, plugin);
  socket = connect(address).on("error", () => {}); // after which nothing more comes
  const frames = receive();
  await shakeHands(frames);
  let beside = 0; // so many frames that come next are bytes, which #untag refuses
  for await (const frame of frames) {
    if (beside-- > 0) continue;
    beside = frame.readUInt32BE(4);
    if (frame[0] !== 1) die("The host does not speak this version of the wire.");
    handle(frame[1], frame[3], frame.readBigUInt64BE(8), frame.toString("utf8", HEADER) || "null");
  }
  await end(2); // the host is gone
}

function handle(kind, flags, number, text) {
  if (kind === CALL || kind === NOTIFY) new Call(number, { kind, flags, text });
  else if (kind === RESULT || kind === ERROR) asked.get(number)?.({ kind, flags, text });
  else if (kind === CREDIT) calls.get(number)?.grant(JSON.parse(text));
  else if (kind === CANCEL) calls.get(number)?.grant(0);
  else if (kind === PING) post(PONG, number);
  else if (kind === SHUTDOWN) end(JSON.parse(text));
  else if (kind > SHUTDOWN && !(flags & IGNORABLE)) die(`The host sent the unknown kind ${kind}.`);
}

async function end(grace) { // within that many seconds
  stopping = true;
  setTimeout(() => process.exit(0), 500 * grace);
  for (const call of calls.values()) call.grant(0);
  await Promise.all([...calls.values()].map((call) => call.done));
  process.exit(0);
}
